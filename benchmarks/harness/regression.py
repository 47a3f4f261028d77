"""Two results documents against each other: what became slower, faster, less accurate, or failed.

The documents come from two runs, so no round of one belongs to a round of the other: the ratios are not paired, and
what the machine did between the runs is in them. Two things show how much that may be. The baseline against itself
(A/A) in both documents is a floor: nothing smaller is claimed. And a cell whose file, runtime version and environment
are the same in both is a control: it ought to be 1, and if it is not, the machine changed.
"""

from collections.abc import Iterable, Iterator, Sequence

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.ratios import spread_of, verdict
from benchmarks.harness.regression_environment import Difference, commit, differences
from benchmarks.harness.regression_figures import Section, compared, place
from benchmarks.harness.regression_records import (
    Cell,
    CellChange,
    Count,
    Failure,
    Origin,
    Regression,
    VariantChange,
    described,
    written,
)
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.statistics import Estimate
from benchmarks.harness.throughput import ThroughputResult

Pair = tuple[VariantResult, VariantResult]
Key = tuple[int | None, str]
"""Batch size and scenario."""


def compare_results(old: Results, new: Results) -> Regression:
    """Compare all cells that two documents have in common.

    Cells correspond by variant, runtime, device, precision, batch size and scenario. A variant that is left over in
    both and differs in the device alone is compared, too, with a warning.

    Raises:
        HarnessInputError: they have nothing in common, or the samples of a cell cannot be used.
    """
    pairs = _pairs(old, new)
    environment = differences(old.environment, new.environment)
    changes: list[CellChange] = []
    only_old = _cells_alone(old, [before for before, _ in pairs])
    only_new = _cells_alone(new, [after for _, after in pairs])
    for before, after in pairs:
        mine, others = _sections(before), _sections(after)
        changes += [
            _change(before, after, mine[key], others[key], same_environment=not environment)
            for key in mine
            if key in others
        ]
        only_old += [_cell(before, mine[key]) for key in mine if key not in others]
        only_new += [_cell(after, others[key]) for key in others if key not in mine]
    failures = sorted(_failures(old, new, pairs), key=lambda failure: not failure.regression)
    if not changes and not any(failure.regression for failure in failures):
        raise HarnessInputError(
            f"There is nothing to compare: OLD has {_listed(only_old)}; NEW has {_listed(only_new)}. Cells correspond "
            "by variant, precision, runtime, device, batch size and scenario: measure the same ones."
        )
    changes.sort(key=lambda change: (change.verdict != "slower", change.ratio.value if change.ratio else 0.0))
    return Regression(
        old=Origin(created=old.created, commit=commit(old.environment)),
        new=Origin(created=new.created, commit=commit(new.environment)),
        warnings=[*_of_machines(pairs, environment), *_of_controls(changes)],
        cells=changes,
        only_old=only_old,
        only_new=only_new,
        variants=[_variant_change(before, after) for before, after in pairs],
        failures=failures,
        environment=environment,
    )


def _identity(variant: VariantResult) -> tuple[str, str, str, str]:
    return variant.name, variant.runtime.name, variant.runtime.device, variant.artefact.precision


def _pairs(old: Results, new: Results) -> list[Pair]:
    found = {_identity(variant): variant for variant in new.variants}
    pairs = [(variant, found[_identity(variant)]) for variant in old.variants if _identity(variant) in found]
    taken = {_identity(variant) for variant, _ in pairs}

    def left(document: Results) -> dict[tuple[str, ...], list[VariantResult]]:
        groups: dict[tuple[str, ...], list[VariantResult]] = {}
        for variant in document.variants:
            if _identity(variant) not in taken:
                groups.setdefault((variant.name, variant.runtime.name, variant.artefact.precision), []).append(variant)
        return groups

    others = left(new)
    for key, variants in left(old).items():
        if len(variants) == len(others.get(key, [])) == 1:
            pairs.append((variants[0], others[key][0]))
    return pairs


def _cell(variant: VariantResult, section: Section) -> Cell:
    name, runtime, device, precision = _identity(variant)
    return Cell(
        variant=name,
        runtime=runtime,
        device=device,
        precision=precision,
        batch_size=None if isinstance(section, ThroughputResult) else section.batch_size,
        scenario="Throughput" if isinstance(section, ThroughputResult) else section.scenario,
    )


def _sections(variant: VariantResult) -> dict[Key, Section]:
    """Everything of a variant that has a figure."""
    found: dict[Key, Section] = {}
    sections: Iterable[Section | None] = (*variant.measurements, variant.server, variant.throughput)
    for section in sections:
        if section is None:
            continue
        cell = _cell(variant, section)
        if (cell.batch_size, cell.scenario) in found:
            raise HarnessInputError(f"A document has {described(cell)} twice: measure it again.")
        found[cell.batch_size, cell.scenario] = section
    return found


def _cells_alone(document: Results, paired: Sequence[VariantResult]) -> list[Cell]:
    """The cells of variants that have no counterpart."""
    known = {_identity(variant) for variant in paired}
    alone = [variant for variant in document.variants if _identity(variant) not in known]
    return [_cell(variant, section) for variant in alone for section in _sections(variant).values()]


def _change(
    before: VariantResult, after: VariantResult, old: Section, new: Section, *, same_environment: bool
) -> CellChange:
    cell = _cell(before, old)
    try:
        found = compared(old, new)
    except HarnessInputError as error:
        raise HarnessInputError(f"{described(cell)} cannot be compared: {error}") from error
    spread = max(map(spread_of, _again(before, after, old, new)), default=1.0)
    return CellChange(
        cell=cell,
        new_device=_new_device(before, after),
        unit=found.unit,
        old=found.old,
        new=found.new,
        ratio=found.ratio,
        spread=spread,
        verdict=verdict(found.ratio, spread=spread) if found.ratio else found.unmeasured,
        control=same_environment
        and before.artefact.sha256 == after.artefact.sha256
        and before.runtime.version == after.runtime.version
        and before.runtime.device == after.runtime.device,
        note=found.note,
    )


def _again(before: VariantResult, after: VariantResult, old: Section, new: Section) -> Iterator[Estimate]:
    """The baseline against itself, in both: of the cell, or where it has none of its own, of all of its variant's."""
    own = [section for section in (old, new) if isinstance(section, BatchMeasurement)]
    for measurement in own or [*before.measurements, *after.measurements]:
        if measurement.again is not None:
            yield measurement.again


def _variant_change(before: VariantResult, after: VariantResult) -> VariantChange:
    old_top1, new_top1 = (it.accuracy.top1_percent if it.accuracy else None for it in (before, after))
    metrics = {it.accuracy.metric for it in (before, after) if it.accuracy}
    return VariantChange(
        variant=before.name,
        runtime=before.runtime.name,
        device=before.runtime.device,
        new_device=_new_device(before, after),
        precision=before.artefact.precision,
        artefact_changed=before.artefact.sha256 != after.artefact.sha256,
        old_sha256=before.artefact.sha256,
        new_sha256=after.artefact.sha256,
        old_runtime_version=before.runtime.version,
        new_runtime_version=after.runtime.version,
        old_top1_percent=old_top1,
        new_top1_percent=new_top1,
        top1_points=new_top1.value - old_top1.value if old_top1 and new_top1 and len(metrics) == 1 else None,
        metric=" and ".join(sorted(metrics)) or "top-1",
        parameters=Count(old=before.parameters, new=after.parameters),
        macs=Count(old=before.macs, new=after.macs),
        size_bytes=Count(old=before.artefact.size_bytes, new=after.artefact.size_bytes),
    )


def _new_device(before: VariantResult, after: VariantResult) -> str | None:
    return after.runtime.device if after.runtime.device != before.runtime.device else None


def _failures(old: Results, new: Results, pairs: Sequence[Pair]) -> Iterator[Failure]:
    paired = {_identity(variant) for pair in pairs for variant in pair}
    both: list[tuple[VariantResult | None, VariantResult | None]] = [
        *pairs,
        *((variant, None) for variant in old.variants if _identity(variant) not in paired),
        *((None, variant) for variant in new.variants if _identity(variant) not in paired),
    ]
    for before, after in both:
        variant = before or after
        assert variant is not None
        earlier, later = _failed(before), _failed(after)
        worked = (
            {place(p.batch_size, p.lanes) for p in before.throughput.points} if before and before.throughput else ()
        )
        for what in {**earlier, **later}:
            yield Failure(
                variant=variant.name,
                runtime=variant.runtime.name,
                device=variant.runtime.device,
                precision=variant.artefact.precision,
                what=what,
                old=earlier.get(what),
                new=later.get(what),
                regression=what not in earlier and (what is None or what in worked),
            )


def _failed(variant: VariantResult | None) -> dict[str | None, str]:
    """What of a variant failed, None for itself -> why."""
    if variant is None:
        return {}
    found: dict[str | None, str] = {} if variant.failure is None else {None: variant.failure}
    points = variant.throughput.failed if variant.throughput else []
    return found | {place(point.batch_size, point.lanes): point.reason for point in points}


def _of_machines(pairs: Sequence[Pair], environment: Sequence[Difference]) -> Iterator[str]:
    for before, after in pairs:
        if before.runtime.device != after.runtime.device:
            yield (
                f"{before.name} ran on {before.runtime.device} in OLD and on {after.runtime.device} in NEW: its ratios "
                "tell of the devices, too."
            )
    for item in environment:
        if item.hardware:
            yield (
                f"{item.name} was {item.old or 'not recorded'} in OLD and is {item.new or 'not recorded'} in NEW: the "
                "ratios tell of the machines, too."
            )


def _of_controls(changes: Sequence[CellChange]) -> Iterator[str]:
    for change in changes:
        if change.control and change.verdict in ("slower", "faster"):
            figures = written(change.ratio) if change.ratio else change.note
            yield (
                f"{described(change.cell)} is the same file on the same runtime and environment, and yet it is "
                f"{change.verdict}: {figures}. The machine changed between the runs, and by as much the other ratios "
                "may be off."
            )


def _listed(cells: Sequence[Cell]) -> str:
    return "; ".join(map(described, cells)) or "no figures"
