"""ONNX Runtime on a GPU; skipped where there is none."""

from pathlib import Path

import pytest
import torch
from torch import nn

from deploy.export import export_onnx
from deploy.parity import check_parity
from deploy.runtimes import open_runtime

pytestmark = pytest.mark.gpu


def test_cuda_runs_every_node_and_agrees(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    path = export_onnx(model, tmp_path / "model.onnx", image_shape=(3, 8, 8))
    with open_runtime(path, device="cuda") as runtime:
        check_parity(model, runtime, torch.randn(8, 3, 8, 8)).require()
        assert runtime.description()["provider"] == "CUDAExecutionProvider"
