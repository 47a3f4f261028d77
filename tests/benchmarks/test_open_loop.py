"""The open loop and the saturated one, on clocks that only the fake queries and sleeps advance."""

import gc
import heapq
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.open_loop import NAP_NS, Crew, NullSubject, Served, serve
from benchmarks.harness.saturation import saturate
from benchmarks.harness.session import LocalSession

MS = 1_000_000


class OneLane:
    """A lane and its clock. The first query, which is not counted, takes 1 ms."""

    def __init__(self, services_ns):
        self.services = services_ns
        self.size = len(services_ns)
        self.now = 5 * MS
        self.asked = []
        self.naps = []
        self.warm = False

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += round(seconds * 1e9)

    def query(self, index):
        self.now += self.services[index] if self.warm else MS
        if self.warm:
            self.asked.append(index)
        self.warm = True


class SharedClock:
    """Virtual time for threads: it moves to the next wake-up only when every lane sleeps or has ended."""

    def __init__(self, lanes):
        self.lanes = lanes
        self.now = 0
        self.wakes = []
        self.changed = threading.Condition()

    def clock(self):
        return self.now

    def sleep(self, seconds):
        with self.changed:
            wake = self.now + round(seconds * 1e9)
            heapq.heappush(self.wakes, wake)
            self._advance()
            while self.now < wake:
                self.changed.wait()

    def leave(self):
        with self.changed:
            self.lanes -= 1
            self._advance()

    def _advance(self):
        if self.wakes and len(self.wakes) == self.lanes:
            self.now = self.wakes[0]
            while self.wakes and self.wakes[0] == self.now:
                heapq.heappop(self.wakes)
            self.changed.notify_all()

    @contextmanager
    def told(self):
        """The clock hears when a lane ends."""
        work = Crew.work

        def told(crew, *arguments):
            try:
                work(crew, *arguments)
            finally:
                self.leave()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Crew, "work", told)
            yield


class ManyLanes:
    """One of several lanes on a shared clock."""

    def __init__(self, clock, services_ns):
        self.shared = clock
        self.services = services_ns
        self.size = len(services_ns)
        self.warm = False

    def query(self, index):
        if self.warm and self.services[index]:
            self.shared.sleep(self.services[index] / 1e9)
        self.warm = True


def due(*milliseconds):
    return np.array([moment * MS for moment in milliseconds], dtype=np.int64)


def on_many_lanes(lanes, services_ns, due_ns):
    shared = SharedClock(lanes)
    with shared.told():
        crew = [ManyLanes(shared, services_ns) for _ in range(lanes)]
        return serve(crew, due_ns, clock=shared.clock, sleep=shared.sleep, spin_ns=0)


def on_one_lane(services_ns, due_ns, **options):
    lane = OneLane(services_ns)
    return lane, serve([lane], due_ns, clock=lane.clock, sleep=lane.sleep, **({"spin_ns": 0} | options))


def test_a_queue_too_slow_for_its_arrivals_gets_longer_and_longer():
    # D/D/1, due every 10 ms, 15 ms each: the n-th is done 15 n after the start, 5 ms later each time.
    due_ns = due(0, 10, 20, 30)
    lane, served = on_one_lane([15 * MS] * 4, due_ns)
    assert ((served.done_ns - due_ns) / MS).tolist() == [15, 20, 25, 30]
    assert (served.issued_ns / MS).tolist() == [0, 15, 30, 45]
    assert served.lateness_ns(due_ns).tolist() == [0, 0, 0, 0]
    assert lane.asked == [0, 1, 2, 3]


def test_a_queue_that_keeps_up_takes_the_service_time_alone():
    due_ns = due(10, 20, 40)
    _, served = on_one_lane([4 * MS] * 3, due_ns)
    assert ((served.done_ns - due_ns) / MS).tolist() == [4, 4, 4]
    assert served.lane.tolist() == [0, 0, 0]


def test_a_stall_delays_all_that_became_due_meanwhile():
    # The second takes 100 ms; a client that waited for it would have sent the others late and called each 1 ms.
    due_ns = due(0, 10, 20, 30, 200)
    _, served = on_one_lane([MS, 100 * MS, MS, MS, MS], due_ns)
    assert ((served.done_ns - due_ns) / MS).tolist() == [1, 100, 91, 82, 1]


def test_inputs_take_turns():
    lane, _ = on_one_lane([MS, MS, MS], due(*range(7)))
    assert lane.asked == [0, 1, 2, 0, 1, 2, 0]


def test_the_last_part_of_a_wait_is_spun_and_long_ones_are_slept_in_naps():
    lane = OneLane([0])
    readings = []

    def clock():
        lane.now += 1000
        readings.append(lane.now)
        return lane.now

    due_ns = np.array([2 * NAP_NS + 300_000], dtype=np.int64)
    served = serve([lane], due_ns, clock=clock, sleep=lane.sleep, spin_ns=100_000)
    assert len(lane.naps) == 3
    assert lane.naps[:2] == [NAP_NS / 1e9] * 2
    assert len(readings) == pytest.approx(100, abs=10)  # of 1 µs each
    assert 0 <= served.lateness_ns(due_ns)[0] <= 2000


def test_lateness_counts_from_when_query_was_due_and_lane_free():
    served = Served(
        issued_ns=np.array([3, 10, 25, 30]), done_ns=np.array([20, 12, 29, 40]), lane=np.array([0, 1, 0, 1])
    )
    # Due at 0, 8, 9, 29: free at 0, 0, 20, 12.
    assert served.lateness_ns(np.array([0, 8, 9, 29])).tolist() == [3, 2, 5, 1]


def test_a_stall_of_the_harness_is_taken_out_of_all_that_it_delayed():
    # Due 0, 10, 20 with 5 ms each; the harness slept for 30 ms before the first.
    due_ns = due(0, 10, 20)
    served = Served(issued_ns=due(30, 35, 40), done_ns=due(35, 40, 45), lane=np.zeros(3, dtype=np.int64))
    assert (served.lateness_ns(due_ns) / MS).tolist() == [30, 0, 0]
    assert (served.prompt_latencies_ns(due_ns, 1) / MS).tolist() == [5, 5, 5]


GAPS = st.lists(st.tuples(st.integers(0, 50 * MS), st.integers(0, 50 * MS)), min_size=1, max_size=40)


@given(GAPS)
@settings(max_examples=200, deadline=None)
def test_latencies_are_those_of_lindleys_recursion(gaps_and_services):
    gaps, services = (list(numbers) for numbers in zip(*gaps_and_services, strict=True))
    due_ns = np.cumsum(gaps)
    _, served = on_one_lane(services, due_ns)
    wait = 0
    for index, service in enumerate(services):
        if index:
            wait = max(0, wait + services[index - 1] - gaps[index])
        assert served.done_ns[index] - due_ns[index] == wait + service
        assert served.issued_ns[index] - due_ns[index] == wait
    assert not served.lateness_ns(due_ns).any()
    assert (served.prompt_latencies_ns(due_ns, 1) == served.done_ns - due_ns).all()


@given(st.integers(2, 4), GAPS)
@settings(max_examples=30, deadline=None)
def test_several_lanes_are_one_queue_first_come_first_served(lanes, gaps_and_services):
    gaps, services = (list(numbers) for numbers in zip(*gaps_and_services, strict=True))
    due_ns = np.cumsum(gaps)
    served = on_many_lanes(lanes, services, due_ns)
    free = [0] * lanes  # Kiefer and Wolfowitz: each query goes to the lane that is free first
    for index, service in enumerate(services):
        issued = max(due_ns[index], heapq.heappop(free))
        heapq.heappush(free, issued + service)
        assert (served.issued_ns[index], served.done_ns[index]) == (issued, issued + service)
    assert not served.lateness_ns(due_ns).any()
    assert (served.prompt_latencies_ns(due_ns, lanes) == served.done_ns - due_ns).all()


def test_two_lanes_by_hand():
    # Due 0, 1, 2, 3 with 10, 4, 10, 1 ms: the second lane is free at 5 and takes the third, the first at 10 the fourth.
    served = on_many_lanes(2, [10 * MS, 4 * MS, 10 * MS, MS], due(0, 1, 2, 3))
    assert (served.issued_ns / MS).tolist() == [0, 1, 5, 10]
    assert (served.done_ns / MS).tolist() == [10, 5, 15, 11]
    assert served.lane[0] == served.lane[3] != served.lane[1] == served.lane[2]


class Failing(NullSubject):
    """A subject whose lanes fail at one query; `at` counts the queries of all lanes."""

    def __init__(self, at):
        self.at = at
        self.asked = 0
        self.lock = threading.Lock()

    def query(self, index):
        with self.lock:
            self.asked += 1
            if self.asked == self.at:
                raise ValueError("the cable is out")


RUNS = {
    "serve": lambda session, lanes: session.serve(np.arange(1000, dtype=np.int64) * MS, lanes),
    "saturate": lambda session, lanes: session.saturate(lanes, 30.0),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("extra", [1, 20])  # in the queries before the common start, and after it
def test_an_error_in_a_query_ends_the_run_and_every_thread(run, lanes, extra):
    session = LocalSession("loose", lambda: Failing(at=lanes + extra), 1)
    session.ready()
    before = threading.active_count()
    with pytest.raises(HarnessError, match=r"'loose'.*the cable is out"):
        run(session, lanes)
    assert threading.active_count() == before
    assert gc.isenabled()


def test_a_lane_that_waits_for_its_query_ends_soon_after_another_failed():
    subject = Failing(at=3)  # the first that counts; the other lane waits for ten minutes
    with pytest.raises(ValueError, match="cable"):
        serve([subject, subject], due(0, 600_000))
    assert subject.asked == 3


@pytest.mark.parametrize(
    ("lanes", "due_ns", "said"),
    [
        (0, due(0), "no lane"),
        (1, due(), "no query"),
        (1, due(2, 1), "must ascend"),
        (1, due(-1, 1), "must ascend"),
    ],
)
def test_what_cannot_be_served_is_said(lanes, due_ns, said):
    with pytest.raises(HarnessInputError, match=said):
        serve([NullSubject()] * lanes, due_ns)


def test_no_garbage_is_collected_while_the_clock_runs():
    seen = []

    class Watching(NullSubject):
        def query(self, index):
            seen.append(gc.isenabled())

    serve([Watching()], due(0, 0))
    saturate([Watching()], 1e-6)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_saturated_lane_by_hand():
    # 10, 20, 30 ms in turn for 50 ms: the third is finished, and the wall is what they took.
    lane = OneLane([10 * MS, 20 * MS, 30 * MS])
    saturated = saturate([lane], 0.05, clock=lane.clock)
    assert (saturated.latencies_ns / MS).tolist() == [10, 20, 30]
    assert saturated.wall_ns == 60 * MS
    assert lane.asked == [0, 1, 2]


def test_a_lane_answers_at_least_one_query():
    lane = OneLane([10 * MS])
    assert saturate([lane], 1e-9, clock=lane.clock).latencies_ns.tolist() == [10 * MS]


def test_room_grows_with_the_queries(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.saturation.ROOM", 2)
    lane = OneLane([MS])
    saturated = saturate([lane], 0.021, clock=lane.clock)
    assert saturated.latencies_ns.tolist() == [MS] * 21


def test_lanes_of_different_speed_add_their_rates():
    # For 60 ms: one lane does 6 queries of 10 ms, the other 3 of 25 in 75 ms: 100 + 40 = 140 a second.
    shared = SharedClock(2)
    lanes = [ManyLanes(shared, [10 * MS] * 2), ManyLanes(shared, [25 * MS] * 2)]
    with shared.told():
        saturated = saturate(lanes, 0.06, clock=shared.clock)
    assert (saturated.latencies_ns / MS).tolist() == [10] * 6 + [25] * 3
    assert saturated.latencies_ns.size / saturated.wall_ns * 1e9 == pytest.approx(140)


def test_bad_seconds_and_no_lanes_are_said():
    for seconds in (0, -1, float("nan")):
        with pytest.raises(HarnessInputError, match="positive number of seconds"):
            saturate([NullSubject()], seconds)
    with pytest.raises(HarnessInputError, match="no lane"):
        saturate([], 1)
