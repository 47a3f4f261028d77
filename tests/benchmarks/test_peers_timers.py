"""Other clocks beside ours: every one on a tiny network, and what is said of made-up readings."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.harness.errors import HarnessError
from benchmarks.peers import timers
from benchmarks.peers.readings import Reading, figures, repeatability
from benchmarks.peers.timers import compare, main
from deploy.export import export_onnx

CLOCKS = {
    "pytorch": ["harness", "timm", "torch.Timer"],
    "onnxruntime": ["harness", "ort.profiler", "timm", "torch.Timer"],
}


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, torch.Tensor]:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return network.eval(), torch.zeros(1, 3, 16, 16)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timers, "ROUNDS", 2)
    monkeypatch.setattr(timers, "WARMUP_S", 0.0)


def readings(*medians_ms: float) -> list[Reading]:
    return [Reading(value, 2 * value, 10) for value in medians_ms]


def test_every_clock_reads_every_network(tiny, quick):
    network, images = tiny
    seen = []
    found = compare(network, images, threads=1, repeats=2, seconds=0.01, seen=seen)
    assert {name: sorted(clocks) for name, clocks in found.items()} == CLOCKS
    assert len(seen) == 2 * 7
    for clocks in found.values():
        for clock, result in clocks.items():
            assert len(result["readings"]) == 2
            assert all(0 < reading["median_ms"] < 100 for reading in result["readings"])
            assert result["median_repeatability"]["pairs"] == 1
            assert ("median_over_harness" in result) is (clock != "harness")
    assert {reading["queries"] for reading in found["pytorch"]["timm"]["readings"]} == {timers.TIMM_STEPS}


def test_the_document_and_what_is_said(tmp_path, quick, capsys):
    before = torch.get_num_threads()
    out = tmp_path / "timers.json"
    options = ["--model", "espalier:resnet20", "--size", "8", "--repeats", "2", "--seconds", "0.01", "--threads", "1"]
    main(["--out", str(out), *options])
    document = json.loads(out.read_text())
    assert document["by_threads"].keys() == {"1"}
    assert document["conditions"]["slots"] == 14
    assert document["environment"]["python"]
    assert (document["batch"], document["size"], document["repeats"]) == (1, 8, 2)
    assert len(capsys.readouterr().out.splitlines()) == 7
    assert torch.get_num_threads() == before
    with pytest.raises(SystemExit):
        main(["--out", str(out), "--repeats", "1"])


def test_ratio_and_agreement():
    ours = readings(10.0, 10.1, 9.9, 10.0, 10.2, 9.8, 10.0, 10.1)
    same = figures("timm", ours, ours, seed=0)
    assert same["median_over_harness"] == {"value": 1, "low": 1, "high": 1, "samples": 8}
    assert same["median_agrees"]
    assert same["median_equivalent"]
    assert same["mean_ms"]["value"] == pytest.approx(2 * same["median_ms"]["value"])
    slower = figures("timm", readings(*(1.2 * reading.median_ms for reading in ours)), ours, seed=0)
    assert slower["median_over_harness"]["value"] == pytest.approx(1.2)
    assert not slower["median_agrees"]
    assert not slower["median_equivalent"]


def test_repeatability():
    found = repeatability([100, 102, 102, 101])
    assert found["pairs"] == 3
    assert found["median_percent"] == pytest.approx(100 / 102)
    assert found["low_percent"] == pytest.approx(np.percentile([2, 0, -100 / 102], 2.5))


def test_the_record_of_onnx_runtime_is_that_of_the_runs(tiny, tmp_path):
    network, images = tiny
    file = export_onnx(network, tmp_path / "network.onnx", image_shape=images.shape[1:])
    opened = timers.OnnxRuntime(file, images, threads=1)
    opened.step()
    runs = timers.run_for(opened, 0)
    assert (runs.start, runs.stop) == (1 + timers.TIMM_WARMUPS, 2 + timers.TIMM_WARMUPS)
    durations_ms = opened.durations_ms()
    assert durations_ms.size == opened.runs
    assert (durations_ms >= 0).all()


def test_a_full_record_is_an_error(tiny, tmp_path):
    network, images = tiny
    opened = timers.OnnxRuntime(
        export_onnx(network, tmp_path / "network.onnx", image_shape=images.shape[1:]), images, threads=1
    )
    opened.step()
    opened.runs = 7
    with pytest.raises(HarnessError, match="1 of 7 runs"):
        opened.durations_ms()
