"""A subject that takes longer than it needs by a known share: what a comparison should find."""

import time
from typing import Any

from benchmarks.harness.subject import Lane, Stages, Subject


def open_slowed(*, share: float, arguments: dict[str, Any]) -> Subject:
    """An artefact whose every query takes longer by this share of itself."""
    from deploy.subjects import open_artefact

    return _Slowed(open_artefact(**arguments), share)


class _Slowed:
    def __init__(self, subject: Subject, share: float) -> None:
        self._subject = subject
        self._share = share

    def prepare(self) -> None:
        self._subject.prepare()

    def lane(self) -> Lane:
        return _SlowedLane(self._subject.lane(), self._share)

    def description(self) -> dict[str, Any]:
        return self._subject.description() | {"slowed_by": self._share}

    def close(self) -> None:
        self._subject.close()


class _SlowedLane:
    def __init__(self, lane: Lane, share: float) -> None:
        self.size = lane.size
        self._lane = lane
        self._share = share

    def query(self, index: int) -> None:
        begin = time.perf_counter_ns()
        self._lane.query(index)
        now = time.perf_counter_ns()
        until = now + self._share * (now - begin)
        while time.perf_counter_ns() < until:
            pass

    def stages(self, index: int) -> Stages:
        return self._lane.stages(index)
