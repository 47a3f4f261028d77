"""The results as a table for the terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.harness import numerals
from benchmarks.harness.results import BatchMeasurement, Results, VariantResult

VERDICT_STYLE = {"faster": "green", "slower": "red", "unclear": "yellow"}


def summary(results: Results) -> RenderableType:
    """One table per runtime and device, one row per variant and batch size; readable at 100 columns.

    Figures of different runtimes or devices never share a table: they do not compare.
    """
    groups: dict[tuple[str, str, str], list[VariantResult]] = {}
    for variant in results.variants:
        runtime = variant.runtime
        groups.setdefault((runtime.name, runtime.version, runtime.device), []).append(variant)
    return Group(*(_table(key, variants) for key, variants in groups.items()))


def _table(key: tuple[str, str, str], variants: list[VariantResult]) -> Table:
    precisions = list(dict.fromkeys(variant.artefact.precision for variant in variants))
    table = Table(
        title=" · ".join((f"{key[0]} {key[1]}", key[2], ", ".join(precisions))),
        title_justify="left",
        title_style="bold",
        caption=_caption(variants),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("variant", overflow="fold", max_width=16)
    for header in ("params", "MACs", "top-1", "batch"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("latency ms", "images/s", "speedup"):
        table.add_column(header, justify="right")
    for variant in variants:
        for position, measurement in enumerate(variant.measurements or [None]):
            network = _network_cells(variant, len(precisions) > 1) if position == 0 else [""] * 4
            table.add_row(*network, *_measured_cells(measurement))
    return table


def _network_cells(variant: VariantResult, several_precisions: bool) -> list[str]:
    precision = variant.artefact.precision
    name = f"{variant.name} {precision}" if several_precisions and precision not in variant.name else variant.name
    accuracy = numerals.percent(variant.accuracy.top1_percent.value) if variant.accuracy else "n/a"
    return [name, numerals.compact(variant.parameters), numerals.compact(variant.macs), accuracy]


def _measured_cells(measurement: BatchMeasurement | None) -> list[str | Text]:
    if measurement is None:
        return ["-", "not timed", "", ""]
    median = measurement.latency.median_ms
    speedup: str | Text = "baseline"
    if measurement.speedup:
        text = f"{numerals.ratio(measurement.speedup.value)} {numerals.ratio_interval(measurement.speedup)}"
        speedup = Text(text, style=VERDICT_STYLE[measurement.speedup.verdict])
        if measurement.speedup.verdict == "unclear":
            speedup.append(" ?")
    return [
        str(measurement.batch_size),
        f"{numerals.value(median)} {numerals.interval(median)}",
        numerals.significant(measurement.throughput_per_s.value, 4),
        speedup,
    ]


def _caption(variants: list[VariantResult]) -> str | None:
    timed = [measurement for variant in variants for measurement in variant.measurements]
    if not timed:
        return None
    rounds = sorted({len(measurement.samples_ms) for measurement in timed})
    spread = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    unclear = any(m.speedup and m.speedup.verdict == "unclear" for m in timed)
    note = "; ? = the interval includes 1, no claim" if unclear else ""
    return f"Median latency and paired speedup with 95 % intervals over {spread} interleaved rounds{note}."
