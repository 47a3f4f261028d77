"""What users ask of a graph: modules and layers by name, and what of attention and embeddings can go."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.errors import InputError
from compress.graph.walk import Attention, Walk

_ATTENTION = ("heads", "widths", "keep")


@dataclass(frozen=True)
class Options:
    """The options of `compress.graph.trace`, checked against a model and in the model's own names."""

    ignore: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    tie: tuple[tuple[str, str], ...] = ()
    attention: Attention = "heads"
    embedding: bool = False

    @classmethod
    def checked(
        cls,
        model: nn.Module,
        *,
        ignore: Sequence[str] = (),
        protect: Sequence[str] = (),
        tie: Sequence[tuple[str, str]] = (),
        attention: Attention = "heads",
        embedding: bool = False,
    ) -> "Options":
        """The options, after every name was found in `model`.

        Raises:
            InputError: a name is no module or parameter of the model, `tie` holds no pairs, or `attention` is unknown.
        """
        if attention not in _ATTENTION:
            raise InputError(f"attention is {attention!r}, but must be one of {', '.join(map(repr, _ATTENTION))}.")
        if any(isinstance(pair, str) or len(pair) != 2 for pair in tie):
            raise InputError(f"tie is {tie!r}, but must be pairs of layers: [(first, second), ...].")
        check_names(model, "ignore", ignore)
        check_names(model, "protect", protect)
        check_names(model, "tie", [name for pair in tie for name in pair])
        first = _first_names(model)
        return cls(
            # `ignore` is about layers, which go by the names of their weights.
            tuple(name for own in _own_names(first, ignore) for name in (own, own.removesuffix(".weight"))),
            tuple(_own_names(first, protect)),
            tuple((first[one], first[other]) for one, other in tie),
            attention,
            embedding,
        )

    def applied(self, walk: Walk) -> None:
        """Freeze and tie what the options name, after the walk."""
        walk.ignore(named(self.ignore))
        walk.protect(named(self.protect))
        for one, other in self.tie:
            walk.tie(one, other)


def check_names(model: nn.Module, option: str, names: Iterable[str]) -> None:
    """Raise InputError for a name that is no module or parameter of the model."""
    known = _first_names(model).keys()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise InputError(f"{option} names {name!r}, but the model has no module or parameter of that name{hint}")


def named(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a layer or tensor is one of `names` or lies inside a module that is."""
    return lambda layer: any(name == "" or layer == name or layer.startswith(f"{name}.") for name in names)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a module or parameter -> the first one that the same object has."""
    first: dict[int, str] = {}
    everything: list[tuple[str, Any]] = [*model.named_modules(remove_duplicate=False)]
    everything += model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(thing), name) for name, thing in everything}


def _own_names(first: dict[str, str], names: Sequence[str]) -> dict[str, None]:
    """The names themselves, and those by which tensors inside them are known that stand elsewhere too."""
    inside = named(names)
    found = dict.fromkeys(first[name] for name in names)
    elsewhere = [own for name, own in first.items() if inside(name) and not inside(own)]
    return found | dict.fromkeys(elsewhere)
