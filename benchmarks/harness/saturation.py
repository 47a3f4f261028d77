"""A closed loop on several lanes at once: each starts its next query as soon as the one before is done.

This module is imported by the processes that time, so it takes no more than NumPy.
"""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.open_loop import Clock, Crew, Nanoseconds, run_lanes
from benchmarks.harness.subject import Lane

ROOM = 65_536
"""Queries of a lane for which there is room at first; the room is doubled between two queries."""


@dataclass(frozen=True)
class Saturated:
    """Queries per second are `latencies_ns.size / wall_ns * 1e9`."""

    latencies_ns: Nanoseconds
    """From the end of each query to the end of the next on its lane; lane after lane."""
    wall_ns: int
    """The queries of all lanes, divided by the sum of the lanes' rates. With one lane it is last done - start.

    A lane's rate counts its queries from the common start to the end of its last one, so each lane is busy for the
    whole of its own time. One common window would be wrong by a query per lane: it either cuts queries off or counts
    the time in which a lane had already ended.
    """


def saturate(lanes: Sequence[Lane], seconds: float, *, clock: Clock = time.perf_counter_ns) -> Saturated:
    """Keep all lanes busy for `seconds`; a query that has begun is finished, and every lane answers at least one.

    Before the common start every lane answers one query that is not counted.

    Raises:
        HarnessInputError: there is no lane, or `seconds` is not positive.
        Exception: what a query raised, after all lanes have stopped.
    """
    if not seconds > 0:
        raise HarnessInputError(f"Lanes cannot be kept busy for {seconds:g} s: give a positive number of seconds.")
    stamps = [array("q", bytes(8 * ROOM)) for _ in lanes]
    counts = [0] * len(lanes)

    def loop(number: int, lane: Lane, crew: Crew) -> None:
        query, size, own = lane.query, lane.size, stamps[number]
        query(number % size)
        done = 0
        last = crew.start()
        end = last + seconds * 1e9
        while not crew.stopped and (last < end or done == 0):
            query((number + done) % size)
            last = own[done] = clock()
            done += 1
            if done == len(own):
                own.frombytes(bytes(8 * done))
        counts[number] = done

    start = run_lanes(lanes, loop, clock)
    ends = [np.frombuffer(own, dtype=np.int64, count=count) for own, count in zip(stamps, counts, strict=True)]
    spans = [int(end[-1]) - start for end in ends]
    rate = sum(count / span for count, span in zip(counts, spans, strict=True))
    return Saturated(
        latencies_ns=np.concatenate([np.diff(end, prepend=start) for end in ends]), wall_ns=round(sum(counts) / rate)
    )
