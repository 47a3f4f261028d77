"""Recipes as text: read from YAML, changed by `--set`, compared, written; their errors in plain sentences.

A value is checked as JSON would be: `epochs: "3"` and `epochs: yes` are errors, not 3 and 1.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from compress.errors import InputError
from deploy.recipe import Recipe

DEFAULT = "the built-in recipe"

LEFT_TO_DATA = ("num_classes", "in_channels", "in_chans", "image_size")
"""Arguments of a factory that the data decide where the recipe does not give them."""

_ABSENT = object()


def read_recipe(path: Path | None, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or the built-in one, with changes of the form `prune.events=5` applied.

    Raises:
        InputError: the file is missing or no YAML, a key is unknown (names the nearest), or a value is wrong; one
            sentence for each problem.
    """
    source = DEFAULT if path is None else str(path)
    values = _parse(_read(path), source)
    if values is None:
        raise InputError(f"{source} is empty: give at least name, model, data and prune.")
    if not isinstance(values, dict):
        raise InputError(f"{source} holds a {_yaml_type(values)}, but a recipe is a mapping of sections.")
    for change in changes:
        _apply(values, change)
    return validate(values, source)


def validate(values: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of plain values.

    Raises:
        InputError: one sentence for each problem, with the dotted key.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source} holds a value that is no number, text, list or mapping: {error}.") from error
    try:
        return Recipe.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A list with a wrong item is reported a second time as a whole.
        lists = {problem["loc"][:-1] for problem in problems if isinstance((problem["loc"] or ("",))[-1], int)}
        sentences = [_sentence(problem) for problem in problems if problem["loc"] not in lists]
        raise InputError("\n".join(f"{source}: {sentence}" for sentence in dict.fromkeys(sentences))) from None


def dump(recipe: Recipe, comment: str = "") -> str:
    """The recipe as YAML with every key; `comment` stands above it."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True, width=110)


def difference(asked: Recipe, recorded: Recipe) -> str | None:
    """The first key in which two recipes differ, with both values; None where they describe one run.

    What `asked` leaves to the data is taken as recorded.
    """
    ours, theirs = asked.resolved(), recorded.resolved()
    kwargs = theirs["model"]["kwargs"]
    ours["model"]["kwargs"] = {key: kwargs[key] for key in LEFT_TO_DATA if key in kwargs} | ours["model"]["kwargs"]
    flat_ours, flat_theirs = dict(_flat(ours)), dict(_flat(theirs))
    for key in [*flat_theirs, *flat_ours]:
        now, before = flat_ours.get(key, _ABSENT), flat_theirs.get(key, _ABSENT)
        if now != before:
            return f"{key} is {_shown(now)} and was {_shown(before)}"
    return None


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 1e-3 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path | None) -> str:
    if path is None:
        return files("deploy").joinpath("default.yaml").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"The recipe {path} does not exist: correct the path.") from error
    except OSError as error:
        raise InputError(f"Cannot read the recipe {path}: {error.strerror}; give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The recipe {path} is not text: give a YAML file in UTF-8.") from error


def _parse(text: str, source: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{source}{place}: {error.problem or error.context}; correct the YAML.") from error
    except yaml.YAMLError as error:
        raise InputError(f"{source} is no YAML: {str(error).splitlines()[0]}; correct it.") from error
    finally:
        if loader is not None:
            loader.dispose()


def _apply(values: dict[str, Any], change: str) -> None:
    """Set one dotted key in place."""
    key, separator, text = change.partition("=")
    if not separator or not key:
        raise InputError(f"--set {change} sets nothing: write --set KEY=VALUE, such as --set prune.events=5.")
    *sections, last = key.strip().split(".")
    place: Any = values
    for section in sections:
        if place.get(section) is None:  # absent, or null as an optional section may be
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise InputError(f"--set {change}: {section} is no section that could hold {last}.")
    place[last] = _parse(text, f"--set {change}")


def _sentence(problem: Any) -> str:
    """One problem that pydantic found, as a sentence that begins with the dotted key."""
    location = tuple(part for part in problem["loc"])
    key = ".".join(map(str, location))
    kind, context, given = problem["type"], problem.get("ctx", {}), problem["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggestion(location)}"
    if kind == "missing":
        return f"{key} is missing{_meaning(location)}"
    if kind == "value_error":
        return f"{key + ': ' if key else ''}{context['error']}."
    return f"{key} is {_shown(given)}, but must be {_wanted(kind, context, problem['msg'])}{_meaning(location)}"


def _wanted(kind: str, context: Mapping[str, Any], message: str) -> str:
    limits = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    if kind in limits:
        limit = limits[kind]
        return f"{words[limit]} {context[limit]:g}"
    types = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "model_type": "a section with keys",
        "model_attributes_type": "a section with keys",
        "dict_type": "a section with keys",
        "tuple_type": "a list",
        "none_required": "left out or null",
    }
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return "of another form"
    return types.get(kind, f"otherwise ({message[:1].lower()}{message[1:]})")


def _suggestion(location: tuple[Any, ...]) -> str:
    """The nearest valid key: first among the neighbours, then anywhere in the recipe."""
    names = [str(part) for part in location]
    siblings = [".".join(path) for path, _ in _keys() if path[:-1] == tuple(names[:-1])]
    near = difflib.get_close_matches(".".join(names), siblings, n=1, cutoff=0.0)
    if near and difflib.get_close_matches(names[-1], [near[0].rpartition(".")[2]], n=1):
        return f"; did you mean {near[0]}?"
    everywhere = {path[-1]: ".".join(path) for path, _ in reversed(list(_keys()))}
    elsewhere = difflib.get_close_matches(names[-1], everywhere, n=1)
    if elsewhere:
        return f"; did you mean {everywhere[elsewhere[0]]}?"
    return f"; the keys there are {', '.join(key.rpartition('.')[2] for key in siblings)}." if siblings else "."


def _meaning(location: tuple[Any, ...]) -> str:
    """What the key stands for, in brackets."""
    described = dict(_keys())
    path = tuple(part for part in location if isinstance(part, str))
    text = described.get(path)
    return f" ({text})." if text else "."


def _keys(model: type[BaseModel] = Recipe, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key of the recipe as a path, with its description."""
    for name, field in model.model_fields.items():
        if field.exclude:
            continue
        yield (*prefix, name), field.description or ""
        for section in _sections(field.annotation):
            yield from _keys(section, (*prefix, name))


def _sections(annotation: Any) -> Iterable[type[BaseModel]]:
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not NoneType]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    return "not given" if value is _ABSENT else json.dumps(value)


def _yaml_type(value: Any) -> str:
    return "list" if isinstance(value, list) else "single value"
