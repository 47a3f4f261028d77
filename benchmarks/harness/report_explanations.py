"""Why a variant is as fast as it is: the bill from the expected time to the measured one, as figure and sentences."""

from functools import partial
from typing import Any

from benchmarks.harness import numerals, plots_load
from benchmarks.harness.explanation import CAUSES, UNCLEAR, Explanation, Finding
from benchmarks.harness.plots import Drawing
from benchmarks.harness.report_names import display_names, listed, sentence, slug
from benchmarks.harness.results import Results

WORTH_NAMING = 0.01
"""Share of the measured time below which a finding gets no sentence."""

NAMED_LAYERS = 3


def explanation_drawings(results: Results) -> list[Drawing]:
    """One bill for each explanation."""
    found = []
    for explanation, baseline, variant in _named(results):
        steps = [(CAUSES[finding.cause], finding.ms) for finding in explanation.findings]
        found.append(
            Drawing(
                name=f"time_went_{slug(variant)}_batch{explanation.batch_size}",
                section="Where the time went",
                title=f"{variant} against {baseline}",
                subtitle=f"batch {explanation.batch_size}, {explanation.device}, timed layer by layer",
                description=f"From the time expected of {variant} to the time measured, reason by reason",
                draw=partial(
                    plots_load.bill,
                    steps=steps,
                    baseline_ms=explanation.baseline_ms,
                    expected_ms=explanation.expected_ms,
                    measured_ms=explanation.variant_ms,
                ),
            )
        )
    return found


def explained(results: Results) -> list[dict[str, Any]]:
    """Each explanation in sentences: what was to be expected, and every reason that costs something to speak of."""
    return [
        {
            "summary": _summary(explanation, baseline, variant),
            "reasons": [
                _reason(finding)
                for finding in explanation.findings
                if finding.ms > WORTH_NAMING * explanation.variant_ms
            ],
        }
        for explanation, baseline, variant in _named(results)
    ]


def _named(results: Results) -> list[tuple[Explanation, str, str]]:
    names = dict(zip((variant.name for variant in results.variants), display_names(results), strict=True))
    return [
        (one, names.get(one.baseline, one.baseline), names.get(one.variant, one.variant))
        for one in results.explanations
    ]


def _summary(explanation: Explanation, baseline: str, variant: str) -> str:
    arithmetic = []
    if explanation.macs_ratio is not None and abs(explanation.macs_ratio - 1) > 0.005:
        arithmetic.append(f"{100 * explanation.macs_ratio:.0f} % of the multiply-adds")
    if abs(explanation.peak_ratio - 1) > 0.02:
        arithmetic.append(f"a type in which this machine multiplies {numerals.ratio(explanation.peak_ratio)} as fast")
    expected = (
        f"With {listed(arithmetic)} one would expect {_ms(explanation.expected_ms)}."
        if arithmetic
        else "Both do the same arithmetic, so one would expect the same time."
    )
    return (
        f"{variant} takes {_ms(explanation.variant_ms)}, {baseline} {_ms(explanation.baseline_ms)}. {expected} "
        f"The limit of its layers as they ran is {_ms(explanation.variant_limit_ms)}."
        f"{' ' + UNCLEAR if explanation.verdict == 'unclear' else ''}"
    )


def _reason(finding: Finding) -> dict[str, str]:
    more = len(finding.layers) - NAMED_LAYERS
    names = ", ".join(finding.layers[:NAMED_LAYERS]) + (f" and {more} more" if more > 0 else "")
    return {
        "cost": _ms(finding.ms),
        "fact": sentence(finding.fact),
        "why": sentence(finding.why),
        "fix": sentence(finding.fix),
        "layers": names,
    }


def _ms(value: float) -> str:
    return f"{numerals.significant(value)} ms"
