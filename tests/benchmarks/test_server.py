"""Scenario Server on sessions that are queues computed by hand, and once on a real one."""

import heapq
import time

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.open_loop import NullSubject, Served, serve
from benchmarks.harness.server import (
    LoadPoint,
    ServerResult,
    arrivals,
    effective_queries,
    highest_rate,
    null_overhead,
    run_load,
)

MS = 1_000_000


class Queue:
    """A session whose queries take a constant time on its lanes, on a clock of its own."""

    name = "queue"
    batch_size = 4

    def __init__(self, service_ms, *, lateness_ms=0.0, fails_at=None):
        self.service_ns = round(service_ms * MS)
        self.lateness_ns = round(lateness_ms * MS)
        self.late_runs = 10**9
        self.fails_at = fails_at
        self.now = 0
        self.loads = []

    def clock(self):
        return self.now

    def warm(self, seconds):
        self.now += round(seconds * 1e9)
        return float(self.service_ns)

    def serve(self, due_ns, lanes):
        self.loads.append(due_ns)
        if len(self.loads) == self.fails_at:
            raise HarnessError("Variant 'queue' failed while it was measured: out of memory")
        late = self.lateness_ns if len(self.loads) <= self.late_runs else 0
        free = [(0, number) for number in range(lanes)]
        issued, done, lane = (np.zeros(due_ns.size, dtype=np.int64) for _ in range(3))
        for index, moment in enumerate(due_ns.tolist()):
            at, number = heapq.heappop(free)
            issued[index] = max(moment, at) + late
            done[index] = issued[index] + self.service_ns
            lane[index] = number
            heapq.heappush(free, (done[index], number))
        self.now += int(done.max())
        return Served(issued, done, lane)


def search(session, **options):
    return highest_rate(
        session, **({"limit_ms": 20.0, "service_ms": 2.0, "time_budget_s": 1e4, "clock": session.clock} | options)
    )


def test_arrivals_are_poisson_and_one_stream_for_every_rate():
    slow, fast = arrivals(100, 4000, seed=3), arrivals(200, 8000, seed=3)
    assert slow.dtype == np.int64
    np.testing.assert_allclose(fast[:4000], slow / 2, atol=2)
    assert (np.diff(slow) >= 0).all()
    assert not np.array_equal(slow, arrivals(100, 4000, seed=4))
    gaps_s = np.diff(slow) / 1e9
    assert stats.kstest(gaps_s, "expon", args=(0, 0.01)).pvalue > 0.01
    assert abs(np.corrcoef(gaps_s[1:], gaps_s[:-1])[0, 1]) < 0.05


def test_a_load_point_is_what_the_queue_did():
    session = Queue(2.0)
    point = run_load(session, 250.0, queries=1000, seed=1)
    due_ns = arrivals(250.0, 1000, seed=1)
    done, expected = 0, []
    for moment in due_ns.tolist():
        done = max(moment, done) + 2 * MS
        expected.append((done - moment) / MS)
    assert point.latencies_ms == pytest.approx(expected)
    assert point.mean_ms.value == pytest.approx(np.mean(expected))
    assert point.median_ms.value == pytest.approx(np.median(expected))
    assert point.p99_ms.value == pytest.approx(np.mean(sorted(expected)[989:991]))
    assert point.p999_ms is None  # 1000 queries do not carry it
    assert point.completed_per_s == pytest.approx(1000 / done * 1e9)
    assert point.utilisation == pytest.approx(2 * MS * 1000 / done)
    assert point.lateness_p99_ms == 0
    assert point.valid
    assert point.reason is None
    assert LoadPoint.model_validate_json(point.model_dump_json()) == point


def test_few_queries_carry_no_tail():
    point = run_load(Queue(1.0), 100.0, queries=100)
    assert point.p90_ms is not None
    assert point.p95_ms is point.p99_ms is None


def test_neighbours_alike_widen_the_interval():
    busy = run_load(Queue(1.0), 900.0, queries=20_000)
    shuffled = np.random.default_rng(0).permutation(busy.latencies_ms)
    assert busy.effective_queries < 1000 < 10_000 < effective_queries(shuffled)
    independent = 2 * 1.96 * np.std(shuffled) / np.sqrt(shuffled.size)
    assert busy.mean_ms.high - busy.mean_ms.low > 4 * independent
    assert effective_queries(np.full(100, 2.0)) == 100


def test_interval_of_the_mean_holds_the_mean_of_the_stationary_queue():
    # M/D/1 at 0.5: service + ρ service / (2 (1 - ρ)) = 1 + 0.5 ms.
    points = [run_load(Queue(1.0), 500.0, queries=2000, seed=seed) for seed in range(20)]
    assert sum(point.mean_ms.low <= 1.5 <= point.mean_ms.high for point in points) >= 17


@pytest.mark.parametrize(
    ("lateness_ms", "limit_ms", "valid"),
    [(0.09, None, True), (0.2, None, False), (0.09, 1.0, False), (0.04, 1.0, True)],
)
def test_a_late_harness_makes_the_run_invalid(lateness_ms, limit_ms, valid):
    # At 1 query a second none waits: p99 is 2 ms and the lateness, of which 5 % are about 0.1 ms.
    point = run_load(Queue(2.0, lateness_ms=lateness_ms), 1.0, limit_ms=limit_ms)
    assert point.lateness_p99_ms == pytest.approx(lateness_ms)
    assert point.valid is valid
    assert (point.reason is None) is valid
    if not valid:
        assert "The harness was late, by" in point.reason


def test_one_long_stall_of_the_harness_makes_the_run_invalid_though_hardly_any_query_was_late():
    class Stalled(Queue):
        def serve(self, due_ns, lanes):
            served = super().serve(due_ns, lanes)
            done = issued = 0
            for index, moment in enumerate(due_ns.tolist()):
                issued = max(moment, done) + (100 * MS if index == 300 else 0)
                done = issued + 2 * MS
                served.issued_ns[index], served.done_ns[index] = issued, done
            return served

    point = run_load(Stalled(2.0), 300.0, queries=1000)
    prompt = run_load(Queue(2.0), 300.0, queries=1000)
    assert point.lateness_p99_ms == 0
    assert point.lateness_effect_ms == pytest.approx(point.p99_ms.value - prompt.p99_ms.value)
    assert point.lateness_effect_ms > 50
    assert not point.valid
    assert prompt.lateness_effect_ms == 0


def test_the_highest_rate_is_bracketed():
    session = Queue(2.0)
    found = search(session)
    assert found.stopped_by == "bracket"
    assert found.reason is None
    assert found.rate_per_s < found.failing_per_s <= 1.02 * found.rate_per_s
    assert found.points[0].rate_per_s == 500
    for point in found.points:
        assert (point.p99_ms.value <= 20) == (point.rate_per_s <= found.rate_per_s)
        assert point.queries >= max(662, 2 * point.rate_per_s)
    assert {point.rate_per_s for point in found.points} >= {found.rate_per_s, found.failing_per_s}
    assert (found.scenario, found.batch_size, found.lanes) == ("Server", 4, 1)
    assert found.elapsed_s == pytest.approx(session.now / 1e9)
    assert ServerResult.model_validate_json(found.model_dump_json()) == found
    assert search(Queue(2.0)) == found


def test_the_highest_rate_of_long_probes_is_that_of_the_theory():
    # M/D/1: at utilisation 0.8 the 99th percentile of latency is 11.42 services (see test_server_truth).
    found = search(Queue(1.0), limit_ms=11.417, service_ms=1.0, min_queries=20_000)
    assert found.rate_per_s == pytest.approx(800, rel=0.05)


def test_more_lanes_serve_more():
    one, two = (search(Queue(2.0), lanes=lanes) for lanes in (1, 2))
    assert two.rate_per_s > 1.9 * one.rate_per_s


def test_a_service_time_that_was_too_long_only_makes_the_search_longer():
    found = search(Queue(2.0), service_ms=7.0)
    assert found.rate_per_s == pytest.approx(search(Queue(2.0)).rate_per_s, rel=0.04)
    with pytest.raises(HarnessInputError, match="service_ms is wrong"):
        search(Queue(0.01), service_ms=2.0)


def test_a_limit_that_no_load_meets_is_said():
    slow = search(Queue(2.0), limit_ms=1.9)
    assert (slow.rate_per_s, slow.failing_per_s, slow.stopped_by, len(slow.points)) == (None, 500, "limit", 1)
    assert slow.reason == "A query on its own takes 2.00 ms, over the limit of 1.9 ms."
    just = search(Queue(2.0), limit_ms=2.0)
    assert (just.rate_per_s, just.stopped_by, len(just.points)) == (None, "limit", 5)
    assert just.reason.startswith("Even at 31.2 queries/s, 6.2% of what the lanes could answer")


def test_the_time_budget_ends_the_search_before_a_probe_that_would_not_fit():
    whole = search(Queue(2.0))
    cut = search(Queue(2.0), time_budget_s=whole.elapsed_s / 2)
    assert cut.stopped_by == "time"
    assert cut.points == whole.points[: len(cut.points)]
    assert cut.elapsed_s <= whole.elapsed_s / 2
    assert "Of the time budget of" in cut.reason
    none = search(Queue(2.0), time_budget_s=0.5)
    assert (none.rate_per_s, none.points, none.stopped_by) == (None, [], "time")
    assert "1000 queries at 500/s, needs 2.1 s" in none.reason


def test_a_late_probe_is_repeated_and_decides_nothing():
    session = Queue(2.0, lateness_ms=1.5)
    session.late_runs = 2
    found = search(session)
    assert [point.valid for point in found.points[:3]] == [False, False, True]
    assert len({point.rate_per_s for point in found.points[:3]}) == 1
    assert found.rate_per_s == search(Queue(2.0)).rate_per_s


def test_a_harness_that_is_always_late_ends_the_search():
    found = search(Queue(2.0, lateness_ms=1.5))
    assert (found.rate_per_s, found.stopped_by, len(found.points)) == (None, "harness", 3)
    assert "The harness was late, by" in found.reason


def test_every_point_is_told_and_a_failure_comes_through():
    told = []
    found = search(Queue(2.0), on_point=told.append)
    assert told == found.points
    with pytest.raises(HarnessError, match=r"'queue'.*out of memory"):
        search(Queue(2.0, fails_at=3))


@pytest.mark.parametrize(
    "options",
    [
        {"limit_ms": 0},
        {"limit_ms": float("nan")},
        {"service_ms": -1},
        {"time_budget_s": 0},
        {"time_budget_s": float("inf")},
        {"lanes": 0},
        {"min_queries": 661},
        {"min_seconds": 0},
        {"tolerance": 0},
    ],
    ids=str,
)
def test_settings_of_the_search_that_cannot_be_used_are_said(options):
    session = Queue(2.0)
    (name,) = options
    with pytest.raises(HarnessInputError, match=f"{name} is .*: (give|raise) "):
        search(session, **options)
    assert not session.loads


@pytest.mark.parametrize(
    ("rate_per_s", "options"),
    [(0, {}), (-1, {}), (10, {"queries": 39}), (10, {"lanes": 0}), (10, {"limit_ms": -1})],
    ids=str,
)
def test_settings_of_a_load_that_cannot_be_used_are_said(rate_per_s, options):
    with pytest.raises(HarnessInputError, match=r" is .*: (give|raise) "):
        run_load(Queue(2.0), rate_per_s, **options)


class Local:
    """A session over one subject in this process."""

    batch_size = 1

    def __init__(self, name, lane):
        self.name = name
        self.lane = lane

    def warm(self, seconds):
        self.lane.query(0)
        return 1.0

    def serve(self, due_ns, lanes):
        return serve([self.lane] * lanes, due_ns)


class Sleeper(NullSubject):
    def query(self, index):
        time.sleep(0.0005)


def test_a_real_lane_under_a_light_load_takes_its_own_time():
    point = run_load(Local("sleeper", Sleeper()), 400.0, queries=200)
    assert 0.5 <= point.median_ms.value < 5
    assert point.completed_per_s == pytest.approx(400, rel=0.3)
    assert min(point.latencies_ms) >= 0.5


def test_the_null_model_bounds_what_the_loop_takes():
    overhead = null_overhead(Local("nothing", NullSubject()), queries=700, rate_per_s=2000)
    assert 0 <= overhead.overhead_us < 50
    assert 0 <= overhead.lateness_median_us < 1000
    assert overhead.lateness_p99_us >= overhead.lateness_median_us
    with pytest.raises(HarnessInputError, match="queries is 661: raise it"):
        null_overhead(Local("nothing", NullSubject()), queries=661)
