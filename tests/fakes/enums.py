"""Enums as pybind11 makes them, with numbers that no literal can hit."""

import hashlib
from collections.abc import Sequence
from typing import Any


class Enum:
    """A member of an enum as pybind11 makes it without arithmetic: int() gives its number, nothing else does."""

    __slots__ = ("_name", "_value")

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> int:
        return self._value

    def __int__(self) -> int:
        return self._value

    def __hash__(self) -> int:
        return hash((type(self), self._value))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._value == other._value  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._value}>"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"can't set attribute {name} of {self}")


def make_enum(name: str, members: Sequence[str], major: int) -> type:
    """An enum whose numbers are shuffled by major version: even ones for 10, odd ones for 11.

    So a number written as a literal, or kept from the other version, is wrong.
    """

    def shuffled(member: str) -> str:
        return hashlib.sha256(f"{major}.{name}.{member}".encode()).hexdigest()

    def construct(cls: type, value: int) -> Any:
        for member in cls.__members__.values():  # type: ignore[attr-defined]
            if member.value == value:
                return member
        raise TypeError(f"{value!r} is no {name}")

    short = name.rpartition(".")[2]
    made = type(short, (Enum,), {"__slots__": (), "__module__": "tensorrt", "__new__": construct})
    table = {}
    for rank, member in enumerate(sorted(members, key=shuffled)):
        table[member] = object.__new__(made)
        object.__setattr__(table[member], "_name", member)
        object.__setattr__(table[member], "_value", 2 * rank + 2 + major % 2)
    for member in members:
        setattr(made, member, table[member])
    made.__members__ = {member: table[member] for member in members}  # type: ignore[attr-defined]
    return made
