"""The text `NAME:option=value:option=value` by which criteria and runtimes are chosen."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.errors import InputError


def read_options(name: str, parts: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the parts after the name give; each value has the type of its default.

    Args:
        name: what the options belong to, for the messages.
        parts: `option=value` each; booleans are `true` and `false`.
        defaults: every option that there is -> its default.

    Raises:
        InputError: there is no such option, or a value is missing or does not fit.
    """
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise InputError(f"{name} has no option {key!r}: it has {', '.join(defaults)}.")
        default = defaults[key]
        example = f"{name}:{key}={str(default).lower() if isinstance(default, bool) else default}"
        if not equals:
            raise InputError(f"The option {key} of {name} has no value: write {example}.")
        try:
            options[key] = _converted(value, default)
        except ValueError:
            raise InputError(f"{part!r} is no value for the option {key} of {name}: write {example}.") from None
    return options


def _converted(value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ValueError(value)
        return value == "true"
    return type(default)(value)
