"""One model in a process of its own, stopped when it takes too long or too much memory."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmarks.coverage.meter import not_compared
from benchmarks.coverage.rows import COMPARISON, Failure, Kind, Request, Row, Share, read_row, write_row

_LOOK_S = 0.05
"""Between two looks at the process."""

# The processes are forked from one that has imported what they need and has done nothing else: this saves each of them
# several seconds, and no model finds what another has left.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["benchmarks.coverage.worker", "benchmarks.coverage.torch_pruning_side", "onnxscript", "timm", "torch.onnx.ops"]
)


def worked(request: Request, *, timeout_s: float, memory_bytes: int) -> Row:
    """The row of one model: what its process wrote, with the reason if the process did not come to its end."""
    with TemporaryDirectory() as folder:
        answer, said = Path(folder) / "row.json", Path(folder) / "said.txt"
        write_row(answer, Row(request=request, now=("build", None)))
        process = _CONTEXT.Process(target=_work, args=(request, answer, said), daemon=True)
        process.start()
        try:
            stopped = watched(process, timeout_s, memory_bytes)
        finally:
            process.kill()
            process.join()
        row = read_row(answer)
        assert row is not None  # it is written in atomic steps, the first of them above
        if row.now is not None:
            row = ended(row, stopped or _death(process.exitcode or 0, said.read_text(errors="replace")))
        return row


def _work(request: Request, answer: Path, said: Path) -> None:
    """What the process does: its work, with all that is printed going to a file."""
    from benchmarks.coverage.worker import work

    threading.Thread(target=_end_with_parent, daemon=True).start()
    with said.open("w") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(request, answer)


def _end_with_parent() -> None:
    """A table that is killed leaves no model behind that goes on eating memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def watched(process: BaseProcess, timeout_s: float, memory_bytes: int) -> tuple[Kind, str] | None:
    """Wait for the end of a process; why it must be stopped before, if it must."""
    end = time.monotonic() + timeout_s
    while process.is_alive():
        if time.monotonic() > end:
            return "time", f"more than {timeout_s:g} s"
        try:
            held = psutil.Process(process.pid).memory_info().rss
        except psutil.NoSuchProcess:
            break
        if held > memory_bytes:
            return "memory", f"more than {memory_bytes / 2**30:.3g} GiB of memory"
        process.join(_LOOK_S)
    return None


def _death(code: int, said: str) -> tuple[Kind, str]:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "died", f"{end}: {lines[-1] if lines else 'without a word'}"


def ended(row: Row, stopped: tuple[Kind, str]) -> Row:
    """The row of a process that did not come to its end: every share that is not complete carries the reason."""
    assert row.now is not None
    stage, share = row.now
    if stage == COMPARISON:
        row.difference = not_compared(stopped[1])
        return row
    failure = Failure(stage=stage, kind=stopped[0], reason=stopped[1])
    if share is None:
        row.failure = failure
        return row
    names = list(row.failures())
    for name in names[names.index(share) :]:
        row.shares.setdefault(name, Share()).failure = failure
    return row
