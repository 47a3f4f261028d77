"""Batch normalisations of an exported network in evaluation mode: affine maps of each channel.

Each is computed together with the convolution before it, as one convolution with other weights, where nothing else
reads that convolution's output.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, fx

_ATEN: Final = torch.ops.aten
CONVOLUTIONS: Final = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default)
BATCH_NORM: Final = _ATEN._native_batch_norm_legit_no_training.default


class Normalisations:
    """The batch normalisations among the operators of a network whose statistics and weights are the network's own."""

    def __init__(self, nodes: Sequence[fx.Node], stored: Collection[fx.Node]) -> None:
        """
        Args:
            stored: the nodes that stand for parameters and buffers.
        """
        self._stored = stored
        self._convolutions = {node: self._convolution_before(node) for node in nodes if self._is_own(node)}
        self._computed = {source for source in self._convolutions.values() if source is not None}
        self._maps: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._convolutions

    def computes(self, node: fx.Node) -> bool:
        """Whether `node` is a convolution that is computed with the normalisation behind it: it has no value then."""
        return node in self._computed

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values an operator reads; for a normalisation those of its convolution."""
        convolution = self._convolutions.get(node)
        return node.all_input_nodes if convolution is None else convolution.all_input_nodes

    def prepare(self, weights: Mapping[fx.Node, Any]) -> None:
        """Take the weights as they are now.

        Args:
            weights: node -> parameter or buffer.
        """
        self._maps = {norm: self._affine(norm, weights) for norm in self._convolutions}

    def compute(self, norm: fx.Node, value: Callable[[fx.Node], Any]) -> Tensor:
        """The normalised activation; `value` gives the values of the nodes in `sources`."""
        first, second = self._maps[norm]
        convolution = self._convolutions[norm]
        if convolution is not None:
            rest = fx.node.map_arg(convolution.args[3:], value)
            target: Any = convolution.target
            return target(value(convolution.args[0]), first, second, *rest, **convolution.kwargs)  # type: ignore[arg-type]
        features = value(norm.args[0])  # type: ignore[arg-type]
        shape = [1, -1, *[1] * (features.dim() - 2)]
        return features * first.view(shape) + second.view(shape)

    def _is_own(self, node: fx.Node) -> bool:
        return node.target == BATCH_NORM and all(part is None or part in self._stored for part in node.args[1:5])

    def _convolution_before(self, norm: fx.Node) -> fx.Node | None:
        """The convolution whose only reader is this normalisation, and whose weights are the network's own."""
        if norm.args[1] is None:
            return None  # without scale and shift the gate stands on the convolution, which then needs its own value
        source = norm.args[0]
        if not isinstance(source, fx.Node) or source.target not in CONVOLUTIONS or len(source.users) > 1:
            return None
        weights = [argument for argument in source.args[1:3] if argument is not None]
        return source if all(weight in self._stored for weight in weights) else None

    def _affine(self, norm: fx.Node, weights: Mapping[Any, Any]) -> tuple[Tensor, Tensor]:
        """(factor, offset) per channel of a normalisation; with a convolution the weight and bias of both together."""
        scale, shift, mean, variance = (None if part is None else weights[part] for part in norm.args[1:5])
        assert mean is not None
        assert variance is not None
        factor = (variance + norm.args[6]).rsqrt() * (1 if scale is None else scale)
        offset = (0 if shift is None else shift) - mean * factor
        convolution = self._convolutions[norm]
        if convolution is None:
            return factor, offset
        weight, bias = (*convolution.args[1:3], None)[:2]
        own = weights[weight]
        if bias is not None:
            offset = offset + weights[bias] * factor
        return own * factor.view(-1, *[1] * (own.dim() - 1)), offset
