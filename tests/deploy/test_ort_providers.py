"""ONNX Runtime's providers for GPUs, against a stand-in for its GPU build that computes on the CPU."""

import json
import stat
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from compress.errors import InputError, WorkError
from deploy.runtimes import open_runtime, ort_providers
from tests.deploy.two_pixels import CASTS, NETWORK, described, images
from tests.fakes.cuda import fake_cuda
from tests.fakes.machine import Machine

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"

# Names in the libraries of onnxruntime-gpu 1.31.1; any that set a precision are left out, for they must not be set.
OPTIONS = {
    CPU: set(),
    CUDA: {"device_id", "enable_cuda_graph", "use_tf32"},
    TENSORRT: {
        "device_id",
        "trt_cuda_graph_enable",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    },
}


class GpuBuild:
    """onnxruntime-gpu: which providers start, and where it places the nodes.

    Attributes:
        starts: providers whose libraries load.
        placement: type of node -> provider that executes it; the first one asked for executes all others.
        memory_copies: how many copies between memories it puts in.
        sessions: those that were opened.
    """

    def __init__(self) -> None:
        self.starts = {CUDA, TENSORRT}
        self.placement: dict[str, str] = {}
        self.memory_copies = 0
        self.sessions: list[Session] = []

    def open(self, path: str, options: Any, *, providers: Sequence[Any], enable_fallback: int) -> "Session":
        assert enable_fallback == 0, "the Python layer must not try again without the provider"
        session = Session(self, path, options, [item if isinstance(item, tuple) else (item, {}) for item in providers])
        self.sessions.append(session)
        return session


class Session:
    """One session, with the rules of CUDA graphs: fixed addresses, one graph per id, no ids for TensorRT."""

    def __init__(self, build: GpuBuild, path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
        for name, own in providers:
            assert set(own) <= OPTIONS[name]
            assert all(isinstance(value, str) for value in own.values())
        self.build = build
        self.asked = dict(providers)
        self.first = providers[0][0]
        own = providers[0][1]
        self.graph = own.get("enable_cuda_graph") == "1" or own.get("trt_cuda_graph_enable") == "True"
        self.bound: dict[str, object] = {}  # id of a graph -> the binding that it was captured from
        try:
            self.strict = options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        except RuntimeError:
            self.strict = False
        if self.strict:
            assert CPU not in self.asked, "ONNX Runtime refuses both at once"
            if self.first != CPU and (self.first not in build.starts or CPU in build.placement.values()):
                raise Fail(
                    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the "
                    "default CPU EP, but fallback to CPU EP has been explicitly disabled by the user."
                )
        self.profiled = options.enable_profiling
        real = onnxruntime.SessionOptions()
        real.enable_profiling = options.enable_profiling
        real.profile_file_prefix = options.profile_file_prefix
        self.real = REAL_SESSION(path, real, providers=[CPU])

    def get_providers(self) -> list[str]:
        return [*(name for name in self.asked if name in self.build.starts), CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {name: {"arena": "default", **self.asked.get(name, {})} for name in self.get_providers()}

    def get_inputs(self) -> list[Any]:
        return self.real.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self.real.get_outputs()

    def run(self, names: Any, batch: Any) -> list[np.ndarray]:
        assert not self.graph, "a run without a binding would be captured with addresses that soon are another's"
        return self.real.run(names, batch)

    def run_with_ort_values(self, names: Any, batch: dict[str, "Value"]) -> list["Value"]:
        assert not self.graph
        given = {name: value.real for name, value in batch.items()}
        return [Value(value, "cpu") for value in self.real.run_with_ort_values(names, given)]

    def io_binding(self) -> "Binding":
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding: "Binding", run_options: Any = None) -> None:
        if self.graph:
            identity = "0" if run_options is None else run_options.get_run_config_entry("gpu_graph_id")
            if self.first == TENSORRT:
                identity = "0"
            assert self.bound.setdefault(identity, binding) is binding, "the graph would replay another's addresses"
        self.real.run_with_iobinding(binding.real)

    def end_profiling(self) -> str:
        path = Path(self.real.end_profiling())
        events = json.loads(path.read_text())
        nodes = [event for event in events if event["cat"] == "Node" and "provider" in event["args"]]
        for event in nodes:
            event["args"]["provider"] = self.build.placement.get(event["args"]["op_name"], self.first)
        copies = [{"cat": "Node", "args": {"op_name": "MemcpyToHost", "provider": CUDA}}] * self.build.memory_copies
        path.write_text(json.dumps([*events, *copies]))
        return str(path)


class Binding:
    def __init__(self, real: Any) -> None:
        self.real = real

    def bind_ortvalue_input(self, name: str, value: "Value") -> None:
        assert value.device == "cuda"
        self.real.bind_ortvalue_input(name, value.real)

    def bind_ortvalue_output(self, name: str, value: "Value") -> None:
        assert value.device == "cuda"
        self.real.bind_ortvalue_output(name, value.real)

    def bind_output(self, name: str) -> None:
        self.real.bind_output(name)

    def get_outputs(self) -> list["Value"]:
        return [Value(value, "cpu") for value in self.real.get_outputs()]


class Value:
    """An OrtValue that may say that it lies on a GPU."""

    def __init__(self, real: Any, device: str) -> None:
        self.real = real
        self.device = device

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str = "cpu", number: int = 0) -> "Value":
        return cls(REAL_VALUE.ortvalue_from_numpy(array if device == "cpu" else array.copy()), device)

    @classmethod
    def ortvalue_from_numpy_with_onnx_type(cls, array: np.ndarray, element: int) -> "Value":
        return cls(REAL_VALUE.ortvalue_from_numpy_with_onnx_type(array, element), "cpu")

    @classmethod
    def ortvalue_from_shape_and_type(
        cls, shape: list[int], element: Any, device: str = "cpu", number: int = 0
    ) -> "Value":
        return cls(REAL_VALUE.ortvalue_from_shape_and_type(shape, element), device)

    def update_inplace(self, other: "Value | np.ndarray") -> None:
        self.real.update_inplace(other if isinstance(other, np.ndarray) else other.real)

    def device_name(self) -> str:
        return self.device

    def data_type(self) -> str:
        return self.real.data_type()

    def shape(self) -> list[int]:
        return self.real.shape()

    def data_ptr(self) -> int:
        assert self.device == "cpu", "memory of a GPU is not read from the host"
        return self.real.data_ptr()

    def numpy(self) -> np.ndarray:
        return self.real.numpy() if self.device == "cpu" else self.real.numpy().copy()


REAL_SESSION, REAL_VALUE = onnxruntime.InferenceSession, onnxruntime.OrtValue


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    onnx.save(onnx.parser.parse_model(NETWORK), path)
    return path


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GpuBuild:
    """A machine with a GPU, onnxruntime-gpu and TensorRT 10."""
    build = GpuBuild()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("deploy.runtimes.cuda.CudaDevice", fake_cuda(Machine("NVIDIA H200", (9, 0))))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", build.open)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_tensorrt(monkeypatch, "10.13.3.9")
    return build


def install_tensorrt(monkeypatch: pytest.MonkeyPatch, version: str | None, distribution: str = "tensorrt") -> None:
    def installed(name: str) -> str:
        if version is None or name != distribution:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(ort_providers, "version", installed)
    monkeypatch.setitem(sys.modules, "tensorrt", version and SimpleNamespace(__version__=version))


PROVIDERS = {"cuda": CUDA, "tensorrt": TENSORRT}


@pytest.fixture(params=PROVIDERS)
def runtime(request: pytest.FixtureRequest) -> str:
    return f"onnxruntime:provider={request.param}"


# --- what is asked of ONNX Runtime ------------------------------------------------------------------------------------


def test_cuda_is_the_only_provider_and_the_default_on_a_gpu(build: GpuBuild, path: Path) -> None:
    runtime = open_runtime(path, device="cuda:1", threads=1)
    probe, session = build.sessions
    assert probe.asked == session.asked == {CUDA: {"device_id": "1", "use_tf32": "0"}}
    assert (probe.strict, probe.profiled, session.strict, session.profiled) == (False, True, True, False)
    found = runtime.description()
    assert (found["provider"], found["device"]) == (CUDA, "cuda:1")
    assert found["kernels_by_provider"] == {CUDA: 2}
    assert found["provider_options"] == {"arena": "default", "device_id": "1", "use_tf32": "0"}
    assert not found["cuda_graph"]
    assert not found["allow_fallback"]
    assert not found["numbers_only"]
    assert len(build.sessions) == 2, "what was proved when it was opened is not measured again"


def test_tensorrt_keeps_its_engines_by_the_file_content(build: GpuBuild, path: Path, tmp_path: Path) -> None:
    open_runtime(path, device="cuda", runtime="onnxruntime:provider=tensorrt")
    options = build.sessions[-1].asked[TENSORRT]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.parent == tmp_path / "cache" / "espalier" / "ort-tensorrt"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert options == {
        "device_id": "0",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
    }
    copy = path.with_name("copy.onnx")
    copy.write_bytes(path.read_bytes())
    assert ort_providers.engine_cache(copy) == folder
    copy.with_name("copy.onnx.data").write_bytes(b"other weights")
    assert ort_providers.engine_cache(copy) != folder


@pytest.mark.parametrize("network", [NETWORK, CASTS])
def test_runs_and_queries(build: GpuBuild, path: Path, runtime: str, network: str) -> None:
    onnx.save(onnx.parser.parse_model(network), path)
    with open_runtime(path, device="cuda", runtime=runtime) as opened:
        batch = {"images": images((1, 0), (1, 2))["images"].astype(opened.inputs[0].dtype)}
        lane = opened.lane([batch, {"images": 0 * batch["images"]}])
        for index, expected in ((1, [[0, 0], [0, 0]]), (0, [[1, 2], [7, 10]])):
            lane.query(index)
            np.testing.assert_array_equal(lane.outputs()["logits"].astype(np.float32), expected)
        found = lane.stages(0)
        assert found.issued_ns == found.enqueued_ns < found.done_ns
        assert found.compute_ms is None
        batch["images"][:] = 1
        np.testing.assert_array_equal(opened.run(batch)["logits"].astype(np.float32), [[4, 6], [4, 6]])


def test_cuda_graphs(build: GpuBuild, path: Path, runtime: str) -> None:
    with open_runtime(path, device="cuda", runtime=f"{runtime}:cuda_graph=true") as opened:
        assert not any(session.graph for session in build.sessions)
        pools = [[images((1, 0)), images((0, 1))], [images((0, 2))], [images((1, 0), (1, 2))]]
        lanes = [opened.lane(pool) for pool in pools]
        for _ in range(2):
            for pool, lane in zip(pools, lanes, strict=True):
                for index, batch in enumerate(pool):
                    lane.query(index)
                    np.testing.assert_array_equal(lane.outputs()["logits"], opened.run(batch)["logits"])
        assert opened.description()["cuda_graph"]
    graphs = [session for session in build.sessions if session.graph]
    assert all(session.strict for session in graphs)
    assert [len(session.bound) for session in graphs] == [1, 1, 1], (
        "lanes work at the same time, graphs of one session not"
    )


def test_cuda_graph_and_fallback_exclude_each_other(build: GpuBuild, path: Path, runtime: str) -> None:
    with pytest.raises(InputError, match="cuda_graph=true and allow_fallback=true exclude each other"):
        open_runtime(path, device="cuda", runtime=f"{runtime}:cuda_graph=true:allow_fallback=true")


# --- what ran where --------------------------------------------------------------------------------------------------


def test_node_on_the_cpu_is_an_error(build: GpuBuild, path: Path, runtime: str) -> None:
    build.placement = {"Reshape": CPU}
    name = PROVIDERS[runtime.partition("=")[2]]
    with pytest.raises(
        WorkError,
        match=rf"network\.onnx was to run on {name}, which lacks some of its nodes: 1 Reshape on {CPU}; "
        r".*onnxruntime:allow_fallback=true\.",
    ):
        open_runtime(path, device="cuda", runtime=runtime)
    assert [session.profiled for session in build.sessions] == [True], "refused before it was opened for use"


def test_node_on_another_gpu_provider_is_an_error(build: GpuBuild, path: Path) -> None:
    build.placement = {"Reshape": CUDA, "MatMul": CUDA}
    with pytest.raises(WorkError, match=rf"lacks some of its nodes: 1 Reshape, 1 MatMul on {CUDA};"):
        open_runtime(path, device="cuda", runtime="onnxruntime:provider=tensorrt")


def test_no_kernel_at_all_is_no_proof(build: GpuBuild, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "end_profiling", lambda session: _empty_profile(path))
    with pytest.raises(WorkError, match="shows no kernel at all"):
        open_runtime(path, device="cuda")


def _empty_profile(path: Path) -> str:
    profile = path.with_suffix(".json")
    profile.write_text('[{"cat": "Session", "name": "model_run", "args": {}}]')
    return str(profile)


@pytest.mark.parametrize(
    ("label", "expected"),
    [("cuda", [CUDA, CPU]), ("tensorrt", [TENSORRT, CUDA, CPU])],
)
def test_allowed_fallback_is_logged_and_described(
    build: GpuBuild, path: Path, label: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    build.placement = {"Reshape": CPU}
    build.memory_copies = 2
    runtime = open_runtime(path, device="cuda", runtime=f"onnxruntime:provider={label}:allow_fallback=true")
    for session in build.sessions:
        assert list(session.asked) == expected
        assert not session.strict
    found = runtime.description()
    assert found["kernels_by_provider"] == {CPU: 1, PROVIDERS[label]: 1}
    assert found["memory_copies"] == 2
    assert found["allow_fallback"]
    assert f"network.onnx: not on {PROVIDERS[label]}: 1 Reshape on {CPU}" in caplog.text


def test_copies_between_memories_are_no_fallback(build: GpuBuild, path: Path, runtime: str) -> None:
    build.memory_copies = 1
    found = open_runtime(path, device="cuda", runtime=runtime).description()
    assert found["memory_copies"] == 1
    assert sum(found["kernels_by_provider"].values()) == 2


def test_dynamic_image_size_is_refused_when_it_is_opened(build: GpuBuild, path: Path, runtime: str) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("1, 1, 2] images", "1, height, 2] images")), path)
    with pytest.raises(InputError, match="dynamic dimension besides the batch"):
        open_runtime(path, device="cuda", runtime=runtime)


def test_first_run_that_fails_is_a_work_error(build: GpuBuild, path: Path, runtime: str) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("shape = {-1, 2}", "shape = {4, -1}")), path)
    with pytest.raises(WorkError, match=r"ONNX Runtime failed on network\.onnx"):
        open_runtime(path, device="cuda", runtime=runtime)


# --- providers that cannot be used -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["", ":allow_fallback=true"])
def test_provider_that_does_not_start_is_an_error(build: GpuBuild, path: Path, runtime: str, fallback: str) -> None:
    name = PROVIDERS[runtime.partition("=")[2]]
    build.starts.discard(name)
    with pytest.raises(
        InputError, match=rf"was to run on cuda, but {name} did not start \(ONNX Runtime offered .*{CPU}"
    ):
        open_runtime(path, device="cuda", runtime=runtime + fallback)


def test_libraries_that_do_not_load_are_an_error(build: GpuBuild, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unloaded(*_: object, **__: object) -> None:  # word for word what 1.31.1 raises without libnvinfer.so.10
        raise RuntimeError(
            "/onnxruntime_src/onnxruntime/python/onnxruntime_pybind_state.cc:729 void onnxruntime::python::"
            "RegisterTensorRTPluginsAsCustomOps(PySessionOptions&, const onnxruntime::ProviderOptions&) Please install "
            "TensorRT libraries as mentioned in the GPU requirements page.\n"
        )

    monkeypatch.setattr(onnxruntime, "InferenceSession", unloaded)
    with pytest.raises(InputError, match=rf"cannot use {TENSORRT}: Please install TensorRT lib.* with espalier doctor"):
        open_runtime(path, device="cuda", runtime="onnxruntime:provider=tensorrt")


def test_build_without_the_provider(build: GpuBuild, path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(InputError, match=r"Device cuda needs .*the installed onnxruntime has only .*espalier\[gpu\]"):
        open_runtime(path, device="cuda", runtime=runtime)


def test_cpu_provider_is_not_used_on_a_gpu(build: GpuBuild, path: Path) -> None:
    with pytest.raises(InputError, match="provider=cpu computes on cpu, but the device asked for is cuda"):
        open_runtime(path, device="cuda", runtime="onnxruntime:provider=cpu")


@pytest.mark.parametrize("distribution", ort_providers.TENSORRT_DISTRIBUTIONS)
def test_tensorrt_11_is_told_before_anything_starts(
    build: GpuBuild, path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str
) -> None:
    install_tensorrt(monkeypatch, "11.4.0.20", distribution)
    with pytest.raises(
        InputError,
        match=r"TensorRT 11\.4\.0\.20 is installed, but .* linked with TensorRT 10 \(libnvinfer\.so\.10\): "
        r"run pip install 'tensorrt-cu13<11', or .*espalier engine",
    ):
        open_runtime(path, device="cuda", runtime="onnxruntime:provider=tensorrt")
    assert build.sessions == []
    open_runtime(path, device="cuda")  # the CUDA provider does without


def test_tensorrt_that_is_not_installed(build: GpuBuild, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch, None)
    with pytest.raises(InputError, match=r"needs TensorRT 10 .*not installed: run pip install 'tensorrt-cu13<11'"):
        open_runtime(path, device="cuda", runtime="onnxruntime:provider=tensorrt")
    assert build.sessions == []


# --- made for other hardware -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("for_verification", [False, True])
def test_int8_for_the_cpu_is_refused_on_a_gpu(
    build: GpuBuild, path: Path, runtime: str, for_verification: bool
) -> None:
    described(path, "int8", "cpu")
    with pytest.raises(
        InputError, match=r"made for the cpu and is not run on .*asymmetric uint8.*--precision int8 --target gpu"
    ):
        open_runtime(path, device="cuda", runtime=runtime, for_verification=for_verification)
    assert build.sessions == []


@pytest.mark.parametrize(("precision", "target"), [("fp32", "any"), ("bf16", "any"), ("int8", "gpu"), ("fp8", "gpu")])
def test_files_that_suit_a_gpu(build: GpuBuild, path: Path, runtime: str, precision: str, target: str) -> None:
    described(path, precision, target)
    opened = open_runtime(path, device="cuda", runtime=runtime)
    opened.lane([images((1, 2))]).query(0)
