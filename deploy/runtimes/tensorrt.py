"""TensorRT: a trusted engine on a CUDA GPU, replayed as a CUDA graph."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compress.errors import InputError, WorkError, first_line
from deploy.runtimes import cuda
from deploy.runtimes.base import Batch, Lane, Runtime
from deploy.runtimes.cuda_lane import CudaLane, Tensors, pin
from deploy.runtimes.tensorrt_fit import record_of, require_fit
from deploy.runtimes.tensorrt_layers import Layer, LayerTimes, make_profiler, read_layers
from deploy.runtimes.tensorrt_tensors import read_tensors
from deploy.tensorrt_binding import Errors, import_tensorrt, process_logger
from deploy.trust import trusted_plan

if TYPE_CHECKING:
    import tensorrt

logger = logging.getLogger(__name__)


class TensorRtRuntime(Runtime):
    """One engine, its optimisation profile 0; every lane has an execution context and a stream of its own.

    A CUDA graph freezes the shapes and addresses of the execution context that it was captured from, so a lane's
    context is set to nothing else while it lives. `run` and `profile` are not for several threads at once: `run` uses
    another context, which has no graph and takes each batch's shape.
    """

    def __init__(
        self, path: Path, *, device: str = "cuda", cuda_graph: bool = True, trusted_manifest: Path | None = None
    ) -> None:
        """Open the engine `path`.

        Args:
            cuda_graph: whether lanes capture the inference and replay it. A capture that fails is logged and stated in
                `description`, and the inference is enqueued kernel by kernel instead.
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
        self._graphs = 0
        self._graph_problem: str | None = None
        self._errors = Errors(self._trt)
        self._lanes: list[tuple[CudaLane, _Execution]] = []
        self._plain: _Execution | None = None
        with self._working("load it"):
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
        self._tensors = read_tensors(self._trt, self._engine, self._path.name)
        self.inputs = self._tensors.inputs
        self.outputs = self._tensors.outputs
        self.largest_batch = min(profile.maximum[0] for profile in self._tensors.profiles.values())

    def close(self) -> None:
        if not self._closed:
            # Graphs before their contexts, contexts before the engine, the engine before the runtime; the recorder,
            # which all of them may call to the last, goes with this object.
            for lane, _ in self._lanes:
                lane.close()
            del self._lanes, self._plain, self._engine, self._runtime
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
            execution = self._idle_execution()
            self._set_shapes(execution, {name: it.optimum for name, it in self._tensors.profiles.items()})
            inspector = self._engine.create_engine_inspector()
            # An engine of dynamic batch has shapes and formats only together with a context.
            inspector.execution_context = execution.context
            return read_layers(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def profile(self, batch: Mapping[str, np.ndarray], *, runs: int = 10) -> dict[str, list[float]]:
        """Milliseconds of each layer in each of `runs` inferences on a batch, layers in the order of execution.

        The layers are timed one by one and without a CUDA graph, so their sum is not the latency of a query.

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
            execution = self._execution()
            self._put(execution, checked)
            self._infer(execution)  # the first inference loads kernels
            execution.context.profiler = profiler
            for _ in range(runs):
                self._infer(execution)
                rows.append(times.take())
        return {layer: [row.get(layer, 0.0) for row in rows] for layer in rows[0]}

    def _run(self, batch: Batch) -> dict[str, np.ndarray]:
        with self._working("run"):
            execution = self._idle_execution()
            self._put(execution, batch)
            self._infer(execution)
            return {name: self._device.take(tensor) for name, tensor in execution.outputs.items()}

    def _prepare(self, pool: list[Batch]) -> list[Tensors]:
        for name, array in pool[0].items():
            self._require_in_range(name, array.shape)
        with self._working("hold a pool of batches"):
            return pin(self._device, self.inputs, pool)

    def _lane(self, prepared: Sequence[Tensors]) -> Lane:
        with self._working("make a lane"):
            execution = self._execution()
            first = {spec.name: here for spec, here in zip(self.inputs, prepared[0], strict=True)}
            self._set_shapes(execution, {name: tuple(here.shape) for name, here in first.items()})
            self._attach(execution, {name: self._device.empty(here.shape, here.dtype) for name, here in first.items()})
            lane = CudaLane(
                execution.stream,
                prepared,
                tuple(execution.inputs.values()),
                partial(self._compute, execution),
                {name: self._device.pinned(it.shape, it.dtype) for name, it in execution.outputs.items()},
                self._failed,
            )
            lane.query(0)  # the first enqueue of a context does what belongs to its shape, and must not be captured
            if self._cuda_graph and self._graph_problem is None:
                self._capture(lane, execution)
        self._lanes.append((lane, execution))
        return lane

    def _capture(self, lane: CudaLane, execution: "_Execution") -> None:
        try:
            replay = self._device.capture(execution.stream, partial(self._enqueue, execution))
        except (RuntimeError, WorkError) as error:
            self._graph_problem = first_line(error)
            logger.warning(
                "%s runs without CUDA graphs, as one could not be captured: %s", self._path.name, self._graph_problem
            )
            return
        computed = tuple(execution.outputs.values())

        def compute() -> Tensors:
            replay()
            return computed

        lane.compute = compute
        self._graphs += 1

    def _graph_state(self) -> str:
        if not self._cuda_graph:
            return "off"
        if self._graph_problem is not None:
            return f"not captured: {self._graph_problem}"
        return "captured" if self._graphs else "not captured: no lane has been made yet"

    def _compute(self, execution: "_Execution") -> Tensors:
        self._enqueue(execution)
        return tuple(execution.outputs.values())

    def _infer(self, execution: "_Execution") -> None:
        """One inference on what the context is bound to; complete on return."""
        with execution.stream.inside:
            self._enqueue(execution)
        execution.stream.synchronize()

    def _enqueue(self, execution: "_Execution") -> None:
        """Start one inference on its stream, which must be the current one."""
        if not execution.context.execute_async_v3(execution.stream.handle):
            raise self._failure("start an inference")

    def _idle_execution(self) -> "_Execution":
        """The one that no lane has."""
        if self._plain is None:
            self._plain = self._execution()
        return self._plain

    def _execution(self) -> "_Execution":
        context = self._engine.create_execution_context()  # with scratch memory of its own
        if context is None:
            raise self._failure("create an execution context")
        stream = self._device.stream()
        if not context.set_optimization_profile_async(0, stream.handle):
            raise self._failure("select its optimisation profile")
        stream.synchronize()
        return _Execution(context, stream)

    def _put(self, execution: "_Execution", batch: Batch) -> None:
        """Copy a batch to the GPU and bind the context to it."""
        self._set_shapes(execution, {name: array.shape for name, array in batch.items()})
        self._attach(execution, {name: self._device.put(array) for name, array in batch.items()})

    def _attach(self, execution: "_Execution", inputs: dict[str, torch.Tensor]) -> None:
        """Allocate the outputs for the shapes that are set, and give the context the addresses of all tensors."""
        context = execution.context
        missing = context.infer_shapes()
        if missing:
            raise WorkError(
                f"TensorRT cannot infer the shapes of {self._path.name} from its inputs: {', '.join(missing)} "
                "lack a value; build the engine of a network whose shapes depend on the images' shape alone."
            )
        outputs = {
            spec.name: self._device.empty(tuple(context.get_tensor_shape(spec.name)), self._tensors.dtypes[spec.name])
            for spec in self.outputs
        }
        execution.inputs, execution.outputs = inputs, outputs
        for name, tensor in (inputs | outputs).items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"bind {name}")

    def _set_shapes(self, execution: "_Execution", shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            self._require_in_range(name, shape)
            if not execution.context.set_input_shape(name, shape):
                raise self._failure(f"take {name} of shape {shape}")

    def _require_in_range(self, name: str, shape: tuple[int, ...]) -> None:
        profile = self._tensors.profiles[name]
        low, best, high = profile.minimum[0], profile.optimum[0], profile.maximum[0]
        if not low <= shape[0] <= high:
            raise InputError(
                f"Input {name} has a batch of {shape[0]}, but {self._path.name} was built for batches from {low} to "
                f"{high}; build it again with espalier engine MODEL.onnx --batch "
                f"{min(low, shape[0])}:{best}:{max(high, shape[0])}."
            )

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

    def _failed(self, error: RuntimeError) -> WorkError:
        return WorkError(f"TensorRT failed on {self._path.name}: {first_line(error)}.")

    def _undeserialised(self) -> WorkError | InputError:
        if self._errors.out_of_memory:
            return self._failure("load it")
        return InputError(
            f"TensorRT {self._trt.__version__} cannot load {self._path} on the {self._device.name}: "
            f"{self._errors.reason()}; build it again here with espalier engine."
        )


class _Execution:
    """An execution context, the stream that it works on, and the tensors that it is bound to by their addresses."""

    def __init__(self, context: "tensorrt.IExecutionContext", stream: cuda.Stream) -> None:
        self.context = context
        self.stream = stream
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
