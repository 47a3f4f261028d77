"""Removing slices of parameters and buffers from a live model, in place, with gradients and optimizer state.

Parameter objects keep their identity: an optimizer, an average of weights or a user's own reference goes on working.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from compress.attributes import AttributeRule, set_attributes
from compress.errors import WorkError

Slot = tuple[str, int]
"""(name of a parameter or buffer, dimension)."""

_RECORD = "_espalier_kept"


class Cuts(dict[Slot, Tensor]):
    """What was cut inside a module: (tensor, by its name there, dimension) -> the positions kept, ascending.

    Attributes:
        sizes: of the same dimensions before the cut.
    """

    def __init__(self, kept: Mapping[Slot, Tensor], sizes: Mapping[Slot, int]) -> None:
        super().__init__(kept)
        self.sizes = dict(sizes)


ShapeUpdate = Callable[[Any, Cuts], None]
SHAPE_UPDATES: dict[type[nn.Module] | str, ShapeUpdate] = {}
"""Module type, or its qualified name -> function that makes a module's forward pass follow its tensors, cut already."""

U = TypeVar("U", bound=ShapeUpdate)


def shape_update(*types: type[nn.Module] | str) -> Callable[[U], U]:
    """Register how modules of these types follow a removal from their own tensors or from those of modules inside them.

        @shape_update(MyAttention)
        def my_attention(module, cuts):
            if ("qkv.weight", 0) in cuts:
                module.num_heads = module.qkv.weight.shape[0] // (3 * module.head_dim)

    The function receives the module and the cuts inside it; modules inside others come first. A subclass inherits the
    function of its base. A type given by its qualified name ("timm.layers.attention.Attention") need not be imported.
    """

    def register(function: U) -> U:
        SHAPE_UPDATES.update(dict.fromkeys(types, function))
        return function

    return register


@shape_update(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d, cuts: Cuts) -> None:
    outputs, inputs = module.weight.shape[:2]
    kept = cuts.get(("weight", 0))
    if kept is not None and module.groups > 1:  # a depthwise convolution loses groups, a grouped one none
        size = module.out_channels // module.groups
        module.groups = len({position // size for position in kept.tolist()})
    module.in_channels, module.out_channels = inputs * module.groups, outputs


@shape_update(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(module: nn.ConvTranspose2d, _: Cuts) -> None:
    module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1] * module.groups


@shape_update(nn.Linear)
def _linear(module: nn.Linear, _: Cuts) -> None:
    module.out_features, module.in_features = module.weight.shape


@shape_update(nn.modules.batchnorm._NormBase)
def _batch_norm(module: nn.BatchNorm2d, _: Cuts) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None:
        module.num_features = len(tensor)


@shape_update(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(module: nn.LayerNorm, _: Cuts) -> None:
    module.normalized_shape = tuple(module.weight.shape)


@shape_update(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, cuts: Cuts) -> None:
    size = module.num_channels // module.num_groups
    # Whole groups go, or the same number of channels of every group.
    module.num_groups = len({position // size for position in cuts["weight", 0].tolist()})
    module.num_channels = len(module.weight)


@shape_update(nn.PReLU)
def _prelu(module: nn.PReLU, _: Cuts) -> None:
    module.num_parameters = len(module.weight)


def update_shapes(model: nn.Module, keep: Mapping[Slot, Tensor], sizes: Mapping[Slot, int]) -> None:
    """Make the forward pass of every module that holds a cut tensor follow (`shape_update`), the innermost first.

    Args:
        keep: as for `keep_slices`.
        sizes: of the same dimensions before the cut.
    """
    from compress import attention  # noqa: F401  (registers its rows; it imports this module)

    aliases = _aliases(model)
    inside: dict[nn.Module, Cuts] = {}
    depths: dict[nn.Module, int] = {}
    for (tensor, dim), positions in keep.items():
        for name in aliases[tensor]:
            parts = name.split(".")
            for depth in range(len(parts)):
                module, slot = model.get_submodule(".".join(parts[:depth])), (".".join(parts[depth:]), dim)
                cuts = inside.setdefault(module, Cuts({}, {}))
                cuts[slot], cuts.sizes[slot] = positions, sizes[tensor, dim]
                depths[module] = max(depth, depths.get(module, 0))
    for module in sorted(inside, key=lambda module: -depths[module]):
        for ancestor in type(module).__mro__:
            update = SHAPE_UPDATES.get(ancestor) or SHAPE_UPDATES.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
            if update is not None:
                update(module, inside[module])
                break


def keep_slices(
    model: nn.Module,
    keep: Mapping[Slot, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    attributes: Iterable[AttributeRule] = (),
) -> None:
    """Cut every named tensor of `model` down to the positions kept.

    Args:
        model: changed in place; what was kept is added to its record (`kept_slices`).
        keep: (parameter or buffer, dimension) -> ascending positions to keep, int64. A tensor under several names is
            cut once, whichever is given.
        optimizer: its state (momentum, moments) is cut alike.
        attributes: what else the forward pass takes its sizes from (`ChannelGraph.attributes`); set last, after the
            functions of `shape_update`.

    Raises:
        WorkError: the optimizer holds a state tensor of a shape that says nothing of channels, or an attribute would
            not be an integer. Nothing is changed then.
    """
    first = {alias: name for name, names in _aliases(model).items() for alias in names}
    keep = {(first[name], dim): positions for (name, dim), positions in keep.items()}
    by_tensor: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for (name, dim), positions in keep.items():
        by_tensor[name][dim] = positions
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if optimizer is not None:
        _check_state(optimizer, {name: tensors[name] for name in by_tensor})
    sizes = {(name, dim): tensors[name].shape[dim] for name, dim in keep}
    values = {rule.attribute: rule.value(len(keep[rule.follows])) for rule in attributes if rule.follows in keep}
    for name, cuts in by_tensor.items():
        _cut(tensors[name], cuts, optimizer)
    update_shapes(model, keep, sizes)
    set_attributes(model, values)
    record = _record(model)
    for slot, positions in keep.items():
        size, earlier = record.get(slot, (sizes[slot], None))
        record[slot] = (size, positions.clone() if earlier is None else earlier[positions])
    setattr(model, _RECORD, record)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The name of every parameter and buffer -> all names that the same tensor has."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        names[id(tensor)].append(name)
    return {same[0]: same for same in names.values()}


def kept_slices(model: nn.Module) -> dict[Slot, Tensor]:
    """(tensor, dimension) -> positions of the model as it was built that are still there; empty for a dense model."""
    return {slot: positions for slot, (_, positions) in _record(model).items()}


def dense_sizes(model: nn.Module) -> dict[Slot, int]:
    """(tensor, dimension) -> its size in the model as it was built, for every dimension that was cut."""
    return {slot: size for slot, (size, _) in _record(model).items()}


def _record(model: nn.Module) -> dict[Slot, tuple[int, Tensor]]:
    return dict(getattr(model, _RECORD, {}))


def _cut(tensor: Tensor, cuts: Mapping[int, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    if isinstance(tensor, FakeTensor):  # a shape without numbers, from which PyTorch is slow to select
        tensor.data = tensor.new_empty([len(cuts.get(dim, range(size))) for dim, size in enumerate(tensor.shape)])
        return
    gradient, state = tensor.grad, {}
    if optimizer is not None:
        state = optimizer.state.get(tensor, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == tensor.shape and value.dim():
            state[key] = _selected(value, cuts)
    tensor.grad = None  # its shape is checked against the tensor's
    selected = _selected(tensor.data, cuts)
    if tensor.requires_grad:
        # A loss that is still alive holds the tensor's gradient accumulator, which remembers the old shape. A change
        # of type makes autograd replace it.
        other = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = selected
    if gradient is not None:
        tensor.grad = _selected(gradient, cuts)


def _selected(tensor: Tensor, cuts: Mapping[int, Tensor]) -> Tensor:
    channels_last = (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    for dim, positions in cuts.items():
        tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _check_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != tensor.shape:
                raise WorkError(
                    f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {name} of shape "
                    f"{tuple(tensor.shape)}, which cannot be cut by channel: use SGD, Adam or AdamW while pruning."
                )
