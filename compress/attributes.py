"""Sizes that a forward pass reads from its modules' attributes: `hidden_dim`, `shape[0]`, `config.width`.

Parameters carry their sizes themselves; where a forward pass also reads one from an attribute, that must follow a
removal. Attributes are set, never made: what is not there already, as an integer, is refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from compress.errors import WorkError

_RECORD = "_espalier_attributes"
_TEXT = re.compile(r"(?P<path>[^\[\]]+)(\[(?P<index>\d+)\])?")


@dataclass(frozen=True)
class Attribute:
    """An integer in an attribute of a module.

    Attributes:
        module: qualified name of the module.
        name: of the attribute; with a dot, of an attribute of an object that the module holds ("config.width").
        index: place in a list or tuple; None for an integer by itself.
    """

    module: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.index is None else f"{path}[{self.index}]"

    @classmethod
    def parsed(cls, model: nn.Module, text: str) -> "Attribute | None":
        """The attribute of `model` that `text`, as `str` writes it, names; None where there is no such integer."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        parts = match["path"].split(".")
        inside = 0
        module = model
        while inside < len(parts) and parts[inside] in module._modules:
            module, inside = module._modules[parts[inside]] or module, inside + 1
        index = None if match["index"] is None else int(match["index"])
        found = cls(".".join(parts[:inside]), ".".join(parts[inside:]), index)
        return found if found.value(model) is not None else None

    def value(self, model: nn.Module) -> int | None:
        """The integer; None where it is none, or is not there."""
        owner, last = self._owner(model)
        if owner is None or last.startswith("__"):
            return None
        held = vars(owner).get(last)
        if self.index is not None:
            held = held[self.index] if isinstance(held, (list, tuple)) and self.index < len(held) else None
        return held if is_size(held) else None

    def set(self, model: nn.Module, value: int) -> None:
        """Replace the integer; a list or tuple by one of its own, for others may hold the same object."""
        owner, last = self._owner(model)
        held = vars(owner)[last]
        if self.index is None:
            vars(owner)[last] = value
        else:
            items = [*held[: self.index], value, *held[self.index + 1 :]]
            vars(owner)[last] = held._make(items) if hasattr(held, "_make") else type(held)(items)

    def _owner(self, model: nn.Module) -> tuple[Any, str]:
        module = model.get_submodule(self.module)
        holder, _, last = self.name.rpartition(".")
        if not holder:
            return module, last
        owner = vars(module).get(holder)
        return (owner if is_plain(owner) else None), last


@dataclass(frozen=True)
class AttributeRule:
    """An attribute, and the tensor dimension whose size decides its value.

    Attributes:
        attribute: what is set.
        follows: (tensor, dimension).
        ratio: the value is that many times its size.
    """

    attribute: Attribute
    follows: tuple[str, int]
    ratio: Fraction

    def value(self, size: int) -> int:
        """The attribute's value at this size of what it follows.

        Raises:
            WorkError: it would not be an integer.
        """
        value = self.ratio * size
        if value.denominator != 1:
            raise WorkError(
                f"{self.attribute} must stay {self.ratio} of dimension {self.follows[1]} of {self.follows[0]}, whose "
                f"size {size} it does not divide: choose round_to as a multiple of {self.ratio.denominator}."
            )
        return int(value)


def is_size(value: Any) -> bool:
    """Whether a value is an integer, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether a value is an object whose attributes are its own: a dataclass, a namespace, a configuration."""
    return hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value)


def set_values(model: nn.Module, values: Mapping[Attribute, int]) -> None:
    """Set attributes."""
    for attribute, value in values.items():
        attribute.set(model, value)


def set_attributes(model: nn.Module, values: Mapping[Attribute, int]) -> None:
    """Set attributes, and record them with the model."""
    set_values(model, values)
    if values:
        setattr(model, _RECORD, attributes_set(model) | {str(one): value for one, value in values.items()})


def attributes_set(model: nn.Module) -> dict[str, int]:
    """Attribute, as text -> value, of all that removals have set."""
    return dict(getattr(model, _RECORD, {}))
