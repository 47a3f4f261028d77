"""Seconds and memory of the stages of one model, written into its row while they pass."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.coverage.checks import WrongResultError
from benchmarks.coverage.rows import STAGES, Failure, Kind, Row, Share, Stage, write_row
from benchmarks.harness.memory import host_bytes, host_peak_bytes
from compress.errors import InputError, first_line

_TRACEBACK_LINES = 8


class Meter:
    """Runs stages and keeps the row in its file up to date, so that a process that is killed has left what it knew."""

    def __init__(self, row: Row, path: Path) -> None:
        self.row = row
        self._path = path
        self._share: str | None = None

    def save(self) -> None:
        write_row(self._path, self.row)

    def wanted(self, stage: str) -> bool:
        """Whether the request goes as far as this stage."""
        return STAGES.index(stage) <= STAGES.index(self.row.request.until)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what happens inside."""
        self.row.now = (name, self._share)
        self.save()
        forget_peak()
        before, began = host_bytes(), time.perf_counter()
        try:
            yield
        finally:
            stages = self.row.stages if self._share is None else self.row.shares[self._share].stages
            stages[name] = Stage(
                seconds=time.perf_counter() - began, before_bytes=before, peak_bytes=max(before, host_peak_bytes())
            )

    def model(self, work: Callable[[], None]) -> bool:
        """Do what concerns the whole model; False if it failed, which the row then says."""
        self._share = None
        self.row.failure = self._failure(work)
        return self.row.failure is None

    def aside(self, work: Callable[[], None]) -> None:
        """Compare the groups of both sides; where that fails, nothing else does."""
        self._share = None
        failure = self._failure(work)
        if failure is not None:
            self.row.difference = not_compared(failure.reason)

    def share(self, name: str, work: Callable[[Share], None]) -> None:
        """Do what concerns one share of the channels."""
        self._share = name
        share = self.row.shares[name] = Share()
        share.failure = self._failure(lambda: work(share))

    def done(self) -> None:
        """Nothing is being worked on any more."""
        self.row.now = None
        self.save()

    def _failure(self, work: Callable[[], None]) -> Failure | None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever a model does to us is a row of the table
            stage = self.row.now[0] if self.row.now else STAGES[0]
            return Failure(stage=stage, kind=_kind(error), reason=_reason(error), traceback=_last_lines(error))
        return None


def not_compared(reason: str) -> str:
    """What a row says in place of a difference between the groups."""
    return f"not compared: {reason}"


def forget_peak() -> None:
    """Let the kernel's high-water mark of this process's memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _kind(error: Exception) -> Kind:
    if isinstance(error, WrongResultError):
        return "wrong"
    return "refused" if isinstance(error, InputError) else "error"


def _reason(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, InputError | WrongResultError) else f"{type(error).__name__}: {text}"


def _last_lines(error: Exception) -> str:
    if isinstance(error, WrongResultError):
        return ""
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    lines = [line for part in traceback.format_exception(root, chain=False) for line in part.splitlines()]
    return "\n".join(lines[-_TRACEBACK_LINES:])
