"""An explanation for the terminal: the bill from the expected time to the measured one, and the layers behind it."""

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table

from benchmarks.harness import numerals
from benchmarks.harness.explanation import CAUSES, UNCLEAR, Explanation, Finding, Layer, Row
from deploy.explaining_findings import remedies

NAMED_LAYERS = 3


def tables(explanation: Explanation, *, rows: int = 15) -> list[RenderableType]:
    """The explanation in sentences and tables.

    Args:
        rows: layers shown, those with most at stake first; 0 shows all.
    """
    found: list[RenderableType] = [_summary(explanation), _bill(explanation)]
    found += [_sentence(number, item) for number, item in enumerate(_reasons(explanation), 1)]
    if advice := _advice(explanation):
        found.append(advice)
    found.append(_layers(explanation, rows))
    if explanation.only_variant:
        found.append(_only(explanation.variant, explanation.only_variant, rows))
    if explanation.only_baseline:
        found.append(_only(explanation.baseline, explanation.only_baseline, rows))
    return found


def _summary(explanation: Explanation) -> str:
    speedup = explanation.baseline_ms / explanation.variant_ms
    arithmetic = []
    if explanation.macs_ratio is not None and abs(explanation.macs_ratio - 1) > 0.005:
        arithmetic.append(f"{100 * explanation.macs_ratio:.0f} % of the multiply-adds")
    if abs(explanation.peak_ratio - 1) > 0.02:
        arithmetic.append(f"a type in which this machine multiplies {numerals.ratio(explanation.peak_ratio)} as fast")
    promised = explanation.baseline_ms / explanation.expected_ms if explanation.expected_ms else 1.0
    return (
        f"{explanation.variant} takes {_ms(explanation.variant_ms)} ms, {explanation.baseline} "
        f"{_ms(explanation.baseline_ms)} ms (batch {explanation.batch_size}, {explanation.device}, layer by layer): "
        f"{numerals.ratio(speedup)} as fast. "
        + (
            f"With {' and '.join(arithmetic)} one would expect {_ms(explanation.expected_ms)} ms, "
            f"{numerals.ratio(promised)}. "
            if arithmetic
            else "Both do the same arithmetic, so one would expect the same time. "
        )
        + f"The roofline of its layers as they ran is {_ms(explanation.variant_limit_ms)} ms."
        + (f" {UNCLEAR}" if explanation.verdict == "unclear" else "")
    )


def _bill(explanation: Explanation) -> Table:
    result = _table("Where the time goes")
    result.add_column("")
    result.add_column("ms", justify="right")
    result.add_row("expected from the arithmetic", _ms(explanation.expected_ms))
    for item in explanation.findings:
        result.add_row(f"{'+' if item.ms >= 0 else '-'} {CAUSES[item.cause]}", _ms(abs(item.ms)))
    result.add_section()
    result.add_row("measured", _ms(explanation.variant_ms))
    return result


def _reasons(explanation: Explanation) -> list[Finding]:
    """Those that cost something to speak of."""
    return [item for item in explanation.findings if item.ms > 0.01 * explanation.variant_ms]


def _advice(explanation: Explanation) -> str:
    if explanation.verdict == "unclear":
        return ""
    worth = [(fix, ms) for fix, ms in remedies(explanation.findings) if ms > 0.01 * explanation.variant_ms]
    return (
        "\n".join(["What to do, by the milliseconds at stake:", *(f"  {_ms(ms)} ms  {fix}" for fix, ms in worth), ""])
        if worth
        else ""
    )


def _sentence(number: int, finding: Finding) -> str:
    names = ", ".join(finding.layers[:NAMED_LAYERS])
    more = f" and {len(finding.layers) - NAMED_LAYERS} more" if len(finding.layers) > NAMED_LAYERS else ""
    parts = [
        f"{number}. {_ms(finding.ms)} ms: {finding.fact}.",
        f"   Why: {finding.why}",
        *([f"   Layers: {names}{more}."] if names else []),
    ]
    return "\n".join(parts) + "\n"


def _layers(explanation: Explanation, count: int) -> Table:
    ranked = sorted(explanation.rows, key=lambda row: -abs(row.lost_ms))
    shown = ranked[:count] if count else ranked
    result = _table(f"Layers, those that lost or won most first ({len(shown)} of {len(ranked)})")
    result.add_column("layer", overflow="fold")
    result.add_column("widths", overflow="fold")
    for header in ("ms before", "after", "expected", "MACs"):
        result.add_column(header, justify="right", overflow="fold")
    result.add_column("bound by")
    result.add_column("of limit", justify="right")
    result.add_column("cause")
    for row in shown:
        result.add_row(
            row.name,
            _widths(row),
            _ms(row.baseline.ms),
            _ms(row.variant.ms),
            _ms(row.expected_ms),
            "" if row.macs_ratio is None else f"{100 * row.macs_ratio:.0f} %",
            row.bound,
            f"{100 * row.reached:.0f} %",
            row.cause or ("memory" if row.memory_ms else ""),
        )
    return result


def _only(name: str, layers: Sequence[Layer], count: int) -> Table:
    ranked = sorted(layers, key=lambda layer: -layer.ms)
    shown = ranked[:count] if count else ranked
    result = _table(f"Kernels that only {name} has ({len(shown)} of {len(ranked)})")
    result.add_column("kernel", overflow="fold")
    result.add_column("operator")
    result.add_column("ms", justify="right")
    result.add_column("put in by")
    for layer in shown:
        result.add_row(layer.name, layer.kind, _ms(layer.ms), "the runtime" if layer.added else "the file")
    return result


def _widths(row: Row) -> str:
    before, after = ((layer.in_channels, layer.out_channels) for layer in (row.baseline, row.variant))
    if None in before:
        return ""
    text = "×".join(map(str, before))
    return text if before == after else f"{text} → {'×'.join(map(str, after))}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _ms(value: float) -> str:
    return numerals.significant(value, 3)
