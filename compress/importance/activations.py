"""Criteria on activations and their gradients, taken while the training's own minibatch runs forward and back."""

from collections.abc import Callable
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import WorkError
from compress.graph import ChannelGraph
from compress.importance.base import Combine, Importance, Minibatch, Need, register
from compress.importance.slices import SliceSums, gates
from compress.importance.taylor import combined
from compress.modes import is_aside

CHANNELS_FIRST: Final = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
CHANNELS_LAST: Final = (nn.Linear, nn.LayerNorm)
"""Layers whose output has its channels along axis 1, and along the last one."""


class FromActivations(Importance):
    """Watches the layers on which gates stand: products of their outputs and the outputs' gradients.

    A gate multiplies its layer's output, so that for one image n the product summed over positions is the gate's
    gradient of that image's share of the loss: no pass is added, and no tensor larger than an activation is made.
    Forward passes without gradients are not watched.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"activations"})
    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max")

    def __init__(self, model: nn.Module, graph: ChannelGraph, **options: Any) -> None:
        super().__init__(model, graph, **options)
        self._sums: SliceSums | None = None
        self._passes: list[dict[str, Tensor]] = []  # layer -> (images, size), one for each forward pass
        modules = dict(model.named_modules())
        layers = dict.fromkeys(station.layer for group in graph.groups.values() for station in gates(group))
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        for layer in layers:
            last = isinstance(modules[layer], CHANNELS_LAST)
            self._handles.append(on_output(modules[layer], self._watch(layer, last)))

    def _product(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Of one layer's output and its gradient, both (images, channels, positions): (images, channels)."""
        raise NotImplementedError

    def _unscorable(self) -> dict[str, str]:
        return without_own_output(self.model, self.graph)

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled() and not is_aside():
            self._passes.append({})

    def _watch(self, layer: str, last: bool) -> Callable[[Tensor], None]:
        def forward(output: Tensor) -> None:
            if is_aside() or not (torch.is_grad_enabled() and output.requires_grad and self._passes):
                return
            products = self._passes[-1]
            before = output.detach().clone()  # the next layer may write into it

            def backward(gradient: Tensor) -> None:
                product = self._product(_by_channel(before, last), _by_channel(gradient, last))
                products[layer] = products[layer] + product if layer in products else product

            output.register_hook(backward)

        return forward

    def _examples(self) -> list[Tensor]:
        """For each forward pass since the last call: (images, rows), each layer's products at its rows."""
        passes = [products for products in self._passes if products]
        self._passes.clear()
        if not passes:
            raise WorkError(
                f"The criterion {self.name} saw no forward and backward pass since it was last asked: call "
                "pruner.step() after loss.backward(), once for each minibatch."
            )
        if self._sums is None:
            self._sums = SliceSums(self.model, self.graph)
        for name, stations in self._sums.stations.items():
            silent = [s.layer for s in stations if any(s.layer not in products for products in passes)]
            if silent:
                raise WorkError(
                    f"{silent[0]} took no part in the forward and backward pass, so the channels of {name} cannot be "
                    "scored: name the layer in ignore."
                )
        return [self._sums.of_layers(products) for products in passes]

    def _widths_changed(self) -> None:
        self._sums = None
        self._passes.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def without_own_output(model: nn.Module, graph: ChannelGraph) -> dict[str, str]:
    """Group -> the gates that do not stand on the output of a layer with channels: parameters used bare, for one."""
    modules = dict(model.named_modules())
    found = {}
    for name, group in graph.groups.items():
        layers = [station.layer for station in gates(group)]
        strange = [layer for layer in layers if not isinstance(modules.get(layer), CHANNELS_FIRST + CHANNELS_LAST)]
        if strange:
            found[name] = f"the channels of {', '.join(strange)} are not those of a layer's output"
    return found


def on_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `function` on what a layer computes by itself, and put what it returns, if anything, in its place.

    A layer with modules inside it, such as timm's normalisation with its activation, hands them what it has computed.
    """
    inside = next(module.children(), None)
    if inside is None:
        return module.register_forward_hook(lambda _module, _inputs, output: function(output))

    def replace(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        changed = function(given[0])
        return None if changed is None else (changed, *given[1:])

    return inside.register_forward_pre_hook(replace)


def _by_channel(value: Tensor, channels_last: bool) -> Tensor:
    """(N, C, ...) or (N, ..., C) -> (N, C, positions) in single precision or better."""
    value = value.movedim(-1, 1) if channels_last else value
    return value.flatten(2).to(torch.promote_types(value.dtype, torch.float32)) if value.dim() > 2 else value[..., None]


@register("taylor-fg")
class TaylorFullGradient(FromActivations):
    """Squared gate gradient of every single image, `1/N Σ_n (∂E_n/∂z_c)²` ("full gradient", table 1 of the paper).

    E_n is image n's share of the loss: the gate is imagined on image n alone. Batch normalisation in training mode ties
    the images of a minibatch together; E_n is then what image n's gate does to the loss of all of them.
    Combine: `joint` adds the producers' gradients up, then squares, as in `taylor`.
    """

    def _product(self, output: Tensor, gradient: Tensor) -> Tensor:
        return (output * gradient).sum(2)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        # The loss is a mean: an image's own gradient is N times what it contributes.
        examples = torch.cat([part * len(part) for part in self._examples()])
        assert self._sums is not None
        if self.combine == "joint":
            return self._sums.sum_of_each(examples).square().mean(0)
        return combined(self._sums, examples.square().mean(0), self.combine)


@register("taylor-output")
class TaylorOutput(FromActivations):
    """Mean size of activation times gradient, `mean_{n, positions} |a · ∂E_n/∂a|`, divided by the group's l2 norm.

    Molchanov et al. 2017 (arXiv 1611.06440, equations 7 and 8) as the later paper's code has it: the absolute value is
    taken at every position. `a` is the output of the layer on which the gate stands.
    Combine: `joint` adds the producers up.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, normalise: bool = True, **options: Any) -> None:
        super().__init__(model, graph, normalise=normalise, **options)

    def _product(self, output: Tensor, gradient: Tensor) -> Tensor:
        return (output * gradient).abs().mean(2)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        examples = torch.cat([part * len(part) for part in self._examples()])
        assert self._sums is not None
        return combined(self._sums, examples.mean(0), self.combine)
