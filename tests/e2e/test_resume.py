"""Killed with SIGKILL in every stage, the same command ends with the networks and accuracies of an unbroken run."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

# Stage -> the file that shows that it is at work, and how long to let it be from then on.
AT_WORK = {
    "baseline": ("baseline.state", 0.0),
    "prune": ("prune.state", 0.0),
    "finetune": ("finetune.state", 0.0),
    "export": ("finetune.json", 0.3),
    "parity": ("export.json", 0.02),
    "measure": ("parity.json", 0.5),
}


def wait_for(path: Path, process: Any) -> None:
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name} was there:\n{process.communicate()[1]}"
        time.sleep(0.002)


def accuracies(results: Path) -> dict[str, Any]:
    return {variant["name"]: variant["accuracy"] for variant in json.loads(results.read_text())["variants"]}


def test_killed_in_every_stage(
    started: Any, espalier: Any, run_directory: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("run", recipe_file, "--out", out)
    for stage, (sign, seconds) in AT_WORK.items():
        process = started(*command)
        wait_for(out / ".work" / sign, process)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / ".work" / f"{stage}.json").exists(), f"{stage} was over before the kill: make it longer"
    done = espalier(*command)
    assert done.returncode == 0, done.stderr
    assert "stage finetune was finished before" in done.stderr

    for network in ("baseline", "pruned"):
        for file in ("model.safetensors", "architecture.json"):
            assert (out / network / file).read_bytes() == (run_directory / network / file).read_bytes()
    for artefact in ("dense.fp32.onnx", "pruned.fp32.onnx", "dense.int8.cpu.onnx", "pruned.int8.cpu.onnx"):
        assert (out / "artifacts" / artefact).read_bytes() == (run_directory / "artifacts" / artefact).read_bytes()
    assert (out / "pruning.json").read_bytes() == (run_directory / "pruning.json").read_bytes()
    assert accuracies(out / "results.json") == accuracies(run_directory / "results.json")
    # Nothing half-written is left over from the kills.
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in run_directory.iterdir())
    assert not list(out.rglob(".*"))


def test_a_second_process_is_kept_out_and_an_interruption_tells_how_to_go_on(
    started: Any, espalier: Any, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = started("run", recipe_file, "--set", "baseline.epochs=1000", "--out", out)
    wait_for(out / ".work" / "baseline.state", first)

    second = espalier("run", recipe_file, "--set", "baseline.epochs=1000", "--out", out)
    assert second.returncode == 2
    assert second.stderr == (
        f"error: Another process is running in {out}: wait for it, or choose another directory with --out.\n"
    )

    first.send_signal(signal.SIGINT)
    stderr = first.communicate()[1]
    assert first.returncode == 130
    assert stderr.endswith("interrupted: the same command goes on where it stopped.\n")
    assert "Traceback" not in stderr


@pytest.mark.parametrize("change", ["baseline.learning_rate=0.04", "prune.budget.macs=0.4", "seed=4"])
def test_a_directory_of_another_recipe_is_left_alone(
    change: str, invoke: Any, run_directory: Path, recipe_file: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")}
    refused = invoke("run", recipe_file, "--set", change, "--out", run_directory)
    key, value = change.split("=")
    assert refused.exit_code == 2
    assert f"holds a run of another recipe: {key} is {value} and was " in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in run_directory.rglob("*")} == before
