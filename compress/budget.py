"""Budgets, and the cost models that say what a network of given widths costs.

MACs and parameters of a convolution or linear layer are a constant times the sizes of its weight's dimensions, and each
size is an affine function of the widths of the groups. So both costs are exact without running or copying the network.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph
from compress.graph.groups import Product, Size

Quantity = Literal["channels", "parameters", "macs"]


class CostModel(Protocol):
    """What a network costs, as a function of its groups' widths."""

    def cost(self, widths: Mapping[str, int]) -> float:
        """Cost of the network whose group `name` has `widths[name]` channels."""

    def gain(self, group: str, widths: Mapping[str, int], new_width: int) -> float:
        """Cost saved by giving `group` the width `new_width`, all other widths as given."""


@dataclass(frozen=True)
class Budget:
    """What must be reached: the fraction that is kept of the channels, the parameters or the MACs, in (0, 1].

    `Budget(macs=0.5)` asks for a network of at most half the multiply-adds.

    Raises:
        InputError: none or several are given, or one is outside (0, 1].
    """

    macs: float | None = None
    parameters: float | None = None
    channels: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise InputError(
                f"A budget names one of macs, parameters and channels, not {len(given)} ({', '.join(given) or 'none'})."
            )
        for name, value in given.items():
            if not 0 < value <= 1:
                raise InputError(f"budget.{name} is {value}, but it is the fraction kept and must lie in (0, 1].")

    @property
    def quantity(self) -> Quantity:
        """The quantity that is bounded."""
        return "macs" if self.macs is not None else "parameters" if self.parameters is not None else "channels"

    @property
    def noun(self) -> str:
        """The quantity as a sentence has it."""
        return "MACs" if self.quantity == "macs" else self.quantity

    @property
    def kept(self) -> float:
        """The fraction kept, in (0, 1]."""
        return next(value for value in vars(self).values() if value is not None)


class TensorCost:
    """A cost that is a sum over tensors of a coefficient times the tensor's number of elements.

    `gain` evaluates only the terms in which the group stands.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        shapes: Mapping[str, tuple[int, ...]],
        coefficients: Mapping[str, float],
        constant: float = 0.0,
        products: Iterable[Product] = (),
    ) -> None:
        """
        Args:
            shapes: tensor -> its shape now.
            coefficients: tensor -> cost of one of its elements; other tensors cost nothing.
            constant: cost that depends on no width.
            products: costs of no tensor, given by the groups' widths.
        """
        tied: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        for group in graph.groups.values():
            for part in group.slices:
                tied[part.tensor, part.dim].append((group.name, len(part.positions) // group.width))
        self._constant = constant
        self._terms: list[Product] = []
        self._of_group: dict[str, list[Product]] = defaultdict(list)
        for tensor, coefficient in coefficients.items():
            dims = []
            for dim, size in enumerate(shapes[tensor]):
                parts = tuple(tied.get((tensor, dim), ()))
                fixed = size - sum(copies * graph.groups[group].width for group, copies in parts)
                dims.append(Size(fixed, parts))
            self._add(Product(coefficient, tuple(dims)))
        for product in products:
            self._add(product)

    def _add(self, term: Product) -> None:
        if term.groups:
            self._terms.append(term)
            for name in term.groups:
                self._of_group[name].append(term)
        else:
            self._constant += term.value({})

    def cost(self, widths: Mapping[str, int]) -> float:
        return self._constant + sum(term.value(widths) for term in self._terms)

    def gain(self, group: str, widths: Mapping[str, int], new_width: int) -> float:
        changed = {**widths, group: new_width}
        return sum(term.value(widths) - term.value(changed) for term in self._of_group[group])


class ChannelCost:
    """The number of removable channels."""

    def cost(self, widths: Mapping[str, int]) -> float:
        return float(sum(widths.values()))

    def gain(self, group: str, widths: Mapping[str, int], new_width: int) -> float:
        return float(widths[group] - new_width)


def cost_model(quantity: Quantity, model: nn.Module, graph: ChannelGraph) -> CostModel:
    """The cost model of `model` for one of the quantities that a budget bounds.

    MACs are those of convolutions, linear layers and products of activations, for one image; what normalisation,
    activations and pooling add elementwise is not counted, as in `torch.utils.flop_counter`.
    """
    if quantity == "channels":
        return ChannelCost()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if quantity == "parameters":
        return TensorCost(graph, shapes, dict.fromkeys(shapes, 1.0))
    uses = {name: count for name, count in graph.uses.items() if name in shapes}  # a buffer's are in `other_macs`
    return TensorCost(graph, shapes, uses, graph.other_macs, graph.products)
