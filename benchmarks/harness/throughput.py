"""Throughput over batch sizes and concurrent lanes: how much a subject does when it is never left waiting."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.session import Clock, Session
from benchmarks.harness.statistics import Estimate, Floats, median, median_estimate, rate_estimate

KNEE_SHARE = 0.95

MIN_ROUNDS = 2
"""Below two rounds there is no interval."""

LEAST_SECONDS = 0.05
"""A time budget shortens a point's turn no further than this; then it takes rounds away."""


class ThroughputPoint(BaseModel):
    """One batch size on so many lanes at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(ge=1)
    lanes: int = Field(ge=1)
    throughput_per_s: Estimate = Field(description="Samples over wall time; `samples` counts them.")
    median_ms: Estimate = Field(description="Time of a query, which is one batch, while all lanes are busy.")
    round_samples: list[int] = Field(description="Samples answered in each round.")
    round_wall_ms: list[float] = Field(description="Time each round took for them.")
    round_median_ms: list[float] = Field(description="Median latency of each round.")


class FailedPoint(BaseModel):
    """A point without figures, such as one for which memory did not suffice."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(ge=1)
    lanes: int = Field(ge=1)
    reason: str


class ThroughputResult(BaseModel):
    """What one variant reaches, and where it pays to stop."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    points: list[ThroughputPoint]
    failed: list[FailedPoint]
    knee: int | None = Field(
        description="Index of the point with the lowest median latency among those that reach 95 % of the highest "
        "throughput."
    )
    reason: str | None = Field(description="Why there is no knee.")
    rounds: int = Field(ge=0)
    stopped_by: Literal["rounds", "time"] = Field(description="'time' if the time budget cut the plan short.")
    elapsed_s: float = Field(ge=0)


@dataclass
class _Cell:
    """One point of one variant while it is measured."""

    session: Session
    lanes: int
    latencies_ms: list[Floats] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    failure: str | None = None

    def turn(self, seconds: float, warmup_s: float) -> None:
        try:
            self.session.warm(warmup_s)
            saturated = self.session.saturate(self.lanes, seconds)
        except HarnessError as error:
            self.failure = str(error)
            return
        self.latencies_ms.append(saturated.latencies_ns / 1e6)
        self.wall_s.append(saturated.wall_ns / 1e9)

    def point(self, seed: int) -> ThroughputPoint:
        samples = [self.session.batch_size * latencies.size for latencies in self.latencies_ms]
        throughput = rate_estimate(samples, self.wall_s, seed=seed)
        return ThroughputPoint(
            batch_size=self.session.batch_size,
            lanes=self.lanes,
            throughput_per_s=throughput.model_copy(update={"samples": sum(samples)}),
            median_ms=median_estimate(self.latencies_ms, seed=seed),
            round_samples=samples,
            round_wall_ms=[round(1e3 * wall, 6) for wall in self.wall_s],
            round_median_ms=[round(median(latencies), 6) for latencies in self.latencies_ms],
        )


def sweep(
    sessions_by_batch: Mapping[int, Sequence[Session]],
    *,
    lanes: Sequence[int] = (1, 2),
    rounds: int = 5,
    seconds: float = 1.0,
    warmup_s: float = 0.1,
    time_budget_s: float = 60.0,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, ThroughputResult]:
    """Measure every variant at every batch size on every number of lanes, in randomised complete rounds.

    Each round gives every point of every variant one turn, in an order drawn anew. If the rounds would exceed the time
    budget, the turns become shorter, to 0.05 s at the least; then there are fewer rounds, two at the least. A point
    that fails is left out from then on and reported with its reason; the others go on.

    Args:
        sessions_by_batch: Batch size -> sessions of that size, ready, one for each variant by its name.
        lanes: Numbers of lanes to try.
        seconds: Of one turn.
        on_round: Called with (rounds done, rounds planned).

    Returns:
        By the name of the variant; its points by batch size, then lanes.

    Raises:
        HarnessInputError: there is nothing to measure, or a setting cannot be used.
    """
    _check(sessions_by_batch, lanes, rounds, seconds, warmup_s, time_budget_s)
    begin = clock()
    cells = [
        _Cell(session, count)
        for batch_size in sorted(sessions_by_batch)
        for session in sessions_by_batch[batch_size]
        for count in sorted(lanes)
    ]
    fitting_s = time_budget_s / (rounds * len(cells)) - warmup_s
    shortened = fitting_s < seconds
    turn_s = max(min(seconds, fitting_s), min(seconds, LEAST_SECONDS))
    rng = np.random.default_rng(seed)
    done = 0
    while done < rounds:
        round_begin = clock()
        for index in rng.permutation(len(cells)):
            if cells[index].failure is None:
                cells[index].turn(turn_s, warmup_s)
        done += 1
        if on_round is not None:
            on_round(done, rounds)
        now = clock()
        if MIN_ROUNDS <= done < rounds and (now - begin) + (now - round_begin) > time_budget_s * 1e9:
            shortened = True
            break
    elapsed_s = (clock() - begin) / 1e9
    results = {}
    for name in dict.fromkeys(cell.session.name for cell in cells):
        own = [cell for cell in cells if cell.session.name == name]
        points = [cell.point(seed) for cell in own if cell.failure is None]
        results[name] = ThroughputResult(
            points=points,
            failed=[
                FailedPoint(batch_size=cell.session.batch_size, lanes=cell.lanes, reason=cell.failure)
                for cell in own
                if cell.failure is not None
            ],
            knee=knee(points),
            reason=None if points else "Every point failed.",
            rounds=done,
            stopped_by="time" if shortened else "rounds",
            elapsed_s=elapsed_s,
        )
    return results


def knee(points: Sequence[ThroughputPoint]) -> int | None:
    """Index of the point worth running at: of those that reach 95 % of the highest throughput, the one with the lowest
    median latency, the first of equals. None where there are no points."""
    if not points:
        return None
    needed = KNEE_SHARE * max(point.throughput_per_s.value for point in points)
    reaching = [index for index, point in enumerate(points) if point.throughput_per_s.value >= needed]
    return min(reaching, key=lambda index: points[index].median_ms.value)


def _check(
    sessions_by_batch: Mapping[int, Sequence[Session]],
    lanes: Sequence[int],
    rounds: int,
    seconds: float,
    warmup_s: float,
    time_budget_s: float,
) -> None:
    if not any(sessions_by_batch.values()):
        raise HarnessInputError("There is no session to measure: give at least one.")
    for batch_size, sessions in sessions_by_batch.items():
        names = [session.name for session in sessions]
        if len(set(names)) < len(names):
            raise HarnessInputError(f"Two variants have the same name in {', '.join(names)}: rename one.")
        wrong = [session.name for session in sessions if session.batch_size != batch_size]
        if wrong:
            raise HarnessInputError(f"{wrong[0]!r} stands under batch size {batch_size} and has another: move it.")
    if not lanes or min(lanes) < 1 or len(set(lanes)) < len(lanes):
        raise HarnessInputError(f"lanes is {list(lanes)}: give different numbers of at least 1.")
    if rounds < MIN_ROUNDS:
        raise HarnessInputError(f"rounds is {rounds}, and an interval needs at least {MIN_ROUNDS}: raise it.")
    for name, value in (("seconds", seconds), ("time_budget_s", time_budget_s)):
        if not value > 0 or not math.isfinite(value):
            raise HarnessInputError(f"{name} is {value:g}, with which nothing can be measured: give a positive number.")
    if warmup_s < 0:
        raise HarnessInputError(f"warmup_s is {warmup_s:g}: give 0 or more seconds.")
