"""What every runtime looks like from outside, and the checks that all of them share."""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.harness.subject import Stages
from compress.errors import InputError
from deploy.tensor_spec import TensorSpec

Batch = dict[str, np.ndarray]
"""One inference's inputs by name, checked and contiguous."""

CLOSED = "The runtime has been closed; open the artefact again."


class Lane(ABC):
    """One stream of execution over a pool of batches, with outputs of its own: `benchmarks.harness.subject.Lane`.

    A query goes from the pool's arrays in host memory to complete outputs in host memory. One thread at a time uses a
    lane; several lanes of a runtime may be used at the same time.
    """

    size: int
    """Number of batches."""

    @abstractmethod
    def query(self, index: int) -> None:
        """One inference on batch `index`.

        Raises:
            WorkError: the runtime failed.
        """

    @abstractmethod
    def outputs(self) -> dict[str, np.ndarray]:
        """What the latest query computed; valid until the next one."""

    def stages(self, index: int) -> Stages:
        """The same query, taken apart. Where nothing tells host and device apart, the durations are None, and the
        work counts as taken when it was issued."""
        issued = time.perf_counter_ns()
        self.query(index)
        return Stages(issued, issued, time.perf_counter_ns())


class Runtime(ABC):
    """Executes one network on one device.

    Subclasses set `inputs` and `outputs` and implement `_run`, `_lane` and `description`; what reaches `_run`,
    `_prepare` and `_lane` has been checked here against the input specs and is contiguous.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    largest_batch: int | None = None
    """Most images that one inference takes; None for any number."""
    _closed = False
    _pool: tuple[Sequence[Mapping[str, np.ndarray]], Any] | None = None

    def run(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One inference: arrays by input name in, arrays by output name out.

        Raises:
            InputError: a name, dtype or shape differs from the input specs.
            WorkError: the runtime failed.
        """
        return self._run(self._checked(batch))

    def lane(self, pool: Sequence[Mapping[str, np.ndarray]]) -> Lane:
        """A lane whose queries answer the batches of the pool.

        The lane may read the given arrays themselves, so leave them and the sequence alone while it is in use. What is
        made of a pool beforehand is kept for the next lanes on the same sequence.

        Raises:
            InputError: the pool is empty; a name, dtype or shape differs from the input specs; or the shapes of two
                batches differ.
            WorkError: the runtime failed.
        """
        self._require_open()
        if self._pool is None or self._pool[0] is not pool:
            self._pool = None  # before the next is made: one of them may fill much of the memory
            self._pool = (pool, self._prepare(self._checked_pool(pool)))
        return self._lane(self._pool[1])

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What ran, ready for JSON: runtime, version, device, threads, and where the library can tell, which
        provider executed how many kernels."""

    @abstractmethod
    def _run(self, batch: Batch) -> dict[str, np.ndarray]: ...

    def _prepare(self, pool: list[Batch]) -> Any:
        """What all lanes on a pool share; `_lane` takes it."""
        return pool

    @abstractmethod
    def _lane(self, prepared: Any) -> Lane: ...

    def close(self) -> None:
        """Release what the runtime holds; neither it nor its lanes can run afterwards."""
        self._closed = True
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise InputError(CLOSED)

    def _checked_pool(self, pool: Sequence[Mapping[str, np.ndarray]]) -> list[Batch]:
        if not len(pool):
            raise InputError("The pool holds no batch, so there is nothing to answer; give at least one.")
        batches = [self._checked(batch) for batch in pool]
        for spec in self.inputs:
            first = batches[0][spec.name].shape
            for position, batch in enumerate(batches):
                if batch[spec.name].shape != first:
                    raise InputError(
                        f"Batch {position} of the pool has {spec.name} of shape {batch[spec.name].shape}, but batch 0 "
                        f"has {first}; give batches of one shape."
                    )
        return batches

    def _checked(self, batch: Mapping[str, np.ndarray]) -> Batch:
        self._require_open()
        if batch.keys() != {spec.name for spec in self.inputs}:
            given = ", ".join(sorted(batch)) or "nothing"
            raise InputError(f"The inputs given are {given}, but the network takes {self._expected()}; name them so.")
        for spec in self.inputs:
            array = batch[spec.name]
            if not isinstance(array, np.ndarray):
                raise InputError(
                    f"Input {spec.name} is a {type(array).__name__}, but a NumPy array is needed "
                    f"({self._expected()}); convert it."
                )
            if array.dtype != np.dtype(spec.dtype):
                raise InputError(
                    f"Input {spec.name} has dtype {array.dtype}, but the network takes {spec.dtype}; "
                    f'convert it with .astype("{spec.dtype}").'
                )
            if not spec.accepts(array.shape):
                raise InputError(
                    f"Input {spec.name} has shape {array.shape}, but the network takes {self._expected()}; "
                    "give it a batch of that shape."
                )
        return {spec.name: np.ascontiguousarray(batch[spec.name]) for spec in self.inputs}

    def _expected(self) -> str:
        return "; ".join(map(str, self.inputs))
