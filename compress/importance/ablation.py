"""The measured loss of a network from which sets of channels are removed, many sets at a time."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from compress.graph import ChannelGraph
from compress.graph.groups import Group
from compress.importance.base import Minibatch
from compress.importance.normalisations import BATCH_NORM, CONVOLUTIONS
from compress.importance.partial_forward import NotCuttableError, PartialForward
from compress.modes import aside

logger = logging.getLogger(__name__)

_WORKING_SET: Final = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}
"""Bytes that the largest activation of one batched forward pass may take: more falls out of the processor's cache."""

_TOLERANCE: Final = 1e-3
"""Relative disagreement of losses above which the parts are not trusted to compute what the whole does."""

_LAST_AXIS: Final = (torch.ops.aten.linear.default,)
_FIRST_AXIS: Final = (
    *CONVOLUTIONS,
    BATCH_NORM,
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
)


@dataclass(frozen=True)
class _Gate:
    """Where a group's channels are multiplied: an operator's value, its channel axis and the channels' places there."""

    node: fx.Node
    axis: int
    size: int
    positions: Tensor
    channels: Tensor


class Ablation:
    """Losses of a network without some of its channels, in evaluation mode.

    What lies before the ablated channels is computed once for a minibatch, and many ablations share one batched
    forward pass over the rest (`PartialForward`). Where a network cannot be run in parts, or a group's gates cannot be
    placed on the operators' values, every ablation is a forward pass of its own with the channel's parameters at 0.

    A removed channel is one whose gates are 0 (`Group.gates`). In a group with a residue, where removal is not zeroing,
    the weights that read it are 0 as well.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, minibatch: Minibatch) -> None:
        """
        Args:
            minibatch: any one, of 2 images or more; it shows the shapes.
        """
        self.model = model
        self.graph = graph
        self._gates: dict[str, tuple[_Gate, ...]] = {}
        self._forward: PartialForward | None = None
        try:
            with aside(model):
                self._forward = PartialForward(model, minibatch.inputs)
                self._gates = self._placed(self._forward)
                self._check(minibatch)
        except NotCuttableError as error:
            logger.warning("every ablation takes a whole forward pass: the network cannot be run in parts, %s", error)
            self._forward, self._gates = None, {}

    @property
    def whole(self) -> list[str]:
        """Groups whose every ablation takes a whole forward pass."""
        return [name for name in self.graph.groups if name not in self._gates]

    def on(self, minibatch: Minibatch) -> "AblatedMinibatch":
        """Run the network on a minibatch and keep what ablations start from."""
        return AblatedMinibatch(self, minibatch)

    def _placed(self, forward: PartialForward) -> dict[str, tuple[_Gate, ...]]:
        """Group -> its gates, for the groups whose gates are the whole affine map of one operator each."""
        placed = {}
        for name, group in self.graph.groups.items():
            gates = None if group.residue is not None else _gates(group, forward)
            if gates:
                placed[name] = gates
        return placed

    def _check(self, minibatch: Minibatch) -> None:
        """Compare the parts with the whole, with a third of all channels at 0."""
        random = torch.Generator().manual_seed(0)
        masks = {
            name: (torch.rand(2, self.graph.groups[name].width, generator=random) > 1 / 3).double()
            for name in self._gates
        }
        if not masks:
            raise NotCuttableError("no gate is the whole affine map of an operator")
        state = AblatedMinibatch(self, minibatch)
        whole = state.losses_by_whole_passes(masks).cpu()
        try:  # both copies in one pass: images of one must not meet those of the other
            parts = state._batched(state._suffix(tuple(masks)), masks).cpu()
        except RuntimeError as error:
            raise NotCuttableError(f"its parts cannot run for several copies: {error}") from error
        if bool(((parts - whole).abs() > _TOLERANCE * whole.abs().clamp(min=1)).any()):
            raise NotCuttableError(f"its parts give losses of {parts.tolist()} where the whole gives {whole.tolist()}")


class AblatedMinibatch:
    """One minibatch, ready for ablations.

    Attributes:
        loss: of the network as it is.
    """

    def __init__(self, ablation: Ablation, minibatch: Minibatch) -> None:
        self._ablation = ablation
        self._minibatch = minibatch
        self._suffixes: dict[tuple[str, ...], list[fx.Node]] = {}
        self._known: dict[fx.Node, Any] = {}
        forward = ablation._forward
        model = ablation.model
        with aside(model), torch.no_grad():
            if forward is None:
                self.loss = float(minibatch.loss(model(*minibatch.inputs)))
                return
            keep = set(forward.outputs())
            for name, gates in ablation._gates.items():
                suffix = self._suffix((name,))
                keep |= forward.before(suffix) | {gate.node for gate in gates}
            self._known = forward.start(minibatch.inputs, keep)
            self.loss = float(minibatch.loss(forward.rerun([], self._known, {}, copies=1, images=self.images)))

    @property
    def images(self) -> int:
        """Number of images."""
        return self._minibatch.images

    def losses(
        self,
        masks: Mapping[str, Tensor],
        *,
        done: Callable[[int], None] | None = None,
        gates_only: bool = False,
    ) -> Tensor:
        """Mean loss of every ablation, (K,) float64.

        Differentiable with respect to the masks, once or more often, where they require gradients.

        Args:
            masks: group -> (K, width), what each channel is multiplied with in each of K ablations: 0 removes it.
            done: called with the number of ablations that were added.
            gates_only: multiply the gates alone in groups with a residue too. At 1 their derivatives are those of a
                gate; at 0 such a channel is not yet removed.
        """
        groups = tuple(masks)
        if any(name not in self._ablation._gates for name in groups):
            return self.losses_by_whole_passes(masks, done=done, gates_only=gates_only)
        count = len(next(iter(masks.values())))
        suffix = self._suffix(groups)
        chunk = self.copies(groups)
        parts = []
        for start in range(0, count, chunk):
            part = {name: mask[start : start + chunk] for name, mask in masks.items()}
            parts.append(self._batched(suffix, part))
            if done is not None:
                done(len(parts[-1]))
        return torch.cat(parts)

    def losses_by_whole_passes(
        self,
        masks: Mapping[str, Tensor],
        *,
        done: Callable[[int], None] | None = None,
        gates_only: bool = False,
    ) -> Tensor:
        """The same by one forward pass of the model itself for each ablation: slow, and as plain as can be."""
        model = self._ablation.model
        parameters = dict(model.named_parameters())
        losses = []
        for index in range(len(next(iter(masks.values())))):
            masked: dict[str, Tensor] = {}
            for name, mask in masks.items():
                for part in _zeroed(self._ablation.graph.groups[name], gates_only):
                    if part.tensor not in parameters:
                        continue
                    parameter = masked.get(part.tensor, parameters[part.tensor].detach())
                    factor = torch.ones(parameter.shape[part.dim], dtype=parameter.dtype, device=parameter.device)
                    values = mask[index].to(factor)[part.channels.to(factor.device)]
                    factor = factor.index_copy(0, part.positions.to(factor.device), values)
                    shape = [-1 if dim == part.dim else 1 for dim in range(parameter.dim())]
                    masked[part.tensor] = parameter * factor.view(shape)
            enabled = any(mask.requires_grad for mask in masks.values())
            with aside(model), torch.set_grad_enabled(enabled):
                losses.append(self._minibatch.loss(functional_call(model, masked, self._minibatch.inputs)).double())
            if done is not None:
                done(1)
        return torch.stack(losses)

    def _suffix(self, groups: tuple[str, ...]) -> list[fx.Node]:
        if groups not in self._suffixes:
            assert self._ablation._forward is not None
            nodes = [gate.node for name in groups for gate in self._ablation._gates[name]]
            self._suffixes[groups] = self._ablation._forward.behind(nodes)
        return self._suffixes[groups]

    def copies(self, groups: tuple[str, ...]) -> int:
        """How many ablations of these groups share one batched forward pass."""
        if self._ablation._forward is None or any(name not in self._ablation._gates for name in groups):
            return 1
        device = next(self._ablation.model.parameters()).device.type
        bytes_of_one = self._ablation._forward.bytes_per_image(self._suffix(groups)) * self.images
        return max(1, _WORKING_SET.get(device, _WORKING_SET["cpu"]) // max(1, bytes_of_one))

    def _batched(self, suffix: list[fx.Node], masks: Mapping[str, Tensor]) -> Tensor:
        forward = self._ablation._forward
        assert forward is not None
        count = len(next(iter(masks.values())))
        factors: dict[fx.Node, Tensor] = {}
        for name, mask in masks.items():
            for gate in self._ablation._gates[name]:
                value = self._known[gate.node]
                if gate.node not in factors:
                    factors[gate.node] = torch.ones(count, gate.size, dtype=value.dtype, device=value.device)
                given = mask.to(value)[:, gate.channels.to(value.device)]
                factors[gate.node] = factors[gate.node].index_copy(1, gate.positions.to(value.device), given)
        for name in masks:
            for gate in self._ablation._gates[name]:
                shape = [
                    count,
                    1,
                    *[gate.size if dim == gate.axis else 1 for dim in range(1, gate.node.meta["val"].dim())],
                ]
                factors[gate.node] = factors[gate.node].view(shape)
        with torch.set_grad_enabled(any(mask.requires_grad for mask in masks.values())):
            outputs = forward.rerun(suffix, self._known, factors, copies=count, images=self.images)
            each = [self._minibatch.loss(_copy(outputs, index, self.images, count)) for index in range(count)]
            return torch.stack([loss.double() for loss in each])


def _copy(outputs: Any, index: int, images: int, copies: int) -> Any:
    """The outputs of one copy of the minibatch."""

    def part(output: Tensor) -> Tensor:
        if output.dim() and len(output) == images * copies:
            return output[index * images : (index + 1) * images]
        return output

    return pytree.tree_map_only(Tensor, part, outputs)


def _gates(group: Group, forward: PartialForward) -> tuple[_Gate, ...] | None:
    """Where the group's gates stand among the operators' values, None where one cannot be placed there."""
    found: dict[fx.Node, _Gate] = {}
    for part in group.gates:
        for reader in forward.readers.get(part.tensor, ()):
            node = forward.value_of(reader)
            if reader.target not in (*_FIRST_AXIS, *_LAST_AXIS) or forward.has_no_value(reader):
                return None
            own = [forward.stored(argument) for argument in reader.args[1:3]]
            if any(tensor is not None and not _gated(group, tensor) for tensor in own):
                return None
            value = node.meta["val"]
            axis = value.dim() - 1 if reader.target in _LAST_AXIS else 1
            if forward.batch_dims(node) != [0]:
                return None
            size = int(value.shape[axis])
            found.setdefault(node, _Gate(node, axis, size, part.positions, part.channels))
    return tuple(found.values()) or None


def _gated(group: Group, tensor: str) -> bool:
    return any(part.tensor == tensor for part in group.gates)


def _zeroed(group: Group, gates_only: bool) -> list[Any]:
    """Slices whose zeros remove a channel: its gates, and where it leaves a residue all of its parameters."""
    if gates_only or group.residue is None:
        return list(group.gates)
    return list(group.slices)
