"""A plain function as something to time, in this very process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.subject import Lane, Stages


@dataclass(frozen=True)
class Variant:
    """One thing to time in this very process: `step` runs one query of `batch_size` samples to its end.

    Compare files by `Candidate`s, each in processes of its own: here one can warm or starve the caches and thread
    pools of another, and nothing shows what a process's place in memory does. `close`, if given, is called once when
    the measurement is over, whether it succeeded or not.
    """

    name: str
    step: Callable[[], None]
    batch_size: int = 1
    close: Callable[[], None] | None = None


class _StepLane:
    """A step without inputs of its own, as a lane."""

    size = 1

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def query(self, index: int) -> None:  # noqa: ARG002 - the step takes what it takes
        self._step()

    def stages(self, index: int) -> Stages:  # noqa: ARG002
        begin = time.perf_counter_ns()
        self._step()
        return Stages(begin, begin, time.perf_counter_ns())


class StepSubject:
    """A step as a subject; all its lanes run the same step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def prepare(self) -> None:
        pass

    def lane(self) -> Lane:
        return _StepLane(self._step)

    def description(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
