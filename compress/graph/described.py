"""What the description of a custom layer says of channels, as statements about labels (`compress.graph.custom`)."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from compress.errors import InputError
from compress.graph.capture import ModuleCall
from compress.graph.elementwise import combine
from compress.graph.flows import Flow, Weight
from compress.graph.labels import along_only
from compress.graph.layers import layer_of
from compress.graph.walk import Walk


@dataclass(frozen=True)
class Channels:
    """Channels that a custom layer makes or passes on.

    Attributes:
        labels: (width,).
        axis: along which they lie in the output that they are returned as.
        gates, vanishes: as in `Flow`.
    """

    labels: Tensor
    axis: int
    gates: frozenset[str] = frozenset()
    vanishes: bool = False


class Kept:
    """An output whose channels stay."""


class Layer:
    """One call of a custom layer: its methods say what becomes of channels.

    Activations are the tensors of the call and what these methods return. Their channels lie along `axis`: 1 in images
    (N, C, H, W), -1 in tokens (N, L, C). A tensor is a parameter or buffer by its name in the module, cut along
    dimension 0, or a pair of name and dimension: `("gain", 1)` for a gain of shape (1, C, 1, 1).

    Attributes:
        name: qualified name of the module.
        module: the module, on fake tensors, to read attributes and shapes from; a removal may have changed these.
    """

    def __init__(self, walk: Walk, call: ModuleCall, function: str, tensors: Mapping[str, Any]) -> None:
        self.name, self.module = call.name or "the model", call.module
        self._walk, self._function, self._tensors = walk, function, tensors
        self._met: list[Flow] = []  # arguments of which something was said
        self._gates: set[str] = set()
        self._counted: dict[str, tuple[Weight, float | None]] = {}  # positions of one image; None: as the output has

    # --- what is said -----------------------------------------------------------------------------------------------

    def reads(self, x: Any, tensor: str, dim: int = 1, *, axis: int = 1) -> None:
        """Channel i of `x` is read through slice i of `tensor` along `dim`, and ends there."""
        weight, dim = self._weight((tensor, dim))
        flow = self._activation("reads", x, axis)
        self._check("reads", flow.labels, weight, dim)
        self._walk.consume(layer_of(weight), weight, dim, flow, flow.labels)

    def makes(self, *tensors: str | tuple[str, int], axis: int = 1) -> Channels:
        """New channels: channel i comes from slice i of each of `tensors`, a filter first, and is 0 where they all are.

        Where a function between them and the output makes something else of 0, such as a sigmoid, `passes` says so:
        `return layer.passes(layer.makes("weight", "bias"))`.
        """
        weights = [self._weight(tensor) for tensor in tensors]
        if not weights:
            raise self.wrong("makes() names no tensor")
        first, dim = weights[0]
        made = self._walk.new(first.shape[dim])
        for weight, along in weights:
            self._check("makes", made, weight, along)
        gates = self._walk.produce(self._layer(first), weights, made)
        return Channels(made, axis, gates, vanishes=all(weight.trainable for weight, _ in weights))

    def scales(self, x: Any, *tensors: str | tuple[str, int], axis: int = 1) -> Channels:
        """The channels of `x`, each worked on by itself, with its slices of `tensors`, and 0 where these are all 0.

        So does a normalisation of each channel, with gain and shift, and a depthwise convolution, with weight and bias.
        """
        flow, weights = self._bound("scales", x, tensors, axis)
        if not weights or not all(weight.trainable for weight, _ in weights):
            return Channels(flow.labels, axis, flow.gates)
        first = weights[0][0]
        layer = self._layer(first)
        if len(first.axes) > 1:  # a filter, as of a depthwise convolution
            return Channels(flow.labels, axis, self._walk.produce(layer, weights, flow.labels), vanishes=True)
        self._walk.normalise(layer, flow)
        gates = self._walk.gated(layer, [(weight.name, dim) for weight, dim in weights])
        return Channels(flow.labels, axis, gates, vanishes=True)

    def passes(self, x: Any, *tensors: str | tuple[str, int], axis: int = 1, keeps_zero: bool = False) -> Channels:
        """The channels of `x`, each worked on by itself, with its slices of `tensors`, which are no factors of it.

        Args:
            keeps_zero: whether a channel of zeros stays one (a PReLU's does, a sigmoid's does not).
        """
        flow, _ = self._bound("passes", x, tensors, axis)
        return Channels(flow.labels, axis, flow.gates, flow.vanishes and keeps_zero)

    def adds(self, x: Any, y: Any, *, axis: int = 1) -> Channels:
        """The sum of `x` and `y`: channel i of one goes with channel i of the other."""
        first, second = self._activation("adds", x, axis), self._activation("adds", y, axis)
        if len(first.labels) != len(second.labels):
            raise self.wrong(f"adds() is given {len(first.labels)} and {len(second.labels)} channels along axis {axis}")
        labels = combine(self._walk, first, second)
        return Channels(labels, axis, first.gates | second.gates, first.vanishes and second.vanishes)

    def mixes(self, x: Any, *, axis: int = 1) -> None:
        """Statistics over the channels of `x` are taken, as by layer normalisation.

        They stay; with `embedding=True` they may go, and removing them then differs from zeroing.
        """
        flow = self._activation("mixes", x, axis)
        reason = f"{self.name} mixes channels: removing one changes the statistics of the others"
        self._walk.mixes(flow, [0], self.name, reason)

    def keeps(self, *activations: Any) -> Kept:
        """The channels of these stay; `return layer.keeps(x)` says so of the output, too."""
        for x in activations:
            flow = x if isinstance(x, Flow) else self._activation("keeps", x, 1)
            self._met.append(flow)
            self._walk.freeze(flow.labels, self._kept)
        return Kept()

    def uses(self, tensor: str, positions: float) -> None:
        """Each element of `tensor` is multiplied at so many places of one image."""
        weight, _ = self._weight(tensor)
        self._counted[weight.name] = (weight, positions)

    # --- what follows from it ---------------------------------------------------------------------------------------

    def output(self, value: Any, shape: Sequence[int]) -> Flow:
        """What the function returned for an output of this shape, as a flow."""
        if isinstance(value, Kept):
            return self._walk.frozen(shape, self._kept)
        if isinstance(value, Flow):
            self._met.append(value)
            if value.shape != tuple(shape):
                raise self.wrong(
                    f"it returns an argument of shape {tuple(value.shape)} for an output of shape {tuple(shape)}, "
                    "where passes() would do"
                )
            return value
        if not isinstance(value, Channels):
            raise self.wrong(
                f"it returns {kind(value)} for an output, instead of an activation (layer.makes(...), an argument)"
            )
        axis = self._axis(value.axis, len(shape), "an output")
        if len(value.labels) != shape[axis]:
            raise self.wrong(
                f"it returns {len(value.labels)} channels for an output of {shape[axis]} along axis {value.axis}"
            )
        return Flow(along_only(value.labels, axis, shape), value.gates, value.vanishes)

    def finish(self, arguments: Sequence[Any], axis: int, shape: Sequence[int]) -> None:
        """Freeze what was not mentioned, and count multiply-adds.

        Args:
            axis, shape: of the first output.
        """
        for flow in arguments:
            if isinstance(flow, Flow) and not any(flow is met for met in self._met):
                self._walk.freeze(flow.labels, f"not mentioned in the description of the custom layer {self.name}")
        size = shape[axis] if -len(shape) <= axis < len(shape) else 1
        for weight, positions in self._counted.values():
            everywhere = prod(shape) / size if positions is None else positions * self._walk.batch
            self._walk.use(weight, everywhere)

    def wrong(self, what: str) -> InputError:
        """The error that says what is wrong with the description."""
        kind = type(self.module).__name__
        return InputError(f"{self._function} describes the custom layer {self.name} ({kind}) wrongly: {what}.")

    # --- arguments --------------------------------------------------------------------------------------------------

    @property
    def _kept(self) -> str:
        return f"kept by the custom layer {self.name}"

    def _activation(self, method: str, x: Any, axis: int) -> Flow:
        """An activation as (width,) labels of its channels."""
        if isinstance(x, Channels):
            return Flow(x.labels, x.gates, x.vanishes)
        if not isinstance(x, Flow):
            raise self.wrong(f"{method}() is given {kind(x)}, which is no activation")
        self._met.append(x)
        flow = x.moved(self._walk.along(x.labels, self._axis(axis, len(x.shape), f"what {method}() is given")))
        return replace(flow, vanishes=flow.vanishes and not flow.left, left=())

    def _axis(self, axis: int, count: int, what: str) -> int:
        if not -count <= axis < count:
            raise self.wrong(f"{what} has {count} axes, and none numbered {axis}")
        return axis % count

    def _bound(
        self, method: str, x: Any, tensors: Sequence[str | tuple[str, int]], axis: int
    ) -> tuple[Flow, list[tuple[Weight, int]]]:
        flow, weights = self._activation(method, x, axis), [self._weight(tensor) for tensor in tensors]
        for weight, dim in weights:
            self._check(method, flow.labels, weight, dim)
            self._walk.bind(weight, dim, flow.labels)
        return flow, weights

    def _weight(self, tensor: str | tuple[str, int]) -> tuple[Weight, int]:
        name, dim = (tensor, 0) if isinstance(tensor, str) else tensor
        if name not in self._tensors:
            near = difflib.get_close_matches(name, self._tensors, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self.wrong(f"it names {name!r}, but the module has no parameter or buffer of that name{hint}")
        weight = self._tensors[name]
        if not isinstance(weight, Weight):
            raise self.wrong(f"it names {name!r}, which another operator changes in place")
        if not -len(weight.shape) <= dim < len(weight.shape):
            raise self.wrong(f"{name!r} of shape {tuple(weight.shape)} has no dimension {dim}")
        if len(weight.shape) > 1 and weight.trainable:
            self._counted.setdefault(weight.name, (weight, None))
        return weight, dim % len(weight.shape)

    def _check(self, method: str, labels: Tensor, weight: Weight, dim: int) -> None:
        if len(labels) != weight.shape[dim]:
            raise self.wrong(
                f"{method}() is about {len(labels)} channels, but {weight.name} has size {weight.shape[dim]} along "
                f"dimension {dim}"
            )

    def _layer(self, weight: Weight) -> str:
        """A name for what `weight` makes or gates: its module's, or its own where the module makes several things."""
        layer = layer_of(weight)
        if layer in self._gates:
            layer = weight.name
        self._gates.add(layer)
        return layer


def kind(value: Any) -> str:
    """What a value is, in a message."""
    return "None" if value is None else f"a {type(value).__name__}"
