"""Execution contexts: shapes, addresses, and what they enqueue on a stream."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import ml_dtypes
import numpy as np

from tests.fakes import cuda
from tests.fakes.classes import Borrowed, Model
from tests.fakes.interfaces import Callback, Dims, ErrorReporter, call
from tests.fakes.plan import Layer, Shape, Tensor

if TYPE_CHECKING:
    from tests.fakes.running import CudaEngine

# member of DataType -> what one element is in memory; FP4 and INT4 are packed and not modelled
MEMORY_TYPES: dict[str, np.dtype] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}
SCRATCH_BYTES = 1 << 20  # what every context needs


class ExecutionContext(ErrorReporter):
    """Shapes and addresses of one inference, and its enqueueing.

    `state` is what a CUDA graph freezes: profile, shapes, addresses.
    """

    public = "IExecutionContext"
    settable: ClassVar[Mapping[str, str]] = {
        **ErrorReporter.settable,
        "profiler": "IProfiler | None",
        "enqueue_emits_profile": "bool",
        "name": "str",
        "nvtx_verbosity": "ProfilingVerbosity",
    }
    engine = Borrowed("the engine of an execution context")
    profiler = Callback("the profiler of an execution context")

    def __init__(self, engine: "CudaEngine", *, user_managed: bool) -> None:
        super().__init__(engine.api, engine)
        self.engine = engine.api.expose(engine)
        self.built = engine
        self.user_managed = user_managed
        self.scratch: tuple[int, int] | None = None  # address and size in bytes, if the user gave memory
        self.enqueue_emits_profile = True
        self.name = ""
        self.nvtx_verbosity = engine.profiling_verbosity
        self.unreported: list[Layer] = []
        self._profile: int | None = None
        self._profile_stream: cuda.FakeStream | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._warm: set[Any] = set()

    @property
    def active_optimization_profile(self) -> int:
        return 0 if self._profile is None else self._profile

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    @property
    def state(self) -> Any:
        """What a captured graph depends on."""
        shapes, addresses = (tuple(sorted(items.items())) for items in (self._shapes, self._addresses))
        return (self._profile, shapes, addresses, self.scratch)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Raises RuntimeError in pybind11's words where it fails, with the error reported."""
        where = "IExecutionContext::setOptimizationProfileAsync"
        if not 0 <= profile_index < self.built.num_optimization_profiles or stream_handle == 0:
            text = f"profile {profile_index} of {self.built.num_optimization_profiles} on stream {stream_handle}"
            self.report("INVALID_ARGUMENT", where, f"Parameter check failed: {text}")
            raise RuntimeError("Error in set optimization profile async.")
        if profile_index != self._profile:
            self._shapes.clear()
        self._profile = profile_index
        self._profile_stream = cuda.stream_of(stream_handle)
        self._profile_stream.submit(_ProfileChange())
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        """Scratch memory of a context that was created without."""
        where = "IExecutionContext::setDeviceMemoryV2"
        if not self.user_managed:
            self.report("INVALID_STATE", where, "The context was not created with strategy USER_MANAGED")
        elif memory % cuda.ALIGNMENT or size < SCRATCH_BYTES:
            text = f"{size} bytes at {memory:#x} are not aligned to 256 bytes, or less than {SCRATCH_BYTES}"
            self.report("INVALID_ARGUMENT", where, text)
        else:
            self.scratch = (memory, size)

    def set_input_shape(self, name: str, shape: Any) -> bool:
        where = "IExecutionContext::setInputShape"
        sizes = tuple(shape)
        if self._profile is None:
            self.report("INVALID_STATE", where, "No optimization profile has been set: set_optimization_profile_async")
            return False
        if not self.built.is_input(name):
            self.report("INVALID_ARGUMENT", where, f"Given invalid tensor name: {name}")
            return False
        least, _, most = self.built.profile_shapes(name, self._profile)
        if len(sizes) != len(least):
            self.report("INVALID_ARGUMENT", where, f"Supplied dimensions {list(sizes)} of {name}, not {len(least)}")
            return False
        for axis, size in enumerate(sizes):
            if not least[axis] <= size <= most[axis]:
                text = (
                    f"Supplied binding dimension {list(sizes)} for {name} exceed min ~ max range at index {axis}, "
                    f"maximum dimension in profile is {most[axis]}, minimum dimension in profile is {least[axis]}, "
                    f"but supplied dimension is {size}."
                )
                self.report("INVALID_ARGUMENT", where, text)
                return False
        self._shapes[name] = sizes
        return True

    def infer_shapes(self) -> list[str]:
        """The inputs whose shape is not known."""
        return [tensor.name for tensor in self.built.plan.inputs if -1 in self._shape_of(tensor)]

    def get_tensor_shape(self, name: str) -> Dims:
        tensor = self.built.tensors.get(name)
        if tensor is None:
            self.report("INVALID_ARGUMENT", "IExecutionContext::getTensorShape", f"Given invalid tensor name: {name}")
            return Dims(self.api)
        return Dims(self.api, self._shape_of(tensor))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        where = "IExecutionContext::setTensorAddress"
        if name not in self.built.tensors:
            self.report("INVALID_ARGUMENT", where, f"Given invalid tensor name: {name}")
            return False
        if self._profile is None:
            self.report("INVALID_STATE", where, "No optimization profile has been set: set_optimization_profile_async")
            return False
        if memory % cuda.ALIGNMENT:
            self.report("INVALID_ARGUMENT", where, f"Address {memory:#x} of {name} is not aligned to 256 bytes")
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def execute_async_v3(self, stream_handle: int) -> bool:
        """False with the error reported where something is missing; RuntimeError for use that CUDA cannot survive."""
        where = "IExecutionContext::enqueueV3"
        problem = self._problem(stream_handle)
        if problem:
            self.report("INVALID_STATE", where, problem)
            return False
        if self.api.machine.faults.fail_enqueue:
            self.report("FAILED_EXECUTION", where, "unspecified launch failure", label="Cuda Runtime")
            return False
        stream = cuda.stream_of(stream_handle)
        if self._profile_stream not in (None, stream) and not self._profile_stream.idle:
            raise RuntimeError("race: the profile was set on another stream, which has not been synchronised")
        if stream.capturing:
            if self.state not in self._warm or self.profiler is not None:
                stream.broken_capture = True
                text = "operation not permitted when stream is capturing: enqueue once with these shapes before"
                self.report("FAILED_EXECUTION", where, text, label="Cuda Runtime")
                return False
        else:
            self._warm = {self.state}
        stream.submit(_Inference(self))
        return True

    def report_to_profiler(self) -> bool:
        """Report the layers of the latest run, where enqueue_emits_profile is off."""
        layers, self.unreported = self.unreported, []
        if self.profiler is None or not layers:
            return False
        for place, layer in enumerate(layers):
            call(self.profiler, "report_layer_time", None, layer.name, 0.01 * (place + 1))
        return True

    def _problem(self, stream_handle: int) -> str | None:
        if stream_handle == 0:
            return "Enqueued on the default stream"
        if self._profile is None:
            return "No optimization profile has been set: set_optimization_profile_async"
        if self.user_managed and self.scratch is None:
            return "The context has no device memory: set_device_memory"
        if missing := self.infer_shapes():
            return f"The shapes of {missing} have not been set"
        if unbound := [name for name in self.built.tensors if not self._addresses.get(name)]:
            return f"Neither address or allocator is set for tensors {unbound}. Call setTensorAddress before enqueue."
        return None

    def _shape_of(self, tensor: Tensor) -> Shape:
        if tensor.name in self._shapes or -1 not in tensor.shape:
            return self._shapes.get(tensor.name, tensor.shape)
        if self.built.is_input(tensor.name) or self.infer_shapes():
            return tensor.shape
        known = {entry.name: self._shape_of(entry) for entry in self.built.plan.inputs}
        return self.built.session.output_shapes(known)[tensor.name]

    def places(self) -> dict[str, tuple[int, Shape, np.dtype]]:
        """Address, shape and element type of every input and output, now."""
        return {
            name: (self._addresses[name], self._shape_of(tensor), MEMORY_TYPES[tensor.data_type])
            for name, tensor in self.built.tensors.items()
        }


class _ProfileChange:
    """Work of no effect: what matters is whether the stream has done it."""

    def enqueue(self) -> "_ProfileChange":
        return self

    def check(self) -> None: ...

    def run(self) -> None: ...


class _Inference:
    """An inference as a stream or graph holds it."""

    def __init__(self, context: ExecutionContext) -> None:
        assert context.reference is not None
        self.context = context
        self.state = context.state
        self.places = context.places()
        self._handle = context.reference

    def enqueue(self) -> "_Enqueued":
        """Poison the outputs and the scratch memory, and remember the inputs."""
        self.ensure_alive()
        if self.context.state != self.state:
            raise RuntimeError("the graph is stale: profile, shapes or addresses have changed since it was captured")
        for tensor in self.context.built.plan.outputs:
            self.memory(tensor.name)[:] = 0xFF
        if self.context.scratch is not None:
            cuda.memory_at(*self.context.scratch)[:] = 0xFF
        return _Enqueued(self)

    def ensure_alive(self) -> None:
        """Raises RuntimeError if the context or what it needs is gone."""
        if self._handle() is None:
            raise RuntimeError("use after free: an execution context was garbage-collected before its work was done")
        self.context.ensure_alive()

    def memory(self, name: str) -> np.ndarray:
        """The bytes of an input or output in device memory."""
        address, shape, kind = self.places[name]
        return cuda.memory_at(address, math.prod(shape) * kind.itemsize)


class _Enqueued:
    def __init__(self, inference: _Inference) -> None:
        self._inference = inference
        self._built = inference.context.built
        self._given = {tensor.name: inference.memory(tensor.name).copy() for tensor in self._built.plan.inputs}

    def check(self) -> None:
        for name, given in self._given.items():
            if not np.array_equal(given, self._inference.memory(name)):
                raise RuntimeError(f"race: input {name} was changed between enqueue and execution")

    def run(self) -> None:
        inference, context = self._inference, self._inference.context
        inference.ensure_alive()
        feeds = {}
        for tensor in self._built.plan.inputs:
            _, shape, kind = inference.places[tensor.name]
            feeds[tensor.name] = inference.memory(tensor.name).view(kind).reshape(shape)
        for name, array in self._built.session.run(feeds).items():
            _, shape, kind = inference.places[name]
            if array.shape != shape:
                raise RuntimeError(f"output {name} has shape {array.shape}, but {shape} was inferred")
            inference.memory(name).view(kind)[:] = array.astype(kind).ravel()
        context.unreported = list(self._built.plan.layers)
        if context.enqueue_emits_profile and context.profiler is not None:
            context.report_to_profiler()


MODELS: tuple[type[Model], ...] = (ExecutionContext,)
