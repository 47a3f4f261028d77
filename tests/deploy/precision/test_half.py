import logging
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import nn

import deploy.onnx_file
from compress.errors import InputError, MissingExtraError, WorkError
from deploy.export import export_onnx
from deploy.onnx_file import load_onnx, read_metadata, read_onnx, write_onnx
from deploy.precision.half import LARGEST, to_half
from deploy.precision.layers import layer_names

pytest.importorskip("modelopt", reason="needs the extra quant")

SHAPE = (3, 8, 8)
Half = Literal["fp16", "bf16"]


class Net(nn.Module):
    """Two convolutions, between which the values are `factor` times as large as elsewhere."""

    def __init__(self, factor: float = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.Hardswish()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            self.conv1.weight *= factor
            self.conv2.weight /= factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.act(self.conv1(x))).relu().mean((2, 3)))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return export_onnx(Net(), tmp_path / "net.fp32.onnx", image_shape=SHAPE, classes=tuple("abcde"))


def images(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *SHAPE)).astype(np.float32)


def error(source: Path, path: Path) -> float:
    """Largest difference of the logits over the largest logit."""
    expected, actual = (
        session.run(None, {"images": images().astype({"tensor(float)": "f4"}.get(session.get_inputs()[0].type, "f2"))})
        for session in map(onnxruntime.InferenceSession, (str(source), str(path)))
    )
    return float(np.abs(actual[0] - expected[0]).max() / np.abs(expected[0]).max())


def types(model: onnx.ModelProto) -> list[int]:
    return [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]


@pytest.mark.parametrize(("precision", "half"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
@pytest.mark.parametrize("fp32_io", [False, True])
def test_whole_network_becomes_half(source: Path, precision: Half, half: int, fp32_io: bool) -> None:
    path = source.with_name("half.onnx")
    assert to_half(source, path, precision, fp32_io=fp32_io, samples=images()) == ()
    model = load_onnx(path)
    assert types(model) == [TensorProto.FLOAT if fp32_io else half] * 2
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    assert {tensor.data_type for tensor in model.graph.initializer} - {TensorProto.INT64} == {half}
    assert read_metadata(path) == read_metadata(source)
    before = layer_names(read_onnx(source))
    after = layer_names(model)
    assert {name: after[name] for name in before if "Conv" in name} == {
        name: before[name] for name in before if "Conv" in name
    }


@pytest.mark.parametrize("fp32_io", [False, True])
def test_fp16_computes_what_fp32_does(source: Path, fp32_io: bool) -> None:
    path = source.with_name("half.onnx")
    to_half(source, path, "fp16", fp32_io=fp32_io, samples=None)
    assert 0 < error(source, path) < 2e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_same_source_gives_the_same_bytes(source: Path, precision: Half) -> None:
    first, again = source.with_name("first.onnx"), source.with_name("again.onnx")
    for path in (first, again):
        to_half(source, path, precision, fp32_io=False, samples=images())
    assert first.read_bytes() == again.read_bytes()


def test_what_leaves_the_range_stays_in_fp32(tmp_path: Path) -> None:
    source = export_onnx(Net(factor=3e5), tmp_path / "net.onnx", image_shape=SHAPE)
    path = tmp_path / "half.onnx"
    kept = to_half(source, path, "fp16", fp32_io=False, samples=images())
    assert kept == ("conv1", "act", "conv2")
    assert 0 < error(source, path) < 2e-3
    assert to_half(source, path, "fp16", fp32_io=False, samples=images() * np.float32(LARGEST / 1e6)) == ()


def test_excluded_layers_stay_in_fp32(source: Path) -> None:
    path = source.with_name("half.onnx")
    assert to_half(source, path, "fp16", fp32_io=False, samples=None, exclude=["conv?"]) == ("conv1", "conv2")
    with pytest.raises(InputError, match='No layer is called "conv3"'):
        to_half(source, path, "fp16", fp32_io=False, samples=None, exclude=["conv3"])


def test_library_is_silent_and_leaves_logging_as_it_was(
    source: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with caplog.at_level(logging.DEBUG, logger="deploy.precision.half"):
        to_half(source, source.with_name("half.onnx"), "fp16", fp32_io=False, samples=images())
    assert capfd.readouterr() == ("", "")
    assert (root.handlers, root.level) == before
    assert all(record.levelno == logging.DEBUG for record in caplog.records)
    assert any("fp16" in record.getMessage() for record in caplog.records)


def test_large_weights_lie_beside_the_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy.onnx_file, "MAX_INLINE_BYTES", 100)
    large, path = source.with_name("large.onnx"), source.with_name("half.onnx")
    write_onnx(load_onnx(source), large)
    assert large.with_name("large.onnx.data").exists()
    to_half(large, path, "fp16", fp32_io=False, samples=images())
    assert path.with_name("half.onnx.data").exists()
    assert 0 < error(source, path) < 2e-3


def test_samples_that_do_not_fit_are_refused(source: Path) -> None:
    with pytest.raises(InputError, match="are float64"):
        to_half(source, source.with_name("half.onnx"), "fp16", fp32_io=False, samples=images().astype(np.float64))
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_failure_of_the_library_is_one_sentence(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import modelopt.onnx.autocast

    def fail(*arguments: object, **options: object) -> None:
        raise Exception("AutoCast cannot do it.\nSee the log.")

    monkeypatch.setattr(modelopt.onnx.autocast, "convert_to_mixed_precision", fail)
    with pytest.raises(WorkError, match=r"^net\.fp32\.onnx cannot be converted to fp16: AutoCast cannot do it\.$"):
        to_half(source, source.with_name("half.onnx"), "fp16", fp32_io=False, samples=None)


def test_missing_library_names_the_extra(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.onnx.autocast", None)
    with pytest.raises(MissingExtraError, match=r"Writing fp16 and bf16 needs nvidia-modelopt.*espalier\[quant\]"):
        to_half(source, source.with_name("half.onnx"), "fp16", fp32_io=False, samples=None)
