"""Ratios of latencies, with their intervals, and what they allow to say."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.statistics import (
    CONFIDENCE,
    Estimate,
    Floats,
    Rounds,
    Speedup,
    Verdict,
    as_rounds,
    draw_rounds,
    median,
    processes_of,
    tail_percent,
)

ROUNDS_TO_BOOTSTRAP = 6
"""With fewer rounds even the range of all ratios holds the true median less often than in 95 of 100 cases (all of n lie
on one side of it with probability 2^(1 - n)). A ratio's interval is then Student's of the logarithms, and nothing is
claimed of it."""

EQUIVALENT = 0.01
"""Two latencies whose ratio is known to lie within 1 % of 1 are called equivalent."""


def paired_speedup(
    baseline_rounds: Rounds,
    variant_rounds: Rounds,
    *,
    baseline: str,
    seed: int,
    again_rounds: Rounds | None = None,
    processes: Sequence[int] | None = None,
    spread: float = 1.0,
    resamples: int = 9999,
) -> Speedup:
    """Median over rounds of (median of the baseline / median of the variant), in the same round.

    The median of the logarithms is taken, so that exchanging the two gives exactly the reciprocal. The median, not
    the mean: one round disturbed by another process must not decide.

    Args:
        again_rounds: Of the same baseline once more. The geometric mean of its two medians is then what the variant
            is held against, which has less noise than either.
        processes: Which process each round ran in; one for all by default.
        spread: Ratio of the baseline to itself that the measurement cannot tell from 1, see `spread_of`.

    Raises:
        HarnessInputError: they have different numbers of rounds.
    """
    before, after = _log_medians(baseline_rounds), _log_medians(variant_rounds)
    if again_rounds is not None:
        again = _log_medians(again_rounds)
        before = (before + again) / 2 if before.size == again.size else again
    if before.size != after.size:
        raise HarnessInputError(
            f"A paired ratio needs the same rounds on both sides, but {baseline!r} has {before.size} "
            f"and the variant {after.size}: measure them together."
        )
    logs = before - after
    value = float(np.median(logs))
    if logs.size < ROUNDS_TO_BOOTSTRAP:
        reach = stats.t.ppf((1 + CONFIDENCE) / 2, logs.size - 1) * logs.std(ddof=1) / np.sqrt(logs.size)
        low, high = logs.mean() - reach, logs.mean() + reach
    else:
        drawn = draw_rounds(processes_of(processes, logs.size), np.random.default_rng(seed), resamples)
        tail = tail_percent(logs.size)
        low, high = np.percentile(np.median(logs[drawn], axis=1), [tail, 100 - tail])
    ratio = Estimate(
        value=float(np.exp(value)),
        low=float(np.exp(min(low, value))),
        high=float(np.exp(max(high, value))),
        samples=logs.size,
    )
    claim: Verdict = "unclear" if logs.size < ROUNDS_TO_BOOTSTRAP else verdict(ratio, spread=spread)
    return Speedup(**ratio.model_dump(), baseline=baseline, verdict=claim)


def unpaired_ratio(
    over: Rounds,
    under: Rounds,
    *,
    seed: int,
    over_processes: Sequence[int] | None = None,
    under_processes: Sequence[int] | None = None,
    resamples: int = 9999,
) -> Estimate:
    """Median of the round medians of one run over that of another run: no round of the one belongs to one of the other.

    Each side is drawn on its own, processes first. Between runs the differences of processes do not cancel, so the
    interval is expanded for the number of processes of the side that has fewer (for its rounds, where there is one
    process only). In simulated runs whose processes differ by twice as much as their rounds (3 processes; 10 or 30
    rounds) it then held the truth in 96 % and 93 %, and expanded for the rounds in 92 % and 87 %. Of fewer than 6
    rounds on both sides it is Welch's of the logarithms: drawn from 2 or 3 rounds each it held it in 69 % and 89 %.

    A side's random numbers come from its own figures. So exchanging the two gives exactly the reciprocal, and a run
    over itself, which is one measurement and not two, gives exactly 1. `samples` counts rounds, the smaller number.

    Raises:
        HarnessInputError: a side has less than two rounds, or a round that took no time.
    """
    sides = _timed_rounds(over), _timed_rounds(under)
    places = processes_of(over_processes, sides[0].size), processes_of(under_processes, sides[1].size)
    value = float(np.median(sides[0]) / np.median(sides[1]))
    rounds = min(side.size for side in sides)
    if np.array_equal(*sides) and np.array_equal(*places):
        low = high = 0.0
    elif max(side.size for side in sides) < ROUNDS_TO_BOOTSTRAP:
        low, high = _welch(np.log(sides[0]), np.log(sides[1]))
    else:
        top, bottom = (_drawn_logs(*side, seed, resamples) for side in zip(sides, places, strict=True))
        units = [processes if (processes := np.unique(place).size) > 1 else place.size for place in places]
        tail = tail_percent(min(units))
        low, high = np.percentile(top - bottom, [tail, 100 - tail])
    return Estimate(
        value=value, low=min(float(np.exp(low)), value), high=max(float(np.exp(high)), value), samples=rounds
    )


def spread_of(same: Estimate) -> float:
    """The spread of a ratio of something to itself: the end of its interval that is farther from 1, as a ratio >= 1."""
    return max(same.high, 1 / same.low, 1.0)


def verdict(ratio: Estimate, *, spread: float = 1.0) -> Verdict:
    """What the ratio's interval allows to say; nothing within the `spread` of the baseline against itself."""
    if ratio.low >= 1 - EQUIVALENT and ratio.high <= 1 + EQUIVALENT:
        return "equivalent"
    if ratio.low > 1 and ratio.value > spread:
        return "faster"
    if ratio.high < 1 and 1 / ratio.value > spread:
        return "slower"
    return "unclear"


def half_width(ratio: Estimate) -> float:
    """Of the interval of a ratio, as a share of the ratio."""
    return float(np.sqrt(ratio.high / ratio.low)) - 1


def _timed_rounds(rounds: Rounds) -> Floats:  # -> (R,) median of each
    medians = np.array([median(samples) for samples in as_rounds(rounds)])
    if medians.min() <= 0:
        raise HarnessInputError("A round took no time at all, so there is no ratio: measure queries that do some work.")
    return medians


def _welch(over: Floats, under: Floats) -> tuple[float, float]:
    """Interval of the difference of two means whose variances differ (Welch, Biometrika, 1947)."""
    parts = np.array([over.var(ddof=1) / over.size, under.var(ddof=1) / under.size])
    difference = float(over.mean() - under.mean())
    if parts.sum() == 0:
        return difference, difference
    freedom = parts.sum() ** 2 / (parts**2 / [over.size - 1, under.size - 1]).sum()
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(parts.sum()))
    return difference - reach, difference + reach


def _drawn_logs(medians: Floats, processes: npt.NDArray[np.int64], seed: int, resamples: int) -> Floats:
    """Logarithms of the medians of resamples; the random numbers are these rounds' own."""
    rng = np.random.default_rng([seed, *medians.view(np.uint64).tolist()])
    return np.log(np.median(medians[draw_rounds(processes, rng, resamples)], axis=1))


def _log_medians(rounds: Rounds) -> Floats:
    return np.array([np.log(median(samples)) for samples in as_rounds(rounds)])
