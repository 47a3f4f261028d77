"""Subjects in processes of their own: a fresh interpreter each, so that none finds what another has warmed or leaked.

A process that dies takes only its own subject with it; what it wrote last stands in the error.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from benchmarks.harness.errors import HarnessError, HarnessInputError
from benchmarks.harness.session import Memory, Nanoseconds, Opened, Timed
from benchmarks.harness.subject import Candidate, Stages
from benchmarks.harness.worker import Call

if TYPE_CHECKING:
    from benchmarks.harness.open_loop import Served
    from benchmarks.harness.saturation import Saturated

PATIENCE_S = 300.0
"""Longest wait for an answer beyond the time that the work itself was given: opening may compile a network."""


class RemoteSession:
    """A session whose subject lives in another process; the process starts at once, `started` waits for it."""

    def __init__(self, candidate: Candidate) -> None:
        self.name = candidate.name
        self.batch_size = candidate.batch_size
        self._opened: Opened | None = None
        self._query_s = 0.0
        self._here = False
        self._worker = _Worker(f"Variant {candidate.name!r}", candidate)

    def started(self) -> None:
        if not self._here:
            self._worker.answer()
            self._here = True

    def ready(self) -> Opened:
        self.started()
        if self._opened is None:
            self._opened = self._ask(0, "ready")
        return self._opened

    def warm(self, seconds: float) -> float:
        query_ns: float = self._ask(seconds, "warm", seconds)
        self._query_s = query_ns / 1e9
        return query_ns

    def time(self, queries: int) -> Timed:
        timed: Timed = self._ask(queries * self._query_s, "time", queries)
        return timed

    def stages(self, queries: int) -> list[Stages]:
        found: list[Stages] = self._ask(queries * self._query_s, "stages", queries)
        return found

    def serve(self, due_ns: Nanoseconds, lanes: int) -> "Served":
        served: Served = self._ask(float(due_ns[-1]) / 1e9 + due_ns.size * self._query_s, "serve", due_ns, lanes)
        return served

    def saturate(self, lanes: int, seconds: float) -> "Saturated":
        found: Saturated = self._ask(seconds, "saturate", lanes, seconds)
        return found

    def memory(self) -> Memory:
        memory: Memory = self._ask(0, "memory")
        return memory

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(0, "describe")
        return found

    def close(self) -> None:
        self._worker.stop("close")

    def _ask(self, expected_s: float, method: str, *arguments: Any) -> Any:
        self._worker.request(method, *arguments)
        return self._worker.answer(PATIENCE_S + 10 * expected_s)


def call(function: Callable[..., Any], arguments: Mapping[str, Any], *, what: str) -> Any:
    """`function(**arguments)` in a process of its own; both must be picklable, and so must the result.

    Raises:
        HarnessError: the process died; whatever the function raised comes through as it is.
    """
    worker = _Worker(what, (function, arguments))
    try:
        return worker.answer(None)
    finally:
        worker.stop()


class _Worker:
    """A fresh interpreter that runs `benchmarks.harness.worker`, and the socket to it."""

    def __init__(self, what: str, task: Candidate | Call) -> None:
        self._what = what
        function = task.open if isinstance(task, Candidate) else task[0]
        if getattr(function, "__module__", None) == "__main__":
            raise HarnessInputError(
                f"{what} is opened by {function.__name__} of the program that runs, which no other process can import: "
                "move the function to a module."
            )
        self._output = TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            message = pickle.dumps(task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise HarnessInputError(
                f"{what} cannot be sent to a process of its own ({error}): give a function of an importable module "
                "and plain arguments."
            ) from error
        ours, theirs = socket.socketpair()
        with theirs:
            # What this process can import the other can, too; -P keeps the working directory out of it otherwise.
            paths = os.pathsep.join(dict.fromkeys(os.path.abspath(path) for path in sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.harness.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                env=os.environ | {"PYTHONPATH": paths},
            )
        self._connection = Connection(ours.detach())
        self._send(message)

    def request(self, method: str, *arguments: Any) -> None:
        self._send(pickle.dumps((method, arguments)))

    def answer(self, patience_s: float | None = PATIENCE_S) -> Any:
        try:
            if not self._connection.poll(patience_s):
                self._process.kill()
                raise HarnessError(f"{self._what} gave no answer within {patience_s:.0f} s; its process was ended.")
            done, outcome = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - from our own process
        except (EOFError, OSError) as error:
            raise self._death() from error
        if not done:
            raise outcome
        return outcome

    def stop(self, last: str | None = None) -> None:
        """End the process: by the request `last` if it still answers, else by force."""
        if self._output.closed:
            return
        try:
            if last is not None and self._process.poll() is None:
                self.request(last)
                if self._connection.poll(10):
                    self._connection.recv_bytes()
        except (HarnessError, EOFError, OSError):
            pass  # it died; whatever it was asked before has told so
        finally:
            self._connection.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._output.close()

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise self._death() from error

    def _death(self) -> HarnessError:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        last = f"; it last wrote: {lines[-1].strip()}" if lines else ""
        return HarnessError(f"{self._what} died while it was measured: its process ended with {how}{last}")
