"""TensorRT on a real GPU; skipped where there is none. The fakes' tests cover the errors, these the numbers."""

import os
import signal
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import InputError
from deploy.engine import BatchRange, BuilderSettings, build_engine
from deploy.export import export_onnx
from deploy.parity import check_parity
from deploy.runtimes import Lane, open_runtime
from deploy.runtimes.cuda import CudaDevice
from deploy.runtimes.tensorrt import TensorRtRuntime

SHAPE = (3, 32, 32)
BATCH = BatchRange(minimum=1, optimum=4, maximum=8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ).eval()


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def onnx_path(tmp_path: Path) -> Path:
    return export_onnx(network(), tmp_path / "artifacts" / "net.fp32.onnx", image_shape=SHAPE)


@pytest.fixture
def plan(onnx_path: Path) -> Path:
    path = onnx_path.with_suffix(".plan")
    build_engine(onnx_path, path, batch=BATCH, settings=BuilderSettings(tf32=False, optimization_level=1))
    return path


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)}


def expected(batch: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return network()(torch.from_numpy(batch["images"])).numpy()


@pytest.mark.tensorrt
def test_engine_agrees_with_pytorch(plan: Path) -> None:
    with open_runtime(plan, device="cuda") as runtime:
        check_parity(network(), runtime, torch.from_numpy(images(16)["images"])).require()


@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_many_lanes_in_turn(plan: Path, cuda_graph: bool) -> None:
    with TensorRtRuntime(plan, cuda_graph=cuda_graph) as runtime:
        pools = [[images(count, seed + 10 * place) for place in range(3)] for seed, count in enumerate((4, 4, 8, 1))]
        lanes = [runtime.lane(pool) for pool in pools]
        assert runtime.description()["cuda_graph"] == ("captured" if cuda_graph else "off")
        for index in (2, 0, 1, 2):
            for lane, pool in zip(lanes, pools, strict=True):
                runtime.run(images(2, seed=99))
                lane.query(index)
                np.testing.assert_allclose(lane.outputs()["logits"], expected(pool[index]), rtol=1e-3, atol=1e-4)
        found = lanes[2].stages(0)
        assert found.issued_ns < found.enqueued_ns < found.done_ns
        parts = [found.h2d_ms, found.compute_ms, found.d2h_ms]
        assert all(0 < part < (found.done_ns - found.issued_ns) / 1e6 for part in parts)
    with pytest.raises(InputError, match="closed"):
        lanes[0].query(0)


@pytest.mark.tensorrt
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_lanes_at_the_same_time(plan: Path, cuda_graph: bool) -> None:
    pool = [images(4, seed) for seed in range(4)]
    with TensorRtRuntime(plan, cuda_graph=cuda_graph) as runtime:
        lanes = [runtime.lane(pool) for _ in range(4)]
        wanted = [expected(batch) for batch in pool]
        wrong: list[float] = []

        def work(lane: Lane) -> None:
            for query in range(200):
                lane.query(query % 4)
                wrong.append(float(np.abs(lane.outputs()["logits"] - wanted[query % 4]).max()))

        threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(wrong) == 800
    assert max(wrong) < 1e-3


@pytest.mark.tensorrt
def test_layers_and_their_times(plan: Path) -> None:
    with TensorRtRuntime(plan) as runtime:
        layers = runtime.layers()
        assert len(layers) == runtime.description()["layers"]
        assert any(tensor.dtype == "float32" for layer in layers for tensor in layer.inputs)
        times = runtime.profile(images(4), runs=3)
        assert times
        assert all(len(runs) == 3 and min(runs) >= 0 for runs in times.values())


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "settings",
    [
        {"version_compatible": True},
        {"hardware_compatible": "ampere-plus"},
        {"refittable": True},
        {"workspace_bytes": 2**28},
    ],
)
def test_settings_give_engines_that_run(onnx_path: Path, settings: dict) -> None:
    plan = onnx_path.with_suffix(".plan")
    build_engine(onnx_path, plan, batch=BATCH, settings=BuilderSettings(optimization_level=0, **settings))
    with TensorRtRuntime(plan) as runtime:
        np.testing.assert_allclose(runtime.run(images(3))["logits"], expected(images(3)), rtol=1e-2, atol=1e-2)


@pytest.mark.tensorrt
def test_timing_cache_is_kept_and_a_damaged_one_replaced(onnx_path: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    settings = BuilderSettings(optimization_level=1, timing_cache=cache)
    for _ in range(2):
        build_engine(onnx_path, onnx_path.with_suffix(".plan"), batch=BATCH, settings=settings)
        assert cache.stat().st_size > 0
    cache.write_bytes(b"no timing cache")
    build_engine(onnx_path, onnx_path.with_suffix(".plan"), batch=BATCH, settings=settings)
    assert cache.read_bytes() != b"no timing cache"


@pytest.mark.tensorrt
def test_interrupt_stops_the_build(onnx_path: Path) -> None:
    def build_for_long() -> None:
        for number in range(20):  # one may be over before the signal
            plan = onnx_path.with_name(f"net{number}.plan")
            build_engine(onnx_path, plan, batch=BATCH, settings=BuilderSettings(optimization_level=5))

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        build_for_long()
    timer.join()
    assert not list(onnx_path.parent.glob(".*"))


@pytest.mark.gpu
def test_memory_goes_to_the_gpu_and_back() -> None:
    device = CudaDevice(torch.device("cuda"))
    for array in (
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([1.5, -2], ml_dtypes.bfloat16),
        np.array([True]),
    ):
        back = device.take(device.put(array))
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


@pytest.mark.gpu
def test_graph_is_replayed_and_a_failed_capture_leaves_the_stream_usable() -> None:
    device = CudaDevice(torch.device("cuda"))
    stream = device.stream()
    total = device.put(np.zeros(1, np.float32))

    def add() -> None:
        total.add_(1)

    with pytest.raises(RuntimeError):
        device.capture(stream, lambda: total.cpu())  # waiting for the GPU cannot be captured
    replay = device.capture(stream, add)
    with stream.inside:
        for _ in range(3):
            replay()
    stream.synchronize()
    assert device.take(total) == [3]
