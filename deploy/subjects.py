"""What a process that times something opens: an artefact in its runtime, or a Python function, with a pool of inputs.

Nothing that executes is imported before it is opened, so that a process holds what a service would hold and no more.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness.errors import HarnessError
from benchmarks.harness.subject import Stages, Subject
from compress.errors import InputError, WorkError, first_line

if TYPE_CHECKING:
    from deploy.runtimes import Lane, Runtime


def open_artefact(
    *,
    artefact: str,
    pool: str,
    batch_size: int,
    device: str = "cpu",
    threads: int | None = None,
    runtime: str | None = None,
    trusted_manifest: str | None = None,
    trust: Sequence[str] = (),
) -> Subject:
    """Open an ONNX file, a TensorRT engine or a checkpoint directory, which runs in PyTorch.

    The pool is read when the subject is prepared, and shared by all lanes.

    Args:
        artefact: its path.
        pool: directory that `deploy.pool.write_pool` wrote.
        device, threads, runtime, trusted_manifest: as `deploy.runtimes.open_runtime` takes them. Give the number of
            threads where several artefacts are compared: PyTorch has to be imported to ask for its number.
        trust: modules that a checkpoint's factory may import.

    Raises:
        InputError: as `open_runtime` does.
        HarnessError: where that raises a WorkError.
    """
    from deploy.runtimes import check_device, open_runtime

    path = Path(artefact)
    network: Any = path
    if path.is_dir():
        check_device(device)
        from compress import checkpoint

        network = checkpoint.load(path, trust=trust).to(device)
    with _failing(path.name):
        opened = open_runtime(
            network,
            device=device,
            threads=threads,
            runtime=runtime,
            trusted_manifest=None if trusted_manifest is None else Path(trusted_manifest),
        )

    def read() -> Sequence[Mapping[str, np.ndarray]]:
        from deploy.pool import read_pool

        return read_pool(Path(pool), opened.inputs, batch_size)

    return _OpenRuntime(opened, read)


def subject_of(runtime: "Runtime", pool: Sequence[Mapping[str, np.ndarray]]) -> Subject:
    """A runtime that is open in this process, with its batches; closing the subject closes the runtime."""
    return _OpenRuntime(runtime, lambda: pool)


def open_callable(*, target: str, pool: str, batch_size: int, search: str) -> Subject:
    """Import a Python function that takes the inputs of a batch as NumPy arrays, in their order.

    Whatever it returns, a query is over when it returns; where it computes is its own affair. Several lanes call it
    from several threads at the same time.

    Args:
        target: package.module:function; importing it runs the module.
        pool: directory that `deploy.pool.write_pool` wrote.
        search: directory that is searched first, the user's.

    Raises:
        InputError: it cannot be imported or called.
    """
    module, _, name = target.partition(":")
    if not module or not name:
        raise InputError(f'"{target}" names no function; write package.module:function.')
    sys.path.insert(0, search)
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise InputError(
            f"{target} cannot be imported from {search}: {type(error).__name__}: {first_line(error)}; name a function "
            "of a module that can be."
        ) from error
    if not callable(function):
        raise InputError(f"{target} is a {type(function).__name__} and cannot be called; name a function.")
    return _OpenFunction(target, function, Path(pool), batch_size)


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """What fails although the input was fine fails this subject alone, not the measurement."""
    try:
        yield
    except WorkError as error:
        raise HarnessError(f"{what}: {error}") from error


class _OpenRuntime:
    def __init__(self, runtime: "Runtime", read: Callable[[], Sequence[Mapping[str, np.ndarray]]]) -> None:
        self._runtime = runtime
        self._read = read
        self._pool: Sequence[Mapping[str, np.ndarray]] | None = None

    def prepare(self) -> None:
        if self._pool is None:
            self._pool = self._read()

    def lane(self) -> "Lane":
        self.prepare()
        assert self._pool is not None
        with _failing("its first lane"):
            return self._runtime.lane(self._pool)

    def description(self) -> dict[str, Any]:
        return self._runtime.description()

    def close(self) -> None:
        self._runtime.close()
        self._pool = None


class _OpenFunction:
    def __init__(self, target: str, function: Callable[..., Any], pool: Path, batch_size: int) -> None:
        self._target = target
        self._function = function
        self._directory = pool
        self._batch_size = batch_size
        self._pool: list[tuple[np.ndarray, ...]] | None = None

    def prepare(self) -> None:
        if self._pool is None:
            from deploy.pool import batches_of, read_arrays

            self._pool = batches_of(read_arrays(self._directory), self._batch_size, self._directory)

    def lane(self) -> "_FunctionLane":
        self.prepare()
        assert self._pool is not None
        return _FunctionLane(self._target, self._function, self._pool)

    def description(self) -> dict[str, Any]:
        return {
            "runtime": "python",
            "version": python_version(),
            "device": "not known",
            "function": self._target,
        }

    def close(self) -> None:
        self._pool = None


class _FunctionLane:
    def __init__(self, target: str, function: Callable[..., Any], pool: Sequence[tuple[np.ndarray, ...]]) -> None:
        self.size = len(pool)
        self._target = target
        self._function = function
        self._pool = pool

    def query(self, index: int) -> None:
        try:
            self._function(*self._pool[index])
        except Exception as error:  # the user's function may raise anything
            raise WorkError(f"{type(error).__name__}: {first_line(error)}.") from error

    def stages(self, index: int) -> Stages:
        issued = time.perf_counter_ns()
        self.query(index)
        return Stages(issued, issued, time.perf_counter_ns())
