"""A comparison of two results documents for the terminal: warnings, one table, what else changed, one last sentence."""

from collections.abc import Callable, Iterator

from pydantic import JsonValue
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.harness import numerals
from benchmarks.harness.regression_limits import Judgement
from benchmarks.harness.regression_records import (
    CellChange,
    Count,
    Origin,
    Regression,
    Unit,
    VariantChange,
    written,
)
from benchmarks.harness.tables import VERDICT_STYLE

LONGEST_VALUE = 40
"""Characters of a setting that are shown; the list of a large machine's cores has many more."""


def summary(regression: Regression, judgement: Judgement) -> list[RenderableType]:
    """What to print, in this order; readable at 80 columns."""
    warnings = [Text(f"Warning: {warning}", style="yellow") for warning in regression.warnings]
    sentences = [Text(sentence) for sentence in _sentences(regression, judgement)]
    table = [_table(regression, judgement)] if regression.cells else []
    return [*warnings, *table, *sentences, Text(judgement.sentence(), style="bold")]


def _table(regression: Regression, judgement: Judgement) -> Table:
    table = Table(
        title=Text(f"NEW ({_origin(regression.new)}) against OLD ({_origin(regression.old)})"),
        title_justify="left",
        title_style="bold",
        caption=Text(_caption(regression)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("cell", overflow="fold")
    for header in ("OLD", "NEW", "ratio"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict")
    for change in regression.cells:
        table.add_row(
            Text(judgement.names.cell(change.cell)),
            _figure(change.old, change.unit),
            _figure(change.new, change.unit),
            _ratio(change),
            _verdict(change, judgement),
        )
    return table


def _caption(regression: Regression) -> str:
    spread = max(change.spread for change in regression.cells)
    return (
        "Latency at a batch size, the highest Server rate, throughput at the knee. Ratios above 1 are better, with "
        f"95 % intervals, not paired: the runs are two. Nothing is claimed within the A/A spread, here up to "
        f"{spread:.3f}×."
    )


def _sentences(regression: Regression, judgement: Judgement) -> Iterator[str]:
    names = judgement.names
    for change in regression.cells:
        if change.note:
            yield f"{names.cell(change.cell)}: {change.note}."
        if change.verdict == "unclear" and change.ratio and not change.ratio.low <= 1 <= change.ratio.high:
            yield f"{names.cell(change.cell)}: the ratio is within the A/A spread of {change.spread:.3f}×, so no claim."
    if regression.cells:
        yield _control(regression, judgement)
    for variant in regression.variants:
        yield f"{names.variant(variant)}: {'; '.join(_changed(variant))}."
    for variant in judgement.unchecked:
        yield f"{names.variant(variant)} has no accuracy in both, so the limit on accuracy was not checked."
    for where, cells in (("OLD", regression.only_old), ("NEW", regression.only_new)):
        if cells:
            yield f"Only in {where}: {', '.join(map(names.cell, cells))}."
    for failure in regression.failures:
        reason = (failure.new or failure.old or "").rstrip(".")
        where = "both" if failure.old and failure.new else "NEW" if failure.new else "OLD"
        yield f"Failed in {where}: {names.failure(failure)}: {reason}."
    if regression.environment:
        differing = (f"{item.name} {_value(item.old)} → {_value(item.new)}" for item in regression.environment)
        yield f"Environment: {'; '.join(differing)}."


def _control(regression: Regression, judgement: Judgement) -> str:
    controls = [change for change in regression.cells if change.control and change.ratio]
    if not controls:
        return (
            "Control: none, as no cell has the same file, runtime version and environment in both; a drift of the "
            "machine between the runs cannot be told from a change."
        )
    texts = (f"{judgement.names.cell(change.cell)} {_ratio(change)} {change.verdict}" for change in controls)
    return f"Control (same file, runtime version and environment, ought to be 1): {', '.join(texts)}."


def _changed(variant: VariantChange) -> Iterator[str]:
    yield "another file" if variant.artefact_changed else "the same file"
    if variant.new_device is not None:
        yield f"{variant.device} → {variant.new_device}"
    if variant.old_runtime_version != variant.new_runtime_version:
        yield f"{variant.runtime} {variant.old_runtime_version} → {variant.new_runtime_version}"
    before, after = variant.old_top1_percent, variant.new_top1_percent
    if before and after and variant.top1_points is not None:
        images = f"{before.samples:,}" + (f" → {after.samples:,}" if after.samples != before.samples else "")
        yield (
            f"{variant.metric} {before.value:.2f} {numerals.percent_interval(before)} → {after.value:.2f} "
            f"{numerals.percent_interval(after)} % ({variant.top1_points:+.2f} points, {images} images)"
        )
    elif before and after:
        yield f"accuracies of other metrics ({variant.metric})"
    elif before or after:
        yield f"{variant.metric} only in {'OLD' if before else 'NEW'}"
    for name, count in (("MACs", variant.macs), ("parameters", variant.parameters)):
        if count.old is not None or count.new is not None:
            yield f"{name} {_counts(count, numerals.compact)}"
    yield f"file {_counts(variant.size_bytes, numerals.size)}"


def _counts(count: Count, write: Callable[[int], str]) -> str:
    texts = ["not known" if number is None else write(number) for number in (count.old, count.new)]
    return texts[0] if count.old == count.new else " → ".join(texts)


def _origin(origin: Origin) -> str:
    commit = "" if origin.commit is None else f", {origin.commit[:7]}{'+' if origin.commit.endswith('+') else ''}"
    return f"{origin.created:%Y-%m-%d %H:%M}{commit}"


def _figure(number: float | None, unit: Unit) -> str:
    if number is None:
        return "none"
    return f"{numerals.significant(number)} ms" if unit == "ms" else f"{numerals.significant(number, 4)}/s"


def _ratio(change: CellChange) -> str:
    return "n/a" if change.ratio is None else written(change.ratio)


def _verdict(change: CellChange, judgement: Judgement) -> Text:
    maybe = any(change is other for other in judgement.maybe)
    return Text("unclear, maybe" if maybe else change.verdict, style=VERDICT_STYLE.get(change.verdict, ""))


def _value(value: JsonValue) -> str:
    text = "not recorded" if value is None else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"
