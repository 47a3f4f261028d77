"""Lanes of ONNX Runtime: a binding each, whose inputs change from query to query and whose outputs stay in place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import WorkError
from deploy.runtimes import bfloat16
from deploy.runtimes.base import Batch, Lane, TensorSpec
from deploy.runtimes.ort_errors import failures, reason

CPU = ("cpu", 0)

Shapes = Mapping[str, tuple[int, ...] | None]
"""Output -> its shape; None where only a run can tell."""


@dataclass(frozen=True)
class OrtPool:
    """Batches in host memory, as ONNX Runtime takes them."""

    size: int
    shapes: dict[str, tuple[int, ...]]
    """Of every batch, by input."""
    values: dict[str, list[Any]]
    """Input -> one entry for each batch."""


def pool_of(pool: Sequence[Batch], values: dict[str, list[Any]]) -> OrtPool:
    """A pool whose entries were made of these batches."""
    return OrtPool(len(pool), {name: array.shape for name, array in pool[0].items()}, values)


def output_shapes(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], given: OrtPool) -> Shapes:
    """The shapes that follow from what the file says: its numbers, and names that inputs and outputs share."""
    sizes: dict[int | str | None, int] = {}
    for spec in inputs:
        sizes |= {name: size for name, size in zip(spec.shape, given.shapes[spec.name], strict=True) if name}
    shapes: dict[str, tuple[int, ...] | None] = {}
    for spec in outputs:
        known = [size if isinstance(size, int) else sizes.get(size) for size in spec.shape]
        shapes[spec.name] = tuple(size for size in known if size is not None) if None not in known else None
    return shapes


class OrtLane(Lane):
    """On the CPU: inputs are read where they lie, outputs written into the same memory each time.

    An output of which only a run can tell the shape is allocated by ONNX Runtime, anew in each query.
    """

    place = CPU

    def __init__(
        self, ort: Any, file: str, session: Any, pool: OrtPool, outputs: Sequence[TensorSpec], shapes: Shapes
    ) -> None:
        """
        Args:
            ort: the module onnxruntime.
            file: names the network in errors.
        """
        self.size = pool.size
        self._ort = ort
        self._file = file
        self._inputs = tuple(pool.values.items())
        self._binding = session.io_binding()
        self._run = session.run_with_iobinding
        self._results: dict[str, Any] = {}
        self._unsized: list[str] = []
        for spec in outputs:
            shape = shapes[spec.name]
            if shape is None:
                self._unsized.append(spec.name)
                self._binding.bind_output(spec.name)
            else:
                self._results[spec.name] = bfloat16.empty_in_ort(ort, shape, np.dtype(spec.dtype), self.place)
                self._binding.bind_ortvalue_output(spec.name, self._results[spec.name])
        self._names = [spec.name for spec in outputs]
        self._failures = failures()

    def query(self, index: int) -> None:
        try:
            for name, values in self._inputs:
                self._binding.bind_ortvalue_input(name, values[index])
            self._infer()
        except self._failures as error:
            raise self._failed(error) from error

    def outputs(self) -> dict[str, np.ndarray]:
        values = dict(zip(self._names, self._binding.get_outputs(), strict=True))
        return {name: bfloat16.from_ort(self._ort, value) for name, value in values.items()}

    def _infer(self) -> None:
        for name in self._unsized:
            self._binding.bind_output(name)  # otherwise it would have to have the shape that it had last
        self._run(self._binding)

    def _failed(self, error: Exception) -> WorkError:
        return WorkError(f"ONNX Runtime failed on {self._file}: {reason(error)}.")


class GpuOrtLane(OrtLane):
    """On a GPU: each query copies its batch to the same memory there, infers, and copies the outputs back.

    ONNX Runtime waits for its own stream at the end of a run and shows it to nobody: `stages` gives no durations of
    the GPU, and no moment at which the work was in its queue.
    """

    def __init__(
        self,
        ort: Any,
        file: str,
        session: Any,
        pool: OrtPool,
        outputs: Sequence[TensorSpec],
        shapes: Shapes,
        *,
        inputs: Sequence[TensorSpec],
        place: tuple[str, int],
    ) -> None:
        self.place = place
        super().__init__(ort, file, session, pool, outputs, shapes)
        self._given = []
        for spec in inputs:
            there = bfloat16.empty_in_ort(ort, pool.shapes[spec.name], np.dtype(spec.dtype), place)
            self._binding.bind_ortvalue_input(spec.name, there)
            self._given.append((there, pool.values[spec.name]))
        self._here: dict[str, np.ndarray] = {}

    def query(self, index: int) -> None:
        try:
            for there, values in self._given:
                there.update_inplace(values[index])
            self._infer()
            self._here = {name: bfloat16.from_ort(self._ort, value) for name, value in self._results.items()}
        except self._failures as error:
            raise self._failed(error) from error

    def outputs(self) -> dict[str, np.ndarray]:
        return (super().outputs() if self._unsized else {}) | self._here
