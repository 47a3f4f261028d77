"""ONNX Runtime: an ONNX file on the CPU or on a CUDA GPU, with proof of which provider executed it."""

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch

from compress.errors import InputError, MissingExtraError, WorkError, first_line
from deploy.runtimes.base import Runtime, Step, TensorSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class OnnxRuntime(Runtime):
    """An inference session with a fixed number of threads, sequential execution and all graph optimisations.

    Only the asked provider is used, and ONNX Runtime's fallback to the CPU is switched off: a node that the
    provider lacks is an error. `threads` None means as many as PyTorch uses, so that like compares with like.
    """

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self._device = torch.device(device)
        if self._device.type not in PROVIDERS:
            raise InputError(f"ONNX Runtime is not used on device {device}; choose one of {', '.join(PROVIDERS)}.")
        self._ort = _onnxruntime(self._device.type)
        self._provider = PROVIDERS[self._device.type]
        available = self._ort.get_available_providers()
        if self._provider not in available:
            raise InputError(
                f"Device {device} needs {self._provider}, but the installed onnxruntime has only "
                f"{', '.join(available)}; install the one that has it with "
                f"pip uninstall onnxruntime && pip install 'espalier[{EXTRAS[self._device.type]}]'."
            )
        self._path = path
        self._threads = threads if threads is not None else torch.get_num_threads()
        self._session = self._open(self._options())
        if self._session.get_providers()[0] != self._provider:
            raise InputError(
                f"{path.name} was to run on {device}, but {self._provider} did not start "
                f"(ONNX Runtime offered {', '.join(self._session.get_providers())}); "
                "check the driver and the CUDA libraries with espalier doctor."
            )
        self.inputs = tuple(self._spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(self._spec(value) for value in self._session.get_outputs())
        self._placement: dict[str, int] | None = None

    def close(self) -> None:
        self._session = None
        super().close()

    def description(self) -> dict[str, Any]:
        """As for every runtime; `kernels_by_provider` counts the kernels of one profiled run at batch 1."""
        if self._placement is None:
            self._placement = self._measure_placement()
        return {
            "runtime": "onnxruntime",
            "version": self._ort.__version__,
            "device": str(self._device),
            "provider": self._provider,
            "kernels_by_provider": self._placement,
            "threads": self._threads,
            "execution": "sequential",
            "graph_optimization": "all",
        }

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, batch), strict=True))
        except _errors() as error:
            raise WorkError(f"ONNX Runtime failed on {self._path.name}: {_reason(error)}") from error

    def _bind(self, batch: dict[str, np.ndarray]) -> "_BoundStep":
        # The sizes of the outputs are known only after one run: the file may give them as names.
        results = self._run(batch)
        place = (self._device.type, self._device.index or 0)
        binding = self._session.io_binding()
        given = {name: self._ort.OrtValue.ortvalue_from_numpy(array, *place) for name, array in batch.items()}
        outputs = {
            name: self._ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, *place)
            for name, array in results.items()
        }
        for name, value in given.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return _BoundStep(self._session, binding, batch, outputs)

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
        if self._device.type != "cpu":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options

    def _open(self, options: Any) -> Any:
        provider = (
            self._provider
            if self._device.type == "cpu"
            else (self._provider, {"device_id": str(self._device.index or 0)})
        )
        try:
            return self._ort.InferenceSession(str(self._path), options, providers=[provider])
        except _errors() as error:
            if type(error).__name__ in {"InvalidProtobuf", "InvalidGraph", "InvalidArgument"}:
                raise InputError(
                    f"{self._path} is not a readable ONNX file: {_reason(error)}; export it again."
                ) from error
            raise InputError(
                f"ONNX Runtime cannot run {self._path} on {self._device}: {_reason(error)}; "
                "export it again, or choose another device."
            ) from error

    def _spec(self, value: Any) -> TensorSpec:
        if value.type not in DTYPES:
            raise InputError(
                f"{self._path.name}: {value.name} has type {value.type}, which NumPy cannot hold; "
                "export it with float32 inputs and outputs."
            )
        return TensorSpec(value.name, DTYPES[value.type], tuple(value.shape))

    def _measure_placement(self) -> dict[str, int]:
        """Provider -> number of kernels that it executed in one run of a session of its own."""
        with TemporaryDirectory(prefix="espalier-profile-") as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "run")
            session = self._open(options)
            session.run(None, {spec.name: self._zeros(spec) for spec in self.inputs})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return dict(
            Counter(
                event["args"]["provider"]
                for event in events
                if event.get("cat") == "Node" and "provider" in event["args"]
            )
        )

    def _zeros(self, spec: TensorSpec) -> np.ndarray:
        if not all(isinstance(size, int) for size in spec.shape[1:]):
            raise InputError(
                f"{self._path.name}: input {spec} has a dynamic dimension besides the batch; "
                "export it with a fixed image size."
            )
        return np.zeros([size if isinstance(size, int) else 1 for size in spec.shape], spec.dtype)


class _BoundStep(Step):
    def __init__(self, session: Any, binding: Any, batch: dict[str, np.ndarray], outputs: dict[str, Any]) -> None:
        self._session = session
        self._binding = binding
        self._batch = batch  # on the CPU the binding points into these arrays: keep them alive
        self._outputs = outputs

    def __call__(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def outputs(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._outputs.items()}


def _onnxruntime(device_type: str) -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", EXTRAS[device_type], "Running an ONNX file") from error
    return onnxruntime


def _errors() -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions; they share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return tuple(item for item in vars(state).values() if isinstance(item, type) and issubclass(item, Exception))


def _reason(error: Exception) -> str:
    # "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from x.onnx failed:Protobuf parsing failed."
    return first_line(error).rsplit(" : ", 1)[-1]
