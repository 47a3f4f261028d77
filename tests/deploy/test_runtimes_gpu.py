"""PyTorch and ONNX Runtime on a GPU; skipped where there is none."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploy.export import export_onnx
from deploy.parity import check_parity
from deploy.runtimes import open_runtime
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


def check_steps(model: nn.Module, path: Path | nn.Module, runtime: str) -> dict:
    """Steps of two batches and two sizes, taking turns, agree with the model; returns the description."""
    batches = [torch.randn(size, 3, 8, 8) for size in (8, 8, 1)]
    with torch.inference_mode():
        expected = [model.cpu()(batch).numpy() for batch in batches]
    if isinstance(path, nn.Module):
        model.cuda()
    with open_runtime(path, device="cuda", runtime=runtime) as opened:
        steps = [opened.bind({"images": batch.numpy()}) for batch in batches]
        for _ in range(2):
            for step, logits in zip(steps, expected, strict=True):
                step()
                np.testing.assert_allclose(step.outputs()["logits"], logits, rtol=1e-2, atol=1e-3)
        return opened.description()


def test_cuda_runs_every_node_and_agrees(model: nn.Module, path: Path) -> None:
    with open_runtime(path, device="cuda") as runtime:
        check_parity(model, runtime, torch.randn(8, 3, 8, 8)).require()
        found = runtime.description()
        assert found["provider"] == "CUDAExecutionProvider"
        assert list(found["kernels_by_provider"]) == ["CUDAExecutionProvider"]


@pytest.mark.parametrize("options", ["", ":cuda_graph=true", ":allow_fallback=true"])
def test_cuda_steps(model: nn.Module, path: Path, options: str) -> None:
    found = check_steps(model, path, f"onnxruntime:provider=cuda{options}")
    assert found["provider_options"]["device_id"] == "0"


@pytest.mark.tensorrt
@pytest.mark.skipif(
    not (installed_tensorrt() or "").startswith("10."), reason="ONNX Runtime's provider links TensorRT 10"
)
@pytest.mark.parametrize("options", ["", ":cuda_graph=true"])
def test_tensorrt_provider_steps(model: nn.Module, path: Path, options: str, tmp_path: Path) -> None:
    found = check_steps(model, path, f"onnxruntime:provider=tensorrt{options}")
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
def test_pytorch_steps(model: nn.Module, options: str) -> None:
    found = check_steps(model, model, f"pytorch{options}")
    for option in ("compile", "channels_last", "cuda_graph"):
        assert found[option] == (f":{option}=true" in options)


def test_pytorch_graph_keeps_its_own_batch(model: nn.Module) -> None:
    model.cuda()
    with open_runtime(model, device="cuda", runtime="pytorch:cuda_graph=true") as runtime:
        batch = {"images": np.ones((2, 3, 8, 8), np.float32)}
        step = runtime.bind(batch)
        step()
        first = step.outputs()["logits"].copy()
        runtime.run({"images": np.zeros((2, 3, 8, 8), np.float32)})
        step()
        np.testing.assert_array_equal(step.outputs()["logits"], first)
