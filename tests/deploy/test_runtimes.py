import shutil
import sys
import threading
import time
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
from deploy.runtimes import RUNTIMES, Kind, Lane, Runtime, TensorSpec, open_runtime
from deploy.runtimes.bfloat16 import BFLOAT16
from deploy.runtimes.pytorch import WARM_UP_RUNS, PyTorchRuntime
from tests.deploy.two_pixels import CASTS, NETWORK, described, images
from tests.fakes.cuda import FakeCuda, FakeStream
from tests.fakes.machine import Machine


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
    assert answers(runtime.lane([{"images": batch}])) == [[[7, 10]]]


def answers(lane: Lane) -> list[list]:
    """The logits of each batch of a lane."""
    found = []
    for index in range(lane.size):
        lane.query(index)
        found.append(lane.outputs()["logits"].tolist())
    return found


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
        runtime.lane([images((1, 0)), batch])


def test_wrong_fixed_size_is_refused_with_the_spec(path: Path) -> None:
    with pytest.raises(InputError, match=r"\(1, 1, 1, 3\).*images: float32 \(batch, 1, 1, 2\)"):
        open_runtime(path).run({"images": np.zeros((1, 1, 1, 3), np.float32)})


def test_queries_answer_their_batches_in_any_order(runtime: Runtime) -> None:
    pool = [images((1, 0), (0, 1)), images((1, 2), (2, 1)), images((0, 0), (1, 1))]
    lane = runtime.lane(pool)
    assert lane.size == 3
    for index in (2, 0, 1, 0, 0):
        lane.query(index)
        np.testing.assert_array_equal(lane.outputs()["logits"], runtime.run(pool[index])["logits"])


def test_lanes_share_the_pool_and_not_the_outputs(runtime: Runtime) -> None:
    pool = [images((1, 0)), images((0, 1))]
    first, second = runtime.lane(pool), runtime.lane(pool)
    first.query(0)
    second.query(1)
    assert (first.outputs()["logits"].tolist(), second.outputs()["logits"].tolist()) == ([[1, 2]], [[3, 4]])
    pool[0]["images"][:] = 10  # in place, not copied
    assert answers(first)[0] == answers(second)[0] == [[40, 60]]


def test_another_pool_is_read_anew(runtime: Runtime) -> None:
    kept = runtime.lane([images((1, 0))])
    assert answers(runtime.lane([images((0, 1), (1, 2))])) == [[[3, 4], [7, 10]]]
    assert answers(kept) == [[[1, 2]]]


def test_lanes_work_at_the_same_time(runtime: Runtime) -> None:
    pool = [images((number, 1)) for number in range(50)]
    expected = [[[number + 3, 2 * number + 4]] for number in range(50)]
    found: dict[int, list] = {}
    lanes = [runtime.lane(pool) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda lane=lane, place=place: found.update({place: answers(lane)}))
        for place, lane in enumerate(lanes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), expected)


def test_stages_of_a_query_on_the_cpu(runtime: Runtime) -> None:
    lane = runtime.lane([images((1, 0)), images((0, 1))])
    before = time.perf_counter_ns()
    found = lane.stages(1)
    assert before <= found.issued_ns == found.enqueued_ns < found.done_ns <= time.perf_counter_ns()
    assert (found.h2d_ms, found.compute_ms, found.d2h_ms) == (None, None, None)
    assert lane.outputs()["logits"].tolist() == [[3, 4]]


def test_pools_that_cannot_be_used(runtime: Runtime) -> None:
    with pytest.raises(InputError, match="holds no batch"):
        runtime.lane([])
    with pytest.raises(
        InputError, match=r"Batch 1 of the pool has images of shape \(2, 1, 1, 2\), but batch 0 has \(1, 1, 1, 2\)"
    ):
        runtime.lane([images((1, 0)), images((1, 0), (0, 1))])
    runtime.close()
    with pytest.raises(InputError, match="closed"):
        runtime.lane([images((1, 0))])


def test_onnx_runtime_writes_into_the_same_memory_each_time(path: Path) -> None:
    lane = open_runtime(path).lane([images((1, 0)), images((0, 1))])
    lane.query(0)
    first = lane.outputs()["logits"]
    address = first.ctypes.data
    lane.query(1)
    np.testing.assert_array_equal(first, [[3, 4]])
    assert lane.outputs()["logits"].ctypes.data == address


def test_outputs_whose_shape_only_a_run_can_tell(path: Path) -> None:
    network = NETWORK.replace("(float[batch, 2] logits)", "(float[batch, 2] logits, int64[2, found] places)").replace(
        "logits = MatMul(pixels, weight)", "logits = MatMul(pixels, weight)\n    places = NonZero(pixels)"
    )
    onnx.save(onnx.parser.parse_model(network), path)
    runtime = open_runtime(path)
    pool = [images((1, 0)), images((1, 2)), images((0, 0)), images((0, 3))]
    lane = runtime.lane(pool)
    for index, places in ((0, [[0], [0]]), (1, [[0, 0], [0, 1]]), (2, [[], []]), (3, [[0], [1]])):
        lane.query(index)
        found = lane.outputs()
        assert list(found) == ["logits", "places"]
        assert found["places"].tolist() == places
        np.testing.assert_array_equal(found["logits"], runtime.run(pool[index])["logits"])


def test_a_lane_over_many_tiny_batches_is_made_at_once(runtime: Runtime) -> None:
    pool = [images((1, 0))] * 16_384
    lane = runtime.lane(pool)
    began = time.perf_counter()
    runtime.lane(pool)
    assert time.perf_counter() - began < 0.16384, "10 µs for each batch, which the first lane has made ready"
    assert lane.size == 16_384


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


def test_lane_in_another_thread_keeps_to_its_number_of_threads() -> None:
    """PyTorch's convolutions ask OpenMP, whose number is another in every thread."""
    before = torch.get_num_threads()
    try:
        lane = open_runtime(nn.Conv2d(64, 64, 3), threads=1).lane([{"images": np.ones((8, 64, 56, 56), np.float32)}])
        used: list[float] = []

        def work() -> None:
            lane.query(0)
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(5):
                lane.query(0)
            used.append((time.process_time() - cpu) / (time.perf_counter() - wall))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert used[0] < 1.4
    finally:
        torch.set_num_threads(before)


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
        lane = runtime.lane([batch])
        lane.query(0)
        for outputs in (runtime.run(batch), lane.outputs()):
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
            lane = runtime.lane([batch])
            lane.query(0)
            assert_close = np.testing.assert_allclose
            assert_close(lane.outputs()["logits"], expected.run(batch)["logits"], rtol=1e-4, atol=1e-5)
        found = runtime.description()
        assert (found["compile"], found["channels_last"], found["compiled_graphs"]) == (True, True, 10)


class Branching(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) if images.sum() > 0 else -images.flatten(1)


@torch._dynamo.config.patch(suppress_errors=True)
def test_network_that_cannot_be_compiled_whole_is_refused() -> None:
    runtime = open_runtime(Branching(), runtime="pytorch:compile=true")
    for refused in (lambda batch: runtime.lane([batch]), runtime.run):
        with pytest.raises(WorkError, match=r"torch\.compile failed on Branching for images of shape \(1, 1, 1, 2\): "):
            refused(images((1, 0)))


@torch._dynamo.config.patch(suppress_errors=True)
def test_compiler_that_fails_is_no_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, inputs: object) -> None:
        raise OSError("no space left for the compiler")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    with pytest.raises(WorkError, match=r"torch\.compile failed on Linear .*no space left for the compiler"):
        open_runtime(Linear(), runtime="pytorch:compile=true").lane([images((1, 0))])


def test_compiler_that_is_switched_off_is_no_eager_run(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(WorkError, match=r"compiled nothing of Linear, because it is switched off \(TORCH_COMPILE_")
    with torch._dynamo.config.patch(disable=True), refused:
        open_runtime(Linear(), runtime="pytorch:compile=true").lane([images((1, 0))])
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # what other ways of doing it come to
    with refused:
        open_runtime(Linear(), runtime="pytorch:compile=true").run(images((1, 0)))


# --- PyTorch on a GPU: what can be held to account without one -------------------------------------------------------


class EagerStream(FakeStream):
    """PyTorch computes on the CPU here, and at once; so a copy that it reads from is done at once, too."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        super().copy(target, source)
        self.calls.append("copy")
        FakeStream.synchronize(self)

    def mark(self) -> object:
        self.calls.append("mark")
        return super().mark()

    def synchronize(self) -> None:
        self.calls.append("synchronize")
        super().synchronize()


class EagerGpu(FakeCuda):
    """The fake GPU with such streams; a graph that is replayed computes anew, into the same memory."""

    machine = Machine("NVIDIA H200", (9, 0))
    fails = False

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))
        self.calls: list[str] = []

    def stream(self) -> EagerStream:
        stream = EagerStream()
        stream.calls = self.calls
        return stream

    def capture(self, stream: FakeStream, work: object) -> object:
        self.calls.append("capture")
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be")
        work()
        self.calls.append("captured")
        return lambda: self.calls.append("replay")


class OnDevice(nn.Module):
    """Flattens; notes when, and gives its outputs as new memory of the fake GPU."""

    def __init__(self, gpu: EagerGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.gpu.calls.append("forward")
        return self.gpu.put(images.flatten(1).numpy().copy())


def cuda_lane(gpu: EagerGpu, model: nn.Module, *, cuda_graph: bool = False) -> Lane:
    runtime = PyTorchRuntime(model)
    runtime._cuda_graph = cuda_graph
    pinned = gpu.pin([images((1, 2))["images"], images((3, 4))["images"]])
    return runtime._cuda_lane(gpu, [(batch,) for batch in pinned])


def test_query_on_a_gpu_copies_there_computes_and_copies_back() -> None:
    gpu = EagerGpu()
    lane = cuda_lane(gpu, OnDevice(gpu))
    assert gpu.calls == ["copy", *["forward"] * WARM_UP_RUNS, "synchronize"]
    gpu.calls.clear()
    lane.query(1)
    assert gpu.calls == ["copy", "forward", "copy", "synchronize"]
    assert lane.outputs()["logits"].tolist() == [[3, 4]]
    gpu.calls.clear()
    found = lane.stages(0)
    assert gpu.calls == ["mark", "copy", "mark", "forward", "mark", "copy", "mark", "synchronize"]
    assert found.issued_ns < found.enqueued_ns < found.done_ns
    assert (found.h2d_ms, found.compute_ms, found.d2h_ms) == pytest.approx((0.01, 0.01, 0.01))
    assert lane.outputs()["logits"].tolist() == [[1, 2]]


def test_cuda_graph_is_captured_after_warm_up_and_replayed() -> None:
    gpu = EagerGpu()
    lane = cuda_lane(gpu, OnDevice(gpu), cuda_graph=True)
    before = ["copy", *["forward"] * WARM_UP_RUNS, "synchronize", "capture", "forward", "captured"]
    assert gpu.calls == before
    lane.query(0)
    assert gpu.calls == [*before, "copy", "replay", "copy", "synchronize"]
    assert lane.outputs()["logits"].tolist() == [[1, 2]]


def test_capture_that_fails_is_no_eager_run() -> None:
    gpu = EagerGpu()
    gpu.fails = True
    with pytest.raises(
        WorkError, match=r"as a CUDA graph: operation not permitted when stream is capturing; leave out"
    ):
        cuda_lane(gpu, OnDevice(gpu), cuda_graph=True)


def test_module_that_fails_on_a_gpu() -> None:
    class Failing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    class Tuple(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            return (images,)

    with pytest.raises(WorkError, match=r"PyTorch failed on a batch of shape \(1, 1, 1, 2\): CUDA out of memory"):
        cuda_lane(EagerGpu(), Failing())
    with pytest.raises(InputError, match="returned a tuple"):
        cuda_lane(EagerGpu(), Tuple())


# --- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["onnxruntime", "pytorch"])
def test_bfloat16_inputs_and_outputs(kind: str, path: Path) -> None:
    onnx.save(onnx.parser.parse_model(CASTS), path)
    runtime = open_runtime(path if kind == "onnxruntime" else Linear().bfloat16())
    assert [spec.dtype for spec in (*runtime.inputs, *runtime.outputs)] == ["bfloat16", "bfloat16"]
    batch = {"images": images((1, 0), (1, 2))["images"].astype("bfloat16")}
    lane = runtime.lane([batch])
    lane.query(0)
    for outputs in (runtime.run(batch), lane.outputs()):
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
        runtime.lane([images((1, 2))])


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
    assert answers(runtime.lane([images((1, 2))])) == [[[7, 10]]]


def test_query_that_fails_is_a_work_error(path: Path) -> None:
    onnx.save(onnx.parser.parse_model(NETWORK.replace("shape = {-1, 2}", "shape = {4, -1}")), path)
    lane = open_runtime(path).lane([images((1, 0))])
    with pytest.raises(WorkError, match=r"ONNX Runtime failed on network\.onnx"):
        lane.query(0)
    lane = open_runtime(Linear()).lane([{"images": np.zeros((1, 1, 1, 3), np.float32)}])
    with pytest.raises(WorkError, match=r"PyTorch failed on a batch of shape \(1, 1, 1, 3\)"):
        lane.query(0)


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
