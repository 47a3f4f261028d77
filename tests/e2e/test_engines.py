"""The commands on TensorRT engines, under strict fakes of both majors: the whole run, and every bad input."""

import csv
import errno
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deploy import (
    bench_targets,
    benching,  # noqa: F401  imported before anything is replaced, as it takes names from deploy.runtimes
    manifest,
    pipeline,
    runtimes,
    serving,
)
from deploy.serving import Serving
from tests.e2e.options import QUICKLY
from tests.fakes.fixtures import LISTINGS, install
from tests.fakes.tensorrt import build_fake, faults


@pytest.fixture(autouse=True)
def _gpu(tensorrt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sessions_here: None) -> None:
    """A machine with the fake's GPU: only PyTorch's own look for one is left out. Its user has built nothing yet."""
    for module in (runtimes, bench_targets):
        monkeypatch.setattr(module, "check_device", lambda _: None)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def artifacts(run_directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run_directory / "artifacts", tmp_path / "artifacts")


@pytest.fixture
def plan(invoke: Any, artifacts: Path) -> Path:
    built = invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", "1:4:8")
    assert built.exit_code == 0, built.stderr
    return artifacts / "pruned.fp32.plan"


def sentence(result: Any, code: int = 2) -> str:
    """The one error sentence of a command that failed."""
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


def test_a_whole_run_uses_tensorrt(
    invoke: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensorrt: ModuleType
) -> None:
    reason = "a CUDA GPU and TensorRT are present"
    monkeypatch.setattr(serving, "choose", lambda: Serving(runtime="tensorrt", device="cuda", reason=reason))
    out = tmp_path / "run"
    result = invoke(
        *("run", recipe_file, "--out", out, "--set", "export.precision=[fp32, fp16, bf16, int8, fp8]"),
        *("--set", "measure.batch_sizes=[1, 4]", "--set", "measure.rounds=2"),
    )
    assert result.exit_code == 0, result.stderr
    assert f"runtime: TensorRT on the GPU, because {reason}" in result.stderr
    assert f"tensorrt {tensorrt.__version__} · cuda:0" in result.stdout

    listed = manifest.verify(out / "artifacts")
    stems = [f"{variant}.{kind}" for variant in ("dense", "pruned") for kind in ("fp32", "fp16", "bf16")]
    stems += [f"{variant}.{kind}.gpu" for variant in ("dense", "pruned") for kind in ("int8", "fp8")]
    for stem in stems:
        built, source = listed.entry(f"{stem}.plan"), listed.entry(f"{stem}.onnx")
        assert built is not None
        assert source is not None
        assert built.source_sha256 == source.sha256
        assert built.engine is not None
        assert built.engine.tensorrt_version == tensorrt.__version__
        assert built.engine.profiles["images"].maximum[0] == 4
        assert built.engine.settings["tf32"] is False

    with (out / "results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert {row["runtime"] for row in rows} == {"tensorrt"}
    assert {row["variant"] for row in rows} == {
        *("dense", "pruned"),
        *(f"{variant} {kind}" for variant in ("dense", "pruned") for kind in ("fp16", "bf16", "int8", "fp8")),
    }
    results = json.loads((out / "results.json").read_text())
    assert results["provenance"]["runtime"].startswith("TensorRT on the GPU")
    proof = results["variants"][0]["runtime"]["proof"]
    assert (proof["gpu"], proof["cuda_graph"]) == ("NVIDIA H200", "captured")

    served = invoke("triton", out, "--name", "tiny", "--max-batch", "4")
    assert served.exit_code == 0, served.stderr
    assert 'platform: "tensorrt_plan"' in (out / "triton" / "tiny" / "config.pbtxt").read_text()


def test_a_run_goes_on_with_the_runtime_that_its_files_were_written_for(
    invoke: Any, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the export on a machine without TensorRT, it does not switch when there is one."""
    changed = dict(pipeline.STAGES)
    monkeypatch.setattr(pipeline, "STAGES", changed | {"engine": lambda _: pytest.fail("stop here")})
    with pytest.raises(pytest.fail.Exception):
        raise invoke("run", recipe_file, "--out", tmp_path / "run").exception
    monkeypatch.setattr(pipeline, "STAGES", changed)
    monkeypatch.setattr(serving, "choose", lambda: pytest.fail("it was chosen before"))
    result = invoke("run", recipe_file, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "runtime: ONNX Runtime on the CPU" in result.stderr


def test_engine_and_bench(invoke: Any, plan: Path) -> None:
    timed = invoke("bench", plan, "--device", "cuda", "--batch", "2", *QUICKLY, "--json")
    assert timed.exit_code == 0, timed.stderr
    (variant,) = json.loads(timed.stdout)["variants"]
    assert variant["runtime"]["proof"]["cuda_graph"] == "captured"
    shown = invoke("inspect", plan)
    assert shown.exit_code == 0
    for expected in ("NVIDIA H200, compute capability 9.0", "images: 1x1x32x32 to 8x1x32x32, fastest at 4x1x32x32"):
        assert expected in shown.stdout


class TestBadInput:
    def test_int8_made_for_the_cpu(self, invoke: Any, artifacts: Path) -> None:
        said = sentence(invoke("engine", artifacts / "pruned.int8.cpu.onnx", "--batch", "1:4:8"))
        assert "unsigned" in said
        assert "--target gpu" in said
        assert not list(artifacts.glob("*.plan"))

    @pytest.mark.parametrize("batch", ["8:4:1", "4", "0:1:2", "a:b:c"])
    def test_batch_range(self, invoke: Any, artifacts: Path, batch: str) -> None:
        assert "1:8:32" in sentence(invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", batch))

    @pytest.mark.parametrize("option", [("--workspace", "lots"), ("--hardware-compatible", "all")])
    def test_options(self, invoke: Any, artifacts: Path, option: tuple[str, str]) -> None:
        said = sentence(invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", "1:4:8", *option))
        assert option[0] in said

    def test_batch_outside_the_profile(self, invoke: Any, plan: Path) -> None:
        said = sentence(invoke("bench", plan, "--device", "cuda", "--batch", "9"))
        assert "built for batches from 1 to 8" in said
        assert "--batch 1:4:9" in said

    def test_a_plan_on_the_cpu(self, invoke: Any, plan: Path) -> None:
        assert "choose device cuda" in sentence(invoke("bench", plan))

    def test_a_changed_byte(self, invoke: Any, plan: Path) -> None:
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
        assert "is not the file that the manifest records" in sentence(invoke("bench", plan, "--device", "cuda"))
        assert "is not the file that the manifest records" in sentence(invoke("inspect", plan))

    def test_a_plan_that_somebody_else_built(
        self, invoke: Any, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
        command = ("bench", plan, "--device", "cuda", *QUICKLY)
        assert "was not built by you on this machine" in sentence(invoke(*command))
        assert invoke(*command, "--trust-manifest", plan.parent / "manifest.json").exit_code == 0

    def test_another_gpu(self, invoke: Any, plan: Path, tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        listing = next(path for name, path in LISTINGS.items() if tensorrt.__version__.startswith(name))
        install(monkeypatch, build_fake(listing, gpu="NVIDIA L4", compute_capability=(8, 9)))
        said = sentence(invoke("bench", plan, "--device", "cuda"))
        assert "built for the NVIDIA H200" in said
        assert "NVIDIA L4" in said

    def test_another_version(self, invoke: Any, plan: Path, tensorrt: ModuleType, monkeypatch: Any) -> None:
        other = next(path for name, path in LISTINGS.items() if not tensorrt.__version__.startswith(name))
        install(monkeypatch, build_fake(other))
        said = sentence(invoke("bench", plan, "--device", "cuda"))
        assert f"built with TensorRT {tensorrt.__version__} and needs exactly that version" in said

    def test_no_tensorrt(self, invoke: Any, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        said = sentence(invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", "1:4:8"))
        assert "pip install 'espalier[tensorrt]'" in said

    def test_an_old_operator_set(self, invoke: Any, artifacts: Path) -> None:
        import onnx

        model = onnx.load(artifacts / "pruned.fp32.onnx")
        model.opset_import[0].version = 99
        path = artifacts / "new.onnx"
        path.write_bytes(model.SerializeToString())
        assert "cannot build" in sentence(invoke("engine", path, "--batch", "1:4:8"))
        assert not path.with_suffix(".plan").exists()

    def test_a_full_disk(self, invoke: Any, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = Path.write_bytes

        def full(path: Path, content: bytes) -> int:
            if ".plan" in path.name:
                write(path, content[:100])
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        before = sorted(artifacts.iterdir())
        said = sentence(invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", "1:4:8"), code=1)
        assert "No space left on device; free some space" in said
        assert sorted(artifacts.iterdir()) == before

    def test_out_of_memory(self, invoke: Any, artifacts: Path, tensorrt: ModuleType) -> None:
        faults(tensorrt).out_of_memory_in_build = True
        said = sentence(invoke("engine", artifacts / "pruned.fp32.onnx", "--batch", "1:4:8"), code=1)
        assert "ran out of GPU memory" in said
        assert not list(artifacts.glob("*.plan"))
