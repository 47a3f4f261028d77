"""Which runtime a run uses, and the reason that it gives."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from compress.errors import InputError
from deploy import serving
from deploy.serving import Serving
from tests.fakes.fixtures import LISTINGS
from tests.fakes.tensorrt import build_fake

CPU = Serving(runtime="onnxruntime", device="cpu", reason="PyTorch finds no CUDA GPU")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def onnxruntime_with(*providers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("onnxruntime")
    module.__spec__ = ModuleSpec("onnxruntime", None)
    module.get_available_providers = lambda: list(providers)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


def test_without_a_gpu_it_is_onnx_runtime_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = serving.choose()
    assert chosen == CPU
    assert chosen.target == "cpu"
    assert str(chosen) == "ONNX Runtime on the CPU, because PyTorch finds no CUDA GPU"


@pytest.mark.parametrize("listing", LISTINGS.values(), ids=LISTINGS)
@pytest.mark.usefixtures("gpu")
def test_a_gpu_and_tensorrt_are_used(listing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", build_fake(listing))
    chosen = serving.choose()
    assert (chosen.runtime, chosen.device, chosen.target) == ("tensorrt", "cuda", "gpu")
    assert str(chosen) == "TensorRT on the GPU, because a CUDA GPU and TensorRT are present"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_tensorrt_is_used_by_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    onnxruntime_with("CUDAExecutionProvider", "CPUExecutionProvider", monkeypatch=monkeypatch)
    chosen = serving.choose()
    assert (chosen.runtime, chosen.device) == ("onnxruntime", "cuda")
    assert "tensorrt, which is not installed" in chosen.reason


@pytest.mark.usefixtures("gpu")
def test_a_tensorrt_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    old = build_fake(next(iter(LISTINGS.values())), version="10.3.0.26")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    onnxruntime_with("CUDAExecutionProvider", monkeypatch=monkeypatch)
    chosen = serving.choose()
    assert chosen.runtime == "onnxruntime"
    assert "10.3.0.26 is installed" in chosen.reason


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_nothing_can_use_leaves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    onnxruntime_with("CPUExecutionProvider", monkeypatch=monkeypatch)
    chosen = serving.choose()
    assert (chosen.runtime, chosen.device) == ("onnxruntime", "cpu")
    assert "no CUDA provider" in chosen.reason


@pytest.mark.parametrize(("precision", "why"), [("bf16", "no bf16 kernels"), ("fp8", "no CPU computes in fp8")])
def test_what_the_cpu_cannot_run_is_refused_before_any_training(precision: str, why: str) -> None:
    with pytest.raises(InputError, match=f"export.precision names {precision}.*{why}.*espalier export"):
        CPU.require(("fp32", precision))
    CPU.require(("fp32", "fp16", "int8"))
    CPU.model_copy(update={"device": "cuda"}).require(("fp32", "bf16", "fp8"))
