"""A hard limit of time: processes that open or time something are ended when it is reached."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import psutil

WORKER = "benchmarks.harness.worker"
"""Module that the harness runs in its processes; by it they are known from other children."""

LOOK_S = 0.2

Clock = Callable[[], float]


class Deadline:
    """Counts down from its creation."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._seconds = seconds

    def elapsed_s(self) -> float:
        return self._clock() - self._begin

    def left_s(self) -> float:
        """Below 0 once it is over."""
        return self._seconds - self.elapsed_s()


@contextmanager
def ending_workers(seconds: float) -> Iterator[threading.Event]:
    """From `seconds` after the start of the block on, end every worker process of this one, until the block is left.

    Who waits for one of them then gets a `HarnessError`, which says that it died; the event tells that this was why.
    """
    done, ended = threading.Event(), threading.Event()

    def watch() -> None:
        if done.wait(max(0.0, seconds)):
            return
        ended.set()
        while True:  # a worker may be started after the others were ended
            _end_workers()
            if done.wait(LOOK_S):
                return

    thread = threading.Thread(target=watch, name="deadline", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        done.set()
        thread.join()


def _end_workers() -> None:
    for worker in psutil.Process().children():
        try:
            if WORKER not in worker.cmdline():
                continue
            for process in chain(worker.children(recursive=True), [worker]):  # compilers that it has started first
                process.kill()
        except psutil.Error:  # it has ended by itself
            continue
