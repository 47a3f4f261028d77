"""`espalier run` from beginning to end, and the steps alone on what it leaves behind."""

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.results import Results
from deploy import manifest
from tests.e2e.options import QUICKLY


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_the_run_directory_is_complete_and_holds_nothing_else(run_directory: Path) -> None:
    found = files(run_directory)
    figures = {name for name in found if name.startswith("figures/")}
    assert {"figures/speedup_batch1.svg", "figures/speedup_batch1.png", "figures/macs_latency.svg"} <= figures
    assert found - figures == {
        "recipe.yaml",
        "pruning.json",
        "results.json",
        "results.csv",
        "report.html",
        "baseline/model.safetensors",
        "baseline/architecture.json",
        "pruned/model.safetensors",
        "pruned/architecture.json",
        "artifacts/dense.fp32.onnx",
        "artifacts/pruned.fp32.onnx",
        "artifacts/dense.int8.cpu.onnx",
        "artifacts/pruned.int8.cpu.onnx",
        "artifacts/manifest.json",
    }
    assert not (run_directory / ".work").exists()


def test_stdout_is_the_results_document(unbroken: "subprocess.CompletedProcess[str]", run_directory: Path) -> None:
    assert unbroken.stdout == (run_directory / "results.json").read_text()
    results = Results.model_validate_json(unbroken.stdout)
    assert [variant.name for variant in results.variants] == ["dense", "pruned", "dense int8", "pruned int8"]
    assert [variant.artefact.precision for variant in results.variants] == ["fp32", "fp32", "int8", "int8"]
    dense, pruned, _, quantised = results.variants
    assert (dense.kind, pruned.kind, quantised.kind) == ("dense", "pruned", "pruned")
    assert quantised.artefact.size_bytes < pruned.artefact.size_bytes
    assert results.provenance["runtime"] == "ONNX Runtime on the CPU, because PyTorch finds no CUDA GPU"
    assert pruned.macs <= 0.5 * dense.macs
    assert pruned.parameters < dense.parameters
    for variant in results.variants:
        assert [measurement.batch_size for measurement in variant.measurements] == [1, 4]
        assert all(len(measurement.samples_ms) >= 2 for measurement in variant.measurements)
        assert variant.accuracy is not None
        assert variant.accuracy.top1_percent.value > 50  # chance is 10
        assert variant.accuracy.top1_percent.samples == 360
        # PyTorch and ONNX Runtime judge the same network; int8 rounds it.
        assert variant.parity is not None
        points = 0.3 if variant.artefact.precision == "fp32" else 3
        top1 = variant.accuracy.top1_percent.value
        assert variant.parity["reference_top1_percent"] == pytest.approx(top1, abs=points)
    assert dense.measurements[0].speedup is None
    for variant in (pruned, quantised):
        speedup = variant.measurements[0].speedup
        assert speedup is not None
        assert results.baseline_of(variant, speedup) is dense


def test_every_figure_can_be_traced(unbroken: "subprocess.CompletedProcess[str]", run_directory: Path) -> None:
    results = Results.model_validate_json(unbroken.stdout)
    entries = {entry.file: entry for entry in manifest.verify(run_directory / "artifacts").entries}
    for variant in results.variants:
        entry = entries[Path(variant.artefact.path).name]
        assert variant.artefact.sha256 == entry.sha256
        folder = run_directory / ("baseline" if variant.kind == "dense" else "pruned")
        assert json.loads((folder / "architecture.json").read_text())["sha256"] == entry.checkpoint_sha256
    assert results.pruning is not None
    assert results.pruning.budget.achieved_fraction * results.variants[0].macs == pytest.approx(
        results.variants[1].macs, rel=1e-6
    )
    widths = {layer.name: (layer.width_before, layer.width_after) for layer in results.pruning.layers}
    assert widths["fc3"] == (10, 10)
    assert any(after < before for before, after in widths.values())
    assert set(results.training) == {"baseline", "prune", "finetune"}
    assert [len(epochs) for epochs in results.training.values()] == [3, 3, 3]
    assert len(set(results.seeds.values())) == len(results.seeds)


def test_pruning_json_holds_the_scores_of_every_event(run_directory: Path) -> None:
    pruning = json.loads((run_directory / "pruning.json").read_text())
    assert [event["minibatches"] for event in pruning["events"]] == [11, 22, 33]
    first = pruning["events"][0]
    assert {name: len(scores) for name, scores in first["scores"].items()} == {
        "conv1": 16,
        "conv2": 32,
        "fc1": 120,
        "fc2": 84,
    }
    assert pruning["budget"]["achieved_fraction"] <= 0.5


def test_the_table_in_the_csv_file(run_directory: Path) -> None:
    with (run_directory / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(row["variant"], row["batch_size"]) for row in rows] == [
        (variant, batch) for variant in ("dense", "pruned", "dense int8", "pruned int8") for batch in ("1", "4")
    ]


def test_the_recorded_recipe_can_be_run_again(invoke: Any, run_directory: Path, recipe_file: Path) -> None:
    recorded = run_directory / "recipe.yaml"
    dumped = invoke("run", recorded, "--dump-recipe")
    assert dumped.exit_code == 0
    uncommented = "".join(line for line in recorded.open() if not line.startswith("#"))
    assert dumped.stdout == uncommented
    assert "num_classes: 10" in uncommented  # filled in from the data
    assert "num_classes" not in recipe_file.read_text()


def test_a_complete_run_prints_its_table_at_once(espalier: Any, run_directory: Path, recipe_file: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")}
    again = espalier("run", recipe_file, "--out", run_directory)
    assert again.returncode == 0
    assert "complete already; nothing was run" in again.stderr
    for expected in ("dense", "pruned", "images/s", "fewer MACs", str(run_directory / "report.html")):
        assert expected in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")} == before


def test_the_steps_alone(invoke: Any, run_directory: Path, tmp_path: Path) -> None:
    exported = invoke("export", run_directory / "pruned", "--out", tmp_path / "again", "--json")
    assert exported.exit_code == 0, exported.stderr
    (entry,) = json.loads(exported.stdout)
    assert entry["sha256"] == manifest.read(run_directory / "artifacts").entry("pruned.fp32.onnx").sha256  # type: ignore[union-attr]

    first, second = run_directory / "artifacts" / "dense.fp32.onnx", Path(entry["path"])
    assert second == tmp_path / "again" / "pruned.fp32.onnx"
    timed = invoke("bench", first, second, "--batch", "2", *QUICKLY, "--json")
    assert timed.exit_code == 0, timed.stderr
    found = json.loads(timed.stdout)
    assert [variant["name"] for variant in found["variants"]] == [str(first), str(second)]
    assert found["variants"][1]["measurements"][0]["speedup"]["baseline"] == str(first)

    in_pytorch = run_directory / "baseline"
    timed = invoke(
        *("bench", in_pytorch, first, "--runtime", "pytorch:channels_last=true", *QUICKLY, "--json"),
    )
    assert timed.exit_code == 0, timed.stderr
    described = [variant["runtime"] for variant in json.loads(timed.stdout)["variants"]]
    assert [runtime["name"] for runtime in described] == ["pytorch", "onnxruntime"]
    assert described[0]["proof"]["channels_last"] is True

    copy = shutil.copytree(run_directory, tmp_path / "copy")
    (copy / "report.html").unlink()
    (copy / "results.csv").unlink()
    assert invoke("report", copy).exit_code == 0
    assert (copy / "results.csv").read_bytes() == (run_directory / "results.csv").read_bytes()
    assert (copy / "report.html").stat().st_size > 10_000


OWN_CODE = """\
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def net(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )


def loaders(batch_size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 2, 8, 8, generator=generator)
    labels = torch.arange(32) % 4
    train = DataLoader(TensorDataset(images, labels), batch_size, shuffle=True)
    return train, DataLoader(TensorDataset(images, labels), batch_size)
"""


def test_own_model_own_data_and_trusted_weights(espalier: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_CODE)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\nname: own\nmodel: {factory: mine:net}\ndata: {source: mine:loaders, batch_size: 8}\n"
        "baseline: null\nprune: {budget: {channels: 0.75}, events: 1, interval: 4}\nfinetune: {epochs: 1}\n"
        "parity: {samples: 4, batch_sizes: [2]}\n"
        "measure: {batch_sizes: [1], rounds: 2, processes: 1, time_limit_s: 1}\n"
    )
    pruned = espalier("prune", recipe, cwd=tmp_path)
    assert pruned.returncode == 0, pruned.stderr
    out = tmp_path / "runs" / "own"
    assert (out / "pruned" / "model.safetensors").exists()
    assert not (out / "artifacts").exists()

    refused = espalier("export", out / "pruned", cwd=tmp_path)
    assert refused.returncode == 2
    assert "add --trust mine" in refused.stderr
    assert espalier("export", out / "pruned", "--trust", "mine", cwd=tmp_path).returncode == 0

    done = espalier("run", recipe, "--json", cwd=tmp_path)  # goes on after the trainings
    assert done.returncode == 0, done.stderr
    assert "stage finetune was finished before" in done.stderr
    results = Results.model_validate_json(done.stdout)
    assert results.training["baseline"] == []
    assert results.recipe["model"] == {
        "factory": "mine:net",
        "weights": None,
        "kwargs": {"num_classes": 4, "in_channels": 2},
    }
