"""The results as tables for the terminal."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from textwrap import shorten, wrap

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from benchmarks.harness import numerals
from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.report_cells import Cell
from benchmarks.harness.report_cells import Table as Found
from benchmarks.harness.report_method import again_line, rounds_line
from benchmarks.harness.report_names import (
    UNSTATED,
    baseline_name,
    display_names,
    further_metrics,
    metric_of,
    reason_of,
    samples_named,
    sentence,
)
from benchmarks.harness.report_tables import tables as found_tables
from benchmarks.harness.report_words import macs_of
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.statistics import SAMPLES_NEEDED, Estimate

VERDICT_STYLE = {"faster": "green", "slower": "red", "equivalent": "cyan", "unclear": "yellow"}
VERDICT_MARK = {"equivalent": " =", "unclear": " ?"}

FURTHER = {
    "server": (
        "Server",
        {
            "p99 limit, ms": "limit ms",
            "highest rate / s": "queries/s",
            "p99 there, ms": "p99 ms",
            "lanes busy": "busy",
            "search ended": "search ended by",
        },
    ),
    "throughput": (
        "Throughput",
        {"highest / s": "highest/s", "knee / s": "knee/s", "latency at the knee, ms": "ms there"},
    ),
    "phases": (
        "From start to hot",
        {
            "batch": "batch",
            "load, s": "load s",
            "first inference, ms": "first ms",
            "hot, ms": "hot ms",
            "after a pause, ms": "paused ms",
            "peak memory, host": "host peak",
            "memory, device": "device",
        },
    ),
    "roofline": (
        "Share of the machine's limit",
        {
            "batch": "batch",
            "limit, ms": "limit ms",
            "measured, ms": "measured ms",
            "share reached": "reached",
            "bound by": "bound by",
        },
    ),
}
"""Tables below the first, where they were measured: which of the report's columns they have, and under what name."""

BESIDE = ("highest / s", "knee / s")
"""Columns whose figure means little without what stands below it in the report."""

GIVEN_UP = (("params",), ("params", "p99 ms"), ("params", "p99 ms", "MACs"))
"""Columns that a narrow terminal goes without, the fewest first; they stand in the report and in results.csv."""

REASON_WIDTH = 22


def summary(results: Results) -> RenderableType:
    """One row per variant and batch size, then what else was measured; made for 110 columns, readable in 80."""
    return _Summary(results)


@dataclass(frozen=True)
class _Summary:
    results: Results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _main_table(self.results, narrow=False)
        unlimited = options.update(max_width=1000)
        if console.measure(table, options=unlimited).maximum > options.max_width:
            for given_up, name_width in product(GIVEN_UP, (22, 14)):
                table = _main_table(self.results, narrow=True, without=given_up, name_width=name_width)
                if console.measure(table, options=unlimited).maximum <= options.max_width:
                    break
        yield table
        yield from _lines(self.results)
        found = found_tables(self.results)
        for section, (title, columns) in FURTHER.items():
            further = found[section]
            if further is not None:
                yield ""
                yield _further_table(title, further, columns)


def _main_table(results: Results, *, narrow: bool, without: Sequence[str] = (), name_width: int = 34) -> Table:
    shared = _shared(results)
    table = _table(" · ".join(shared))
    variants, names = results.variants, display_names(results)
    timed = [m for variant in variants for m in variant.measurements]
    known = {
        "params": any(variant.parameters is not None for variant in variants),
        "MACs": any(macs_of(variant) is not None for variant in variants),
        "top-1": any(variant.accuracy for variant in variants),
        "p99 ms": any(m.latency.p99_ms for m in timed),
        "speedup": any(m.speedup for m in timed),
    }
    known |= dict.fromkeys(without, False)
    _add_variants(table, names, max_width=name_width)
    further = further_metrics(results) if known["top-1"] else []
    for header in ("params", "MACs", "top-1"):
        if known[header]:
            table.add_column(metric_of(results) if header == "top-1" else header, justify="right", no_wrap=True)
    for header in further:
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("batch", "latency ms", "p99 ms", f"{samples_named(results)}/s", "speedup"):
        if known.get(header, True):
            table.add_column(header, justify="right", no_wrap=True)
    baseline = baseline_name(results)
    for name, variant in zip(names, variants, strict=True):
        macs = macs_of(variant)
        network = {
            "params": "n/a" if variant.parameters is None else numerals.compact(variant.parameters),
            "MACs": "n/a" if macs is None else numerals.compact(macs),
            "top-1": numerals.percent(variant.accuracy.top1_percent.value) if variant.accuracy else "n/a",
        }
        own = _own_place(variant, shared)
        several = len(variant.measurements) > 1
        for position, measurement in enumerate(variant.measurements or [None]):
            first = Text(name if position == 0 else own if position == 1 else "")
            if position == 0 and own and not several:
                first.append(f"\n{own}", style="dim")
            elif position == 1:
                first.stylize("dim")
            own_figures = [text for header, text in network.items() if known[header]]
            own_figures += [_further(variant, header) for header in further]
            cells = [text if position == 0 else "" for text in own_figures]
            last = _timed(measurement, is_baseline=variant.name == baseline, narrow=narrow) if measurement else None
            last = last or _untimed(variant)
            shown = [cell for header, cell in last.items() if known.get(header, True)]
            table.add_row(first, *cells, *shown)
    return table


def _further(variant: VariantResult, metric: str) -> str:
    value = variant.accuracy.others_percent.get(metric) if variant.accuracy else None
    return "n/a" if value is None else numerals.percent(value)


def _timed(measurement: BatchMeasurement, *, is_baseline: bool, narrow: bool) -> dict[str, str | Text]:
    latency, speedup = measurement.latency, measurement.speedup
    between = "\n" if narrow else " "
    ratio: str | Text = "baseline" if is_baseline else "n/a"
    if speedup is not None:
        text = f"{numerals.ratio(speedup.value)}{between}{numerals.ratio_interval(speedup)}"
        ratio = Text(text + VERDICT_MARK.get(speedup.verdict, ""), style=VERDICT_STYLE[speedup.verdict])
    return {
        "batch": str(measurement.batch_size),
        "latency ms": f"{numerals.value(latency.median_ms)}{between}{numerals.interval(latency.median_ms)}",
        "p99 ms": _value(latency.p99_ms),
        "rate": numerals.significant(measurement.throughput_per_s.value, 4),
        "speedup": ratio,
    }


def _untimed(variant: VariantResult) -> dict[str, str | Text]:
    state: str | Text = "not timed"
    if variant.failure:
        state = Text("\n".join(wrap(f"failed: {short_reason(variant.failure)}", REASON_WIDTH)), style="red")
    return {"batch": "-", "latency ms": state, "p99 ms": "", "rate": "", "speedup": ""}


def short_reason(failure: str) -> str:
    """The heart of a failure's message, in at most 60 characters."""
    text = re.split(r"[;(]|\. ", reason_of(failure))[0].strip(" .")
    return shorten(text, 60, placeholder=" …")


def _lines(results: Results) -> list[Text]:
    """What is to be known of the table: how it was measured, what marks mean, who failed, what is not there."""
    lines = []
    timed = [m for variant in results.variants for m in variant.measurements]
    if timed:
        how = rounds_line(results)
        again = again_line(results)
        if any(m.speedup for m in timed):
            lines.append(Text(f"Medians and paired speedups with 95 % intervals, {how}. {again}", style="dim italic"))
        else:
            lines.append(Text(f"Medians with 95 % intervals, {how}.", style="dim italic"))
        verdicts = {m.speedup.verdict for m in timed if m.speedup}
        marks = []
        if "equivalent" in verdicts:
            marks.append("= the same within 1 %")
        if "unclear" in verdicts:
            marks.append("? no claim: the interval includes 1, or the baseline differs from itself as much")
        if marks:
            lines.append(Text("; ".join(marks) + ".", style="dim italic"))
        if all(m.latency.p99_ms is None for m in timed):
            most = max(m.latency.median_ms.samples for m in timed)
            lines.append(
                Text(
                    f"No p99: it needs {SAMPLES_NEEDED[99.0]} samples, and there are {most:,} at most.",
                    style="dim italic",
                )
            )
    for name, variant in zip(display_names(results), results.variants, strict=True):
        if variant.failure:
            lines.append(Text.assemble((f"{name} failed: ", "red"), sentence(reason_of(variant.failure))))
    return lines


def _further_table(title: str, found: Found, columns: Mapping[str, str]) -> Table:
    table = _table(title)
    _add_variants(table, [row[0].text for row in found.rows], max_width=26)
    shown = [column for column in columns if column in found.columns]
    for column in shown:
        table.add_column(columns[column], justify="right")
    before = ""
    for row in found.rows:
        cells = dict(zip(found.columns, row, strict=True))
        name = cells["variant"].text
        table.add_row("" if name == before else name, *(_text(column, cells[column]) for column in shown))
        before = name
    return table


def _text(column: str, cell: Cell) -> str:
    return f"{cell.text} ({cell.small})" if column in BESIDE and cell.small else cell.text


def _add_variants(table: Table, names: Sequence[str], *, max_width: int) -> None:
    longest = max(7, *map(len, names))
    table.add_column("variant", overflow="fold", min_width=min(longest, 14), max_width=max_width)


def _table(title: str) -> Table:
    return Table(
        title=title or None,
        show_edge=False,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _shared(results: Results) -> list[str]:
    """Runtime, device and precisions, as far as all variants share them."""
    variants = results.variants
    runtimes = list(dict.fromkeys(_runtime(variant) for variant in variants))
    devices = list(dict.fromkeys(variant.runtime.device for variant in variants))
    precisions = [variant.artefact.precision for variant in variants if variant.artefact.precision not in UNSTATED]
    found = [group[0] for group in (runtimes, devices) if len(group) == 1]
    return [*found, ", ".join(dict.fromkeys(precisions))] if precisions and len(runtimes) == 1 else found


def _own_place(variant: VariantResult, shared: Sequence[str]) -> str:
    """What of runtime, device and precision does not stand in the title."""
    precision = variant.artefact.precision
    told = any(precision in part.split(", ") for part in shared) or precision in UNSTATED
    parts = [part for part in (_runtime(variant), variant.runtime.device) if part not in shared]
    return ", ".join(parts if told or not parts else [*parts, precision])


def _runtime(variant: VariantResult) -> str:
    version = variant.runtime.version
    return variant.runtime.name if version in UNSTATED else f"{variant.runtime.name} {version}"


def _value(estimate: Estimate | None) -> str:
    return numerals.value(estimate) if estimate else "n/a"
