"""What a listing of the TensorRT bindings says of calls: signatures as text, and arguments checked against them.

A listing maps every public name of the module to its kind; a method's entry is its pybind11 signature, or a list of
numbered overloads:

    set_flag(self: tensorrt_bindings.tensorrt.IBuilderConfig, flag: tensorrt_bindings.tensorrt.BuilderFlag) -> None
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

PREFIXES = ("tensorrt_bindings.tensorrt.", "collections.abc.", "typing_extensions.", "typing.", "nvinfer1::")
PARSER_PREFIX = "nvonnxparser::"
ENUM_DEFAULT = re.compile(r"<(\w+)\.(\w+): \d+>")
OPENING, CLOSING = "([<", ")]>"


class MismatchError(Exception):
    """A value is not of the type that a signature names."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a signature; `default` is its text, None where the parameter is required."""

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class Signature:
    """One overload, `self` left out; `text` is what a TypeError shows."""

    parameters: tuple[Parameter, ...]
    text: str


def signatures(entry: str | Sequence[str]) -> tuple[Signature, ...]:
    """The overloads of a method or function of a listing."""
    texts = [entry] if isinstance(entry, str) else list(entry)
    return tuple(_signature(text) for text in texts)


@cache
def _signature(text: str) -> Signature:
    text = re.sub(r"^\d+\. ", "", text)
    for prefix in PREFIXES:
        text = text.replace(prefix, "")
    text = text.replace(PARSER_PREFIX + "IParserError", "ParserError").replace(PARSER_PREFIX, "")
    start = text.index("(") + 1
    depth, end = 1, start
    while depth:
        depth += (text[end] in "([") - (text[end] in ")]")
        end += 1
    parts = [_parameter(part) for part in _split(text[start : end - 1])]
    return Signature(tuple(part for part in parts if part.name != "self"), text)


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in OPENING) - (letter in CLOSING)
        if letter == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part.strip() for part in [*parts, text[begin:]] if part.strip()]


def _parameter(text: str) -> Parameter:
    name, _, rest = text.partition(":")
    kind, equals, default = rest.partition(" = ")
    return Parameter(name.strip(), kind.strip(), default.strip() if equals else None)


class Types:
    """Checks and converts values as pybind11 does, and in some places more strictly (see `convert`).

    `named` are the module's own classes and enums; `dims` makes a Dims of a sequence of integers.
    """

    def __init__(self, named: Mapping[str, type], dims: Callable[[Sequence[int]], Any]) -> None:
        self._named = named
        self._dims = dims

    def bind(
        self, overloads: Sequence[Signature], args: Sequence[Any], kwargs: Mapping[str, Any], name: str
    ) -> dict[str, Any]:
        """The arguments by parameter name, for the first overload that takes them.

        Raises:
            TypeError: no overload does.
        """
        reasons = []
        for signature in overloads:
            try:
                return self._bind(signature, args, kwargs)
            except MismatchError as error:
                reasons.append(f"    {signature.text}: {error}")
        raise TypeError(f"{name}(): incompatible function arguments. Supported are:\n" + "\n".join(reasons))

    def _bind(self, signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [parameter.name for parameter in signature.parameters]
        if len(args) > len(names):
            raise MismatchError(f"{len(args)} arguments given, at most {len(names)} taken")
        given = dict(zip(names, args, strict=False))
        for name in kwargs:
            if name not in names:
                raise MismatchError(f"no parameter is called {name}")
            if name in given:
                raise MismatchError(f"{name} is given twice")
        given |= kwargs
        bound = {}
        for parameter in signature.parameters:
            if parameter.name in given:
                value = given[parameter.name]
                omitted = value is None and parameter.default == "None"
                bound[parameter.name] = None if omitted else self._named_convert(parameter, value)
            elif parameter.default is None:
                raise MismatchError(f"{parameter.name} is missing")
            else:
                bound[parameter.name] = self._default(parameter)
        return bound

    def _named_convert(self, parameter: Parameter, value: Any) -> Any:
        try:
            return self.convert(parameter.type, value)
        except MismatchError as error:
            raise MismatchError(f"{parameter.name}: {error}") from error

    def _default(self, parameter: Parameter) -> Any:
        assert parameter.default is not None
        match = ENUM_DEFAULT.fullmatch(parameter.default)
        if match is None:
            return ast.literal_eval(parameter.default)
        enum = self._named[parameter.type if parameter.type in self._named else match[1]]
        return getattr(enum, match[2])

    def convert(self, kind: str, value: Any) -> Any:
        """The value as type `kind` of a signature; `kind` may end in `| None`.

        Stricter than pybind11: None is no object unless `kind` says so, and an enum member is no integer.

        Raises:
            MismatchError: it is none.
        """
        if kind.endswith(" | None"):
            return None if value is None else self.convert(kind.removesuffix(" | None"), value)
        if kind == "Dims" and isinstance(value, list | tuple):
            return self._dims([_integer(size) for size in value])
        if kind in self._named:
            if not isinstance(value, self._named[kind]):
                raise MismatchError(f"{kind} wanted, {type(value).__name__} given")
            return value
        if kind.startswith("Sequence["):
            if isinstance(value, str | bytes) or not isinstance(value, Sequence):
                raise MismatchError(f"{kind} wanted, {type(value).__name__} given")
            return [self.convert(kind[len("Sequence[") : -1], item) for item in value]
        if kind not in SIMPLE:
            raise NotImplementedError(f"the fake of tensorrt knows no type {kind}")
        return SIMPLE[kind](value)


def _instance_of(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise MismatchError(f"{kinds[0].__name__} wanted, {type(value).__name__} given")
        return value

    return check


def _integer(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise MismatchError(f"an integer is wanted, {type(value).__name__} given") from None
    if number < -(2**63) or number >= 2**64:
        raise MismatchError(f"{number} does not fit in 64 bits")
    return number


def _number(value: Any) -> float:
    if not isinstance(value, int | float | np.number):
        raise MismatchError(f"a number is wanted, {type(value).__name__} given")
    return float(value)


def _buffer(value: Any) -> memoryview:
    try:
        return memoryview(value).cast("B")
    except TypeError:
        raise MismatchError(f"an object with the buffer protocol is wanted, {type(value).__name__} given") from None


SIMPLE: dict[str, Callable[[Any], Any]] = {
    "SupportsInt": _integer,
    "SupportsFloat": _number,
    "str": _instance_of(str),
    "bool": _instance_of(bool),
    "bytes": _instance_of(bytes),
    "tuple": _instance_of(tuple),
    "list": _instance_of(list),
    "object": lambda value: value,
    "Buffer": _buffer,
    "numpy.ndarray": _instance_of(np.ndarray),
}
