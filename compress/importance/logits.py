"""The change of loss when the network's outputs, instead of its loss, are expanded to first order."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import InputError
from compress.graph import ChannelGraph
from compress.importance.activations import CHANNELS_LAST, on_output, without_own_output
from compress.importance.base import Importance, Minibatch, Need, register
from compress.importance.slices import SliceSums
from compress.modes import aside


@register("taylor-logits")
class TaylorLogits(Importance):
    """Squared change of loss with the logits expanded to first order, `(E(y − ∂y/∂z_c) − E(y))²` at z = 1.

    The loss is evaluated exactly at every image's estimated logits without the channel; only the network between gate
    and logits is taken as linear. That keeps all curvature of the softmax, which first- and second-order expansions of
    the loss lose when a channel matters. One forward pass and `outputs` backward passes (to activations alone) for all
    channels together. The idea follows the Gauss-Newton approximation, which is its second order.

    Averaged over minibatches, in evaluation mode; a group's producers are gated jointly.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"minibatch"})

    def __init__(self, model: nn.Module, graph: ChannelGraph, *, outputs: int = 10, **options: Any) -> None:
        """
        Args:
            outputs: for each image so many logits, its largest ones, are expanded and the others kept as they are.

        Raises:
            InputError: `outputs` is less than 1, or a gate does not stand on a layer's output; names the layers.
        """
        if outputs < 1:
            raise InputError(f"outputs is {outputs}, but must be at least 1.")
        self.outputs = outputs
        super().__init__(model, graph, **options)
        self._sums: SliceSums | None = None

    def _unscorable(self) -> dict[str, str]:
        return without_own_output(self.model, self.graph)

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        if self._sums is None:
            self._sums = SliceSums(self.model, self.graph)
        with aside(self.model):
            logits, slopes, largest = self._expanded(minibatch, self._sums)
            before = minibatch.loss(logits).double()
            after = []
            for channel in range(slopes.shape[2]):
                change = torch.zeros_like(logits).scatter_(1, largest, slopes[:, :, channel])
                after.append(minibatch.loss(logits - change).double())
        return (torch.stack(after) - before).square()

    def _expanded(self, minibatch: Minibatch, sums: SliceSums) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, classes), slopes of the largest by every gate (N, k, channels), and which those are (N, k)."""
        factors: dict[str, list[Tensor]] = {}
        layers = {
            station.layer: self.graph.sizes[station.parts[0].tensor, station.parts[0].dim]
            for stations in sums.stations.values()
            for station in stations
        }
        modules = {layer: self.model.get_submodule(layer) for layer in layers}
        handles = [
            on_output(module, _gate(factors.setdefault(layer, []), isinstance(module, CHANNELS_LAST)))
            for layer, module in modules.items()
        ]
        try:
            with torch.enable_grad():
                logits = self.model(*minibatch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != minibatch.images:
            raise InputError(f"{self.name} needs a model that returns logits of (images, classes): choose another.")
        largest = logits.detach().topk(min(self.outputs, logits.shape[1]), dim=1).indices
        chosen = logits.gather(1, largest)
        every = [factor for layer in layers for factor in factors[layer]]
        slopes = []
        for index in range(chosen.shape[1]):
            found = torch.autograd.grad(
                chosen[:, index].sum(), every, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            by_factor = dict(zip(map(id, every), found, strict=True))
            by_layer = {
                # A layer that runs in training mode only, of an auxiliary head, changes no logit.
                layer: sum((by_factor[id(one)] for one in factors[layer]), logits.new_zeros(len(logits), size))
                for layer, size in layers.items()
            }
            slopes.append(sums.sum_of_each(sums.of_layers(by_layer)))
        return logits.detach(), torch.stack(slopes, 1).to(logits.dtype), largest

    def _widths_changed(self) -> None:
        self._sums = None


def _gate(factors: list[Tensor], last: bool) -> Callable[[Tensor], Tensor]:
    """A hook that multiplies a layer's output by one factor for each image and channel, all 1."""

    def multiply(output: Tensor) -> Tensor:
        channels = output.shape[-1 if last else 1]
        factor = torch.ones(len(output), channels, dtype=output.dtype, device=output.device, requires_grad=True)
        factors.append(factor)
        shape = [len(output), *[1] * (output.dim() - 2)]
        shape.insert(len(shape) if last else 1, channels)
        return output * factor.view(shape)

    return multiply
