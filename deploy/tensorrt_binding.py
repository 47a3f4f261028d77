"""What TensorRT calls back (logger, error recorder, progress monitor), and the import that all of it starts from.

TensorRT's Python classes exist only where it is installed, so each callback is a class made on demand. TensorRT calls
them from C++ and from several threads; an exception that left one would be lost there, or end the process: none may.
"""

import logging
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress.errors import InputError, MissingExtraError
from compress.progress import Bar, progress_bar

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

OLDEST, FIRST_UNKNOWN = (10, 12), (12,)
"""Versions of TensorRT that this code is for: from the first up to, but without, the second."""

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient (device )?memory|memory allocation failed", re.IGNORECASE)


def import_tensorrt(purpose: str) -> ModuleType:
    """The `tensorrt` module, its plugins not yet registered.

    Args:
        purpose: what needs it, as the subject of a sentence.

    Raises:
        MissingExtraError: it is not installed.
        InputError: it is of a version that this code does not know.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise MissingExtraError("tensorrt", "tensorrt", purpose) from error
    if not supported(trt.__version__):
        oldest = ".".join(map(str, OLDEST))
        raise InputError(
            f"{purpose} needs TensorRT from {oldest} up to, but without, {FIRST_UNKNOWN[0]}, and {trt.__version__} is "
            f"installed: run pip install 'tensorrt>={oldest},<{FIRST_UNKNOWN[0]}'."
        )
    return trt


def supported(version: str) -> bool:
    """Whether this code is for that version of TensorRT."""
    return OLDEST <= version_numbers(version) < FIRST_UNKNOWN


def version_numbers(version: str) -> tuple[int, ...]:
    """ "10.16.1.11" -> (10, 16, 1, 11); what follows the numbers is left out."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


@cache
def process_logger(trt: ModuleType) -> "tensorrt.ILogger":
    """TensorRT's messages in our log: errors and warnings as they are, its own INFO and VERBOSE as DEBUG.

    There is one for the whole process, which is never freed: TensorRT makes the first logger that it is given the
    global one, and its plugin library goes on pointing at it.
    """
    levels = {
        trt.ILogger.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.ERROR: logging.ERROR,
        trt.ILogger.WARNING: logging.WARNING,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            logger.log(levels.get(severity, logging.DEBUG), "TensorRT: %s", msg)

    return Logger()


@dataclass(frozen=True)
class RecordedError:
    """One error that TensorRT reported."""

    code: Any
    """A `tensorrt.ErrorCodeTRT`."""
    description: str


class Errors:
    """What an error recorder collected. The first error is the cause, those after it mostly follow from it."""

    def __init__(self, trt: ModuleType) -> None:
        self._allocation = trt.ErrorCodeTRT.FAILED_ALLOCATION
        self.items: list[RecordedError] = []
        self.recorder = _make_recorder(trt, self.items)
        """To be assigned to `error_recorder` of a TensorRT object; keep this `Errors` alive as long as the object."""

    def reason(self, otherwise: str = "it gave no reason") -> str:
        """The first error as part of a sentence; `otherwise` where none was reported."""
        return " ".join(self.items[0].description.split()).rstrip(".") if self.items else otherwise

    @property
    def out_of_memory(self) -> bool:
        """Whether GPU memory ran out."""
        return any(
            item.code == self._allocation or _OUT_OF_MEMORY.search(item.description) is not None for item in self.items
        )

    def clear(self) -> None:
        self.items.clear()


def _make_recorder(trt: ModuleType, items: list[RecordedError]) -> "tensorrt.IErrorRecorder":
    class Recorder(trt.IErrorRecorder):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)

        def clear(self) -> None:
            items.clear()

        def num_errors(self) -> int:
            return len(items)

        def get_error_code(self, index: int) -> Any:
            return items[index].code

        def get_error_desc(self, index: int) -> str:
            return items[index].description

        def has_overflowed(self) -> bool:
            return False

        def report_error(self, code: Any, description: str) -> bool:
            items.append(RecordedError(code, description))
            return True  # every error is fatal to the call that it occurred in

    return Recorder()


@dataclass
class _Phase:
    name: str
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """TensorRT's nested build phases on one bar of `STEPS` steps, and the wish to stop.

    A phase of n steps is done by one n-th per step; its children share out the step that it is at.
    """

    STEPS = 100

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._phases: dict[str, _Phase] = {}
        self._reached = 0
        self.error: BaseException | None = None
        """What a callback failed with, or the user's interruption; raised when TensorRT has returned."""

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._phases[name] = _Phase(name, parent, max(steps, 1))
        self._show()

    def step(self, name: str, step: int) -> bool:
        """Mark a step, counted from 0, as completed; False asks TensorRT to stop."""
        phase = self._phases.get(name)
        if phase is not None:
            phase.done = min(step + 1, phase.steps)
        self._show()
        return self.error is None

    def finish(self, name: str) -> None:
        self._phases.pop(name, None)
        self._show()

    def fail(self, error: BaseException) -> None:
        """Stop the build at the next step and keep the reason."""
        self.error = self.error or error

    def _show(self) -> None:
        phases = list(self._phases.values())  # a copy: phases begin and end in several threads of the builder
        done = max((_fraction(phase, phases) for phase in phases if phase.parent not in self._phases), default=0.0)
        self._reached = max(self._reached, int(self.STEPS * done))
        self._bar.skip_to(self._reached)
        self._bar.advance(" › ".join(f"{phase.name} {phase.done}/{phase.steps}" for phase in phases[-2:]), 0)


def _fraction(phase: _Phase, phases: Sequence[_Phase]) -> float:
    """Part of a phase that is done, from 0 to 1, its children's part of the current step included."""
    within = max((_fraction(child, phases) for child in phases if child.parent == phase.name), default=0.0)
    return min((phase.done + within) / phase.steps, 1.0)


def make_monitor(trt: ModuleType, progress: BuildProgress) -> "tensorrt.IProgressMonitor":
    """Hands TensorRT's progress on to `progress`; what fails there stops the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            try:
                progress.start(phase_name, parent_phase, num_steps)
            except BaseException as error:  # noqa: BLE001  must not reach C++; raised after the build
                progress.fail(error)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                return progress.step(phase_name, step)
            except BaseException as error:  # noqa: BLE001  as above
                progress.fail(error)
                return False

        def phase_finish(self, phase_name: str) -> None:
            try:
                progress.finish(phase_name)
            except BaseException as error:  # noqa: BLE001  as above
                progress.fail(error)

    return Monitor()


@contextmanager
def building(description: str) -> Iterator[BuildProgress]:
    """A progress bar while TensorRT builds; what stopped the build is raised when the block ends.

    Ctrl-C stops the build at its next step: Python would raise KeyboardInterrupt inside whichever callback runs
    next, the logger's among them, so it is noted here instead. In another thread than the main one there is
    nothing to do, as interrupts go to the main thread.
    """
    with progress_bar(description, BuildProgress.STEPS) as bar:
        progress = BuildProgress(bar)
        with _noting_interrupts(progress):
            yield progress
    if progress.error is not None:
        raise progress.error


@contextmanager
def _noting_interrupts(progress: BuildProgress) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: progress.fail(KeyboardInterrupt()))
    try:
        yield
    finally:
        # None: the handler was not set from Python, so Python cannot set it again.
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)
