"""An open loop: queries come when they are due, whatever became of those before.

A client that waits for a reply before it sends the next query slows down together with what it measures, and never
sees the queue that real users stand in (coordinated omission: Gil Tene, "How NOT to Measure Latency", 2015). Here the
schedule is fixed beforehand and latency counts from the scheduled moment: `done - due`.

This module is imported by the processes that time, so it takes no more than NumPy.
"""

import gc
import heapq
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Barrier, BrokenBarrierError
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.subject import Lane, Stages

Clock = Callable[[], int]
Nanoseconds = npt.NDArray[np.int64]

SPIN_NS = 100_000
"""The last part of a wait, spent looking at the clock instead of sleeping.

Linux wakes a sleeper late by its timer slack, 50 µs, and the time to wake a core. Measured on two cores of an AMD EPYC:
without spinning 77 µs late in the median, with 50 µs 34, with 75 µs 19, with 100 µs 0.2. More only burns the core
(100 µs: 2 % of it at 500 queries/s, 200 µs: 6 %, 500 µs: 17 %), and while Python spins it keeps its lock from a lane
that is done. Yielding in between (`sleep(0)`) sleeps for the slack as well, and was 45 µs late.
"""

NAP_NS = 50_000_000
"""Longest sleep at a stretch: how long a lane may go on after another one has failed."""


@dataclass(frozen=True)
class Served:
    """What became of each query: nanoseconds since the start of the run, one entry per query in order of due times."""

    issued_ns: Nanoseconds
    """When the query was handed to the runtime."""
    done_ns: Nanoseconds
    lane: npt.NDArray[np.int64]
    """Number of the lane that answered it."""

    def lateness_ns(self, due_ns: Nanoseconds) -> Nanoseconds:  # (queries,) -> (queries,)
        """How late the harness itself was: from when the query was due and its lane free to when it was issued."""
        ready = due_ns.copy()
        for number in np.unique(self.lane):
            own = np.flatnonzero(self.lane == number)
            ready[own[1:]] = np.maximum(ready[own[1:]], self.done_ns[own[:-1]])
        return self.issued_ns - ready

    def prompt_latencies_ns(self, due_ns: Nanoseconds, lanes: int) -> Nanoseconds:  # (queries,) -> (queries,)
        """The latencies of a harness that is never late: the same queue replayed with each query's own service time.

        One long stall of the harness delays all that queue behind it, so it moves the tail of latency although nearly
        no query was itself issued late. The replay shows that.
        """
        free = [0] * lanes
        prompt = np.empty_like(due_ns)
        services = (self.done_ns - self.issued_ns).tolist()
        for index, (due, service) in enumerate(zip(due_ns.tolist(), services, strict=True)):
            done = max(due, free[0]) + service
            heapq.heapreplace(free, done)
            prompt[index] = done - due
        return prompt


class Crew:
    """The lanes of one run: they start at one moment, and if one fails all stop."""

    def __init__(self, lanes: int, clock: Clock) -> None:
        self.stopped = False
        self.start_ns = 0
        self._clock = clock
        self._start = Barrier(lanes, action=self._begin)

    def start(self) -> int:
        """Wait for all lanes; the common start in the clock's nanoseconds."""
        self._start.wait()
        return self.start_ns

    def stop(self) -> None:
        self.stopped = True
        self._start.abort()

    def work(self, loop: "Loop", number: int, lane: Lane) -> None:
        """Run the loop on one lane. If it raises, the others are stopped; a stopped lane raises nothing."""
        try:
            loop(number, lane, self)
        except BrokenBarrierError:
            return
        except BaseException:
            self.stop()
            raise

    def _begin(self) -> None:
        self.start_ns = self._clock()


Loop = Callable[[int, Lane, Crew], None]


def run_lanes(lanes: Sequence[Lane], loop: Loop, clock: Clock) -> int:
    """Run `loop(number, lane, crew)` for every lane, each in a thread of its own; one lane alone needs none.

    Garbage collection is off meanwhile. All threads have ended when this returns or raises.

    Returns:
        The common start in the clock's nanoseconds.

    Raises:
        HarnessInputError: there is no lane.
        Exception: what a lane raised; if several did, that of the first lane.
    """
    if not lanes:
        raise HarnessInputError("There is no lane to run queries on: give at least 1.")
    crew = Crew(len(lanes), clock)
    collecting = gc.isenabled()
    gc.disable()
    try:
        if len(lanes) == 1:
            crew.work(loop, 0, lanes[0])
            return crew.start_ns
        with ThreadPoolExecutor(len(lanes), thread_name_prefix="lane") as pool:
            try:
                futures = [pool.submit(crew.work, loop, number, lane) for number, lane in enumerate(lanes)]
                wait(futures)
            finally:
                crew.stop()
    finally:
        if collecting:
            gc.enable()
    for future in futures:
        future.result()
    return crew.start_ns


def serve(
    lanes: Sequence[Lane],
    due_ns: Nanoseconds,
    *,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
    spin_ns: int = SPIN_NS,
) -> Served:
    """Answer one query per entry of `due_ns`, first come first served.

    A free lane takes the next query, waits until it is due and answers it. Before the start every lane answers one
    query that is not counted: what a runtime sets up for a thread belongs to no query.

    Args:
        due_ns: When each query is due, in nanoseconds from the start, ascending.
        clock: Monotonic nanoseconds; tests give a fake one, and a fake `sleep` that takes seconds.
        spin_ns: The last part of a wait that is not slept.

    Raises:
        HarnessInputError: there is no lane, no query, or the due times do not ascend.
        Exception: what a query raised, after all lanes have stopped.
    """
    count = due_ns.size
    if count == 0:
        raise HarnessInputError("There is no query to serve: give at least one due time.")
    if due_ns[0] < 0 or (np.diff(due_ns) < 0).any():
        raise HarnessInputError("The due times must ascend from 0: sort them.")
    due = array("q", due_ns.astype(np.int64).tobytes())
    issued, done, taker = (array("q", bytes(8 * count)) for _ in range(3))
    take = itertools.count().__next__  # one step of the interpreter, so no two lanes get the same number

    def loop(number: int, lane: Lane, crew: Crew) -> None:
        query, size = lane.query, lane.size
        query(number % size)
        start = crew.start()
        while (index := take()) < count and not crew.stopped:
            due_at = start + due[index]
            while (left := due_at - clock()) > 0:
                if left > spin_ns:
                    sleep(min(left - spin_ns, NAP_NS) / 1e9)
                    if crew.stopped:
                        return
            issued[index] = clock()
            query(index % size)
            done[index] = clock()
            taker[index] = number

    start = run_lanes(lanes, loop, clock)
    return Served(_integers(issued) - start, _integers(done) - start, _integers(taker).copy())


def _integers(stamps: "array[int]") -> Nanoseconds:
    numbers: Nanoseconds = np.frombuffer(stamps, dtype=np.int64)
    return numbers


class NullSubject:
    """A subject whose queries do nothing: what it seems to take is the harness."""

    size = 1

    def query(self, index: int) -> None:
        pass

    def stages(self, index: int) -> Stages:
        issued_ns = time.perf_counter_ns()
        self.query(index)
        return Stages(issued_ns=issued_ns, enqueued_ns=issued_ns, done_ns=time.perf_counter_ns())

    def prepare(self) -> None:
        pass

    def lane(self) -> Lane:
        return self

    def description(self) -> dict[str, Any]:
        return {"runtime": "none", "version": "", "device": "none"}

    def close(self) -> None:
        pass
