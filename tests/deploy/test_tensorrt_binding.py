"""TensorRT's callbacks under fakes of both majors."""

import logging
import signal
import sys
import threading
from types import ModuleType

import pytest
from rich.progress import Progress

from compress.errors import InputError, MissingExtraError
from compress.progress import Bar
from deploy.tensorrt_binding import (
    BuildProgress,
    Errors,
    building,
    import_tensorrt,
    make_monitor,
    process_logger,
    version_numbers,
)


class RecordingBar(Bar):
    """What a bar would show: (completed steps, text) after each change."""

    def __init__(self) -> None:
        super().__init__(Progress(disable=True), "building", BuildProgress.STEPS)
        self.shows: list[tuple[int, str]] = []
        self._completed = 0

    def skip_to(self, completed: int) -> None:
        self._completed = completed

    def advance(self, status: str, steps: int = 1) -> None:
        self._completed += steps
        self.shows.append((self._completed, status))


def test_missing_tensorrt_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"Building an engine needs tensorrt.*espalier\[tensorrt\]"):
        import_tensorrt("Building an engine")


@pytest.mark.parametrize(
    ("version", "works"), [("10.11.9", False), ("10.12.0.36", True), ("11.9", True), ("12.0.1", False)]
)
def test_versions(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str, works: bool) -> None:
    monkeypatch.setattr(tensorrt, "__version__", version)
    if works:
        assert import_tensorrt("Building an engine") is tensorrt
    else:
        with pytest.raises(
            InputError, match=rf"from 10\.12 up to.*{version} is installed.*pip install 'tensorrt>=10\.12,<12'"
        ):
            import_tensorrt("Building an engine")


def test_version_numbers() -> None:
    assert version_numbers("10.16.1.11") == (10, 16, 1, 11)
    assert version_numbers("11.4.0rc1") == (11, 4, 0)
    assert version_numbers("unknown") == ()


def test_logger_keeps_the_severity(tensorrt: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    log = process_logger(tensorrt)
    assert process_logger(tensorrt) is log
    with caplog.at_level(logging.DEBUG, "deploy.tensorrt_binding"):
        for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
            log.log(getattr(tensorrt.ILogger, name), f"a message of {name}")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("ERROR", "TensorRT: a message of INTERNAL_ERROR"),
        ("ERROR", "TensorRT: a message of ERROR"),
        ("WARNING", "TensorRT: a message of WARNING"),
        ("DEBUG", "TensorRT: a message of INFO"),
        ("DEBUG", "TensorRT: a message of VERBOSE"),
    ]


def test_errors_are_collected_and_the_first_is_the_reason(tensorrt: ModuleType) -> None:
    errors = Errors(tensorrt)
    assert (errors.reason(), errors.reason("no idea"), errors.out_of_memory) == ("it gave no reason", "no idea", False)
    codes = tensorrt.ErrorCodeTRT
    assert errors.recorder.report_error(codes.INVALID_CONFIG, "the first\n  of two.") is True
    errors.recorder.report_error(codes.INTERNAL_ERROR, "the second")
    recorder = errors.recorder
    assert (recorder.num_errors(), recorder.has_overflowed()) == (2, False)
    assert (recorder.get_error_code(1), recorder.get_error_desc(1)) == (codes.INTERNAL_ERROR, "the second")
    assert (errors.reason(), errors.out_of_memory) == ("the first of two", False)
    recorder.clear()
    assert (recorder.num_errors(), errors.items) == (0, [])


@pytest.mark.parametrize(
    ("code", "text", "is_memory"),
    [
        ("FAILED_ALLOCATION", "no words", True),
        ("INTERNAL_ERROR", "Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)", True),
        ("UNSPECIFIED_ERROR", "Cuda Runtime (out of memory)", True),
        ("INTERNAL_ERROR", "insufficient memory on the device", True),
        ("INTERNAL_ERROR", "Could not find any implementation for node conv.", False),
    ],
)
def test_out_of_memory_is_recognised(tensorrt: ModuleType, code: str, text: str, is_memory: bool) -> None:
    errors = Errors(tensorrt)
    errors.recorder.report_error(getattr(tensorrt.ErrorCodeTRT, code), text)
    assert errors.out_of_memory is is_memory


def test_nested_phases_on_one_bar(tensorrt: ModuleType) -> None:
    bar = RecordingBar()
    monitor = make_monitor(tensorrt, BuildProgress(bar))
    monitor.phase_start("Engine", None, 2)
    monitor.phase_start("Tactics", "Engine", 4)
    assert monitor.step_complete("Tactics", 0) is True  # a quarter of the first half
    assert bar.shows[-1] == (12, "Engine 0/2 › Tactics 1/4")
    monitor.step_complete("Tactics", 3)
    assert bar.shows[-1] == (50, "Engine 0/2 › Tactics 4/4")
    monitor.phase_finish("Tactics")
    assert bar.shows[-1] == (50, "Engine 0/2")  # what was reached is not given back
    monitor.step_complete("Engine", 0)
    monitor.step_complete("Engine", 1)
    assert bar.shows[-1] == (100, "Engine 2/2")
    monitor.phase_finish("Engine")
    assert bar.shows[-1] == (100, "")


def test_phases_without_steps_or_parent(tensorrt: ModuleType) -> None:
    bar = RecordingBar()
    monitor = make_monitor(tensorrt, BuildProgress(bar))
    monitor.phase_start("Empty", None, 0)
    monitor.phase_start("Orphan", "gone", 2)
    assert monitor.step_complete("never started", 5) is True
    monitor.step_complete("Orphan", 0)
    assert bar.shows[-1][0] == 50
    monitor.phase_finish("never started")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError("gone")])
def test_nothing_that_a_callback_raises_reaches_tensorrt(tensorrt: ModuleType, error: BaseException) -> None:
    class FailingBar(RecordingBar):
        def skip_to(self, completed: int) -> None:
            raise error

    progress = BuildProgress(FailingBar())
    monitor = make_monitor(tensorrt, progress)
    monitor.phase_start("Engine", None, 2)
    assert monitor.step_complete("Engine", 0) is False
    monitor.phase_finish("Engine")
    assert progress.error is error


def test_interrupt_asks_the_build_to_stop_and_is_raised_after_it() -> None:
    before = signal.getsignal(signal.SIGINT)
    kept_going = []

    def build() -> None:
        with building("building") as progress:
            progress.start("Engine", None, 3)
            kept_going.append(progress.step("Engine", 0))
            signal.raise_signal(signal.SIGINT)
            kept_going.append(progress.step("Engine", 1))

    with pytest.raises(KeyboardInterrupt):
        build()
    assert kept_going == [True, False]
    assert signal.getsignal(signal.SIGINT) is before


def test_building_in_another_thread() -> None:
    results = []

    def work() -> None:
        with building("building") as progress:
            results.append(progress.step("Engine", 0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [True]
