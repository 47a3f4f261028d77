"""Scenario Server: queries come at random moments, and the question is how many a second keep the tail in bounds.

MLPerf's name and meaning (Poisson arrivals, a limit on the 99th percentile of latency, first come first served); not
an MLPerf submission. A query is one batch of the session. Latency counts from the moment a query was due.
"""

import math
import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.numerals import significant
from benchmarks.harness.session import Clock, Nanoseconds, Session
from benchmarks.harness.statistics import (
    SAMPLES_NEEDED,
    Estimate,
    Floats,
    mean_estimate,
    median,
    median_estimate,
    percentile_estimate,
)

BATCHES = 20
"""Consecutive parts of a run that its intervals take as independent."""

MIN_QUERIES = 2 * BATCHES
"""For an interval there must be something to draw in each batch."""

StoppedBy = Literal["bracket", "limit", "time", "harness"]

LATENESS_SHARE = 0.05
"""A run is valid if the harness's own lateness is at most this share of what is judged."""

ATTEMPTS = 3
"""How often a load is tried before the search gives up because the harness was late."""

LOWEST_LOAD = 1 / 16
"""Of the rate at which the lanes would never rest: there a query hardly ever meets another, and to halve it again
would double the time for nothing."""

HIGHEST_LOAD = 16
"""No queue can serve more than its lanes' time allows, so where this passes the service time was wrong."""


class LoadPoint(BaseModel):
    """How a session answered queries that came at one rate: a point of the curve of latency against load.

    Percentiles are None where the queries are too few to carry them.

    Latencies of neighbouring queries are alike, since one queue delays both, and intervals that took the queries as
    independent would be far too narrow. These are of batch means (Schmeiser, "Batch Size Effects in the Analysis of
    Simulation Output", Operations Research, 1982: 10 to 30 batches do): the run is cut into 20 consecutive batches,
    each longer than the memory of the queue, and the batches are drawn as rounds are elsewhere. A run that is short for
    its load has batches that are not independent, and no method finds in it what did not happen;
    `effective_queries` shows that. In 2,400 simulated M/D/1 queues (utilisation 0.3 to 0.9, 662 to 60,000 queries)
    the interval of the 99th percentile held the truth in 92 % of the runs or more where `effective_queries` was at
    least 662, in 80 % where it was between 130 and 662, and in half of them below.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rate_per_s: float = Field(gt=0, description="Queries offered a second.")
    completed_per_s: float = Field(gt=0, description="Queries done, over the time to the end of the last one.")
    queries: int = Field(ge=1)
    lanes: int = Field(ge=1)
    utilisation: float = Field(ge=0, description="Share of the lanes' time in which they answered a query.")
    median_ms: Estimate
    mean_ms: Estimate
    p90_ms: Estimate | None
    p95_ms: Estimate | None
    p99_ms: Estimate | None
    p999_ms: Estimate | None
    effective_queries: float = Field(
        gt=0,
        description="As many independent queries would give the mean as precisely. Below 662 the interval of p99 is "
        "too narrow.",
    )
    lateness_p99_ms: float = Field(description="How late the harness itself issued queries, 99th percentile.")
    lateness_effect_ms: float = Field(
        description="How much the 99th percentile of latency falls when the queue is replayed without that lateness."
    )
    valid: bool = Field(description="The harness was not late.")
    reason: str | None = Field(description="Why it is not valid.")
    latencies_ms: list[float] = Field(description="Every latency, in order of due times.")


class ServerResult(BaseModel):
    """The highest rate at which the 99th percentile of latency stays within the limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scenario: Literal["Server"] = Field("Server", description="MLPerf's name; not an MLPerf submission.")
    limit_ms: float = Field(gt=0, description="For the 99th percentile of latency.")
    rate_per_s: float | None = Field(description="Highest rate that met the limit, queries a second; None if none did.")
    failing_per_s: float | None = Field(description="Lowest rate that missed it: the truth lies between the two.")
    stopped_by: StoppedBy = Field(
        description="bracket: the two rates are close. limit: even the lowest load misses the limit. time: the time "
        "budget ended. harness: it was late itself, again and again."
    )
    reason: str | None = Field(description="Why there is no rate, or why the bracket is wide.")
    batch_size: int = Field(ge=1, description="Samples of a query.")
    lanes: int = Field(ge=1)
    seed: int = Field(description="Of the arrivals.")
    points: list[LoadPoint] = Field(description="Every load tried, in order.")
    elapsed_s: float = Field(ge=0)


class NullOverhead(BaseModel):
    """What the loop itself takes, measured with a model that does nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    lanes: int = Field(ge=1)
    overhead_us: float = Field(ge=0, description="Time of a query among queries that are all due at once, median.")
    rate_per_s: float = Field(gt=0, description="At which the lateness was measured.")
    lateness_median_us: float
    lateness_p99_us: float


def arrivals(rate_per_s: float, queries: int, seed: int) -> Nanoseconds:  # -> (queries,)
    """Moments of a Poisson process in nanoseconds from the start: the gaps are independent and exponential.

    One stream of unit rate belongs to each seed and is only scaled by the rate, so every variant meets the same
    arrivals, and more queries continue the same stream.

    Raises:
        HarnessInputError: the rate is not positive, or there is no query.
    """
    _positive(rate_per_s=rate_per_s, queries=queries)
    gaps = np.random.default_rng(seed).exponential(size=queries)
    return np.round(np.cumsum(gaps) / rate_per_s * 1e9).astype(np.int64)


def run_load(
    session: Session,
    rate_per_s: float,
    *,
    queries: int = SAMPLES_NEEDED[99.0],
    lanes: int = 1,
    limit_ms: float | None = None,
    warmup_s: float = 0.1,
    seed: int = 0,
) -> LoadPoint:
    """Offer queries at a mean rate and see how long each takes.

    The run is not valid if the harness was late: if the 99th percentile of its lateness, or what its lateness changes
    in the 99th percentile of latency, is more than 5 % of the latter (of the limit, where that is less). The second is
    needed because one stall delays all that queue behind it. With too few queries for the percentile both are taken
    all the same, as a check.

    Raises:
        HarnessInputError: a setting cannot be used.
        HarnessError: the subject failed.
    """
    _positive(rate_per_s=rate_per_s, lanes=lanes, **({} if limit_ms is None else {"limit_ms": limit_ms}))
    if queries < MIN_QUERIES:
        raise HarnessInputError(
            f"An interval needs {BATCHES} batches of 2 queries, and queries is {queries}: raise it to {MIN_QUERIES}."
        )
    due_ns = arrivals(rate_per_s, queries, seed)
    session.warm(warmup_s)
    served = session.serve(due_ns, lanes)
    latencies_ms = (served.done_ns - due_ns) / 1e6
    batches = np.array_split(latencies_ms, BATCHES)
    p99_ms = percentile_estimate(batches, 99, seed=seed)
    wall_ns = int(served.done_ns.max())
    tail_ms = _tail(latencies_ms)
    lateness_ms = _tail(served.lateness_ns(due_ns) / 1e6)
    effect_ms = tail_ms - _tail(served.prompt_latencies_ns(due_ns, lanes) / 1e6)
    judged_ms = min(tail_ms, limit_ms or math.inf)
    worst_ms = max(lateness_ms, abs(effect_ms))
    valid = worst_ms <= LATENESS_SHARE * judged_ms
    return LoadPoint(
        rate_per_s=rate_per_s,
        completed_per_s=queries / wall_ns * 1e9,
        queries=queries,
        lanes=lanes,
        utilisation=float((served.done_ns - served.issued_ns).sum() / (lanes * wall_ns)),
        median_ms=median_estimate(batches, seed=seed),
        mean_ms=mean_estimate(batches, seed=seed),
        p90_ms=percentile_estimate(batches, 90, seed=seed),
        p95_ms=percentile_estimate(batches, 95, seed=seed),
        p99_ms=p99_ms,
        p999_ms=percentile_estimate(batches, 99.9, seed=seed),
        effective_queries=effective_queries(latencies_ms),
        lateness_p99_ms=lateness_ms,
        lateness_effect_ms=effect_ms,
        valid=valid,
        reason=None
        if valid
        else f"The harness was late, by {significant(worst_ms)} ms in the 99th percentile, more than "
        f"{LATENESS_SHARE:.0%} of {significant(judged_ms)} ms: the machine was busy with something else, or the "
        "queries are too short for it.",
        latencies_ms=np.round(latencies_ms, 6).tolist(),
    )


def highest_rate(
    session: Session,
    *,
    limit_ms: float,
    service_ms: float,
    time_budget_s: float,
    lanes: int = 1,
    min_queries: int = SAMPLES_NEEDED[99.0],
    min_seconds: float = 2.0,
    tolerance: float = 0.02,
    warmup_s: float = 0.1,
    seed: int = 0,
    on_point: Callable[[LoadPoint], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> ServerResult:
    """Search for the highest rate with a 99th percentile of latency within the limit.

    Starts where the lanes would never rest, `lanes / service_ms`, halves or doubles until one rate meets the limit and
    one misses it, and then bisects. The arrivals of all probes are one stream, scaled: with constant service times
    every latency rises with the rate, so the search meets no noise from the arrivals; but its result belongs to
    that stream, and only longer probes bring it closer to that of all streams.

    A probe in which the harness was late decides nothing: it is repeated, and three in a row end the search. No probe
    is begun that would not fit into the time left.

    Args:
        service_ms: Median time of a query on its own.
        min_queries: Of a probe; at least as many as the 99th percentile needs.
        min_seconds: Of a probe, by its schedule.
        tolerance: The search ends when the lowest failing rate is no more than this share above the highest passing.
        on_point: Called after every probe.

    Raises:
        HarnessInputError: a setting cannot be used, or the service time contradicts what was measured.
        HarnessError: the subject failed.
    """
    _positive(
        limit_ms=limit_ms,
        service_ms=service_ms,
        time_budget_s=time_budget_s,
        lanes=lanes,
        min_seconds=min_seconds,
        tolerance=tolerance,
    )
    if min_queries < SAMPLES_NEEDED[99.0]:
        raise HarnessInputError(
            f"The 99th percentile needs {SAMPLES_NEEDED[99.0]} queries, and min_queries is {min_queries}: raise it."
        )
    begin = clock()
    bracket = _Bracket(1e3 * lanes / service_ms)
    points: list[LoadPoint] = []
    stopped_by: StoppedBy = "bracket"
    reason = None
    late = 0
    while not bracket.closed(tolerance):
        queries = max(min_queries, math.ceil(min_seconds * bracket.rate))
        needed_s = warmup_s + queries / min(bracket.rate, bracket.busy_per_s)
        left_s = max(0.0, time_budget_s - (clock() - begin) / 1e9)
        if needed_s > left_s:
            stopped_by = "time"
            reason = (
                f"Of the time budget of {time_budget_s:g} s there were {significant(left_s, 2)} s left, and the next "
                f"probe, {queries} queries at {significant(bracket.rate)}/s, needs {significant(needed_s, 2)} s."
            )
            break
        point = run_load(
            session, bracket.rate, queries=queries, lanes=lanes, limit_ms=limit_ms, warmup_s=warmup_s, seed=seed
        )
        points.append(point)
        if on_point is not None:
            on_point(point)
        if point.valid:
            late = 0
            reason = bracket.judge(point, limit_ms, service_ms)
            if reason is not None:
                stopped_by = "limit"
                break
        else:
            late += 1
            if late == ATTEMPTS:
                stopped_by, reason = "harness", point.reason
                break
    return ServerResult(
        limit_ms=limit_ms,
        rate_per_s=bracket.passing,
        failing_per_s=bracket.failing,
        stopped_by=stopped_by,
        reason=reason,
        batch_size=session.batch_size,
        lanes=lanes,
        seed=seed,
        points=points,
        elapsed_s=(clock() - begin) / 1e9,
    )


class _Bracket:
    """The highest rate that met the limit, the lowest that missed it, and the rate to try next."""

    def __init__(self, busy_per_s: float) -> None:
        self.busy_per_s = busy_per_s
        self.rate = busy_per_s
        self.passing: float | None = None
        self.failing: float | None = None

    def closed(self, tolerance: float) -> bool:
        return self.passing is not None and self.failing is not None and self.failing / self.passing - 1 <= tolerance

    def judge(self, point: LoadPoint, limit_ms: float, service_ms: float) -> str | None:
        """Take in what the rate gave; why no rate can meet the limit, if none can."""
        p99_ms = point.p99_ms.value if point.p99_ms else math.inf
        if p99_ms <= limit_ms:
            self.passing = self.rate
        else:
            self.failing = self.rate
        if self.passing is None and service_ms > limit_ms:
            return f"A query on its own takes {significant(service_ms)} ms, over the limit of {limit_ms:g} ms."
        if self.passing is None and self.rate <= LOWEST_LOAD * self.busy_per_s:
            return (
                f"Even at {significant(self.rate)} queries/s, {LOWEST_LOAD:.1%} of what the lanes could answer, the "
                f"99th percentile is {significant(p99_ms)} ms, over the limit of {limit_ms:g} ms."
            )
        if self.failing is None and self.rate >= HIGHEST_LOAD * self.busy_per_s:
            raise HarnessInputError(
                f"{significant(self.rate)} queries/s were answered, {HIGHEST_LOAD} times as many as queries of "
                f"{service_ms:g} ms allow: service_ms is wrong, measure it again."
            )
        if self.failing is None:
            self.rate *= 2
        elif self.passing is None:
            self.rate /= 2
        else:
            self.rate = math.sqrt(self.passing * self.failing)
        return None


def null_overhead(
    session: Session, *, lanes: int = 1, queries: int = 2000, rate_per_s: float = 1000.0, seed: int = 0
) -> NullOverhead:
    """The harness's part in every latency: the session's queries must do nothing (`open_loop.NullSubject`).

    Raises:
        HarnessInputError: a setting cannot be used.
    """
    _positive(lanes=lanes, rate_per_s=rate_per_s)
    if queries < SAMPLES_NEEDED[99.0]:
        raise HarnessInputError(
            f"The 99th percentile needs {SAMPLES_NEEDED[99.0]} queries, and queries is {queries}: raise it."
        )
    at_once = session.serve(np.zeros(queries, dtype=np.int64), lanes)
    due_ns = arrivals(rate_per_s, queries, seed)
    lateness_us = session.serve(due_ns, lanes).lateness_ns(due_ns) / 1e3
    return NullOverhead(
        lanes=lanes,
        overhead_us=median(np.diff(np.sort(at_once.done_ns)) / 1e3),
        rate_per_s=rate_per_s,
        lateness_median_us=median(lateness_us),
        lateness_p99_us=_tail(lateness_us),
    )


def effective_queries(latencies_ms: Floats) -> float:
    """Variance of one latency over that of the run's mean, estimated from batch means; at most their number."""
    means = np.array([batch.mean() for batch in np.array_split(latencies_ms, BATCHES)])
    of_mean = means.var(ddof=1) / BATCHES
    if of_mean == 0:
        return float(latencies_ms.size)
    return float(min(latencies_ms.size, max(1.0, latencies_ms.var() / of_mean)))


def _tail(values: Floats) -> float:
    """99th percentile as a check, also of samples too few to report it."""
    return float(np.percentile(values, 99, method="averaged_inverted_cdf"))


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0 or not math.isfinite(value):
            raise HarnessInputError(f"{name} is {value:g}, with which nothing can be measured: give a positive number.")
