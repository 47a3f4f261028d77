"""ONNX Runtime: an ONNX file on the CPU or on a CUDA GPU, with proof of which provider executed it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from compress.errors import InputError, WorkError
from deploy.metadata import decode
from deploy.onnx_file import read_onnx
from deploy.runtimes import bfloat16, ort_providers
from deploy.runtimes.base import Batch, Lane, Runtime, TensorSpec
from deploy.runtimes.device import parse_device
from deploy.runtimes.ort_errors import failures, not_opened, reason
from deploy.runtimes.ort_lanes import CPU, GpuOrtLane, OrtLane, OrtPool, output_shapes, pool_of
from deploy.runtimes.ort_pairing import require_pairing
from deploy.runtimes.ort_placement import Placement, read_profile
from deploy.runtimes.ort_profiling import Profiling

logger = logging.getLogger(__name__)

DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntime(Runtime):
    """An inference session with a fixed number of threads, sequential execution and all graph optimisations.

    Only the asked provider is used: on a GPU, ONNX Runtime's fallback to the CPU is switched off, and one profiled
    run with zeros proves, before anything else, that no node ran elsewhere. The copies that ONNX Runtime itself puts
    between host and device are no such nodes; `description` counts them.

    The TensorRT provider builds engines for the batch sizes that it has seen, at first sight of each, and keeps them
    in a folder of the user's cache.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        threads: int | None = None,
        provider: str | None = None,
        cuda_graph: bool = False,
        allow_fallback: bool = False,
        for_verification: bool = False,
    ) -> None:
        """
        Args:
            threads: of one inference on the CPU; None means as many as PyTorch uses, so that like compares with like.
            provider: cpu, cuda or tensorrt; None means the one of the device's name.
            cuda_graph: each lane has a session of its own, which replays a CUDA graph; `run` computes without one.
            allow_fallback: nodes that the provider lacks may run on CUDA or on the CPU; they are logged.
            for_verification: a file made for GPUs may run on the CPU for its numbers, rounded where the file says so
                and computed in fp32; it gives no lane, as a time would mislead.

        Raises:
            InputError: the file is unreadable or made for other hardware, or the provider cannot be used.
            WorkError: a node ran on another provider, or the first run failed.
        """
        self._device = parse_device(device)
        self._provider = ort_providers.choose(provider, self._device)
        if self._provider.label == "cpu" and (cuda_graph or allow_fallback):
            option = "cuda_graph" if cuda_graph else "allow_fallback"
            raise InputError(
                f"onnxruntime:{option}=true is for providers of GPUs, but the provider is cpu; leave it out."
            )
        if cuda_graph and allow_fallback:
            raise InputError(
                "onnxruntime: cuda_graph=true and allow_fallback=true exclude each other, because a CUDA graph holds "
                "the kernels of one provider alone; choose one of them."
            )
        self._ort = ort_providers.library(self._provider, self._device)
        self._path = path
        self._threads = threads if threads is not None else _threads_of_pytorch()
        self._cuda_graph = cuda_graph
        self._allow_fallback = allow_fallback
        self._about = decode(read_onnx(path).metadata_props, str(path))
        self._shapes: Mapping[str, tuple[int, ...]] = {}  # of the inputs of the latest lane
        self._numbers_only = require_pairing(path.name, self._about, self._provider, for_verification=for_verification)
        self._cache = ort_providers.engine_cache(path) if self._provider.label == "tensorrt" else None
        self._placement = None if self._provider.label == "cpu" else self._prove_placement()
        self._session = self._open(self._options())
        self.inputs, self.outputs = self._specs(self._session)

    def close(self) -> None:
        self._session = None
        super().close()

    def description(self) -> dict[str, Any]:
        """As for every runtime; `kernels_by_provider` counts the kernels of one profiled run at batch 1."""
        if self._placement is None:
            self._placement = self._measure_placement()
        found = {
            "runtime": "onnxruntime",
            "version": self._ort.__version__,
            "device": str(self._device),
            "provider": self._provider.name,
            "kernels_by_provider": self._placement.by_provider(),
            "memory_copies": self._placement.memory_copies,
            "threads": self._threads,
            "execution": "sequential",
            "graph_optimization": "basic" if self._numbers_only else "all",
            "numbers_only": self._numbers_only,
        }
        if self._provider.label != "cpu":
            found |= {
                "cuda_graph": self._cuda_graph,
                "allow_fallback": self._allow_fallback,
                "provider_options": self._session.get_provider_options()[self._provider.name],
            }
        return found

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        try:
            if any(spec.dtype == "bfloat16" for spec in (*self.inputs, *self.outputs)):
                given = {name: bfloat16.to_ort(self._ort, array, ("cpu", 0)) for name, array in batch.items()}
                values = self._session.run_with_ort_values(names, given)
                return {name: bfloat16.from_ort(self._ort, value) for name, value in zip(names, values, strict=True)}
            return dict(zip(names, self._session.run(names, batch), strict=True))
        except failures() as error:
            raise WorkError(f"ONNX Runtime failed on {self._path.name}: {reason(error)}.") from error

    def _prepare(self, pool: list[Batch]) -> OrtPool:
        if self._numbers_only:
            raise InputError(
                f"{self._path.name} was made for GPUs and opened on the CPU to verify its numbers, so it cannot be "
                "timed; open it on a GPU."
            )
        arrays = {spec.name: [batch[spec.name] for batch in pool] for spec in self.inputs}
        if self._provider.label == "cpu":
            return pool_of(pool, {name: [self._ort_value(array) for array in every] for name, every in arrays.items()})
        return pool_of(pool, {name: self._pinned(every) for name, every in arrays.items()})

    def profiling(self, batch: Mapping[str, np.ndarray], folder: Path) -> Profiling:
        """A session of its own, set up as this one, whose inferences on one batch are profiled node by node.

        Raises:
            InputError: as for `run`.
        """
        checked = self._checked(batch)
        values = {name: self._ort_value(array) for name, array in checked.items()}
        return Profiling(self._profiled(folder), checked, values, self._path.name)

    def _profiled(self, folder: Path, *, probe: bool = False) -> Any:
        options = self._options()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "run")
        return self._open(options, probe=probe)

    def _lane(self, prepared: OrtPool) -> Lane:
        self._shapes = prepared.shapes
        shapes = output_shapes(self.inputs, self.outputs, prepared)
        if self._provider.label == "cpu":
            return OrtLane(self._ort, self._path.name, self._session, prepared, self.outputs, shapes)
        session = self._session
        if self._cuda_graph:
            # With CUDA graphs a session is for one thread at a time, and TensorRT's provider holds only one graph.
            session = self._open(self._options(), cuda_graph=True)
            if None in shapes.values():
                zeros = {spec.name: np.zeros(prepared.shapes[spec.name], spec.dtype) for spec in self.inputs}
                shapes = {name: array.shape for name, array in self._run(zeros).items()}
        place = (self._device.type, self._device.index or 0)
        lane = GpuOrtLane(
            self._ort, self._path.name, session, prepared, self.outputs, shapes, inputs=self.inputs, place=place
        )
        if self._cuda_graph:
            lane.query(0)  # ONNX Runtime runs once in the usual way, then captures; later calls replay
        return lane

    def _ort_value(self, array: np.ndarray) -> Any:
        return bfloat16.to_ort(self._ort, array, CPU)

    def _pinned(self, arrays: list[np.ndarray]) -> list[Any]:
        """What a value on the GPU is updated from: page-locked memory, which is copied from without a detour."""
        import torch

        from deploy.runtimes import cuda

        pinned = [bfloat16.to_numpy(it) for it in cuda.CudaDevice(torch.device(str(self._device))).pin(arrays)]
        return [self._ort_value(array) for array in pinned] if pinned[0].dtype == bfloat16.BFLOAT16 else pinned

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Workers of an idle session would otherwise spin on and slow down the variant that is timed next: two
        # ResNet-18 taking turns on two cores ran 1.5 times slower than each alone.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self._numbers_only:
            # Quantise and dequantise as the file says, then compute in fp32: the CPU's int8 kernels can saturate where
            # a GPU does not, and moving these nodes about asks for fp8 kernels that there are not.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            # ONNX Runtime 1.31's further optimisations compute fp8 networks wrongly: ResNet-18 was off by 155 %.
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return options

    def _open(self, options: Any, *, cuda_graph: bool = False, probe: bool = False) -> Any:
        """A session; only as a `probe` may it use the CPU where the provider lacks a node or does not start."""
        if self._provider.label != "cpu" and not self._allow_fallback and not probe:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        own = ort_providers.provider_options(self._provider, self._device, self._cache, cuda_graph=cuda_graph)
        providers: list[Any] = [(self._provider.name, own) if own else self._provider.name]
        if self._allow_fallback:
            if self._provider.label == "tensorrt":
                cuda = ort_providers.PROVIDERS["cuda"]
                cuda_options = ort_providers.provider_options(cuda, self._device, None, cuda_graph=False)
                providers.append((cuda.name, cuda_options))
            providers.append(ort_providers.PROVIDERS["cpu"].name)
        try:
            # Its Python layer would print an error and try again without the provider.
            session = self._ort.InferenceSession(
                str(self._path), options, providers=providers, enable_fallback=0, **self._left_out()
            )
        except failures() as error:
            precision = None if self._about is None else self._about.precision
            raise not_opened(error, self._path, provider=self._provider.name, precision=precision) from error
        if session.get_providers()[0] != self._provider.name:
            raise InputError(
                f"{self._path.name} was to run on {self._device}, but {self._provider.name} did not start "
                f"(ONNX Runtime offered {', '.join(session.get_providers())}); "
                "check the driver and the CUDA libraries with espalier doctor."
            )
        return session

    def _left_out(self) -> dict[str, list[str]]:
        """An optimisation that ends the process on fp16 transformers on the CPU (ViT-B/32, ONNX Runtime 1.31)."""
        half = self._about is not None and self._about.precision == "fp16"
        return {"disabled_optimizers": ["MatmulTransposeFusion"]} if half and self._provider.label == "cpu" else {}

    def _specs(self, session: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        inputs = tuple(self._spec(value) for value in session.get_inputs())
        return inputs, tuple(self._spec(value) for value in session.get_outputs())

    def _spec(self, value: Any) -> TensorSpec:
        if value.type not in DTYPES:
            raise InputError(
                f"{self._path.name}: {value.name} has type {value.type}, which NumPy cannot hold; "
                "export it with float32 inputs and outputs."
            )
        return TensorSpec(value.name, DTYPES[value.type], tuple(value.shape))

    def _prove_placement(self) -> Placement:
        placement = self._measure_placement()
        if not self._allow_fallback:
            placement.require_only(self._provider.name, self._path.name)
        elif placement.elsewhere(self._provider.name):
            logger.warning(
                "%s: not on %s: %s", self._path.name, self._provider.name, placement.elsewhere(self._provider.name)
            )
        return placement

    def _measure_placement(self) -> Placement:
        """What each provider executed in one run of a session of its own, in which nothing is forbidden."""
        with TemporaryDirectory(prefix="espalier-profile-") as folder:
            session = self._profiled(Path(folder), probe=True)
            inputs, _ = self._specs(session)
            zeros = {spec.name: bfloat16.to_ort(self._ort, self._zeros(spec), ("cpu", 0)) for spec in inputs}
            try:
                session.run_with_ort_values(None, zeros)
            except failures() as error:
                raise WorkError(f"ONNX Runtime failed on {self._path.name}: {reason(error)}.") from error
            return read_profile(Path(session.end_profiling()))

    def _zeros(self, spec: TensorSpec) -> np.ndarray:
        if spec.name in self._shapes:
            return np.zeros(self._shapes[spec.name], spec.dtype)
        if not all(isinstance(size, int) for size in spec.shape[1:]):
            raise InputError(
                f"{self._path.name}: input {spec} has a dynamic dimension besides the batch; "
                "export it with a fixed image size."
            )
        return np.zeros([size if isinstance(size, int) else 1 for size in spec.shape], spec.dtype)


def _threads_of_pytorch() -> int:
    import torch

    return torch.get_num_threads()
