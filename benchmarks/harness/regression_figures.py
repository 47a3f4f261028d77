"""One figure of two runs: the latency of a batch size, the highest Server rate, or the throughput at the knee."""

from typing import NamedTuple

from benchmarks.harness.cells import BatchMeasurement
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.ratios import unpaired_ratio
from benchmarks.harness.regression_records import Unit
from benchmarks.harness.server import ServerResult
from benchmarks.harness.statistics import Estimate, Verdict, median
from benchmarks.harness.throughput import ThroughputPoint, ThroughputResult

Section = BatchMeasurement | ServerResult | ThroughputResult


class Compared(NamedTuple):
    """Both figures, and their ratio: above 1 the new one is better."""

    unit: Unit
    old: float | None
    new: float | None
    ratio: Estimate | None
    note: str | None = None
    unmeasured: Verdict = "unclear"
    """What is known without a ratio."""


def compared(old: Section, new: Section) -> Compared:
    """Compare two of one kind.

    Raises:
        HarnessInputError: the samples of one cannot be used.
    """
    if isinstance(old, BatchMeasurement) and isinstance(new, BatchMeasurement):
        return _latencies(old, new)
    if isinstance(old, ServerResult) and isinstance(new, ServerResult):
        return _server_rates(old, new)
    if isinstance(old, ThroughputResult) and isinstance(new, ThroughputResult):
        return _throughputs(old, new)
    raise TypeError(f"{type(old).__name__} and {type(new).__name__} are of different kinds")


def place(batch_size: int, lanes: int) -> str:
    """A point of the throughput in words."""
    return f"batch {batch_size} on {lanes} lane{'s' if lanes > 1 else ''}"


def _latencies(old: BatchMeasurement, new: BatchMeasurement) -> Compared:
    found = unpaired_ratio(
        old.samples_ms, new.samples_ms, over_processes=old.processes, under_processes=new.processes, seed=0
    )
    before, after = (median([median(samples) for samples in item.samples_ms]) for item in (old, new))
    lacking = [name for name, item in (("OLD", old), ("NEW", new)) if item.again is None]
    note = f"{' and '.join(lacking)} did not measure the baseline against itself" if lacking else None
    return Compared("ms", before, after, found, note)


def _server_rates(old: ServerResult, new: ServerResult) -> Compared:
    """The truth of each search lies between the highest rate that met the limit and the lowest that missed it."""
    plain = Compared("queries/s", old.rate_per_s, new.rate_per_s, None)
    if old.limit_ms != new.limit_ms:
        return plain._replace(note=f"the limit was {old.limit_ms:g} ms in OLD and is {new.limit_ms:g} ms in NEW")
    if old.lanes != new.lanes:
        return plain._replace(note=f"lanes: {old.lanes} in OLD, {new.lanes} in NEW")
    samples = max(1, min(len(old.points), len(new.points)))
    if old == new and old.rate_per_s:  # one search, not two
        return plain._replace(ratio=Estimate(value=1, low=1, high=1, samples=samples))
    if not (old.rate_per_s and new.rate_per_s and old.failing_per_s and new.failing_per_s):
        return plain._replace(note=_unbracketed(old, new), unmeasured=_lost_or_won(old, new))
    value = new.rate_per_s / old.rate_per_s
    found = Estimate(
        value=value,
        low=min(value, new.rate_per_s / old.failing_per_s),
        high=max(value, new.failing_per_s / old.rate_per_s),
        samples=samples,
    )
    note = None if old.seed == new.seed else "the queries came at other moments (another seed)"
    return plain._replace(ratio=found, note=note)


def _unbracketed(old: ServerResult, new: ServerResult) -> str:
    return "; ".join(
        f"{name} found no rate that {'meets' if item.rate_per_s is None else 'misses'} the limit: "
        f"{(item.reason or item.stopped_by).rstrip('.')}"
        for name, item in (("OLD", old), ("NEW", new))
        if item.rate_per_s is None or item.failing_per_s is None
    )


def _lost_or_won(old: ServerResult, new: ServerResult) -> Verdict:
    """A limit that no load meets any more is a loss, of which only the size is unknown."""
    if old.rate_per_s is not None and new.rate_per_s is None and new.stopped_by == "limit":
        return "slower"
    if new.rate_per_s is not None and old.rate_per_s is None and old.stopped_by == "limit":
        return "faster"
    return "unclear"


def _throughputs(old: ThroughputResult, new: ThroughputResult) -> Compared:
    before, after = _knee(old), _knee(new)
    if before is None or after is None:
        note = "; ".join(
            f"{name} has no throughput: {(item.reason or 'no point').rstrip('.')}"
            for name, item in (("OLD", old), ("NEW", new))
            if item.knee is None
        )
        old_rate, new_rate = (None if point is None else median(_rates(point)) for point in (before, after))
        return Compared("samples/s", old_rate, new_rate, None, note)
    old_rates, new_rates = _rates(before), _rates(after)
    moved = (before.batch_size, before.lanes) != (after.batch_size, after.lanes)
    return Compared(
        "samples/s",
        median(old_rates),
        median(new_rates),
        unpaired_ratio([[rate] for rate in new_rates], [[rate] for rate in old_rates], seed=0),
        f"the knee was at {place(before.batch_size, before.lanes)} and is at {place(after.batch_size, after.lanes)}"
        if moved
        else None,
    )


def _knee(result: ThroughputResult) -> ThroughputPoint | None:
    if result.knee is None:
        return None
    if not 0 <= result.knee < len(result.points):
        raise HarnessInputError(f"The knee is point {result.knee} of {len(result.points)}: measure it again.")
    return result.points[result.knee]


def _rates(point: ThroughputPoint) -> list[float]:
    """Samples a second in each round."""
    counts, walls_ms = point.round_samples, point.round_wall_ms
    if len(counts) != len(walls_ms) or min((*counts, *walls_ms), default=0) <= 0:
        raise HarnessInputError("The rounds of the throughput lack their time or their samples: measure it again.")
    return [1e3 * count / wall_ms for count, wall_ms in zip(counts, walls_ms, strict=True)]
