"""The figures of single layers: a variant's beside the baseline's, and how near each is to the machine's limit."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

from benchmarks.harness import plots_load
from benchmarks.harness.plots import Drawing
from benchmarks.harness.report_names import names_of, series_of, slugs_of
from benchmarks.harness.report_words import compared
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.roofline import LayerLimit, RooflineResult

SLOWEST = 20
"""Layers that are drawn; the others are counted in the subtitle."""


def layer_drawings(results: Results) -> list[Drawing]:
    """Each variant beside its baseline where that has times too, else alone."""
    names, series, slugs = names_of(results), series_of(results), slugs_of(results)
    comparisons = compared(results)
    baselines = {id(comparison.variant): comparison.baseline for comparison in comparisons}
    beside_others = {id(one.baseline) for one in comparisons if any(map(_timed, one.variant.rooflines))}
    found = []
    for variant in results.variants:
        baseline = baselines.get(id(variant))
        if id(variant) in beside_others:
            continue
        for roofline in filter(_timed, variant.rooflines):
            before = _roofline_at(baseline, roofline.batch_size) if baseline else None
            pairs = layer_pairs(before, roofline)
            shown = sorted(pairs, key=lambda pair: -max(pair.baseline_ms or 0, pair.variant_ms or 0))[:SLOWEST]
            beside = names[id(baseline)] if baseline and before else ""
            found.append(
                Drawing(
                    name=f"layers_{slugs[id(variant)]}_batch{roofline.batch_size}",
                    section="Layers",
                    title=names[id(variant)] + (f" against {beside}" if beside else ""),
                    subtitle=_share_shown(roofline, shown, len(pairs)),
                    description=f"Time of the slowest layers of {names[id(variant)]} at batch {roofline.batch_size}",
                    draw=partial(
                        plots_load.layer_times,
                        layers=shown,
                        baseline=beside,
                        variant=names[id(variant)],
                        series=series[id(variant)],
                    ),
                )
            )
    return found


def layer_pairs(before: RooflineResult | None, after: RooflineResult) -> list[plots_load.LayerPair]:
    """Layers with a time, of both where their names match; those of the variant first, in its order."""
    old, new = _by_name(before), _by_name(after)
    return [
        plots_load.LayerPair(
            name=name if count == 0 else f"{name} ({count + 1})",
            baseline_ms=old[key].measured_ms if key in old else None,
            variant_ms=new[key].measured_ms if key in new else None,
            variant_limit_ms=new[key].limit_ms if key in new else None,
            note=_layer_note(new.get(key)),
        )
        for key in dict.fromkeys((*new, *old))
        for name, count in (key,)
    ]


def _by_name(roofline: RooflineResult | None) -> dict[tuple[str, int], LayerLimit]:
    """The layers with a time, by name and, should a name come again, its count."""
    found: dict[tuple[str, int], LayerLimit] = {}
    seen: Counter[str] = Counter()
    for layer in roofline.layers if roofline else ():
        if layer.measured_ms is not None:
            found[layer.name, seen[layer.name]] = layer
            seen[layer.name] += 1
    return found


def _layer_note(layer: LayerLimit | None) -> str:
    if layer is None:
        return "not in the variant"
    return f"{layer.bound} bound" if layer.reached is None else f"{100 * layer.reached:.0f} % of {layer.bound} limit"


def _share_shown(roofline: RooflineResult, shown: Sequence[plots_load.LayerPair], layers: int) -> str:
    batch = f"batch {roofline.batch_size}"
    total = sum(layer.measured_ms or 0 for layer in roofline.layers)
    if len(shown) == layers or not total:
        return f"{batch}, all {layers} layers"
    share = 100 * sum(pair.variant_ms or 0 for pair in shown) / total
    return f"{batch}, the slowest {len(shown)} of {layers} layers: {share:.0f} % of the time"


def _timed(roofline: RooflineResult) -> bool:
    return any(layer.measured_ms is not None for layer in roofline.layers)


def _roofline_at(variant: VariantResult, batch_size: int) -> RooflineResult | None:
    return next((r for r in variant.rooflines if r.batch_size == batch_size and _timed(r)), None)
