"""What the processes of a group open: an ONNX file or a TensorRT engine; see `opening_pytorch` for checkpoints.

PyTorch, which lanes on a GPU need, is imported with this module: by all processes of a group at the same time, before
any of them opens its network. One after the other they would take half of the time that there is. Load times are
therefore without it.
"""

from pathlib import Path
from typing import Any

import torch  # noqa: F401 - see above

from benchmarks.harness.errors import HarnessError
from benchmarks.harness.subject import Lane, Subject
from compress.errors import first_line
from deploy.pool import read_pool
from deploy.runtimes import Runtime, open_runtime
from deploy.subjects import subject_of


def open_file(*, artefact: str, pool: str, batch_size: int, device: str, threads: int, runtime: str) -> Subject:
    """An ONNX file or a TensorRT engine; the arguments are those of `deploy.subjects.open_artefact`.

    Raises:
        HarnessError: it cannot be opened, for whatever reason: the other networks of the group are measured then.
    """
    try:
        opened = open_runtime(Path(artefact), device=device, threads=threads, runtime=runtime)
    except Exception as error:
        raise failed(error) from error
    return OpenNetwork(opened, Path(pool), batch_size)


class OpenNetwork:
    """A runtime with its pool of inputs; its failures, too, leave the others of the group in it."""

    def __init__(self, runtime: Runtime, pool: Path, batch_size: int) -> None:
        self._runtime = runtime
        self._pool = pool
        self._batch_size = batch_size
        self._subject: Subject | None = None

    def prepare(self) -> None:
        try:
            if self._subject is None:
                self._subject = subject_of(self._runtime, read_pool(self._pool, self._runtime.inputs, self._batch_size))
        except Exception as error:
            raise failed(error) from error

    def lane(self) -> Lane:
        self.prepare()
        assert self._subject is not None
        try:
            return self._subject.lane()
        except Exception as error:
            raise failed(error) from error

    def description(self) -> dict[str, Any]:
        return self._runtime.description()

    def close(self) -> None:
        self._runtime.close()


def failed(error: Exception) -> HarnessError:
    return HarnessError(f"{type(error).__name__}: {first_line(error)}")
