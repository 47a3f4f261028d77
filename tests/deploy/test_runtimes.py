import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import nn

from compress.errors import InputError, MissingExtraError, WorkError
from deploy.runtimes import RUNTIMES, Kind, Runtime, TensorSpec, open_runtime
from deploy.runtimes.bfloat16 import BFLOAT16
from deploy.runtimes.pytorch import WARM_UP_RUNS, _GraphStep, _PyTorchStep
from tests.deploy.two_pixels import CASTS, NETWORK, described, images


class Linear(nn.Module):
    """The same network in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.linear = nn.Linear(2, 2, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(images.flatten(1)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    onnx.save(onnx.parser.parse_model(NETWORK), path)
    return path


@pytest.fixture(params=["onnxruntime", "pytorch"])
def runtime(request: pytest.FixtureRequest, path: Path) -> Runtime:
    return open_runtime(path if request.param == "onnxruntime" else Linear(), threads=1)


def test_logits_by_hand(runtime: Runtime) -> None:
    for batch in (images((1, 0)), images((1, 0), (0, 1), (1, 2))):
        outputs = runtime.run(batch)
        assert list(outputs) == ["logits"]
        expected = [[a + 3 * b, 2 * a + 4 * b] for a, b in batch["images"].reshape(-1, 2)]
        np.testing.assert_array_equal(outputs["logits"], np.array(expected, np.float32))


def test_input_that_is_not_contiguous(runtime: Runtime) -> None:
    batch = np.array([[1, 9, 2, 9]], np.float32).reshape(1, 1, 1, 4)[..., ::2]
    np.testing.assert_array_equal(runtime.run({"images": batch})["logits"], [[7, 10]])
    step = runtime.bind({"images": batch})
    step()
    np.testing.assert_array_equal(step.outputs()["logits"], [[7, 10]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"pictures": np.zeros((1, 1, 1, 2), np.float32)},
            "given are pictures, but the network takes images",
        ),
        ({}, "given are nothing"),
        (
            {"images": np.zeros((1, 1, 1, 2), np.float64)},
            r'dtype float64.*takes float32.*astype\("float32"\)',
        ),
        ({"images": np.zeros((1, 2), np.float32)}, r"shape \(1, 2\)"),
        ({"images": np.zeros((0, 1, 1, 2), np.float32)}, r"shape \(0, 1, 1, 2\)"),
        ({"images": torch.zeros(1, 1, 1, 2)}, "is a Tensor, but a NumPy array"),
    ],
)
def test_wrong_input_is_refused(runtime: Runtime, batch: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        runtime.run(batch)
    with pytest.raises(InputError, match=message):
        runtime.bind(batch)


def test_wrong_fixed_size_is_refused_with_the_spec(path: Path) -> None:
    with pytest.raises(InputError, match=r"\(1, 1, 1, 3\).*images: float32 \(batch, 1, 1, 2\)"):
        open_runtime(path).run({"images": np.zeros((1, 1, 1, 3), np.float32)})


def test_bound_step_equals_run(runtime: Runtime) -> None:
    batch = images((1, 0), (0, 1), (1, 2))
    step = runtime.bind(batch)
    step()
    np.testing.assert_array_equal(step.outputs()["logits"], runtime.run(batch)["logits"])


def test_bound_step_writes_into_the_same_memory_each_time(path: Path) -> None:
    batch = images((1, 0))
    step = open_runtime(path).bind(batch)
    step()
    first = step.outputs()["logits"]
    address = first.ctypes.data
    batch["images"][:] = 10  # bound, not copied: the next call reads the new pixels into the old buffer
    step()
    np.testing.assert_array_equal(first, [[40, 60]])
    assert step.outputs()["logits"].ctypes.data == address


def test_specs_of_a_file(path: Path) -> None:
    runtime = open_runtime(path)
    assert runtime.inputs == (TensorSpec("images", "float32", ("batch", 1, 1, 2)),)
    assert runtime.outputs == (TensorSpec("logits", "float32", ("batch", 2)),)


def test_description_proves_the_provider_and_leaves_no_profile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    description = open_runtime(path, threads=1).description()
    assert description["runtime"] == "onnxruntime"
    assert description["version"] == onnxruntime.__version__
    assert description["threads"] == 1
    assert description["kernels_by_provider"] == {"CPUExecutionProvider": 2}
    assert [item.name for item in tmp_path.iterdir()] == ["network.onnx"]


def test_threads_default_to_those_of_pytorch(path: Path) -> None:
    assert open_runtime(path).description()["threads"] == torch.get_num_threads()
    assert open_runtime(Linear()).description()["threads"] == torch.get_num_threads()


def test_module_is_in_eval_mode_until_closed() -> None:
    model = Linear().train()
    model.linear.eval()
    with open_runtime(model) as runtime:
        assert not model.training
        assert not model.dropout.training
        assert runtime.description()["version"] == torch.__version__
    assert (model.training, model.dropout.training, model.linear.training) == (True, True, False)


def test_closed_runtime_is_refused(runtime: Runtime) -> None:
    runtime.close()
    runtime.close()
    with pytest.raises(InputError, match="closed"):
        runtime.run(images((1, 0)))


def test_module_that_fails_or_returns_no_tensor() -> None:
    with pytest.raises(WorkError, match=r"PyTorch failed on a batch of shape \(1, 1, 1, 3\)"):
        open_runtime(Linear()).run({"images": np.zeros((1, 1, 1, 3), np.float32)})

    class Tuple(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images

    with pytest.raises(InputError, match="returned a tuple"):
        open_runtime(Tuple()).run(images((1, 0)))


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_cut_off_file_is_named(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"network\.onnx is not a readable ONNX file.*export it again"):
        open_runtime(path)


def test_file_with_an_unknown_operator_is_named(path: Path) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("MatMul", "MutMal")), path)
    with pytest.raises(InputError, match=r"network\.onnx.*MutMal"):
        open_runtime(path)


def test_failure_inside_onnx_runtime_is_a_work_error(path: Path) -> None:
    # Reshape to rows of four fails for one image, which the input spec cannot foresee.
    onnx.save(onnx.parser.parse_model(NETWORK.replace("shape = {-1, 2}", "shape = {4, -1}")), path)
    with pytest.raises(WorkError, match=r"ONNX Runtime failed on network\.onnx"):
        open_runtime(path).run(images((1, 0)))


def test_dynamic_image_size_cannot_be_proved(path: Path) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("1, 1, 2] images", "1, height, 2] images")), path)
    with pytest.raises(InputError, match="dynamic dimension besides the batch"):
        open_runtime(path).description()


def test_missing_file_unknown_suffix_and_no_threads(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        open_runtime(tmp_path / "absent.onnx")
    with pytest.raises(InputError, match=r"model\.pt has the suffix \.pt.*\.onnx, \.plan"):
        open_runtime(tmp_path / "model.pt")
    with pytest.raises(InputError, match="0 threads"):
        open_runtime(path, threads=0)


def test_table_can_be_extended(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.tflite").touch()

    def opened(artefact: Path, request: object, **options: object) -> object:
        return SimpleNamespace(path=artefact, threads=request.threads, options=options)

    monkeypatch.setitem(RUNTIMES, "lite", Kind(opened, ".tflite", {"delegate": "none", "sparse": False}))
    found = open_runtime(tmp_path / "model.tflite", threads=2)
    assert (found.path, found.threads, found.options) == (tmp_path / "model.tflite", 2, {})
    assert open_runtime(tmp_path / "model.tflite", runtime="lite:sparse=true").options == {"sparse": True}
    with pytest.raises(InputError, match=r"There is no runtime 'light'; choose one of .*, lite\."):
        open_runtime(tmp_path / "model.tflite", runtime="light")


# --- choosing by text ------------------------------------------------------------------------------------------------


def test_a_name_without_options_is_the_default(path: Path) -> None:
    batch = images((1, 0), (1, 2))
    for artefact, name in ((path, "onnxruntime"), (path, "onnxruntime:provider=cpu"), (Linear(), "pytorch")):
        named, default = open_runtime(artefact, runtime=name, threads=1), open_runtime(artefact, threads=1)
        np.testing.assert_array_equal(named.run(batch)["logits"], default.run(batch)["logits"])
        assert named.description() == default.description()


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ("torch", r"There is no runtime 'torch'; choose one of pytorch, onnxruntime, tensorrt\."),
        ("", r"There is no runtime ''"),
        ("pytorch", r"network\.onnx cannot be opened in pytorch, which executes modules"),
        ("tensorrt", r"network\.onnx cannot be opened in tensorrt, which executes \.plan files"),
        ("onnxruntime:speed=true", r"onnxruntime has no option 'speed': it has provider, cuda_graph, allow_fallback\."),
        ("onnxruntime:provider", r"The option provider of onnxruntime has no value: write onnxruntime:provider=cpu\."),
        ("onnxruntime:cuda_graph=1", r"'cuda_graph=1' is no value .* write onnxruntime:cuda_graph=false\."),
        ("onnxruntime:provider=gpu", r"The provider 'gpu' .* choose one of cpu, cuda, tensorrt\."),
        ("onnxruntime:provider=cuda", r"computes on cuda, but the device asked for is cpu; choose device cuda"),
        ("onnxruntime:provider=tensorrt", r"computes on cuda, but the device asked for is cpu"),
        ("onnxruntime:cuda_graph=true", r"onnxruntime:cuda_graph=true is for providers of GPUs"),
        ("onnxruntime:allow_fallback=true", r"onnxruntime:allow_fallback=true is for providers of GPUs"),
    ],
)
def test_runtime_text_that_cannot_be_used(path: Path, runtime: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_runtime(path, runtime=runtime)


def test_runtime_text_that_a_module_cannot_use() -> None:
    with pytest.raises(InputError, match=r"A module cannot be opened in onnxruntime, which executes \.onnx files"):
        open_runtime(Linear(), runtime="onnxruntime")
    with pytest.raises(InputError, match="pytorch has no option 'provider': it has compile, channels_last, cuda_graph"):
        open_runtime(Linear(), runtime="pytorch:provider=cpu")
    with pytest.raises(InputError, match="pytorch:cuda_graph=true needs a CUDA GPU, but the device asked for is cpu"):
        open_runtime(Linear(), runtime="pytorch:cuda_graph=true")


def test_engine_is_not_opened_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "model.plan").touch()
    with pytest.raises(
        InputError, match=r"model\.plan is a TensorRT engine.*device asked for is cpu; choose device cuda"
    ):
        open_runtime(tmp_path / "model.plan")


def test_engine_goes_to_tensorrt_with_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, manifest = tmp_path / "model.plan", tmp_path / "manifest.json"
    plan.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    opened = SimpleNamespace(TensorRtRuntime=lambda path, **given: (path, given))
    monkeypatch.setitem(sys.modules, "deploy.runtimes.tensorrt", opened)
    assert open_runtime(plan, device="cuda:1") == (plan, {"device": "cuda:1", "trusted_manifest": None})
    assert open_runtime(plan, device="cuda", runtime="tensorrt:cuda_graph=false", trusted_manifest=manifest) == (
        plan,
        {"device": "cuda", "trusted_manifest": manifest, "cuda_graph": False},
    )


def test_trusted_manifest_is_for_engines_alone(path: Path, tmp_path: Path) -> None:
    for artefact in (path, Linear()):
        with pytest.raises(InputError, match=r"only TensorRT engines \(\.plan\) need one"):
            open_runtime(artefact, trusted_manifest=tmp_path / "manifest.json")


# --- PyTorch: compiled, channels-last --------------------------------------------------------------------------------


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.seen: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous())
        return self.convolution(images).mean((2, 3))


def test_channels_last_is_numerically_equal_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = Convolution().train()
    strides = model.convolution.weight.stride()
    batch = {"images": np.random.default_rng(0).standard_normal((2, 3, 8, 8), np.float32)}
    with open_runtime(model, runtime="pytorch:channels_last=true") as runtime, open_runtime(model) as usual:
        step = runtime.bind(batch)
        step()
        for outputs in (runtime.run(batch), step.outputs()):
            np.testing.assert_allclose(outputs["logits"], usual.run(batch)["logits"], rtol=1e-5)
        assert runtime.description()["channels_last"]
        assert not usual.description()["channels_last"]
        assert runtime._forward.convolution.weight.is_contiguous(memory_format=torch.channels_last)
        assert all(runtime._forward.seen)
        assert not any(model.seen)
        assert model.convolution.weight.stride() == strides
    assert model.training
    assert model.convolution.weight.stride() == strides


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_compiled_network_agrees_and_counts_its_graphs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    expected = open_runtime(model)
    with open_runtime(model, runtime="pytorch:compile=true:channels_last=true") as runtime:
        # Above the 8 shapes after which torch.compile by itself goes back to eager mode.
        for size in (*range(1, 11), 1):
            batch = {"images": np.random.default_rng(size).standard_normal((size, 3, 8, 8), np.float32)}
            step = runtime.bind(batch)
            step()
            assert_close = np.testing.assert_allclose
            assert_close(step.outputs()["logits"], expected.run(batch)["logits"], rtol=1e-4, atol=1e-5)
        found = runtime.description()
        assert (found["compile"], found["channels_last"], found["compiled_graphs"]) == (True, True, 10)


class Branching(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


@torch._dynamo.config.patch(suppress_errors=True)
def test_network_that_cannot_be_compiled_whole_is_refused() -> None:
    runtime = open_runtime(Branching(), runtime="pytorch:compile=true")
    for refused in (runtime.bind, runtime.run):
        with pytest.raises(WorkError, match=r"torch\.compile failed on Branching for images of shape \(1, 1, 1, 2\): "):
            refused(images((1, 0)))


@torch._dynamo.config.patch(suppress_errors=True)
def test_compiler_that_fails_is_no_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise OSError("no space left for the compiler")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    with pytest.raises(WorkError, match=r"torch\.compile failed on Linear .*no space left for the compiler"):
        open_runtime(Linear(), runtime="pytorch:compile=true").bind(images((1, 0)))


def test_compiler_that_is_switched_off_is_no_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(WorkError, match=r"compiled nothing of Linear, because it is switched off \(TORCH_COMPILE_")
    with torch._dynamo.config.patch(disable=True), refused:
        open_runtime(Linear(), runtime="pytorch:compile=true").bind(images((1, 0)))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # what other ways of doing it come to
    with refused:
        open_runtime(Linear(), runtime="pytorch:compile=true").run(images((1, 0)))


class Recorder:
    """Stands in for what of torch.cuda a captured step touches; notes the order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.calls: list[str] = []
        stream = SimpleNamespace(wait_stream=lambda other: self.calls.append("wait"))

        @contextmanager
        def inside(name: str) -> Iterator[None]:
            self.calls.append(name)
            yield

        @contextmanager
        def capturing(graph: object) -> Iterator[None]:
            self.calls.append("capture")
            if fails:
                raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be")
            yield

        graph = SimpleNamespace(replay=lambda: self.calls.append("replay"))
        replaced = {
            "device": lambda device: inside("device"),
            "stream": lambda side: inside("side stream"),
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "CUDAGraph": lambda: graph,
            "graph": capturing,
            "synchronize": lambda device: self.calls.append("synchronize"),
        }
        for name, stand_in in replaced.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)


def test_cuda_graph_is_captured_after_warm_up_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    model = nn.Flatten()
    model.register_forward_hook(lambda *_: recorder.calls.append("forward"))
    step = _GraphStep(_PyTorchStep(model, torch.ones(1, 1, 1, 2)))
    forwards = ["forward"] * WARM_UP_RUNS
    before = ["device", "wait", "side stream", *forwards, "wait", "capture", "forward"]
    assert recorder.calls == before
    step()
    assert recorder.calls == [*before, "replay", "synchronize"]
    np.testing.assert_array_equal(step.outputs()["logits"], [[1, 1]])


def test_capture_that_fails_is_no_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Recorder(monkeypatch, fails=True)
    with pytest.raises(
        WorkError, match=r"as a CUDA graph: operation not permitted when stream is capturing; leave out"
    ):
        _GraphStep(_PyTorchStep(nn.Flatten(), torch.ones(1, 1, 1, 2)))


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["onnxruntime", "pytorch"])
def test_bfloat16_inputs_and_outputs(kind: str, path: Path) -> None:
    onnx.save(onnx.parser.parse_model(CASTS), path)
    runtime = open_runtime(path if kind == "onnxruntime" else Linear().bfloat16())
    assert [spec.dtype for spec in (*runtime.inputs, *runtime.outputs)] == ["bfloat16", "bfloat16"]
    batch = {"images": images((1, 0), (1, 2))["images"].astype("bfloat16")}
    step = runtime.bind(batch)
    step()
    for outputs in (runtime.run(batch), step.outputs()):
        assert outputs["logits"].dtype == BFLOAT16
        np.testing.assert_array_equal(outputs["logits"].astype(np.float32), [[1, 2], [7, 10]])
    with pytest.raises(InputError, match="has dtype float32, but the network takes bfloat16"):
        runtime.run(images((1, 0)))
    if kind == "onnxruntime":
        assert runtime.description()["kernels_by_provider"] == {"CPUExecutionProvider": 4}


def test_network_in_bfloat16_cannot_run_on_the_cpu(path: Path) -> None:
    model = onnx.parser.parse_model(NETWORK.replace("float[batch", "bfloat16[batch"))
    weight = model.graph.initializer[0]
    array = onnx.numpy_helper.to_array(weight).astype(BFLOAT16)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)
    with pytest.raises(
        InputError, match=r"network\.onnx cannot run on CPUExecutionProvider: a kernel is missing.*MatMul"
    ):
        open_runtime(path)
    described(path, "bf16", "any")
    with pytest.raises(InputError, match=r"it is in bf16, and a kernel is missing.*use the file in fp32 or fp16"):
        open_runtime(path)


# --- made for other hardware -----------------------------------------------------------------------------------------


def test_int8_for_gpus_is_refused_on_the_cpu_but_for_its_numbers(path: Path) -> None:
    described(path, "int8", "gpu")
    with pytest.raises(
        InputError,
        match=r"network\.onnx was made for the gpu and is not run on CPUExecutionProvider: symmetric signed int8 .*"
        r"slower than fp32.*0\.79x.*espalier export … --precision int8 --target cpu",
    ):
        open_runtime(path)
    runtime = open_runtime(path, for_verification=True)
    np.testing.assert_array_equal(runtime.run(images((1, 2)))["logits"], [[7, 10]])
    assert runtime.description()["numbers_only"]
    with pytest.raises(InputError, match=r"opened on the CPU to verify its numbers, so it cannot be timed"):
        runtime.bind(images((1, 2)))


def test_fp8_is_refused_on_the_cpu_but_for_its_numbers(path: Path) -> None:
    network = NETWORK.replace(
        "pixels = Reshape(images, shape)",
        """scale = Constant<value = float {0.5}>()
    zero = Constant<value = float {0.0}>()
    zero_point = Cast<to = 17>(zero)
    flat = Reshape(images, shape)
    quantised = QuantizeLinear(flat, scale, zero_point)
    pixels = DequantizeLinear(quantised, scale, zero_point)""",
    )
    onnx.save(onnx.parser.parse_model(network), path)
    described(path, "fp8", "gpu")
    with pytest.raises(InputError, match=r"CPUs do not compute in fp8.*--precision int8 --target cpu"):
        open_runtime(path)
    runtime = open_runtime(path, for_verification=True)
    assert runtime.description()["numbers_only"]
    # 16.6 / 0.5 = 33.2 becomes 32: e4m3 has three bits of mantissa, so steps of 4 between 32 and 64.
    np.testing.assert_array_equal(runtime.run(images((16.6, 0)))["logits"], [[16, 32]])


@pytest.mark.parametrize(("precision", "target"), [("fp32", "any"), ("fp16", "any"), ("int8", "cpu")])
def test_files_that_suit_the_cpu(path: Path, precision: str, target: str) -> None:
    described(path, precision, target)
    runtime = open_runtime(path, for_verification=True)
    assert not runtime.description()["numbers_only"]
    runtime.bind(images((1, 2)))()


def test_step_that_fails_is_a_work_error(path: Path) -> None:
    runtime = open_runtime(path)
    step = runtime.bind(images((1, 0)))
    step._binding.clear_binding_inputs()
    with pytest.raises(WorkError, match=r"ONNX Runtime failed on network\.onnx"):
        step()


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_refused(path: Path, device: str) -> None:
    for artefact in (path, Linear()):
        with pytest.raises(InputError, match=f"Device {device} was asked for"):
            open_runtime(artefact, device=device)


def test_cuda_with_the_cpu_build_of_onnxruntime_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(InputError, match=r"CUDAExecutionProvider.*espalier\[gpu\]"):
        open_runtime(path, device="cuda")


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_unknown_device_is_refused(path: Path, device: str) -> None:
    with pytest.raises(InputError, match=device):
        open_runtime(path, device=device)


def test_missing_onnxruntime_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[cpu\]"):
        open_runtime(path)
