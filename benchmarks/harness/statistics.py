"""The statistics behind every figure, each with one pinned definition.

Percentile: Hyndman and Fan's type 2 (numpy's ``averaged_inverted_cdf``). It is the smallest sample that at least
that share of the samples does not exceed; where a sample sits exactly on the step it is averaged with the next one.
The median is therefore the usual one, and a percentile never lies where nothing was observed nearby.

Intervals are 95 % percentile-bootstrap intervals, deterministic by seed. Queries of one round share the state of the
machine, and rounds of one process its place in memory, so the bootstrap is hierarchical: processes are drawn first,
then rounds of each, and for latencies queries of each round. With few rounds a percentile interval is too narrow; it
is expanded as Hesterberg proposes ("What Teachers Should Know About the Bootstrap", The American Statistician, 2015):
the quantiles taken are those at which a normal interval would have the width of Student's t. No sample is dropped.
"""

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats

from benchmarks.harness.errors import HarnessInputError

CONFIDENCE = 0.95

SAMPLES_NEEDED = {90.0: 64, 95.0: 130, 99.0: 662, 99.9: 6636}
"""Smallest sample in which, at 99 % confidence, at least two samples lie above the true percentile.

The smallest n with P(Binomial(n, 1 - p) <= 1) <= 0.01, the test of MLPerf LoadGen's early stopping
(mlcommons/inference, loadgen/early_stopping.cc) with one query over the limit.
"""

Verdict = Literal["faster", "slower", "equivalent", "unclear"]
Floats = npt.NDArray[np.float64]
Rounds = Sequence[npt.ArrayLike]


class Estimate(BaseModel):
    """A figure with its 95 % interval and the number of samples behind it. The unit stands in the field's name."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float
    low: float = Field(description="Lower end of the 95 % interval.")
    high: float = Field(description="Upper end of the 95 % interval.")
    samples: int = Field(ge=1, description="Number of samples behind the figure.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"the interval [{self.low}, {self.high}] does not contain {self.value}")
        return self


class Speedup(Estimate):
    """The baseline's latency divided by the variant's, paired by round: 2.0 means half the latency.

    `samples` counts rounds: a ratio is one figure per round.
    """

    baseline: str = Field(description="Name of the variant that is 1.0.")
    verdict: Verdict = Field(
        description="'equivalent' if the interval lies within 1 % of 1; else a claim only if the interval excludes 1 "
        "and the ratio is beyond the spread of the baseline against itself."
    )


def median(samples: npt.ArrayLike) -> float:
    """The middle sample, or the mean of the two middle ones."""
    return float(np.median(_samples(samples)))


def percentile(samples: npt.ArrayLike, percent: float) -> float | None:
    """The percentile by the module's definition; None where the samples are too few to carry it.

    Raises:
        HarnessInputError: `percent` is not one of `SAMPLES_NEEDED`, or there is no sample.
    """
    values = _samples(samples)
    if values.size < _samples_needed(percent):
        return None
    return float(np.percentile(values, percent, method="averaged_inverted_cdf"))


def median_estimate(
    rounds: Rounds, *, seed: int, processes: Sequence[int] | None = None, resamples: int = 2000
) -> Estimate:
    """Median over all samples; `processes` names the process of each round, one for all by default."""
    arrays = as_rounds(rounds)
    drawn = hierarchical_percentiles(arrays, 50.0, seed=seed, processes=processes, resamples=resamples)
    pooled = np.concatenate(arrays)
    return _estimate(median(pooled), drawn, pooled.size, len(arrays))


def percentile_estimate(
    rounds: Rounds, percent: float, *, seed: int, processes: Sequence[int] | None = None, resamples: int = 2000
) -> Estimate | None:
    """Percentile over all samples with its interval; None where the samples are too few to carry it."""
    arrays = as_rounds(rounds)
    pooled = np.concatenate(arrays)
    value = percentile(pooled, percent)
    if value is None:
        return None
    drawn = hierarchical_percentiles(arrays, percent, seed=seed, processes=processes, resamples=resamples)
    return _estimate(value, drawn, pooled.size, len(arrays))


def mean_estimate(
    rounds: Rounds, *, seed: int, processes: Sequence[int] | None = None, resamples: int = 2000
) -> Estimate:
    """Mean over all samples, with an interval that resamples whole rounds."""
    arrays = as_rounds(rounds)
    sizes = np.array([array.size for array in arrays])
    sums = np.array([array.sum() for array in arrays])
    estimate = rate_estimate(sums, sizes, seed=seed, processes=processes, resamples=resamples)
    return estimate.model_copy(update={"samples": int(sizes.sum())})


def rate_estimate(
    amounts: npt.ArrayLike,
    durations: npt.ArrayLike,
    *,
    seed: int,
    processes: Sequence[int] | None = None,
    resamples: int = 2000,
) -> Estimate:
    """Sum of `amounts` over sum of `durations` (one of each per round), with an interval over rounds."""
    over, under = _samples(amounts), _samples(durations)
    drawn = draw_rounds(processes_of(processes, over.size), np.random.default_rng(seed), resamples)
    rates = over[drawn].sum(axis=1) / under[drawn].sum(axis=1)
    return _estimate(over.sum() / under.sum(), rates, over.size, over.size)


def draw_rounds(
    processes: npt.NDArray[np.int64], rng: np.random.Generator, resamples: int
) -> npt.NDArray[np.int64]:  # (R,) process of each round -> (resamples, R) rounds
    """Resamples of rounds: processes with replacement, then as many rounds of each as the one it stands for has."""
    _, place, sizes = np.unique(processes, return_inverse=True, return_counts=True)
    members = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = rng.integers(sizes.size, size=(resamples, sizes.size))[:, place]  # (resamples, R) processes
    within = (rng.random(chosen.shape) * sizes[chosen]).astype(np.int64)
    return members[starts[chosen] + within]


def proportion_estimate_percent(share_percent: float, samples: int) -> Estimate:
    """A share of `samples` in percent, such as an accuracy, with its Wilson score interval."""
    hits = round(share_percent / 100 * samples)
    interval = stats.binomtest(hits, samples).proportion_ci(CONFIDENCE, method="wilson")
    low, high = 100 * float(interval.low), 100 * float(interval.high)
    # At 0 % and 100 % the interval ends in the estimate, but for the last bit of the arithmetic.
    return Estimate(value=share_percent, low=min(low, share_percent), high=max(high, share_percent), samples=samples)


def hierarchical_percentiles(
    rounds: Sequence[Floats], percent: float, *, seed: int, resamples: int, processes: Sequence[int] | None = None
) -> Floats:  # R rounds of n_r samples -> (resamples,)
    """Percentiles of hierarchical bootstrap resamples: processes, R rounds of them, then n_r queries within each.

    The resamples are never written out, which would take resamples x samples numbers. All samples stand in one sorted
    order; how many of a resample's queries fall into the lower half of a range is binomial per round, so each
    resample walks to its order statistic by bisection. The distribution is the same, and the cost is
    resamples x R x log2(samples). The order statistic taken is number ceil(p n), the lower one on a step.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([array.size for array in rounds])
    labels = np.repeat(np.arange(len(rounds)), sizes)
    pooled = np.concatenate(rounds)
    order = np.argsort(pooled, kind="stable")
    below = np.zeros((pooled.size + 1, len(rounds)), dtype=np.int64)  # below[i, r]: of the first i, those of round r
    np.cumsum(labels[order, None] == np.arange(len(rounds)), axis=0, out=below[1:])

    chosen = draw_rounds(processes_of(processes, len(rounds)), rng, resamples)
    inside = sizes[chosen]  # (resamples, R) queries still inside each resample's range
    rank = np.ceil(np.round(inside.sum(axis=1) * percent / 100, 9)).astype(np.int64)
    start = np.zeros(resamples, dtype=np.int64)
    stop = np.full(resamples, pooled.size)
    while (stop - start > 1).any():
        middle = (start + stop) // 2
        first = below[start[:, None], chosen]
        available = below[stop[:, None], chosen] - first
        share = (below[middle[:, None], chosen] - first) / np.maximum(available, 1)
        lower = rng.binomial(inside, share)
        found = lower.sum(axis=1) >= rank
        rank -= np.where(found, 0, lower.sum(axis=1))
        inside = np.where(found[:, None], lower, inside - lower)
        start, stop = np.where(found, start, middle), np.where(found, middle, stop)
    return pooled[order][start]


def _estimate(value: float, distribution: Floats, samples: int, rounds: int) -> Estimate:
    tail = tail_percent(rounds)
    low, high = np.percentile(distribution, [tail, 100 - tail])
    # With few rounds the resamples of a skewed sample can lie wholly to one side of the estimate itself.
    return Estimate(value=float(value), low=float(min(low, value)), high=float(max(high, value)), samples=int(samples))


def tail_percent(rounds: int) -> float:
    """Percent of resamples to leave out at each end: 2.5 for many rounds, fewer for few (expanded percentiles)."""
    if rounds < 2:
        return 50 * (1 - CONFIDENCE)
    width = np.sqrt(rounds / (rounds - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, rounds - 1)
    return 100 * float(stats.norm.cdf(-width))


def processes_of(processes: Sequence[int] | None, rounds: int) -> npt.NDArray[np.int64]:
    if processes is None:
        return np.zeros(rounds, dtype=np.int64)
    if len(processes) != rounds:
        raise HarnessInputError(f"There are {rounds} rounds, but processes are named for {len(processes)}.")
    return np.asarray(processes, dtype=np.int64)


def _samples_needed(percent: float) -> int:
    if percent not in SAMPLES_NEEDED:
        known = ", ".join(f"{known:g}" for known in SAMPLES_NEEDED)
        raise HarnessInputError(f"Percentile {percent:g} is not reported: choose one of {known}.")
    return SAMPLES_NEEDED[percent]


def _samples(samples: npt.ArrayLike) -> Floats:
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise HarnessInputError("There are no samples to summarise: measure at least one query.")
    return values


def as_rounds(rounds: Rounds) -> list[Floats]:
    arrays = [_samples(samples) for samples in rounds]
    if len(arrays) < 2:
        raise HarnessInputError(f"An interval needs at least 2 rounds and there are {len(arrays)}.")
    return arrays
