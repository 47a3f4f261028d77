"""The table of all rows, in Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.coverage.rows import STAGES, Row, Share

_HEAD = """# Coverage: which models can be pruned

Written by `{command}`. Every model was built with random weights (norms, statistics and layer scales drawn at random),
traced, stripped of a share of every group's channels (drawn at random, widths in multiples of 8 where possible),
compared with the network whose channels are zeroed instead, trained for two steps, exported to ONNX with a dynamic
batch, and run in ONNX Runtime at batch 1 and 3, in a process of its own.

- *removable*: output channels of convolutions and linear layers that stand in a group, of all.
- *s*: seconds of `trace` and of the removal. *memory*: the most that both took beyond one forward pass, in multiples of
  the model's own parameters and buffers; MB below 100 MB are mostly Python's own.
- *MACs*: of the pruned model, of the dense one's. *zeroing*: largest difference between removal and zeroing, of the
  largest output (groups mixed by a normalisation apart, in brackets). *ORT*: the same between ONNX Runtime and PyTorch.
"""


def page(ours: Sequence[Row], theirs: Mapping[str, Row], environment: Mapping[str, Any], command: str) -> str:
    """The whole page.

    Args:
        ours, theirs: rows of our side, and model -> row of Torch-Pruning's.
        environment: as `benchmarks.harness.environment` gives it.
    """
    rows = sorted(ours, key=lambda row: row.request.model)
    parts = [_HEAD.format(command=command), _summary(rows), _ours(rows)]
    if theirs:
        parts.append(_against(rows, theirs))
    parts.append(_environment(environment))
    return "\n".join(parts)


def summary_lines(rows: Iterable[Row]) -> list[str]:
    """For every share how many models pass, and what stands in the way of the others."""
    passed: dict[str, int] = defaultdict(int)
    causes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for share, failure in row.failures().items():
            passed[share] += failure is None
            if failure is not None:
                causes[share][f"{failure.kind} in {failure.stage}: {failure.reason}"].append(row.request.model)
    lines = []
    for share in sorted(passed, key=float):
        total = passed[share] + sum(map(len, causes[share].values()))
        lines.append(f"{percent(share)} of the channels: {passed[share]} of {total} models pass.")
        for cause, models in sorted(causes[share].items(), key=lambda item: (-len(item[1]), item[0])):
            lines.append(f"  - {len(models)} {cause} ({', '.join(models)})")
    return lines


def memory_beyond(row: Row) -> tuple[float, float] | None:
    """The most memory of trace and removal beyond one forward pass: in MB, and as a multiple of the model's own.

    The removal works on a copy of the model, which is not counted.
    """
    if "trace" not in row.stages or not row.bytes:
        return None
    forward, traced = row.stages["forward"], row.stages["trace"]
    removals = [share.stages["removal"] for share in row.shares.values() if "removal" in share.stages]
    removal = max((stage.peak_bytes - stage.before_bytes for stage in removals), default=0)
    beyond = max(0, traced.peak_bytes - forward.peak_bytes, removal)
    return beyond / 2**20, beyond / row.bytes


def seconds(row: Row) -> float | None:
    """Of trace and the slowest removal together."""
    if "trace" not in row.stages:
        return None
    removals = [share.stages["removal"].seconds for share in row.shares.values() if "removal" in share.stages]
    return row.stages["trace"].seconds + max(removals, default=0.0)


def percent(share: str) -> str:
    return f"{float(share):.0%}".replace("%", " %")


def _summary(rows: Sequence[Row]) -> str:
    lines = [line if line.startswith(" ") else f"- {line}" for line in summary_lines(rows)]
    slow = [row.request.model for row in rows if (seconds(row) or 0) > 5]
    last = {row.request.until for row in rows} - {STAGES[-1]}
    if last:
        lines.append(f"- Not all stages were asked for: the last one was {' or '.join(sorted(last))}.")
    lines.append(f"- Trace and removal took more than 5 s on {len(slow)} models{_listed(slow)}.")
    return "\n".join(["## Summary", "", *lines, ""])


def _ours(rows: Sequence[Row]) -> str:
    shares = list(dict.fromkeys(name for row in rows for name in row.failures()))
    heads = [f"{percent(share)}: {what}" for share in shares for what in ("MACs", "zeroing", "ORT")]
    table = [["model", "image", "groups", "removable", "GMACs", "s", "memory", *heads, "left out, or what failed"]]
    for row in rows:
        graph, beyond = row.graph, memory_beyond(row)
        cells = [
            f"{row.request.model}{_how(row)}",
            str(row.request.size),
            str(graph.groups) if graph else "",
            f"{graph.removable / graph.channels:.0%}" if graph and graph.channels else "",
            f"{row.macs / 1e9:.3g}" if row.macs is not None else "",
            _number(seconds(row), ".1f"),
            f"{beyond[1]:.1f}x ({beyond[0]:.0f} MB)" if beyond else "",
        ]
        for share in shares:
            cells += _share_cells(row, row.shares.get(share, Share()))
        table.append([*cells, _notes(row)])
    return _markdown("Models", table)


def _how(row: Row) -> str:
    """What of the model was traced, and with which options, where these are not all of it and none."""
    said = [row.request.part] if row.request.part else []
    said += [name if value is True else f"{name}={value}" for name, value in row.request.trace.items()]
    return f" ({', '.join(said)})" if said else ""


def _share_cells(row: Row, share: Share) -> list[str]:
    kept = f"{share.macs / row.macs:.0%}" if share.macs is not None and row.macs else ""
    zeroing = _number(share.parity, ".0e")
    if share.mixed_parity is not None:
        zeroing += f" ({share.mixed_parity:.0e})"
    return [kept, zeroing, _number(max(share.runtime.values(), default=None), ".0e")]


def _notes(row: Row) -> str:
    failed: dict[str, list[str]] = defaultdict(list)
    for share, failure in row.failures().items():
        if failure is not None:
            failed[f"**{failure.kind} in {failure.stage}: {failure.reason}**"].append(percent(share))
    notes = [f"{text} at {' and '.join(shares)}" for text, shares in failed.items()]
    if row.graph:
        notes += [f"{left.reason}: {_some(left.first, left.layers)}" for left in row.graph.left_out]
        if row.graph.operators_without_rule:
            operators = row.graph.operators_without_rule
            notes.append("no rule for " + ", ".join(f"{name} ({uses})" for name, uses in operators.items()))
        if row.graph.mixed:
            notes.append(f"mixed by a normalisation: {_some(tuple(row.graph.mixed), len(row.graph.mixed))}")
    return "; ".join(notes)


def _against(rows: Sequence[Row], theirs: Mapping[str, Row]) -> str:
    table = [["model", "s", "s, Torch-Pruning", "memory", "memory, Torch-Pruning", "Torch-Pruning is right", "groups"]]
    right = equal = more = 0
    for row in rows:
        other = theirs.get(row.request.model)
        if other is None:
            continue
        verdicts = []
        for share, failure in other.failures().items():
            verdicts.append(f"{percent(share)}: {'yes' if failure is None else failure.reason}")
        is_right = all(failure is None for failure in other.failures().values())
        right += is_right
        equal += bool(is_right and other.equal_groups)
        more += bool(is_right and other.contained and not other.equal_groups)
        groups = "equal" if other.equal_groups else other.difference or ""
        mine, their = memory_beyond(row), memory_beyond(other)
        table.append(
            [
                row.request.model,
                _number(seconds(row), ".1f"),
                _number(seconds(other), ".1f"),
                f"{mine[0]:.0f} MB" if mine else "",
                f"{their[0]:.0f} MB" if their else "",
                "; ".join(dict.fromkeys(verdicts)),
                groups,
            ]
        )
    title = (
        f"Against Torch-Pruning: right on {right} of {len(table) - 1} models; on {equal} of these its groups are ours, "
        f"on {more} all that it removes channels from"
    )
    return _markdown(title, table)


def _environment(environment: Mapping[str, Any]) -> str:
    libraries = environment["libraries"]
    names = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "torch-pruning")
    versions = ", ".join(f"{name} {libraries[name]}" for name in names if name in libraries)
    cpu, git = environment["cpu"], environment["git"] or {}
    commit = f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}"
    return f"## Environment\n\n{cpu.get('model')}, {versions}, Python {environment['python']}, commit {commit}.\n"


def _markdown(title: str, table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in table]
    lines.insert(1, "| " + " | ".join("---" for _ in table[0]) + " |")
    return "\n".join([f"## {title}", "", *lines, ""])


def _some(names: Sequence[str], count: int) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {count - 3} more" if count > 3 else shown


def _listed(names: Sequence[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
