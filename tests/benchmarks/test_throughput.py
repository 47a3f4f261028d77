"""The throughput sweep on sessions whose rates are known."""

import numpy as np
import pytest

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.saturation import Saturated
from benchmarks.harness.statistics import Estimate
from benchmarks.harness.throughput import ThroughputPoint, ThroughputResult, knee, sweep

MS = 1_000_000


class Machine:
    """A clock, and sessions that advance it. A batch takes 1 ms and `per_sample_ms` for each sample; two lanes overlap
    by half, more bring nothing."""

    def __init__(self):
        self.now = 0
        self.turns = []

    def clock(self):
        return self.now

    def session(self, name, batch_size, per_sample_ms=0.5, **options):
        return Session(self, name, batch_size, 1 + per_sample_ms * batch_size, **options)


class Session:
    def __init__(self, machine, name, batch_size, query_ms, *, fails_on=()):
        self.machine = machine
        self.name = name
        self.batch_size = batch_size
        self.query_ms = query_ms
        self.fails_on = fails_on
        self.warmed = 0

    def warm(self, seconds):
        self.warmed += 1
        self.machine.now += round(1e9 * seconds)
        return self.query_ms * MS

    def saturate(self, lanes, seconds):
        self.machine.turns.append((self.name, self.batch_size, lanes))
        if lanes in self.fails_on:
            raise HarnessError(f"Variant {self.name!r} failed while it was measured: out of memory")
        latency_ms = self.query_ms * {1: 1, 2: 4 / 3}.get(lanes, lanes * 2 / 3)
        each = max(1, int(1e3 * seconds / latency_ms))
        self.machine.now += round(each * latency_ms * MS)
        return Saturated(
            latencies_ns=np.full(lanes * each, round(latency_ms * MS)), wall_ns=round(each * latency_ms * MS)
        )


def test_points_are_samples_over_wall_time():
    machine = Machine()
    sizes = {size: [machine.session("dense", size)] for size in (8, 1)}
    result = sweep(sizes, lanes=(2, 1), seconds=1.0, rounds=3, time_budget_s=60, clock=machine.clock)["dense"]
    assert [(point.batch_size, point.lanes) for point in result.points] == [(1, 1), (1, 2), (8, 1), (8, 2)]
    # Queries of 1.5 and 5 ms: 1 / 1.5 and 8 / 5 samples a millisecond, and 1.5 times as many on two lanes.
    rates = [point.throughput_per_s.value for point in result.points]
    assert rates == pytest.approx([1000 / 1.5, 1000, 1600, 2400])
    assert [point.median_ms.value for point in result.points] == pytest.approx([1.5, 2.0, 5.0, 20 / 3])
    last = result.points[-1]
    assert last.throughput_per_s.samples == sum(last.round_samples) == 3 * 8 * 2 * 150
    assert last.round_wall_ms == pytest.approx([1000] * 3)
    assert last.round_median_ms == pytest.approx([20 / 3] * 3, abs=1e-6)
    assert (result.knee, result.reason, result.stopped_by, result.rounds) == (3, None, "rounds", 3)
    assert result.failed == []
    assert ThroughputResult.model_validate_json(result.model_dump_json()) == result


def test_every_round_has_every_point_of_every_variant_in_an_order_drawn_by_seed():
    def turns(seed):
        machine = Machine()
        sizes = {size: [machine.session("dense", size), machine.session("pruned", size, 0.25)] for size in (1, 4)}
        found = sweep(sizes, lanes=(1, 2), seconds=0.1, seed=seed, clock=machine.clock)
        assert list(found) == ["dense", "pruned"]
        assert all(session.warmed == 10 for sessions in sizes.values() for session in sessions)
        return [machine.turns[start : start + 8] for start in range(0, len(machine.turns), 8)]

    rounds = turns(0)
    assert len(rounds) == 5
    everything = [(name, size, lanes) for name in ("dense", "pruned") for size in (1, 4) for lanes in (1, 2)]
    assert all(sorted(turn) == sorted(everything) for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert rounds == turns(0) != turns(1)


def test_the_time_budget_shortens_the_turns_first():
    machine = Machine()
    result = sweep(
        {1: [machine.session("dense", 1)]}, lanes=(1,), seconds=1.0, warmup_s=0.1, time_budget_s=2, clock=machine.clock
    )["dense"]
    assert (result.stopped_by, result.rounds) == ("time", 5)
    assert result.elapsed_s <= 2
    assert result.points[0].round_wall_ms == pytest.approx([300] * 5, abs=2)


def test_the_time_budget_then_takes_rounds_but_leaves_two():
    machine = Machine()
    result = sweep(
        {8: [machine.session("dense", 8, 100.0)]}, lanes=(1, 2), time_budget_s=8, warmup_s=0, clock=machine.clock
    )["dense"]  # a query takes 0.8 or 1.07 s, a round 1.87 s
    assert (result.stopped_by, result.rounds) == ("time", 4)
    machine = Machine()
    result = sweep(
        {8: [machine.session("dense", 8, 100.0)]}, lanes=(1, 2), time_budget_s=0.1, warmup_s=0, clock=machine.clock
    )["dense"]
    assert (result.stopped_by, result.rounds) == ("time", 2)


def test_progress_counts_rounds():
    machine, seen = Machine(), []
    sweep(
        {1: [machine.session("dense", 1)]},
        rounds=3,
        seconds=0.1,
        on_round=lambda done, planned: seen.append((done, planned)),
        clock=machine.clock,
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_point_that_fails_is_reported_and_the_others_go_on():
    machine = Machine()
    dense = machine.session("dense", 1, fails_on=(4,))
    lost = machine.session("lost", 1, fails_on=(1, 2, 4))
    found = sweep({1: [dense, lost]}, lanes=(1, 2, 4), seconds=0.1, clock=machine.clock)
    assert [point.lanes for point in found["dense"].points] == [1, 2]
    (failed,) = found["dense"].failed
    assert (failed.batch_size, failed.lanes) == (1, 4)
    assert "'dense' failed while it was measured: out of memory" in failed.reason
    assert machine.turns.count(("dense", 1, 4)) == 1
    assert (found["lost"].points, found["lost"].knee, found["lost"].reason) == ([], None, "Every point failed.")
    assert len(found["lost"].failed) == 3


def point(throughput, median_ms):
    def exactly(value):
        return Estimate(value=value, low=value, high=value, samples=5)

    return ThroughputPoint(
        batch_size=1,
        lanes=1,
        throughput_per_s=exactly(throughput),
        median_ms=exactly(median_ms),
        round_samples=[],
        round_wall_ms=[],
        round_median_ms=[],
    )


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([(100, 1.0)], 0),
        ([(500, 1.0), (940, 2.0), (960, 4.0), (1000, 8.0), (990, 16.0)], 2),
        ([(950, 2.0), (1000, 8.0)], 0),  # 95 % is enough
        ([(949, 2.0), (1000, 8.0)], 1),
        ([(1000, 3.0), (1000, 2.0), (1000, 2.0)], 1),  # the first of equals
    ],
)
def test_knee(points, expected):
    assert knee([point(*numbers) for numbers in points]) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lanes": (0, 1)}, r"lanes is \[0, 1\]"),
        ({"lanes": ()}, r"lanes is \[\]"),
        ({"lanes": (1, 1)}, r"lanes is \[1, 1\]"),
        ({"rounds": 1}, "rounds is 1.*raise it"),
        ({"seconds": 0}, "seconds is 0.*give a positive number"),
        ({"time_budget_s": -1}, "time_budget_s is -1.*give a positive number"),
        ({"time_budget_s": float("nan")}, "time_budget_s is nan"),
        ({"warmup_s": -1}, "warmup_s is -1"),
    ],
)
def test_settings_that_cannot_be_used_are_said(options, said):
    machine = Machine()
    with pytest.raises(HarnessInputError, match=said):
        sweep({1: [machine.session("dense", 1)]}, **options)
    assert not machine.turns


def test_sessions_that_cannot_be_used_are_said():
    machine = Machine()
    dense = machine.session("dense", 1)
    for sessions, said in (
        ({}, "no session"),
        ({1: []}, "no session"),
        ({1: [dense, dense]}, "same name"),
        ({2: [dense]}, "'dense' stands under batch size 2"),
    ):
        with pytest.raises(HarnessInputError, match=said):
            sweep(sessions)
