"""The GPU suite on the CPU: its plan by hand, its flow with made-up measurements, and once for real."""

import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu_suite import __main__ as command
from benchmarks.gpu_suite import engines, timing
from benchmarks.gpu_suite import run as suite
from benchmarks.gpu_suite.deadline import Deadline, ending_workers
from benchmarks.gpu_suite.engines import Files
from benchmarks.gpu_suite.groups import (
    BATCH_SIZES,
    COMPILED,
    TENSORRT,
    TIERS,
    Group,
    Mode,
    Tier,
    groups,
    shares,
)
from benchmarks.gpu_suite.networks import Family, Network, make_network
from benchmarks.gpu_suite.opening_pytorch import open_checkpoint
from benchmarks.gpu_suite.run import Settings, run
from benchmarks.gpu_suite.timing import ROUNDS_S, Timing
from benchmarks.gpu_suite.verification import TestRun, read_report
from benchmarks.harness.conditions import Watch
from benchmarks.harness.errors import HarnessError
from benchmarks.harness.measure import Measurement, Variant, measure
from benchmarks.harness.peaks import Peak
from benchmarks.harness.processes import call
from benchmarks.harness.results import Results, load
from benchmarks.harness.rounds import Plan
from benchmarks.harness.subject import Candidate
from compress.errors import WorkError
from deploy.engine_settings import BatchRange
from deploy.pool import write_pool
from deploy.runtimes import open_runtime

FAMILY = Family("espalier:resnet20", side=32, round_to=(8,))
PYTORCH = Mode("PyTorch: eager", "pytorch", "checkpoint", 0.5)
ONNX = Mode("ONNX Runtime", "onnxruntime", "onnx", 0.5)
TINY = (Tier((ONNX, PYTORCH), ("fp32",)),)
GROUPS = [f"{mode}, fp32, batch {size}" for size in (1, 2) for mode in ("ONNX Runtime", "PyTorch: eager")]


def settings(out: Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "minutes": 0.2,
        "device": "cpu",
        "threads": 1,
        "family": FAMILY,
        "tiers": TINY,
        "batch_sizes": (1, 2),
        "tests": (),
    }
    return Settings(out, **given | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Network]]:
    """Both networks, made without Torch-Pruning and ModelOpt."""
    folder = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patch:
        for library in ("torch_pruning", "modelopt", "modelopt.onnx.autocast"):
            patch.setitem(sys.modules, library, None)
        threads = torch.get_num_threads()
        networks = {
            name: make_network(name=name, family=FAMILY, folder=folder, precisions=("fp16", "fp32"), threads=1)
            for name in FAMILY.names()
        }
        torch.set_num_threads(threads)
    return folder, networks


@pytest.fixture
def quick(made: tuple[Path, dict[str, Network]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks and peaks are there at once."""

    def ready(family: Family, folder: Path, **_: Any) -> tuple[dict[str, Network], dict[str, str]]:
        shutil.copytree(made[0], folder, dirs_exist_ok=True)
        return made[1], {}

    def peak(dtype: str, *, device: str, threads: int) -> Peak:
        return Peak(
            dtype=dtype,
            device=device,
            threads=threads,
            macs_per_s=1e12,
            bytes_per_s=1e11,
            how="made up",
            measured_at=datetime.now(UTC),
        )

    monkeypatch.setattr(suite, "make_networks", ready)
    monkeypatch.setattr(suite, "measured_peak", peak)


def measured_at_once(candidates: Sequence[Candidate], *, baseline: str, **_: Any) -> Measurement:
    """Dense networks take 2 ms for an image, others 1 ms, on a clock of their own."""
    now_ns = 0

    def step(candidate: Candidate) -> Callable[[], None]:
        def take() -> None:
            nonlocal now_ns
            now_ns += candidate.batch_size * (2_000_000 if candidate.name.startswith("dense") else 1_000_000)

        return take

    variants = [Variant(candidate.name, step(candidate), candidate.batch_size) for candidate in candidates]
    plan = Plan(rounds=3, seconds=0, queries=3, time_budget_s=1)
    return measure(variants, baseline=baseline, plan=plan, clock=lambda: now_ns)


def left_out(results: Results) -> dict[str, str]:
    found: Any = results.provenance["left_out"]
    return {item["what"]: item["why"] for item in found}


def timed(results: Results) -> dict[str, list[int]]:
    return {
        f"{variant.name} in {variant.runtime.name}": [cell.batch_size for cell in variant.measurements]
        for variant in results.variants
    }


def test_the_most_important_groups_come_first() -> None:
    order = [str(group) for group in groups(TIERS, BATCH_SIZES)]
    assert order[:7] == [
        "ONNX Runtime: CUDA provider, fp16, batch 8",
        "PyTorch: CUDA graphs, fp16, batch 8",
        "PyTorch: eager, fp16, batch 8",
        "ONNX Runtime: CUDA provider, fp32, batch 8",
        "PyTorch: CUDA graphs, fp32, batch 8",
        "PyTorch: eager, fp32, batch 8",
        "ONNX Runtime: CUDA provider, fp16, batch 1",
    ]
    assert order[18:21] == [f"TensorRT, fp16, batch {size}" for size in (8, 1, 32)]
    assert order[-6:] == [
        f"PyTorch: torch.compile, {kind}, batch {size}" for kind in ("fp16", "fp32") for size in (8, 1, 32)
    ]
    assert len(order) == len(set(order)) == 33


def test_time_goes_to_the_first_that_fit_and_the_rest_is_shared() -> None:
    first, large, third, last = (Group(PYTORCH, "fp32", size) for size in (1, 2, 3, 4))
    least = {first: 10.0, large: 40.0, third: 15.0, last: 20.0}
    # 10 leaves 22: 40 does not fit, 15 does and leaves 7, 20 does not; 7 is shared by two.
    assert shares([first, large, third, last], 32, least.__getitem__) == {first: 13.5, third: 18.5}
    assert shares([large], 39.9, least.__getitem__) == {}
    assert shares([first], -1, least.__getitem__) == {}


def test_what_a_start_takes_is_learnt() -> None:
    found = Timing("cpu", 1, Path(), Watch())
    eager, compiled = Group(PYTORCH, "fp16", 8), Group(COMPILED, "fp16", 8)
    assert found.least_s(eager) == PYTORCH.least_s
    found.learn(eager, 20.0)
    assert found.least_s(Group(PYTORCH, "fp32", 1)) == 20 + ROUNDS_S
    assert found.least_s(compiled) == COMPILED.least_s
    assert [found.plan(eager, seconds).processes for seconds in (30, 79, 80, 1000)] == [1, 1, 2, 3]
    assert found.plan(eager, 30).time_budget_s == 30
    found.learn(Group(TENSORRT, "fp16", 8), 9.0)
    assert found.least_s(Group(TENSORRT, "fp16", 1)) == 9 + ROUNDS_S
    assert found.least_s(Group(TENSORRT, "fp32", 8)) == TENSORRT.least_s  # its engines are still to be built


def test_networks_need_no_optional_library(made: tuple[Path, dict[str, Network]]) -> None:
    folder, networks = made
    dense, half = networks.values()
    assert (dense.name, half.name, half.kind) == ("dense", "half round_to=8", "pruned")
    assert half.macs <= 0.5 * dense.macs
    assert dense.failures == half.failures == {}
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    outputs = {}
    for precision, dtype in (("fp32", np.float32), ("fp16", np.float16)):
        with open_runtime(folder / half.artefacts[precision].path) as runtime:
            outputs[precision] = runtime.run({"images": images.astype(dtype)})["logits"]
    assert outputs["fp16"].dtype == np.float16
    np.testing.assert_allclose(outputs["fp16"], outputs["fp32"], rtol=0.1, atol=0.05)


def test_a_network_that_cannot_be_opened_leaves_the_others(
    made: tuple[Path, dict[str, Network]], tmp_path: Path
) -> None:
    folder, networks = made
    write_pool(tmp_path, [np.zeros((2, 3, 32, 32), np.float32)])
    given: dict[str, Any] = {
        "artefact": str(folder / networks["dense"].artefacts["checkpoint"].path),
        "precision": "fp16",
        "pool": str(tmp_path),
        "batch_size": 2,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "runtime": "pytorch",
    }
    subject = open_checkpoint(**given)
    subject.lane().query(0)
    assert subject.description()["runtime"] == "pytorch"
    subject.close()
    with pytest.raises(HarnessError, match="InputError: pytorch:cuda_graph=true needs a CUDA GPU"):
        open_checkpoint(**given | {"runtime": "pytorch:cuda_graph=true"})
    with pytest.raises(HarnessError, match="InputError: A batch of 3 was asked for"):
        open_checkpoint(**given | {"batch_size": 3}).prepare()


def test_engines_are_built_once(made: tuple[Path, dict[str, Network]], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build(_: Callable[..., Any], arguments: dict[str, Any], *, what: str) -> Any:
        built.append(arguments["plan"])
        if "half" in what:
            raise HarnessError("no memory")
        return SimpleNamespace(sha256="0" * 64, size_bytes=3)

    monkeypatch.setattr(engines, "call", build)
    files = Files(*made, BatchRange(minimum=1, optimum=8, maximum=32))
    for _ in range(2):
        engine = files.artefact("dense", "plan", "fp16")
        assert engine is not None
        assert (engine.path, engine.precision) == ("dense/fp16.plan", "fp16")
        assert files.artefact("half round_to=8", "plan", "fp16") is None
    assert built == [made[0] / "dense/fp16.plan", made[0] / "half-round_to-8/fp16.plan"]
    assert files.failures == {("half round_to=8", "plan", "fp16"): "HarnessError: no memory"}


def test_every_group_is_in_the_document(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure", measured_at_once)
    monkeypatch.setattr(suite, "_write_report", lambda *_: None)
    path = run(settings(tmp_path), "Tiny CPU, 2 cores")
    assert path == tmp_path / "tiny_cpu_2_cores.json"
    results = load(path)
    assert timed(results) == {
        f"{name} fp32 in {runtime}": [1, 2]
        for runtime in ("onnxruntime", "pytorch")
        for name in ("dense", "half round_to=8")
    }
    assert left_out(results) == {}
    half = results.variants[1]
    speedup = half.measurements[0].speedup
    assert speedup is not None
    assert (speedup.baseline, speedup.value) == ("dense fp32", pytest.approx(2))
    assert [roofline.batch_size for roofline in half.rooflines] == [1, 2]
    assert half.rooflines[1].macs == 2 * (half.macs or 0)
    assert path.with_suffix(".csv").read_text().count("\n") == 9
    suite.write_report(path=path)
    assert "half round_to=8" in path.with_suffix(".html").read_text()


def test_a_group_that_fails_does_not_stop_the_others(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sometimes(candidates: Sequence[Candidate], **given: Any) -> Measurement:
        if "precision" in candidates[0].arguments:
            raise HarnessError("the GPU has no memory")
        return measured_at_once(candidates, **given)

    monkeypatch.setattr(timing, "measure", sometimes)
    monkeypatch.setattr(suite, "_write_report", lambda *_: None)
    no_engines = (*TINY, Tier((TENSORRT,), ("fp32",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        results = load(run(settings(tmp_path, tiers=no_engines), "cpu"))
    failures: Any = results.provenance["failures"]
    why = "HarnessError: the GPU has no memory"
    assert failures[0]["what"] == "TensorRT"
    assert "which is not installed" in failures[0]["why"]
    assert failures[1:] == [{"what": "PyTorch: eager, fp32, batch 1", "why": why}]
    assert left_out(results) == {
        "PyTorch: eager, fp32, batch 2": f"as at another batch size: {why}",
    }
    assert [variant.failure for variant in results.variants] == [None, None, f"batch 1: {why}", f"batch 1: {why}"]
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| ONNX Runtime | cpu | timed: cpu, ")
    assert rows[0].endswith(": fp32 at batch 1, 2 |")
    assert rows[1] == f"| PyTorch: eager | cpu | not verified on cpu. Failed: batch 1: {why} |"
    assert rows[2].startswith(
        "| TensorRT | cpu | not verified on cpu. Failed: Building TensorRT engines needs tensorrt"
    )


def test_what_was_measured_before_a_kill_stands(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(candidates: Sequence[Candidate], **given: Any) -> Measurement:
        if candidates[0].batch_size == 2:
            raise KeyboardInterrupt
        return measured_at_once(candidates, **given)

    monkeypatch.setattr(timing, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path), "cpu")
    assert set(map(tuple, timed(load(tmp_path / "cpu.json")).values())) == {(1,)}


def test_groups_end_with_the_time(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group takes 3 of 12 s, of which 1 s is kept for the report: three groups, and 2 s are too few for more."""
    clock = SimpleNamespace(now_s=0.0)
    least = Mode("PyTorch: eager", "pytorch", "checkpoint", 2.5)

    def slow(candidates: Sequence[Candidate], **given: Any) -> Measurement:
        clock.now_s += 3
        return measured_at_once(candidates, **given)

    monkeypatch.setattr(timing, "measure", slow)
    monkeypatch.setattr(suite, "_write_report", lambda *_: None)
    monkeypatch.setattr(suite, "Deadline", lambda seconds: Deadline(seconds, lambda: clock.now_s))
    tiers = (Tier((least,), ("fp32",)),)
    results = load(run(settings(tmp_path, tiers=tiers, batch_sizes=(4, 3, 2, 1)), "cpu"))
    assert timed(results)["dense fp32 in pytorch"] == [2, 3, 4]
    assert left_out(results) == {"PyTorch: eager, fp32, batch 1": "time"}


def test_a_dry_run_in_processes_of_its_own(quick: None, tmp_path: Path) -> None:
    began = time.monotonic()
    path = run(settings(tmp_path, minutes=0.12), "cpu")
    assert time.monotonic() - began < 7.2 + 1
    results = load(path)
    done = {f"{name}, fp32, batch {size}" for name, size in _measured_groups(results)}
    assert done | left_out(results).keys() == set(GROUPS)
    for variant in results.variants:
        for cell in variant.measurements:
            assert cell.latency.median_ms.value > 0
            assert variant.runtime.proof


def _measured_groups(results: Results) -> set[tuple[str, int]]:
    names = {"onnxruntime": "ONNX Runtime", "pytorch": "PyTorch: eager"}
    return {
        (names[variant.runtime.name], cell.batch_size) for variant in results.variants for cell in variant.measurements
    }


def test_without_networks_there_is_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "make_networks", lambda *_, **__: ({}, {"dense": "no memory"}))
    with pytest.raises(WorkError, match="No network could be made: no memory"):
        run(settings(tmp_path), "cpu")


def test_workers_end_with_their_time() -> None:
    with ending_workers(0.0) as ended, pytest.raises(HarnessError, match=r"Waiting died .* SIGKILL"):
        call(signal.pause, {}, what="Waiting")
    assert ended.is_set()
    with ending_workers(1000) as ended:
        assert call(time.monotonic, {}, what="Asking") > 0
    assert not ended.is_set()


def test_pytest_runs_what_is_marked(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "test_marked.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\ndef test_fails(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no engine')\ndef test_skipped(): pass\n"
    )
    (tmp_path / "test_plain.py").write_text("def test_plain(): raise SystemExit(3)\n")
    outcome = TestRun(["."], tmp_path, "gpu").outcome(30)
    assert outcome["complete"]
    assert outcome["exit_code"] == 1
    assert outcome["closing"].startswith("1 failed, 1 passed, 1 skipped, 1 deselected")
    assert [line.partition(" - ")[0] for line in outcome["failed"]] == [
        "ERROR test_broken.py",
        "FAILED test_marked.py::test_fails",
    ]
    assert "no engine" in outcome["skipped"][0]


def test_tests_that_take_too_long_are_ended(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    began = time.monotonic()
    outcome = TestRun(["."], tmp_path, "not gpu").outcome(0.2)
    assert time.monotonic() - began < 10
    assert not outcome["complete"]
    assert outcome["closing"] == "not finished: no test was over"


def test_what_was_seen_of_tests_that_were_ended() -> None:
    lines = [
        "tests/a.py::test_one[x y] PASSED   [ 10%]",
        "tests/a.py::test_two FAILED   [ 20%]",
        "tests/a.py::test_three ",
    ]
    assert read_report(lines) == {
        "closing": "not finished: 1 failed, 1 passed",
        "failed": ["tests/a.py::test_two"],
        "skipped": [],
    }


def test_the_command_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "PyTorch finds no CUDA GPU, and all of this suite is about one: check espalier doctor.\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path), "--minutes", "nan"])
