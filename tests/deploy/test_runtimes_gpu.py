"""PyTorch and ONNX Runtime on a GPU; skipped where there is none."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils._triton
from torch import nn

from deploy.export import export_onnx
from deploy.parity import check_parity
from deploy.runtimes import Lane, open_runtime
from deploy.runtimes.ort_providers import installed_tensorrt

pytestmark = pytest.mark.gpu


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


@pytest.fixture
def path(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("onnxruntime")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return export_onnx(model, tmp_path / "model.onnx", image_shape=(3, 8, 8))


def check_lanes(model: nn.Module, path: Path | nn.Module, runtime: str) -> dict:
    """Lanes of two sizes, in turn and at the same time, agree with the model; returns the description."""
    pools = [[torch.randn(size, 3, 8, 8) for _ in range(3)] for size in (8, 1)]
    pools.append(pools[0])
    with torch.inference_mode():
        expected = [[model.cpu()(batch).numpy() for batch in pool] for pool in pools]
    if isinstance(path, nn.Module):
        model.cuda()
    with open_runtime(path, device="cuda", runtime=runtime) as opened:
        lanes = [opened.lane([{"images": batch.numpy()} for batch in pool]) for pool in pools]
        agree: list[bool] = []

        def work(lane: Lane, wanted: list[np.ndarray]) -> None:
            for index in (2, 0, 1, 2):
                lane.query(index)
                agree.append(np.allclose(lane.outputs()["logits"], wanted[index], rtol=1e-2, atol=1e-3))

        for lane, wanted in zip(lanes, expected, strict=True):
            work(lane, wanted)
        threads = [threading.Thread(target=work, args=given) for given in zip(lanes, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(agree) == 24
        assert all(agree)
        found = lanes[0].stages(1)
        assert found.issued_ns <= found.enqueued_ns < found.done_ns
        parts = [found.h2d_ms, found.compute_ms, found.d2h_ms]
        if isinstance(path, nn.Module):
            assert all(part > 0 for part in parts)
        else:
            assert parts == [None, None, None]
        return opened.description()


def test_cuda_runs_every_node_and_agrees(model: nn.Module, path: Path) -> None:
    with open_runtime(path, device="cuda") as runtime:
        check_parity(model, runtime, torch.randn(8, 3, 8, 8)).require()
        found = runtime.description()
        assert found["provider"] == "CUDAExecutionProvider"
        assert list(found["kernels_by_provider"]) == ["CUDAExecutionProvider"]


@pytest.mark.parametrize("options", ["", ":cuda_graph=true", ":allow_fallback=true"])
def test_cuda_lanes(model: nn.Module, path: Path, options: str) -> None:
    found = check_lanes(model, path, f"onnxruntime:provider=cuda{options}")
    assert found["provider_options"]["device_id"] == "0"


@pytest.mark.tensorrt
@pytest.mark.skipif(
    not (installed_tensorrt() or "").startswith("10."), reason="ONNX Runtime's provider links TensorRT 10"
)
@pytest.mark.parametrize("options", ["", ":cuda_graph=true"])
def test_tensorrt_provider_lanes(model: nn.Module, path: Path, options: str, tmp_path: Path) -> None:
    found = check_lanes(model, path, f"onnxruntime:provider=tensorrt{options}")
    assert found["kernels_by_provider"] == {"TensorrtExecutionProvider": 1}
    assert list((tmp_path / "cache").rglob("*.engine"))


needs_triton = pytest.mark.skipif(
    sys.platform != "linux" or not torch.utils._triton.has_triton(), reason="torch.compile needs Triton on a GPU"
)


@pytest.mark.parametrize(
    "options",
    [
        "",
        ":channels_last=true",
        ":cuda_graph=true",
        ":channels_last=true:cuda_graph=true",
        pytest.param(":compile=true", marks=needs_triton),
        pytest.param(":compile=true:channels_last=true:cuda_graph=true", marks=needs_triton),
    ],
)
def test_pytorch_lanes(model: nn.Module, options: str) -> None:
    found = check_lanes(model, model, f"pytorch{options}")
    for option in ("compile", "channels_last", "cuda_graph"):
        assert found[option] == (f":{option}=true" in options)


def test_pytorch_graph_keeps_its_own_batch(model: nn.Module) -> None:
    model.cuda()
    with open_runtime(model, device="cuda", runtime="pytorch:cuda_graph=true") as runtime:
        batch = {"images": np.ones((2, 3, 8, 8), np.float32)}
        lane = runtime.lane([batch])
        lane.query(0)
        first = lane.outputs()["logits"].copy()
        runtime.run({"images": np.zeros((2, 3, 8, 8), np.float32)})
        lane.query(0)
        np.testing.assert_array_equal(lane.outputs()["logits"], first)


def test_fp32_is_not_rounded_to_tf32(model: nn.Module, path: Path) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with open_runtime(model.cuda(), device="cuda"):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
