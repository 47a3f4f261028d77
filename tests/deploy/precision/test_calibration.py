import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_nets import SHAPE, convolution

import deploy.onnx_file
from compress.errors import InputError, MissingExtraError, WorkError
from deploy.onnx_file import load_onnx, write_onnx
from deploy.precision.calibration import PERCENTILE, calibrate
from deploy.precision.settings import Calibration

IDENTITY = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return convolution(tmp_path / "net.onnx", 2 * IDENTITY)


def samples(count: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 3, (count, *SHAPE)).astype(np.float32)


def test_minmax_is_the_lowest_and_highest_value_over_all_batches(source: Path) -> None:
    images = samples(21)
    images[3, 0, 0, 0], images[20, 1, 1, 1] = -1.5, 4
    assert calibrate(source, images) == {"images": (-1.5, 4), "logits": (-3, 8)}


def test_ranges_for_the_gpu_are_symmetric(source: Path) -> None:
    images = np.full((1, *SHAPE), -1, np.float32)
    images[0, 0, 0, 0] = 3
    assert calibrate(source, images, target="cpu")["images"] == (-1, 3)
    assert calibrate(source, images, target="gpu")["images"] == (-3, 3)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_outliers_are_cut_off(source: Path, method: Calibration) -> None:
    images = np.random.default_rng(0).standard_normal((1000, *SHAPE)).astype(np.float32)
    images[999, 0, 0, 0] = 40
    low, high = calibrate(source, images, method=method)["images"]
    assert -5 < low < -2
    assert 2 < high < 20
    assert calibrate(source, images)["images"][1] == 40


def test_percentile_keeps_its_share(source: Path) -> None:
    images = np.linspace(0, 1, 400 * 32, dtype=np.float32).reshape(400, *SHAPE)
    np.random.default_rng(0).shuffle(images)
    low, high = calibrate(source, images, method="percentile")["images"]
    tail = (1 - PERCENTILE / 100) / 2
    assert low == pytest.approx(tail, abs=2e-3)
    assert high == pytest.approx(1 - tail, abs=2e-3)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_same_samples_give_the_same_ranges(source: Path, method: Calibration) -> None:
    assert calibrate(source, samples(), method=method) == calibrate(source, samples(), method=method)


def test_nothing_is_printed_or_left_beside_the_file(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(source, samples(), method="entropy")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_external_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 2, 1, 1)).astype(np.float32)
    source = convolution(tmp_path / "net.onnx", weight)
    expected = calibrate(source, samples())
    monkeypatch.setattr(deploy.onnx_file, "MAX_INLINE_BYTES", 100)
    write_onnx(load_onnx(source), tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx.data").exists()
    assert calibrate(tmp_path / "large.onnx", samples()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, *SHAPE), np.float32), "calibration set is empty"),
        (np.zeros((4, *SHAPE), np.uint8), r"are uint8, but the network takes images: float32 \(batch, 2, 4, 4\)"),
        (np.zeros((4, *SHAPE), np.float64), "are float64"),
        ([[1.0]], "are list"),
        (np.zeros((4, 3, 4, 4), np.float32), r"have shape \(4, 3, 4, 4\)"),
        (np.zeros(SHAPE, np.float32), r"have shape \(2, 4, 4\)"),
        (np.float32(1), "are float32"),
        (np.array(1, np.float32), r"have shape \(\)"),
        (np.full((1, *SHAPE), np.nan, np.float32), "NaN or infinite"),
        (np.full((1, *SHAPE), np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_samples_that_do_not_fit_are_refused(source: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibrate(source, given)


def test_activation_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = convolution(tmp_path / "net.onnx", np.float32(3e38) * IDENTITY)
    with pytest.raises(WorkError, match=r"activation logits of net\.onnx is not finite"):
        calibrate(source, 10 * np.ones((1, *SHAPE), np.float32))


def test_operator_that_onnxruntime_lacks_is_work_that_failed(tmp_path: Path) -> None:
    node = helper.make_node("Foreign", ["images"], ["logits"], name="foreign", domain="elsewhere")
    source = tmp_path / "foreign.onnx"
    model = load_onnx(convolution(tmp_path / "net.onnx", IDENTITY))
    del model.graph.node[:]
    model.graph.node.append(node)
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    source.write_bytes(model.SerializeToString())
    with pytest.raises(WorkError, match=r"ONNX Runtime cannot run foreign\.onnx"):
        calibrate(source, samples())


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    source = convolution(tmp_path / "net.onnx", IDENTITY)
    model = load_onnx(source)
    model.graph.input.append(model.graph.input[0])
    model.graph.input[1].name = "more"
    source.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="has 2 inputs"):
        calibrate(source, samples())


def test_missing_onnxruntime_names_the_extra(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(MissingExtraError, match=r"espalier\[cpu\]"):
        calibrate(source, samples())
