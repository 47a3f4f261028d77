"""The graph of a part of a model in the model's own names."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compress.errors import InputError
from compress.graph.groups import ChannelGraph, Frozen, Group, Producer, Size, Slices
from compress.graph.options import check_names, named
from compress.graph.tracing import trace
from compress.removal import Slot


def trace_part(model: nn.Module, part: str, example_inputs: Tensor | Sequence[Any], **options: Any) -> ChannelGraph:
    """`trace` for the submodule `part` alone, such as a detector's backbone.

    What the part returns stays as it is, so that the rest of the model goes on working.

    Args:
        part: qualified name of the submodule.
        example_inputs: of the submodule's forward pass.
        options: those of `trace`, in the model's names.

    Raises:
        InputError: the model has no such part, an option names what is outside of it, a tensor of it stands outside of
            it too, or it cannot be traced.
    """
    check_names(model, "part", [part])
    for option in ("ignore", "protect"):
        options[option] = _within(model, part, option, options.get(option, ()))
    options["tie"] = [tuple(_within(model, part, "tie", pair)) for pair in options.get("tie", ())]
    module = model.get_submodule(part)
    own = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in every:
        if id(tensor) in own and not named([part])(name):
            raise InputError(f"part is {part!r}, but {name} outside of it is one of its tensors: give a larger part.")
    return prefixed(trace(module, example_inputs, **options), part)


def _within(model: nn.Module, part: str, option: str, names: Sequence[str]) -> list[str]:
    check_names(model, option, names)
    for name in names:
        if name == part or not named([part])(name):
            raise InputError(f"{option} names {name!r}, which does not lie inside the part {part!r}.")
    return [name.removeprefix(f"{part}.") for name in names]


def prefixed(graph: ChannelGraph, part: str) -> ChannelGraph:
    """The graph with every layer, tensor and group inside the module `part`."""

    def full(name: str) -> str:
        return f"{part}.{name}" if name else part

    def slot(at: Slot) -> Slot:
        return full(at[0]), at[1]

    def slices(parts: Sequence[Slices]) -> tuple[Slices, ...]:
        return tuple(replace(one, tensor=full(one.tensor)) for one in parts)

    def group(one: Group) -> Group:
        return replace(
            one,
            name=full(one.name),
            slices=slices(one.slices),
            producers=tuple(Producer(full(made.layer), tuple(map(full, made.norms))) for made in one.producers),
            consumers=tuple(map(full, one.consumers)),
            filters=tuple(map(slot, one.filters)),
            readers=tuple(map(slot, one.readers)),
            gates=slices(one.gates),
            residue=None if one.residue is None else full(one.residue),
            mixed=None if one.mixed is None else full(one.mixed),
        )

    def size(axis: Size) -> Size:
        return replace(axis, parts=tuple((full(name), copies) for name, copies in axis.parts))

    return replace(
        graph,
        groups={full(name): group(one) for name, one in graph.groups.items()},
        frozen=[Frozen(tuple(map(full, one.layers)), one.reason) for one in graph.frozen],
        sizes={slot(at): length for at, length in graph.sizes.items()},
        uses={full(name): count for name, count in graph.uses.items()},
        products=tuple(replace(one, sizes=tuple(map(size, one.sizes))) for one in graph.products),
        grouped=frozenset(map(full, graph.grouped)),
        attributes=tuple(
            replace(
                rule,
                attribute=replace(rule.attribute, module=full(rule.attribute.module)),
                follows=slot(rule.follows),
            )
            for rule in graph.attributes
        ),
    )
