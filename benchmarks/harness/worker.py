"""The process in which one subject is opened and timed: python -P -m benchmarks.harness.worker FD

Reads requests from the socket `FD`, which `processes.RemoteSession` holds at the other end, and answers each. Both
ends are of one program and one user, so what they exchange may be pickled. It ends when the other end does.
"""

import ctypes
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.harness.session import LocalSession
from benchmarks.harness.subject import Candidate

DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of <sys/prctl.h>: a subject deep in its own code would not notice that the socket was closed."""


Call = tuple[Callable[..., Any], Mapping[str, Any]]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    try:
        task: Candidate | Call = pickle.loads(connection.recv_bytes())  # noqa: S301 - from the process that started this one
        answer(connection, task)
    except EOFError:
        pass


def answer(connection: Connection, task: Candidate | Call) -> None:
    """Call the one function, or hold a session on the candidate until it is closed."""
    if not isinstance(task, Candidate):
        function, arguments = task
        _send(connection, *_outcome(lambda: function(**arguments)))
        return
    _send(connection, True, None)  # it is here, and what opens the subject is imported
    session = LocalSession(task.name, lambda: task.open(**task.arguments), task.batch_size)
    while True:
        method, arguments = connection.recv()
        _send(connection, *_outcome(lambda name=method, given=arguments: getattr(session, name)(*given)))
        if method == "close":
            return


def _outcome(work: Any) -> tuple[bool, Any]:
    try:
        return True, work()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        return False, error


def _send(connection: Connection, done: bool, outcome: Any) -> None:
    try:
        message = pickle.dumps((done, outcome))
        if not done:
            pickle.loads(message)  # noqa: S301 - an exception may be written and yet not be read
    except Exception:  # noqa: BLE001 - an exception of the subject's library may fail to be pickled in any way
        message = pickle.dumps((False, RuntimeError(f"{type(outcome).__name__}: {outcome}")))
    connection.send_bytes(message)


if __name__ == "__main__":
    main()
