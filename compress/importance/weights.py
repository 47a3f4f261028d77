"""Criteria that look at the weights alone, or at nothing: no data, no gradients."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph
from compress.importance.base import Combine, Importance, Minibatch, register
from compress.importance.slices import SliceSums, filters
from compress.importance.taylor import combined, without_normalisation


@register("magnitude")
class Magnitude(Importance):
    """Size of the filter's weights: `Σ_i w_i²` (norm=l2) or `Σ_i |w_i|` (norm=l1; Li et al. 2017, arXiv 1608.08710).

    Over the weights, without biases, of every layer that makes the channel. Combine: `joint` adds the producers up.
    """

    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max")

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, *, norm: Literal["l1", "l2"] = "l2", **options: Any
    ) -> None:
        """
        Args:
            norm: l2, the sum of squares, or l1, the sum of absolute values.

        Raises:
            InputError: another norm.
        """
        if norm not in ("l1", "l2"):
            raise InputError(f"norm is {norm!r}, but must be l1 or l2.")
        self.norm = norm
        super().__init__(model, graph, **options)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        sums = SliceSums(self.model, self.graph, filters)
        rows = sums.rows(lambda _, value: value.abs() if self.norm == "l1" else value.square())
        return combined(sums, rows, self.combine)


@register("bn-scale")
class BatchNormScale(Importance):
    """Size of a normalisation's scale, `|γ_c|` (Liu et al. 2017, arXiv 1708.06519).

    Of every normalisation that gates the channel. Combine: `joint` adds them up.
    """

    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max")

    def _unscorable(self) -> dict[str, str]:
        return without_normalisation(self.model, self.graph)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        sums = SliceSums(self.model, self.graph)
        # A normalisation's scale and shift stand in one station; only the scale counts.
        rows = sums.rows(lambda name, value: value.abs() if name.endswith("weight") else torch.zeros_like(value))
        return combined(sums, rows, self.combine)


@register("random")
class Random(Importance):
    """A number drawn once for each channel, uniform on [0, 1): what every criterion must beat."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, seed: int = 0, **options: Any) -> None:
        """
        Args:
            seed: of the draws; a channel keeps its number while others go.
        """
        super().__init__(model, graph, **options)
        generator = torch.Generator().manual_seed(seed)
        self._drawn = {
            name: torch.rand(int(group.kept.max()) + 1, generator=generator, dtype=torch.float64)
            for name, group in graph.groups.items()
        }

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        return torch.cat([self._drawn[name][group.kept] for name, group in self.graph.groups.items()])
