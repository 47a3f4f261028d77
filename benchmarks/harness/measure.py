"""Measuring variants against each other: complete rounds, interleaved in random order, every sample kept.

A machine drifts (temperature, other processes), so variants measured one after the other compare the machine with
itself. Here each round runs every variant once, in an order drawn anew, and ratios are taken within rounds.
"""

import gc
import math
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.statistics import (
    Estimate,
    Speedup,
    mean_estimate,
    median,
    median_estimate,
    paired_speedup,
    percentile_estimate,
    rate_estimate,
)

Scenario = Literal["SingleStream", "Offline"]
Clock = Callable[[], int]
Nanoseconds = npt.NDArray[np.int64]

MIN_ROUNDS = 2  # below two rounds there is no interval


@dataclass(frozen=True)
class Variant:
    """One thing to time: `step` runs one query of `batch_size` images to its end, and returns nothing.

    `close`, if given, is called once when the measurement is over, whether it succeeded or not.
    """

    name: str
    step: Callable[[], None]
    batch_size: int = 1
    close: Callable[[], None] | None = None


@dataclass(frozen=True)
class Measured:
    """What one variant took. `rounds_ns` holds every sample: one array per round, one integer per query."""

    name: str
    batch_size: int
    scenario: Scenario
    rounds_ns: tuple[Nanoseconds, ...]
    median_ms: Estimate
    mean_ms: Estimate
    p90_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None
    throughput_per_s: Estimate
    speedup: Speedup | None


@dataclass(frozen=True)
class Measurement:
    """The variants measured together, by name, and how the measurement went.

    `stopped_by` is "time" if the time budget ended before all planned rounds or queries, else "rounds".
    `order` gives each round's order of variants.
    """

    baseline: str
    variants: dict[str, Measured]
    order: tuple[tuple[str, ...], ...]
    stopped_by: Literal["rounds", "time"]
    elapsed_s: float


def measure(
    variants: Sequence[Variant],
    *,
    baseline: str,
    rounds: int = 10,
    min_seconds_per_round: float = 1.0,
    min_queries_per_round: int = 50,
    warmup_seconds: float = 0.1,
    time_budget_s: float = 60.0,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Measurement:
    """Time the variants in randomised complete rounds and summarise them.

    Per round each variant is warmed for `warmup_seconds` (one query at least) and then runs as many queries as
    reach both minima. If that would exceed `time_budget_s`, the queries per round are scaled down to fit, to one
    query at the least; if the budget still ends early, measuring stops after a complete round, never before two.

    A latency is the time from the end of one query to the end of the next: back to back, on one clock, including
    about 0.1 µs of the loop itself. Garbage collection is off and nothing is allocated while the clock runs.

    Args:
        variants: All of one batch size, names unique.
        baseline: Name of the variant that the others are divided by.
        on_round: Called with (rounds done, rounds planned).
        clock: Monotonic nanoseconds; tests give a fake one.

    Raises:
        HarnessInputError: the variants, the baseline or a setting cannot be used.
        HarnessError: a variant raised, or the clock saw no time pass.
    """
    _check(
        variants,
        baseline,
        rounds,
        (min_seconds_per_round, min_queries_per_round, warmup_seconds, time_budget_s),
    )
    begin = clock()
    gc.collect()  # once: with torch loaded it takes 0.2 s, and just before a round it would cool what is warm
    try:
        query_ns = {variant.name: _warm(variant, warmup_seconds, clock) for variant in variants}
        remaining_s = time_budget_s - (clock() - begin) / 1e9
        wanted = {
            name: max(min_queries_per_round, math.ceil(min_seconds_per_round * 1e9 / ns))
            for name, ns in query_ns.items()
        }
        queries, shortened = _fit(wanted, query_ns, warmup_seconds, remaining_s / rounds)
        stamps = {name: array("q", bytes(8 * (count + 1))) for name, count in queries.items()}
        taken: dict[str, list[Nanoseconds]] = {variant.name: [] for variant in variants}
        order = []
        rng = np.random.default_rng(seed)
        for done in range(1, rounds + 1):
            shuffled = [variants[index] for index in rng.permutation(len(variants))]
            order.append(tuple(variant.name for variant in shuffled))
            for variant in shuffled:
                _warm(variant, warmup_seconds, clock)
                taken[variant.name].append(_time(variant, stamps[variant.name], clock))
            if on_round is not None:
                on_round(done, rounds)
            if done >= MIN_ROUNDS and done < rounds and clock() - begin >= time_budget_s * 1e9:
                shortened = True
                break
    finally:
        for variant in variants:
            if variant.close is not None:
                variant.close()
    return Measurement(
        baseline=baseline,
        variants={
            variant.name: _summarise(variant, taken[variant.name], taken[baseline], baseline, seed)
            for variant in variants
        },
        order=tuple(order),
        stopped_by="time" if shortened else "rounds",
        elapsed_s=(clock() - begin) / 1e9,
    )


def _check(variants: Sequence[Variant], baseline: str, rounds: int, settings: tuple[float, int, float, float]) -> None:
    names = [variant.name for variant in variants]
    min_seconds, min_queries, warmup_seconds, time_budget_s = settings
    if not variants:
        raise HarnessInputError("There is nothing to measure: give at least one variant.")
    if len(set(names)) < len(names):
        raise HarnessInputError(f"Two variants have the same name in {', '.join(names)}: rename one.")
    if baseline not in names:
        raise HarnessInputError(f"The baseline {baseline!r} is not among the variants {', '.join(names)}.")
    sizes = sorted({variant.batch_size for variant in variants})
    if len(sizes) > 1 or sizes[0] < 1:
        raise HarnessInputError(f"Latencies compare at one positive batch size only, but got {sizes}.")
    if rounds < MIN_ROUNDS:
        raise HarnessInputError(f"rounds is {rounds}, and an interval needs at least {MIN_ROUNDS}: raise it.")
    if time_budget_s <= 0 or not math.isfinite(time_budget_s):
        raise HarnessInputError(f"time_budget_s is {time_budget_s}: give a positive number of seconds.")
    if min_queries < 1 or min_seconds < 0 or warmup_seconds < 0:
        raise HarnessInputError(
            "min_queries_per_round must be at least 1, min_seconds_per_round and warmup_seconds at least 0, "
            f"but they are {min_queries}, {min_seconds} and {warmup_seconds}."
        )


def _fit(
    wanted: dict[str, int], query_ns: dict[str, float], warmup_seconds: float, round_s: float
) -> tuple[dict[str, int], bool]:
    """Queries per round that fit into `round_s`, and whether they had to be fewer than wanted."""
    timed_s = sum(count * query_ns[name] for name, count in wanted.items()) / 1e9
    warm_s = sum(max(warmup_seconds, ns / 1e9) for ns in query_ns.values())
    share = max(0.0, round_s - warm_s) / timed_s
    if share >= 1:
        return wanted, False
    return {name: max(1, math.floor(count * share)) for name, count in wanted.items()}, True


def _warm(variant: Variant, seconds: float, clock: Clock) -> float:
    """Run the variant for `seconds`, one query at least; the median duration of a query in nanoseconds."""
    durations: list[int] = []
    begin = last = clock()
    while not durations or last - begin < seconds * 1e9:
        _run(variant)
        now = clock()
        durations.append(now - last)
        if now == begin:
            raise HarnessError(f"Variant {variant.name!r} took no measurable time: its step does no work.")
        last = now
    return max(1.0, median(durations))


def _run(variant: Variant) -> None:
    try:
        variant.step()
    except Exception as error:
        raise HarnessError(f"Variant {variant.name!r} failed while it was measured: {error}") from error


def _time(variant: Variant, stamps: "array[int]", clock: Clock) -> Nanoseconds:
    """Run one query per slot of `stamps` after the first; nanoseconds from each stamp to the next."""
    step = variant.step
    collecting = gc.isenabled()
    gc.disable()
    try:
        stamps[0] = clock()
        for index in range(1, len(stamps)):
            step()
            stamps[index] = clock()
    except Exception as error:
        raise HarnessError(f"Variant {variant.name!r} failed while it was measured: {error}") from error
    finally:
        if collecting:
            gc.enable()
    times: Nanoseconds = np.frombuffer(stamps, dtype=np.int64)
    return times[1:] - times[:-1]


def _summarise(
    variant: Variant,
    rounds_ns: list[Nanoseconds],
    baseline_ns: list[Nanoseconds],
    baseline: str,
    seed: int,
) -> Measured:
    if any(median(samples) <= 0 for samples in rounds_ns):
        raise HarnessError(f"Variant {variant.name!r} took no measurable time: its step does no work.")
    rounds_ms = [samples / 1e6 for samples in rounds_ns]
    speedup = None
    if variant.name != baseline:
        speedup = paired_speedup(baseline_ns, rounds_ns, baseline=baseline, seed=seed)
    images = [variant.batch_size * samples.size for samples in rounds_ns]
    wall_s = [samples.sum() / 1e9 for samples in rounds_ns]
    throughput = rate_estimate(images, wall_s, seed=seed)
    return Measured(
        name=variant.name,
        batch_size=variant.batch_size,
        scenario="SingleStream" if variant.batch_size == 1 else "Offline",
        rounds_ns=tuple(rounds_ns),
        median_ms=median_estimate(rounds_ms, seed=seed),
        mean_ms=mean_estimate(rounds_ms, seed=seed),
        p90_ms=percentile_estimate(rounds_ms, 90, seed=seed),
        p95_ms=percentile_estimate(rounds_ms, 95, seed=seed),
        p99_ms=percentile_estimate(rounds_ms, 99, seed=seed),
        throughput_per_s=throughput.model_copy(update={"samples": sum(images)}),
        speedup=speedup,
    )
