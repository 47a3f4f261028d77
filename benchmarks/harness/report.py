"""One self-contained page from a results document: it opens offline, in any browser, from a mail attachment.

The page says what was measured and, where a section has no data, why. Its figures come from `report_figures`, its
tables from `report_tables`, its words from `report_words`, `report_method` and `report.html`.
"""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from benchmarks.harness import numerals, report_method
from benchmarks.harness.plots import DARK, WHITE
from benchmarks.harness.report_explanations import explained
from benchmarks.harness.report_figures import drawings
from benchmarks.harness.report_names import QUANTITY_NAMES, display_names
from benchmarks.harness.report_tables import tables
from benchmarks.harness.report_words import Comparison, compared, failures, headline, left_out, tiles
from benchmarks.harness.results import Pruning, Results
from benchmarks.harness.statistics import SAMPLES_NEEDED

__all__ = ["Comparison", "compared", "headline", "report_html"]


def report_html(results: Results) -> str:
    """The page as text. Every value is escaped; there is no script and no reference to anything outside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": numerals.percent, "significant": numerals.significant}
    comparisons = compared(results)
    figures = {section: [_figure(one) for one in found] for section, found in drawings(results).items()}
    found = tables(results)
    drawn = [section for section, of_section in figures.items() if of_section]
    drawn += [name for name in ("server", "throughput", "roofline", "phases") if found[name] and name not in drawn]
    if figures["widths"] or figures["events"]:
        drawn.append("pruning")
    return environment.get_template("report.html").render(
        results=results,
        headline=headline(results, comparisons),
        failures=failures(results),
        tiles=tiles(results, comparisons),
        figures=figures,
        tables=found,
        drawn=drawn,
        left_out=left_out(results, drawn),
        explained=explained(results),
        widths=_widths(results.pruning),
        quantity_names=QUANTITY_NAMES,
        light=WHITE.variables(),
        dark=DARK.variables(),
        colours=len(WHITE.series),
        notes=report_method.notes(results),
        again_line=report_method.again_line(results),
        rounds_line=report_method.rounds_line(results),
        conditions_line=report_method.conditions_line(results),
        overhead_line=report_method.overhead_line(results),
        peaks=report_method.peaks(results),
        environment=report_method.flat(results.environment),
        details=_details(results),
        parities=[
            (name, report_method.flat(variant.parity))
            for name, variant in zip(display_names(results), results.variants, strict=True)
            if variant.parity
        ],
        accurate=any(variant.accuracy for variant in results.variants),
        samples_needed=SAMPLES_NEEDED,
    )


def _figure(drawing: Any) -> dict[str, Any]:
    # matplotlib escapes the text it draws, and the drawing comes from nowhere else.
    return {"title": drawing.title, "subtitle": drawing.subtitle, "svg": Markup(drawing.svg())}


def _widths(pruning: Pruning | None) -> list[dict[str, Any]]:
    if pruning is None or not pruning.layers:
        return []
    widest = max(layer.width_before for layer in pruning.layers)
    return [
        {
            "name": layer.name,
            "before": layer.width_before,
            "after": layer.width_after,
            "before_percent": round(100 * layer.width_before / widest, 2),
            "after_percent": round(100 * layer.width_after / widest, 2),
        }
        for layer in pruning.layers
    ]


def _details(results: Results) -> list[dict[str, Any]]:
    """Each file and what the runtime itself reported of executing it."""
    return [
        {
            "name": name,
            "full_name": variant.name,
            "artefact": variant.artefact,
            "proof": report_method.flat({"proof": variant.runtime.proof}),
        }
        for name, variant in zip(display_names(results), results.variants, strict=True)
    ]
