"""One open subject with a clock beside it: what every scenario drives, here or in another process.

This module is imported by the processes that time, so it takes no more than NumPy.
"""

import gc
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from benchmarks.harness.errors import HarnessError
from benchmarks.harness.memory import device_bytes, host_bytes, host_peak_bytes
from benchmarks.harness.subject import Lane, Stages, Subject

if TYPE_CHECKING:
    from benchmarks.harness.open_loop import Served
    from benchmarks.harness.saturation import Saturated

Clock = Callable[[], int]
Nanoseconds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Opened:
    """How a subject started."""

    load_s: float
    """Opening it and making its first lane; on a GPU that warms up and captures."""
    first_ms: float
    before_bytes: int
    """Memory of the process before it opened the subject."""


@dataclass(frozen=True)
class Timed:
    """Queries one after the other: the time from the end of each to the end of the next."""

    latencies_ns: Nanoseconds
    cpu_s: float
    """CPU time of the process meanwhile, all its threads together."""


@dataclass(frozen=True)
class Memory:
    """What the process has needed so far."""

    host_peak_bytes: int
    device_bytes: int | None
    """On the GPU at this moment; None where there is none or the driver does not tell."""


class Session(Protocol):
    """A subject that can be timed. Every method raises `HarnessError`, with the name, when the subject fails."""

    name: str
    batch_size: int

    def started(self) -> None:
        """Wait until the process is there and has imported what opens the subject."""
        ...

    def ready(self) -> Opened:
        """Open the subject, and wait until it is open and has answered its first query.

        What `open` itself raises comes through as it is: the user's input may be at fault.
        """
        ...

    def warm(self, seconds: float) -> float:
        """Run queries for `seconds`, one at least; the median duration of one in nanoseconds."""
        ...

    def time(self, queries: int) -> Timed:
        """Run queries on one lane, each as soon as the one before it is done."""
        ...

    def stages(self, queries: int) -> list[Stages]:
        """Queries taken apart, outside the timed ones."""
        ...

    def serve(self, due_ns: Nanoseconds, lanes: int) -> "Served":
        """Answer queries that come when they are due, whatever became of those before (see `open_loop`)."""
        ...

    def saturate(self, lanes: int, seconds: float) -> "Saturated":
        """Keep several lanes busy at once (see `saturation`)."""
        ...

    def memory(self) -> Memory: ...

    def describe(self) -> dict[str, Any]:
        """What runs; finding out may take memory and time, so ask last."""
        ...

    def close(self) -> None:
        """Release everything; may be called more than once."""
        ...


class LocalSession:
    """A session in this very process."""

    def __init__(
        self, name: str, open_subject: Callable[[], Subject], batch_size: int, clock: Clock = time.perf_counter_ns
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self._clock = clock
        self._open = open_subject
        self._opened: Opened | None = None
        self._subject: Subject | None = None
        self._lanes: list[Lane] = []
        self._indices: Iterator[int] = iter(())
        self._stamps = array("q")

    def started(self) -> None:
        pass

    def ready(self) -> Opened:
        if self._opened is None:
            before = host_bytes()
            begin = self._clock()
            self._subject = self._open()
            opened = self._clock()
            self._subject.prepare()
            prepared = self._clock()
            lane = self._subject.lane()
            load_s = (self._clock() - prepared + opened - begin) / 1e9
            self._lanes.append(lane)
            self._indices = cycle(range(lane.size))
            begin = self._clock()
            with self._working():
                lane.query(next(self._indices))
            first_ms = (self._clock() - begin) / 1e6
            self._opened = Opened(load_s, first_ms, before)
        return self._opened

    def warm(self, seconds: float) -> float:
        (lane,) = self._first(1)
        durations: list[int] = []
        begin = last = self._clock()
        while not durations or last - begin < seconds * 1e9:
            with self._working():
                lane.query(next(self._indices))
            now = self._clock()
            durations.append(now - last)
            if now == begin:
                raise HarnessError(f"Variant {self.name!r} took no measurable time: its step does no work.")
            last = now
        return max(1.0, float(np.median(durations)))

    def time(self, queries: int) -> Timed:
        (lane,) = self._first(1)
        if len(self._stamps) != queries + 1:
            self._stamps = array("q", bytes(8 * (queries + 1)))
        stamps, query, indices, clock = self._stamps, lane.query, self._indices, self._clock
        with _uncollected(), self._working():
            cpu = time.process_time()
            stamps[0] = clock()
            for slot in range(1, queries + 1):
                query(next(indices))
                stamps[slot] = clock()
            cpu_s = time.process_time() - cpu
        times: Nanoseconds = np.frombuffer(stamps, dtype=np.int64)
        return Timed(times[1:] - times[:-1], cpu_s)

    def stages(self, queries: int) -> list[Stages]:
        (lane,) = self._first(1)
        with self._working():
            return [lane.stages(next(self._indices)) for _ in range(queries)]

    def serve(self, due_ns: Nanoseconds, lanes: int) -> "Served":
        from benchmarks.harness.open_loop import serve

        with _uncollected(), self._working():
            return serve(self._first(lanes), due_ns)

    def saturate(self, lanes: int, seconds: float) -> "Saturated":
        from benchmarks.harness.saturation import saturate

        with _uncollected(), self._working():
            return saturate(self._first(lanes), seconds)

    def memory(self) -> Memory:
        return Memory(host_peak_bytes(), device_bytes())

    def describe(self) -> dict[str, Any]:
        if self._subject is None:
            raise self._not_open()
        with self._working():
            return self._subject.description()

    def close(self) -> None:
        self._lanes.clear()
        if self._subject is not None:
            self._subject.close()
            self._subject = None

    def _first(self, count: int) -> list[Lane]:
        """The first `count` lanes; those that are missing are made and answer one query each."""
        if self._subject is None:
            raise self._not_open()
        while len(self._lanes) < count:
            with self._working():
                lane = self._subject.lane()
                lane.query(0)
            self._lanes.append(lane)
        return self._lanes[:count]

    def _not_open(self) -> HarnessError:
        return HarnessError(f"Variant {self.name!r} is not open: it was closed, or never made ready.")

    @contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except HarnessError:
            raise
        except Exception as error:
            raise HarnessError(f"Variant {self.name!r} failed while it was measured: {error}") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Garbage collection is off while the clock runs."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
