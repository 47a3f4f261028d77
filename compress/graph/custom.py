"""Layers of the user's own, described to the graph by a function in place of what they call inside.

The function is called wherever the module is called, with a `Layer` and the arguments of that call, and says what
becomes of the channels:

    @custom_layer(DeformableConv)
    def deformable_conv(layer, x, offset):
        layer.reads(x, "weight", dim=1)  # the input channels of x go with slices of weight along dim 1
        layer.keeps(offset)  # these channels stay
        return layer.makes("weight", "bias")  # the output's channels: slices of weight and of bias along dim 0

A wrong description is found by the trial like a wrong rule: the module's forward pass runs on fake tensors from which
channels were removed. Where only an operator lacks its rule, `compress.graph.rule` says less and helps everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.errors import InputError, first_line
from compress.graph.capture import Forwards, ModuleCall, module_call
from compress.graph.described import Layer, kind
from compress.graph.rules import rule
from compress.graph.walk import Walk


@dataclass(frozen=True)
class Description:
    """What users say of a type of modules.

    Attributes:
        function: `function(layer, *args, **kwargs)`, see `custom_layer`.
        fake: run in place of the module's forward pass on fake tensors; None for the forward pass itself.
    """

    function: Callable[..., Any]
    fake: Callable[..., Any] | None


CUSTOM_LAYERS: dict[type[nn.Module] | str, Description] = {}
"""Module type, or its qualified name -> its description."""

F = TypeVar("F", bound=Callable[..., Any])


def custom_layer(*types: type[nn.Module] | str, fake: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Register a function that says what modules of these types do to channels, replacing an earlier one.

        @custom_layer(FusedNorm)
        def fused_norm(layer, x):
            return layer.scales(x, "gain", "shift")  # channel by channel, and 0 where gain and shift are

    It receives a `Layer` and the arguments of the call, each tensor as an activation; it returns what the module
    returns (a tuple where that is one), each tensor as an activation that it received or that a method of `Layer` gave
    it. Channels of an argument that it does not mention stay. Modules inside are not looked into; their tensors go by
    their names there ("inner.weight"). A subclass inherits the function of its base. A type given by its qualified name
    ("mylib.layers.FusedNorm") need not be imported.

    Multiply-adds are counted as of a convolution: every parameter of two axes or more that is mentioned, once at each
    position of the first output (`Layer.uses` says otherwise). Attributes from which the forward pass takes sizes
    follow as everywhere: found by the trial, or by `compress.removal.shape_update`.

    Args:
        fake: `fake(module, *args, **kwargs)` returns empty tensors of the shapes that the module returns; needed where
            its forward pass cannot run on fake tensors (it calls a compiled extension that is no operator of PyTorch,
            or decides by values). It must take the shapes from the module's tensors, which removals make smaller:
            `lambda module, x: x.new_empty(x.shape[0], len(module.weight), *x.shape[2:])`. The module's own forward pass
            is then put to no trial.
    """

    def register(function: F) -> F:
        CUSTOM_LAYERS.update(dict.fromkeys(types, Description(function, fake)))
        return function

    return register


def description_of(module: nn.Module) -> Description | None:
    """How the module's type, or the nearest of its bases, is described."""
    for ancestor in type(module).__mro__:
        found = CUSTOM_LAYERS.get(ancestor) or CUSTOM_LAYERS.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if found is not None:
            return found
    return None


def described_forwards(model: nn.Module) -> Forwards:
    """The custom layers of `model`, and what is run on fake tensors when they are called."""
    found = {module: description_of(module) for module in model.modules()} if CUSTOM_LAYERS else {}
    return {
        module: module.forward if description.fake is None else partial(description.fake, module)
        for module, description in found.items()
        if description is not None
    }


@rule(module_call)
def _custom(walk: Walk, node: fx.Node, call: ModuleCall, leaves: Sequence[Any], tensors: Mapping[str, Any]) -> Any:
    """Call the function that describes the module; returns the leaves of its output."""
    description = description_of(call.module)
    assert description is not None  # nothing else is recorded whole
    arguments = [walk.as_flow(leaf) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(arguments, call.spec)
    layer = Layer(walk, call, getattr(description.function, "__name__", "the function"), tensors)
    try:
        returned = description.function(layer, *args, **kwargs)
    except InputError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise layer.wrong(f"it raises {type(error).__name__}: {first_line(error)}") from error
    result = node.meta["val"]
    parts, spec = pytree.tree_flatten(result)
    try:
        values = spec.flatten_up_to(returned)
    except ValueError as error:
        raise layer.wrong(f"it returns {kind(returned)}, but the module {kind(result)}: {first_line(error)}") from error
    outputs = [
        layer.output(value, part.shape) if isinstance(part, Tensor) else part
        for value, part in zip(values, parts, strict=True)
    ]
    first = next(number for number, part in enumerate(parts) if isinstance(part, Tensor))
    layer.finish(arguments, getattr(values[first], "axis", 1), parts[first].shape)
    return outputs[0] if isinstance(result, Tensor) else outputs
