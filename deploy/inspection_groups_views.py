"""Channel groups for the terminal: what can go, what stays and why."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.harness import numerals

SHOWN: Final = 3
"""Names of a list that are shown; `--json` has all."""

LONGEST, BESIDE_LONGEST = 46, 24
"""Characters of a name in one line, and of one that stands beside it."""


def tables(found: Mapping[str, Any]) -> list[RenderableType]:
    """What `inspect_groups` found."""
    groups = found["groups"]
    size = " x ".join(map(str, found["image_shape"]))
    part = "" if found["part"] is None else f", part {found['part']}"
    parts: list[RenderableType] = [f"Channel groups of {found['target']}{part} ({size})"]
    parts += [_groups(groups), _explained(groups, found["round_to"])] if groups else ["Nothing of it can be removed."]
    if found["stays"]:
        parts += ["\nWhat stays", _stays(found["stays"])]
    if unknown := found["operators_without_rule"]:
        shown = [f"{operator} ({len(nodes)}x)" for operator, nodes in unknown.items()]
        parts.append(f"Operators without a rule: {_listed(shown)}.")
    if found["attributes"]:
        shown = [_attribute(one) for one in found["attributes"]]
        parts.append(f"Attributes that follow a removal: {_listed(shown)}.")
    return [*parts, _summary(found)]


def _groups(groups: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("made by", no_wrap=True)  # names that go into `ignore`, whole
    table.add_column("channels", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("read by", overflow="fold")
    table.add_column("zeroing", overflow="fold")
    for group in groups:
        name = group["name"]
        makers = [_broken(name), *(_beside(one["layer"], name) for one in group["producers"][1:])]
        readers = [_beside(layer, name) for layer in group["consumers"]]
        table.add_row(_lines(makers), _channels(group), str(group["step"]), _lines(readers) or "-", _zeroing(group))
    return table


def _explained(groups: Sequence[Mapping[str, Any]], round_to: int) -> str:
    said = [f"step: how many go together where layers are to stay multiples of {round_to} wide."]
    several = next((one["rows"] for group in groups for one in group["producers"] if one["rows"] > 1), None)
    if several is not None:
        said.insert(0, f"x {several}: each is {several} rows of the layer's weight.")
    if any(group["exact"] for group in groups):
        said.append("exact: without a channel the network computes what it computes with zeros there.")
    if any(group["residue"] for group in groups):
        said.append("reads: that layer reads something else than 0 of a channel of zeros.")
    if any(group["mixed"] for group in groups):
        said.append("mixed by: that layer normalises the channels together.")
    return " ".join(said)


def _channels(group: Mapping[str, Any]) -> str:
    """What can go, and how many rows of each maker that is."""
    kind = group["goes"].removesuffix("channels").strip()
    rows = [f" x {one['rows']}" if one["rows"] > 1 else "" for one in group["producers"][:SHOWN]] or [""]
    first = f"{group['width']}{' ' if kind else ''}{kind}"
    return "\n".join([f"{first}{rows[0]}", *(f"{'':{len(first)}}{more}" for more in rows[1:])]).rstrip()


def _zeroing(group: Mapping[str, Any]) -> str:
    said = [
        f"{word} {_beside(group[key], group['name'])}"
        for word, key in (("reads", "residue"), ("mixed by", "mixed"))
        if group[key] is not None
    ]
    return "\n".join(said) or "exact"


def _stays(stays: Sequence[Mapping[str, Any]]) -> Table:
    hints = any(one["hint"] for one in stays)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("layers", justify="right", no_wrap=True)
    table.add_column("which", no_wrap=True)
    table.add_column("because of", overflow="fold")
    if hints:
        table.add_column("try", min_width=len("--embedding"))
    for one in stays:
        cells = [str(len(one["layers"])), _lines([_broken(layer) for layer in one["layers"]]), one["reason"]]
        table.add_row(*cells, *([one["hint"] or ""] if hints else []))
    return table


def _attribute(one: Mapping[str, Any]) -> str:
    factor = "" if one["ratio"] == "1" else f"{one['ratio']} of "
    return f"{one['attribute']} ({factor}dimension {one['dim']} of {one['tensor']})"


def _summary(found: Mapping[str, Any]) -> str:
    channels, macs = found["channels"], found["macs"]
    share = 100 * channels["removable"] / channels["all"] if channels["all"] else 0.0
    least = f"{numerals.compact(macs['narrowest'])} ({100 * macs['narrowest'] / (macs['now'] or 1):.1f} %)"
    return (
        f"{channels['removable']:,} of {channels['all']:,} output channels ({share:.0f} %) stand in groups. "
        f"{numerals.compact(macs['now'])} multiply-adds for one image, {least} with every group at its narrowest."
    )


def _broken(name: str) -> str:
    """A long name in lines, broken at dots."""
    if len(name) <= LONGEST:
        return name
    at = name.rfind(".", 0, LONGEST) + 1 or LONGEST
    return f"{name[:at]}\n  {_broken(name[at:])}"


def _beside(name: str, other: str) -> str:
    """A layer's name beside another's: long ones without the path that they share, or without the beginning."""
    parts, others = name.split("."), other.split(".")
    same = 0
    while same < min(len(parts) - 1, len(others)) and parts[same] == others[same]:
        same += 1
    if same > 1 and parts[same].isdecimal():  # "3" says less than "mlp.3"
        same -= 1
    while same < len(parts) - 2 and len(".".join(parts[same:])) > BESIDE_LONGEST:
        same += 1
    return name if same < 2 else f"….{'.'.join(parts[same:])}"


def _lines(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return "\n".join([*names[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
