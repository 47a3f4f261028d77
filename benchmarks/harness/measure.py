"""Measuring variants against each other: complete rounds, interleaved in random order, every sample kept.

A machine drifts (temperature, other processes), so variants measured one after the other compare the machine with
itself. Here each round runs every variant once, in an order drawn anew, and ratios are taken within rounds. The
baseline runs twice in every round: how far it seems to differ from itself is what no claim may be smaller than.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks.harness.conditions import Conditions, Watch
from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.processes import RemoteSession
from benchmarks.harness.ratios import half_width, paired_speedup, spread_of
from benchmarks.harness.rounds import MIN_ROUNDS, Contest, Plan, Record
from benchmarks.harness.session import Clock, LocalSession, Memory, Nanoseconds, Opened, Session
from benchmarks.harness.statistics import (
    Estimate,
    Speedup,
    mean_estimate,
    median,
    median_estimate,
    percentile_estimate,
    rate_estimate,
)
from benchmarks.harness.steps import StepSubject, Variant
from benchmarks.harness.subject import Candidate, Stages

Scenario = Literal["SingleStream", "MultiStream", "Offline"]

AGAIN = "{} (again)"
"""How the second run of the baseline is called."""

LOOKS = 2000
"""Bootstrap resamples of a look at the precision on the way; the result itself takes more."""


@dataclass(frozen=True)
class Measured:
    """What one variant took. `rounds_ns` holds every sample: one array per round, one integer per query."""

    name: str
    batch_size: int
    scenario: Scenario
    rounds_ns: tuple[Nanoseconds, ...]
    processes: tuple[int, ...]
    """Which process each round ran in."""
    median_ms: Estimate
    mean_ms: Estimate
    p90_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None
    p999_ms: Estimate | None
    throughput_per_s: Estimate
    speedup: Speedup | None
    opened: tuple[Opened, ...]
    after_gap_ms: tuple[float, ...]
    stages: tuple[Stages, ...]
    memory: tuple[Memory, ...]
    conditions: tuple[Conditions, ...]
    description: dict[str, Any]
    """What ran, as the subject told."""
    throttled_ns: tuple[Nanoseconds, ...]
    """Samples of rounds that were run again because the machine throttled; in no figure, and kept."""


@dataclass(frozen=True)
class Measurement:
    """The variants measured together, by name, and how the measurement went.

    `order` gives each round's order of variants; `reruns` counts the rounds that were run again.
    """

    baseline: str
    variants: dict[str, Measured]
    failures: dict[str, str]
    """Variant -> why it has no figures."""
    again: Speedup | None
    """The baseline against itself, A/A; None if either of the two failed."""
    order: tuple[tuple[str, ...], ...]
    reruns: int
    stopped_by: Literal["precision", "time"]
    elapsed_s: float


def measure(
    variants: Sequence[Variant | Candidate],
    *,
    baseline: str,
    plan: Plan | None = None,
    seed: int = 0,
    watch: Watch | None = None,
    on_round: Callable[[int, float], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> Measurement:
    """Time the variants in randomised complete rounds and summarise them.

    Per round each variant is warmed and then runs as many queries as reach both minima of the plan; if that would
    exceed the time budget, the queries per round are scaled down to fit, to one query at the least. Rounds go on until
    every ratio is as precise as planned or the time is over, and never end before two. Candidates run in processes of
    their own, of which one at a time does anything, and which are replaced by fresh ones on the way.

    A latency is the time from the end of one query to the end of the next: back to back, on one clock, including
    about 0.2 µs of the loop itself. Garbage collection is off while the clock runs.

    Args:
        variants: All of one batch size, names unique.
        baseline: Name of the variant that the others are divided by.
        watch: What notes the state of the machine during each variant's part of a round; by default of the CPU alone.
        on_round: Called with (rounds done, seconds since the beginning).
        clock: Monotonic nanoseconds; tests give a fake one.

    Raises:
        HarnessInputError: the variants, the baseline or a setting cannot be used.
        HarnessError: every variant failed. Where some did, the others' figures stand and `failures` has the reasons.
    """
    plan = plan or Plan()
    _check(variants, baseline, plan)
    if not any(isinstance(variant, Candidate) for variant in variants):
        plan = replace(plan, processes=1)
    again = AGAIN.format(baseline)

    def launches() -> list[tuple[str, Callable[[], Session]]]:
        named = [(variant.name, variant) for variant in variants]
        named += [(again, variant) for variant in variants if variant.name == baseline]
        return [(name, _launcher(name, variant, clock)) for name, variant in named]

    contest = Contest(
        launches(),
        plan,
        precise=lambda contest: _precise(contest, baseline, again, plan.half_width),
        seed=seed,
        watch=watch or Watch(),
        on_round=on_round,
        clock=clock,
    )
    try:
        contest.run()
    finally:
        for variant in variants:
            if isinstance(variant, Variant) and variant.close is not None:
                variant.close()
    failures = {name: record.failure for name, record in contest.records.items() if record.failure is not None}
    if len(failures) == len(contest.records):
        raise HarnessError(next(iter(failures.values())))
    return _summarise(variants, contest, failures, baseline, again, seed)


def scenario_of(batch_size: int) -> Scenario:
    """MLPerf's name for queries of so many samples, one query after the other."""
    return "SingleStream" if batch_size == 1 else "MultiStream" if batch_size == 8 else "Offline"


def _check(variants: Sequence[Variant | Candidate], baseline: str, plan: Plan) -> None:
    names = [variant.name for variant in variants]
    if not variants:
        raise HarnessInputError("There is nothing to measure: give at least one variant.")
    if len(set(names)) < len(names):
        raise HarnessInputError(f"Two variants have the same name in {', '.join(names)}: rename one.")
    if baseline not in names:
        raise HarnessInputError(f"The baseline {baseline!r} is not among the variants {', '.join(names)}.")
    sizes = sorted({variant.batch_size for variant in variants})
    if len(sizes) > 1 or sizes[0] < 1:
        raise HarnessInputError(f"Latencies compare at one positive batch size only, but got {sizes}.")
    if plan.rounds < MIN_ROUNDS:
        raise HarnessInputError(f"rounds is {plan.rounds}, and an interval needs at least {MIN_ROUNDS}: raise it.")
    if plan.time_budget_s <= 0 or not math.isfinite(plan.time_budget_s):
        raise HarnessInputError(f"time_budget_s is {plan.time_budget_s}: give a positive number of seconds.")
    if min(plan.queries, plan.processes) < 1 or min(plan.seconds, plan.warmup_s, plan.half_width, plan.idle_gap_s) < 0:
        raise HarnessInputError(
            "queries and processes must be at least 1, seconds, warmup_s, half_width and idle_gap_s at least 0, "
            f"but they are {plan.queries}, {plan.processes}, {plan.seconds}, {plan.warmup_s}, {plan.half_width} and "
            f"{plan.idle_gap_s}."
        )


def _launcher(name: str, variant: Variant | Candidate, clock: Clock) -> Callable[[], Session]:
    if isinstance(variant, Candidate):
        return lambda: RemoteSession(replace(variant, name=name))
    return lambda: LocalSession(name, lambda: StepSubject(variant.step), variant.batch_size, clock)


def _precise(contest: Contest, baseline: str, again: str, wanted: float) -> bool:
    """Whether every ratio is as precise as wanted, that of the baseline to itself included."""
    records, processes = contest.records, contest.processes
    if records[baseline].failure is not None:
        return True  # there is no ratio any more, and every further round would only refine medians
    first = records[baseline].rounds_ns
    second = records[again].rounds_ns if records[again].failure is None else None
    for name, record in records.items():
        if name == baseline or record.failure is not None:
            continue
        ratio = paired_speedup(
            first,
            record.rounds_ns,
            again_rounds=None if name == again else second,
            baseline=baseline,
            processes=processes,
            seed=0,
            resamples=LOOKS,
        )
        if half_width(ratio) > wanted:
            return False
    return True


def _summarise(
    variants: Sequence[Variant | Candidate],
    contest: Contest,
    failures: dict[str, str],
    baseline: str,
    again: str,
    seed: int,
) -> Measurement:
    processes = tuple(contest.processes)
    records = {name: record for name, record in contest.records.items() if name not in failures}
    for name, record in records.items():
        if any(median(samples) <= 0 for samples in record.rounds_ns):
            raise HarnessError(f"Variant {name!r} took no measurable time: its step does no work.")
    first = records[baseline].rounds_ns if baseline in records else None
    second = records[again].rounds_ns if again in records else None
    same = None
    if first is not None and second is not None:
        same = paired_speedup(
            first, second, baseline=baseline, processes=processes, spread=math.inf, seed=seed
        )  # no claim: whatever it shows is noise
    measured = {}
    for variant in variants:
        if variant.name not in records:
            continue
        record, speedup = records[variant.name], None
        if variant.name != baseline and first is not None:
            speedup = paired_speedup(
                first,
                record.rounds_ns,
                again_rounds=second,
                baseline=baseline,
                processes=processes,
                spread=1.0 if same is None else spread_of(same),
                seed=seed,
            )
        measured[variant.name] = _measured(variant, record, processes, speedup, seed)
    return Measurement(
        baseline=baseline,
        variants=measured,
        failures=failures,
        again=same,
        order=tuple(contest.order),
        reruns=contest.reruns,
        stopped_by=contest.stopped_by,
        elapsed_s=contest.elapsed_s,
    )


def _measured(
    variant: Variant | Candidate, record: Record, processes: tuple[int, ...], speedup: Speedup | None, seed: int
) -> Measured:
    rounds_ms = [samples / 1e6 for samples in record.rounds_ns]
    samples = [variant.batch_size * latencies.size for latencies in record.rounds_ns]
    wall_s = [latencies.sum() / 1e9 for latencies in record.rounds_ns]
    throughput = rate_estimate(samples, wall_s, seed=seed, processes=processes)

    def percentile_ms(percent: float) -> Estimate | None:
        return percentile_estimate(rounds_ms, percent, seed=seed, processes=processes)

    return Measured(
        name=variant.name,
        batch_size=variant.batch_size,
        scenario=scenario_of(variant.batch_size),
        rounds_ns=tuple(record.rounds_ns),
        processes=processes,
        median_ms=median_estimate(rounds_ms, seed=seed, processes=processes),
        mean_ms=mean_estimate(rounds_ms, seed=seed, processes=processes),
        p90_ms=percentile_ms(90),
        p95_ms=percentile_ms(95),
        p99_ms=percentile_ms(99),
        p999_ms=percentile_ms(99.9),
        throughput_per_s=throughput.model_copy(update={"samples": sum(samples)}),
        speedup=speedup,
        opened=tuple(record.opened),
        after_gap_ms=tuple(record.after_gap_ms),
        stages=tuple(record.stages),
        memory=tuple(record.memory),
        conditions=tuple(record.conditions),
        description=record.description or {},
        throttled_ns=tuple(record.throttled_ns),
    )
