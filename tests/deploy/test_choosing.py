"""Which file of a run is served."""

from pathlib import Path

import pytest
from made_runs import MadeRun

from compress.errors import InputError
from deploy.choosing import choose_artefact, describing_onnx


@pytest.fixture
def run(tmp_path: Path) -> MadeRun:
    return MadeRun(tmp_path / "run")


def test_untimed_files_of_the_pruned_network_the_widest_first(run: MadeRun) -> None:
    run.add_onnx("dense.fp32.onnx", of="baseline")
    run.add_onnx("pruned.int8.cpu.onnx", precision="int8", target="cpu")
    run.add_onnx("pruned.fp32.onnx")
    run.add_onnx("pruned.fp16.onnx", precision="fp16")
    choice = choose_artefact(run.root)
    assert choice.path == run.artifacts / "pruned.fp32.onnx"
    assert choice.device is None
    assert "none of them timed" in choice.reason


def test_the_fastest_at_its_best_batch_size(run: MadeRun) -> None:
    run.time(run.add_onnx("dense.fp32.onnx", of="baseline"), {1: 9000.0})
    run.time(run.add_onnx("pruned.fp32.onnx"), {1: 300.0, 8: 310.0})
    run.time(run.add_onnx("pruned.int8.cpu.onnx", precision="int8", target="cpu"), {1: 200.0, 8: 900.0})
    choice = choose_artefact(run.root)
    assert choice.entry.file == "pruned.int8.cpu.onnx"
    assert choice.device == "cpu"


def test_each_device_has_its_own_fastest(run: MadeRun) -> None:
    wide = run.add_onnx("pruned.fp32.onnx")
    run.time(wide, {8: 100.0})
    run.time(run.add_onnx("pruned.int8.gpu.onnx", precision="int8", target="gpu"), {8: 700.0}, device="cuda")
    run.time(run.add_onnx("pruned.fp16.onnx", precision="fp16"), {8: 90.0})
    assert choose_artefact(run.root).entry.file == "pruned.int8.gpu.onnx"
    assert choose_artefact(run.root, device="cuda").entry.file == "pruned.int8.gpu.onnx"
    assert choose_artefact(run.root, device="cpu").entry.file == "pruned.fp32.onnx"


def test_the_tensorrt_provider_says_nothing_of_the_file(run: MadeRun) -> None:
    run.time(run.add_onnx("pruned.fp16.onnx", precision="fp16"), {8: 90.0}, device="cuda")
    entry = run.add_onnx("pruned.fp32.onnx")
    run.time(entry, {8: 900.0}, device="cuda", provider="TensorrtExecutionProvider")
    assert choose_artefact(run.root).entry.file == "pruned.fp16.onnx"


def test_an_engine_comes_before_faster_onnx_files_and_never_on_the_cpu(run: MadeRun) -> None:
    half = run.add_onnx("pruned.fp16.onnx", precision="fp16")
    run.time(half, {8: 9000.0})
    run.add_plan(half)
    assert choose_artefact(run.root).entry.file == "pruned.fp16.plan"
    assert choose_artefact(run.root, device="cuda").entry.file == "pruned.fp16.plan"
    assert choose_artefact(run.root, device="cuda", kind="onnx").entry.file == "pruned.fp16.onnx"
    assert choose_artefact(run.root, device="cpu").entry.file == "pruned.fp16.onnx"


def test_of_several_engines_the_fastest(run: MadeRun) -> None:
    engines = [run.add_plan(run.add_onnx(f"pruned.{name}.onnx", precision=name)) for name in ("fp16", "fp32", "bf16")]
    for engine, throughput in zip(engines, (10.0, 30.0, 20.0), strict=True):
        run.time(engine, {8: throughput}, device="cuda:0")
    choice = choose_artefact(run.root)
    assert choice.entry.file == "pruned.fp32.plan"
    assert choice.device == "cuda"


def test_a_changed_file_is_refused_and_not_passed_over(run: MadeRun) -> None:
    half = run.add_onnx("pruned.fp16.onnx", precision="fp16")
    run.add_plan(half)
    (run.artifacts / "pruned.fp16.plan").write_bytes(b"Engine of " + half.sha256.encode())
    with pytest.raises(InputError, match=r"pruned\.fp16\.plan is not the file that the manifest records"):
        choose_artefact(run.root)


def test_what_is_asked_for_is_taken(run: MadeRun) -> None:
    run.add_onnx("dense.fp32.onnx", of="baseline")
    run.add_onnx("pruned.fp32.onnx")
    assert choose_artefact(run.root, artefact="dense.fp32.onnx").reason == "it was asked for"
    with pytest.raises(InputError, match=r"no artefact '\.\./x\.onnx' in .*dense\.fp32\.onnx, pruned\.fp32\.onnx"):
        choose_artefact(run.root, artefact="../x.onnx")


def test_nothing_fits(run: MadeRun, tmp_path: Path) -> None:
    run.add_onnx("pruned.int8.gpu.onnx", precision="int8", target="gpu")
    with pytest.raises(InputError, match=r"No artefact of the pruned network runs on cpu: .*pruned\.int8\.gpu\.onnx"):
        choose_artefact(run.root, device="cpu")
    with pytest.raises(InputError, match="is no run directory with artefacts"):
        choose_artefact(tmp_path)


def test_an_engine_is_described_by_the_file_it_was_built_from(run: MadeRun) -> None:
    run.add_onnx("pruned.fp32.onnx")
    half = run.add_onnx("renamed.onnx", precision="fp16")
    plan = run.artifacts / run.add_plan(half).file
    assert describing_onnx(plan) == run.artifacts / "renamed.onnx"
    assert describing_onnx(run.artifacts / "pruned.fp32.onnx") == run.artifacts / "pruned.fp32.onnx"
    (run.artifacts / "renamed.onnx").write_bytes(b"another")
    with pytest.raises(InputError, match=r"An engine does not hold class names .* build the engine again"):
        describing_onnx(plan)
