"""A lane on a CUDA GPU: batch to the GPU, inference, outputs back, all on one stream of its own."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from benchmarks.harness.subject import Stages
from compress.errors import InputError
from deploy.runtimes.base import CLOSED, Batch, Lane, TensorSpec
from deploy.runtimes.bfloat16 import to_numpy
from deploy.runtimes.cuda import CudaDevice, Stream

Tensors = Sequence[torch.Tensor]


def pin(device: CudaDevice, inputs: Sequence[TensorSpec], pool: Sequence[Batch]) -> list[Tensors]:
    """The batches in page-locked memory, each as its inputs in the order of the specs."""
    return list(zip(*(device.pin([batch[spec.name] for batch in pool]) for spec in inputs), strict=True))


class CudaLane(Lane):
    """Copies and inference are enqueued together; the host waits once, for the whole query.

    Attributes:
        compute: enqueues the inference on the current stream and gives the outputs, which need not be complete; it
            must be able to answer all queries with the same `inputs`.
    """

    def __init__(
        self,
        stream: Stream,
        pool: Sequence[Tensors],
        inputs: Tensors,
        compute: Callable[[], Tensors],
        outputs: Mapping[str, torch.Tensor],
        failed: Callable[[RuntimeError], Exception],
    ) -> None:
        """
        Args:
            pool: page-locked memory, see `pin`.
            inputs: memory of the GPU that `compute` reads.
            outputs: page-locked memory for what `compute` gives, by name in the same order.
            failed: makes the error that is raised for one of CUDA.
        """
        self.size = len(pool)
        self.compute: Callable[[], Tensors] | None = compute
        self._stream = stream
        self._pool = pool
        self._inputs = inputs
        self._outputs = outputs
        self._here = list(outputs.values())
        self._failed = failed

    def query(self, index: int) -> None:
        if self.compute is None:
            raise InputError(CLOSED)
        stream = self._stream
        try:
            with stream.inside:
                for there, here in zip(self._inputs, self._pool[index], strict=True):
                    stream.copy(there, here)
                for here, there in zip(self._here, self.compute(), strict=True):
                    stream.copy(here, there)
            stream.synchronize()
        except RuntimeError as error:
            raise self._failed(error) from error

    def stages(self, index: int) -> Stages:
        """The same query, with events on its stream between copies and inference."""
        if self.compute is None:
            raise InputError(CLOSED)
        stream = self._stream
        try:
            issued = time.perf_counter_ns()
            with stream.inside:
                marks = [stream.mark()]
                for there, here in zip(self._inputs, self._pool[index], strict=True):
                    stream.copy(there, here)
                marks.append(stream.mark())
                computed = self.compute()
                marks.append(stream.mark())
                for here, there in zip(self._here, computed, strict=True):
                    stream.copy(here, there)
                marks.append(stream.mark())
            enqueued = time.perf_counter_ns()
            stream.synchronize()
            done = time.perf_counter_ns()
            h2d, compute, d2h = (before.elapsed_time(after) for before, after in pairwise(marks))
        except RuntimeError as error:
            raise self._failed(error) from error
        return Stages(issued, enqueued, done, h2d, compute, d2h)

    def outputs(self) -> dict[str, np.ndarray]:
        if self.compute is None:
            raise InputError(CLOSED)
        return {name: to_numpy(tensor) for name, tensor in self._outputs.items()}

    def close(self) -> None:
        """Release what it holds of the GPU."""
        self.compute = None
        self._pool, self._inputs, self._outputs, self._here = [], [], {}, []
