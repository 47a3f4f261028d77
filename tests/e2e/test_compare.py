"""Files held against their checkpoint, and the first layer at which a bad one parts from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.errors import WorkError
from deploy import comparing


@pytest.fixture
def damaged(run_directory: Path, tmp_path: Path) -> Path:
    """The pruned network's file with one weight of its layer fc1 changed."""
    model = onnx.load(run_directory / "artifacts" / "pruned.fp32.onnx")
    (weights,) = (tensor for tensor in model.graph.initializer if tensor.name == "fc1.weight")
    values = numpy_helper.to_array(weights).copy()
    values[0] += 1
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    path = tmp_path / "damaged.onnx"
    onnx.save(model, path)
    return path


def test_sound_files_keep_to_their_tolerance(invoke: Any, run_directory: Path) -> None:
    files = sorted((run_directory / "artifacts").glob("pruned.*.onnx"))
    result = invoke("compare", run_directory / "pruned", *files, "--data", "digits", "--samples", "16", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [item["precision"] for item in found["files"]] == ["fp32", "int8"]
    fp32, int8 = found["files"]
    assert fp32["problem"] is int8["problem"] is None
    assert fp32["max_relative_error"] < 1e-5 < int8["max_relative_error"]
    assert fp32["top1_agreement"] == 100
    assert fp32["accuracy"]["samples"] == 360


def test_a_bad_file_fails_after_its_figures_were_shown(invoke: Any, run_directory: Path, damaged: Path) -> None:
    result = invoke("compare", run_directory / "pruned", damaged, "--data", "digits", "--first-layer")
    assert result.exit_code == 1
    assert "does not compute what the model does" in result.stderr
    assert "fc1 (Gemm" in result.stdout
    assert "is the first to diverge" in " ".join(result.stdout.split())


def test_the_layer_is_looked_for_only_on_request(run_directory: Path, damaged: Path) -> None:
    found = comparing.compare(run_directory / "pruned", [damaged], "digits", samples=8, batch_sizes=(8,))
    assert found["files"][0]["first_layer"] is None
    with pytest.raises(WorkError, match=r"damaged\.onnx"):
        comparing.require(found)


def test_files_for_gpus_are_compared_by_their_numbers(invoke: Any, run_directory: Path, tmp_path: Path) -> None:
    exported = invoke(
        *("export", run_directory / "pruned", "--precision", "int8,fp8", "--target", "gpu"),
        *("--calibration", "digits", "--samples", "32", "--out", tmp_path),
    )
    assert exported.exit_code == 0, exported.stderr
    files = sorted(tmp_path.glob("*.onnx"))
    found = comparing.compare(run_directory / "pruned", files, "digits", samples=8)
    assert [item["precision"] for item in found["files"]] == ["fp8", "int8"]
    for item in found["files"]:
        assert item["problem"] is None
        assert item["runtime"]["numbers_only"] is True
        assert np.isfinite(item["sqnr_db"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "glyphs"), "has images of (3, 32, 32)"),
        (("--data", "digits", "--samples", "4"), "needs at least 8 samples"),
    ],
)
def test_data_that_do_not_fit(invoke: Any, arguments: tuple[str, ...], words: str, run_directory: Path) -> None:
    file = run_directory / "artifacts" / "pruned.fp32.onnx"
    result = invoke("compare", run_directory / "pruned", file, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
