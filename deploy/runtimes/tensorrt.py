"""TensorRT: a trusted engine on a CUDA GPU, without copies between batch and result, replayed as a CUDA graph."""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.errors import InputError, WorkError, first_line
from deploy.runtimes import cuda
from deploy.runtimes.base import Runtime, Step
from deploy.runtimes.tensorrt_fit import record_of, require_fit
from deploy.runtimes.tensorrt_layers import Layer, LayerTimes, make_profiler, read_layers
from deploy.runtimes.tensorrt_tensors import read_tensors
from deploy.tensorrt_binding import Errors, import_tensorrt, process_logger
from deploy.trust import trusted_plan

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)

CLOSED = "The runtime has been closed; open the artefact again."


class TensorRtRuntime(Runtime):
    """One engine, its optimisation profile 0, one stream; not for several threads at once.

    A CUDA graph freezes the shapes and addresses of the execution context that it was captured from. So every bound
    batch has a context and a graph of its own, and neither is set to anything else while it lives; plain runs use
    another context, which has no graph and takes each batch's shape. The scratch memory, by far the largest part of a
    context, is one block that all contexts share: they take turns on the one stream.
    """

    def __init__(
        self, path: Path, *, device: str = "cuda", cuda_graph: bool = True, trusted_manifest: Path | None = None
    ) -> None:
        """Open the engine `path`.

        Args:
            cuda_graph: whether bound batches are captured and replayed. A capture that fails is logged and stated in
                `description`, and the batch is enqueued kernel by kernel instead.
            trusted_manifest: a manifest that vouches for the engine, see `deploy.trust.trusted_plan`.

        Raises:
            MissingExtraError: TensorRT is not installed.
            InputError: there is no such GPU; nobody vouches for the engine, and then it is not deserialised; or it
                was built for another GPU or another TensorRT.
            WorkError: the GPU's memory does not suffice.
        """
        self._path = Path(path)
        self._trt = import_tensorrt("Running a TensorRT engine")
        self._device = cuda.CudaDevice(torch.device(device))
        content, entry = trusted_plan(self._path, trusted_manifest=trusted_manifest)
        self._record = record_of(self._path, entry)
        require_fit(self._path, self._record, self._trt.__version__, self._device)
        self._cuda_graph = cuda_graph
        self._captured = 0
        self._graph_problem: str | None = None
        self._errors = Errors(self._trt)
        self._steps: weakref.WeakSet[_TensorRtStep] = weakref.WeakSet()
        self._run_context: tensorrt.IExecutionContext | None = None
        with self._working("load it"):
            self._stream = self._device.stream()
            log = process_logger(self._trt)
            self._trt.init_libnvinfer_plugins(log, "")
            self._runtime: tensorrt.Runtime = self._trt.Runtime(log)
            self._runtime.error_recorder = self._errors.recorder
            if self._record.settings.get("version_compatible"):
                self._runtime.engine_host_code_allowed = True  # such a plan brings the code that executes it
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise self._undeserialised()
            self._engine: tensorrt.ICudaEngine = engine
            self._scratch = self._device.empty((max(self._engine.device_memory_size_v2, 1),), torch.uint8)
        self._tensors = read_tensors(self._trt, self._engine, self._path.name)
        self.inputs = self._tensors.inputs
        self.outputs = self._tensors.outputs
        self.largest_batch = min(profile.maximum[0] for profile in self._tensors.profiles.values())

    def close(self) -> None:
        if not self._closed:
            with suppress(RuntimeError):  # of a GPU that has failed; what it failed at was raised before
                self._stream.synchronize()
            # Graphs before their contexts, contexts before the engine, the engine before the runtime; the recorder,
            # which all of them may call to the last, goes with this object.
            for step in list(self._steps):
                step.release()
            del self._run_context, self._engine, self._runtime, self._scratch
        super().close()

    def description(self) -> dict[str, Any]:
        """As for every runtime, with the GPU, the optimisation profile, and whether CUDA graphs are in use.

        "cuda_graph" is "captured", "off", or "not captured: " and the reason.
        """
        self._require_open()
        return {
            "runtime": "tensorrt",
            "version": self._trt.__version__,
            "device": f"cuda:{self._device.index}",
            "gpu": self._device.name,
            "compute_capability": list(self._device.compute_capability),
            "cuda_graph": self._graph_state(),
            "tf32": self._record.settings.get("tf32"),
            "profiles": {name: profile.model_dump(mode="json") for name, profile in self._tensors.profiles.items()},
            "layers": self._engine.num_layers,
        }

    def layers(self) -> tuple[Layer, ...]:
        """The engine's layers as they are executed, at the batch that it is tuned for."""
        self._require_open()
        with self._working("describe its layers"):
            context = self._new_context()
            for name, profile in self._tensors.profiles.items():
                self._set_shape(context, name, profile.optimum)
            inspector = self._engine.create_engine_inspector()
            # An engine of dynamic batch has shapes and formats only together with a context.
            inspector.execution_context = context
            return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def profile(self, batch: Mapping[str, np.ndarray], *, runs: int = 10) -> dict[str, list[float]]:
        """Milliseconds of each layer in each of `runs` inferences on a batch, layers in the order of execution.

        The layers are timed one by one and without a CUDA graph, so their sum is not the latency of a bound step.

        Raises:
            InputError: as for `run`, or no run was asked for.
            WorkError: TensorRT failed.
        """
        if runs < 1:
            raise InputError(f"{runs} profiled runs were asked for; give at least 1.")
        checked = self._checked(batch)
        times = LayerTimes()
        profiler = make_profiler(self._trt, times)
        rows = []
        with self._working("profile its layers"):
            context = self._new_context()
            step = _TensorRtStep(self, context, *self._place(context, checked))
            step()  # the first inference loads kernels
            context.profiler = profiler
            for _ in range(runs):
                step()
                rows.append(times.take())
        return {layer: [row.get(layer, 0.0) for row in rows] for layer in rows[0]}

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._working("run"):
            if self._run_context is None:
                self._run_context = self._new_context()
            step = _TensorRtStep(self, self._run_context, *self._place(self._run_context, batch))
            step()
            return step.outputs()

    def _bind(self, batch: dict[str, np.ndarray]) -> "_TensorRtStep":
        with self._working("bind a batch"):
            context = self._new_context()
            step = _TensorRtStep(self, context, *self._place(context, batch))
            step()  # the first enqueue of a context does what belongs to its shape, and must not be captured
            if self._cuda_graph and self._graph_problem is None:
                self._capture(step, context)
        self._steps.add(step)
        return step

    def _capture(self, step: "_TensorRtStep", context: "tensorrt.IExecutionContext") -> None:
        try:
            step.launch = self._device.capture(self._stream, partial(self._enqueue, context))
            self._captured += 1
        except (RuntimeError, WorkError) as error:
            self._graph_problem = first_line(error)
            logger.warning(
                "%s runs without CUDA graphs, as one could not be captured: %s", self._path.name, self._graph_problem
            )

    def _graph_state(self) -> str:
        if not self._cuda_graph:
            return "off"
        if self._graph_problem is not None:
            return f"not captured: {self._graph_problem}"
        return "captured" if self._captured else "not captured: no batch has been bound yet"

    def _enqueue(self, context: "tensorrt.IExecutionContext") -> None:
        """Start one inference on the stream."""
        with self._device.current():
            if not context.execute_async_v3(self._stream.handle):
                raise self._failure("start an inference")

    def _new_context(self) -> "tensorrt.IExecutionContext":
        context = self._engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failure("create an execution context")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        if not context.set_optimization_profile_async(0, self._stream.handle):
            raise self._failure("select its optimisation profile")
        self._stream.synchronize()
        return context

    def _place(
        self, context: "tensorrt.IExecutionContext", batch: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Copy the batch to the GPU, allocate the outputs, and bind both to the context by their addresses."""
        for name, array in batch.items():
            self._set_shape(context, name, array.shape)
        missing = context.infer_shapes()
        if missing:
            raise WorkError(
                f"TensorRT cannot infer the shapes of {self._path.name} from its inputs: {', '.join(missing)} "
                "lack a value; build the engine of a network whose shapes depend on the images' shape alone."
            )
        inputs = {name: self._device.put(array) for name, array in batch.items()}
        outputs = {
            spec.name: self._device.empty(tuple(context.get_tensor_shape(spec.name)), self._tensors.dtypes[spec.name])
            for spec in self.outputs
        }
        for name, tensor in (inputs | outputs).items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"bind {name}")
        return inputs, outputs

    def _set_shape(self, context: "tensorrt.IExecutionContext", name: str, shape: tuple[int, ...]) -> None:
        profile = self._tensors.profiles[name]
        low, best, high = profile.minimum[0], profile.optimum[0], profile.maximum[0]
        if not low <= shape[0] <= high:
            raise InputError(
                f"Input {name} has a batch of {shape[0]}, but {self._path.name} was built for batches from {low} to "
                f"{high}; build it again with espalier engine MODEL.onnx --batch "
                f"{min(low, shape[0])}:{best}:{max(high, shape[0])}."
            )
        if not context.set_input_shape(name, shape):
            raise self._failure(f"take {name} of shape {shape}")

    def _require_open(self) -> None:
        if self._closed:
            raise InputError(CLOSED)

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """This GPU is the current one, errors are collected anew, and what torch or TensorRT raise becomes ours."""
        self._errors.clear()
        with self._device.current():
            try:
                yield
            except self._device.memory_error as error:
                raise WorkError(self._no_memory(what, first_line(error))) from error
            except RuntimeError as error:
                raise self._failure(what, first_line(error)) from error

    def _failure(self, what: str, otherwise: str = "it gave no reason") -> WorkError:
        if self._errors.out_of_memory:
            return WorkError(self._no_memory(what, self._errors.reason()))
        return WorkError(
            f"TensorRT failed on {self._path.name}: it could not {what}: {self._errors.reason(otherwise)}."
        )

    def _no_memory(self, what: str, reason: str) -> str:
        return (
            f"The memory of the {self._device.name} does not suffice for {self._path.name} to {what}: {reason}; "
            "free memory of the GPU, give a smaller batch, or build the engine for smaller ones."
        )

    def _undeserialised(self) -> WorkError | InputError:
        if self._errors.out_of_memory:
            return self._failure("load it")
        return InputError(
            f"TensorRT {self._trt.__version__} cannot load {self._path} on the {self._device.name}: "
            f"{self._errors.reason()}; build it again here with espalier engine."
        )


class _TensorRtStep(Step):
    """One batch on the GPU, bound to an execution context; `launch` starts the inference."""

    def __init__(
        self,
        owner: TensorRtRuntime,
        context: "tensorrt.IExecutionContext",
        inputs: dict[str, torch.Tensor],
        outputs: dict[str, torch.Tensor],
    ) -> None:
        # A graph holds addresses of the tensors and of the context's memory: all are kept as long as `launch`.
        self.launch: Callable[[], None] | None = partial(owner._enqueue, context)
        self._owner = owner
        self._context: tensorrt.IExecutionContext | None = context
        self._inputs = inputs
        self._outputs = outputs

    def __call__(self) -> None:
        if self.launch is None:
            raise InputError(CLOSED)
        try:
            self.launch()
            self._owner._stream.synchronize()
        except RuntimeError as error:
            raise WorkError(f"TensorRT failed on {self._owner._path.name}: {first_line(error)}.") from error

    def outputs(self) -> dict[str, np.ndarray]:
        if self.launch is None:
            raise InputError(CLOSED)
        return {name: self._owner._device.take(tensor) for name, tensor in self._outputs.items()}

    def release(self) -> None:
        self.launch = None
        self._context = None
        self._inputs, self._outputs = {}, {}
