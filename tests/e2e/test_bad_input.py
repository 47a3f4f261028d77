"""Bad input: exit code 2, one clear sentence that names the key or the file, no traceback, and nothing lost."""

import errno
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from compress import checkpoint


def sentence(result: Result) -> str:
    """The one sentence on stderr, after checking that it is one."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.endswith((".\n", "?\n"))
    return result.stderr.removeprefix("error: ").strip()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("prune.budgit.macs=0.5", "prune.budgit: unknown key; did you mean prune.budget?"),
        ("prune.budget.macs=0", "prune.budget.macs is 0, but must be above 0"),
        ("prune.budget.macs=1.5", "prune.budget.macs is 1.5, but must be at most 1"),
        ("prune.budget.macs=-0.5", "prune.budget.macs is -0.5, but must be above 0"),
        ("prune.importance=tailor", "'tailor'"),
        ("prune.importance=taylor:combine=most", "combine is 'most', but must be one of joint, mean, max, shared-gate"),
        ("prune.importance=magnitude:power=2", "magnitude has no option 'power'"),
        ("prune.ignore=[conv9]", "conv9"),
        ("model.factory=torchvision:resnet51", "resnet51"),
        ("model.factory=espalier:lenet4", "espalier has no model 'lenet4': did you mean 'lenet3'."),
        ("model.factory=nowhere.at_all:net", "Cannot import nowhere.at_all"),
        ("model.factory=compress.models:no_such_net", "has no 'no_such_net'"),
        ("model.kwargs.num_classes=7", "num_classes: 10"),
        ("model.kwargs.depth=3", "depth"),
        ("model.weights=/nowhere/weights.safetensors", "/nowhere/weights.safetensors"),
        ("data.source=imagefolder:/nowhere", "/nowhere"),
        ("data.source=digitz", "digits"),
        ("parity.samples=1000", "The test split of digits has 360 images, but 1000 are needed"),
        ("finetune.precision=fp16", "fp16"),
    ],
)
def test_a_recipe_that_cannot_work(invoke: Any, change: str, expected: str, recipe_file: Path, out: Path) -> None:
    result = invoke("run", recipe_file, "--set", change, "--out", out)
    assert expected in sentence(result)
    assert not out.exists()  # said before anything was begun


def test_a_criterion_that_cannot_score_the_network_names_the_layers(invoke: Any, recipe_file: Path, out: Path) -> None:
    changes = ("--set", "model.factory=espalier:lenet3", "--set", "prune.importance=bn-scale")
    said = sentence(invoke("run", recipe_file, *changes, "--out", out))
    assert "bn-scale cannot score 4 of 4 channel groups (conv1: no normalisation layer follows conv1; conv2" in said
    assert not out.exists()


def test_a_missing_recipe(invoke: Any, out: Path) -> None:
    assert "The recipe /nowhere.yaml does not exist" in sentence(invoke("run", "/nowhere.yaml", "--out", out))


def test_broken_yaml_names_the_line(invoke: Any, tmp_path: Path, out: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("version: 1\nname: [tiny\nseed: 3\n")
    assert f"{broken}, line 3" in sentence(invoke("run", broken, "--out", out))


def test_an_unreadable_image_is_named(invoke: Any, recipe_file: Path, tmp_path: Path, out: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(4):
                Image.fromarray(pixels).save(tmp_path / split / label / f"{index}.png")
    bad = tmp_path / "train" / "dog" / "2.png"
    bad.write_bytes(b"no image")
    result = invoke("run", recipe_file, "--set", f"data.source=imagefolder:{tmp_path}", "--out", out)
    assert f"Cannot read the image {bad}" in sentence(result)
    assert not out.exists()


@pytest.mark.parametrize("place", ["file/run", "/proc/espalier"])
def test_an_output_directory_that_cannot_be_written(invoke: Any, place: str, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / place
    assert f"Cannot create the directory {out}" in sentence(invoke("run", recipe_file, "--out", out))
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_directory_with_other_things_in_it(invoke: Any, recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("keep me")
    assert "it is no run directory" in sentence(invoke("run", recipe_file, "--out", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("file", [checkpoint.WEIGHTS, checkpoint.ARCHITECTURE])
@pytest.mark.parametrize("verb", ["inspect", "export"])
def test_a_checkpoint_with_a_changed_byte(
    invoke: Any, file: str, verb: str, run_directory: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run_directory / "pruned", tmp_path / "copy")
    content = bytearray((copy / file).read_bytes())
    position = content.index(b"taylor" if b"taylor" in content else b"0", len(content) // 2)
    content[position] ^= 1
    (copy / file).write_bytes(content)
    result = invoke(verb, copy)
    assert file in sentence(result)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("verb", ["inspect", "bench"])
def test_a_truncated_onnx_file(invoke: Any, share: float, verb: str, run_directory: Path, tmp_path: Path) -> None:
    whole = (run_directory / "artifacts" / "pruned.fp32.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(share * len(whole))])
    assert f"{cut} is not a readable ONNX file" in sentence(invoke(verb, cut))


def test_a_changed_artefact_is_noticed(invoke: Any, run_directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_directory / "artifacts", tmp_path / "artifacts")
    artefact = copy / "pruned.fp32.onnx"
    content = bytearray(artefact.read_bytes())
    content[len(content) // 2] ^= 1
    artefact.write_bytes(content)
    assert f"{artefact} is not the file that the manifest records" in sentence(invoke("inspect", artefact))


@pytest.mark.parametrize("path", ["/nowhere", "/etc/hostname", "/etc"])
def test_nothing_to_inspect(invoke: Any, path: str) -> None:
    assert path in sentence(invoke("inspect", path))


def test_a_run_without_results_cannot_be_reported(invoke: Any, tmp_path: Path) -> None:
    assert str(tmp_path / "results.json") in sentence(invoke("report", tmp_path))


def test_the_traceback_is_there_for_who_asks(invoke: Any, recipe_file: Path, out: Path) -> None:
    result = invoke("run", recipe_file, "--set", "prune.budgit=1", "--out", out, "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "prune.budgit: unknown key" in result.stderr


@pytest.mark.parametrize(
    "arguments", [("run", "--no-such-option"), ("nonsense",), ("bench",), ("bench", "a.onnx", "--batch", "0")]
)
def test_usage_errors(invoke: Any, arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_the_exit_code_of_the_process(espalier: Any, recipe_file: Path, out: Path) -> None:
    failed = espalier("run", recipe_file, "--set", "model.kwargs.num_classes=7", "--out", out)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runtime", "openvino"), "There is no runtime 'openvino'"),
        (("--runtime", "pytorch:compile=true"), "executes none of the artefacts given"),
        (("--runtime", "onnxruntime", "--runtime", "onnxruntime:provider=cpu"), "are for the same files: give one"),
        (("--runtime", "onnxruntime:provider=npu"), "npu"),
        (("--batch", "1,x"), "takes positive whole numbers"),
        (("--batch", "0"), "takes positive whole numbers"),
        (("--scenario", "Sometimes"), "There is no scenario 'Sometimes'; choose from SingleStream"),
        (("--scenario", "Server"), "give --limit"),
        (("--scenario", "SingleStream", "--limit", "5"), "--limit is for the scenario Server"),
        (("--scenario", "SingleStream", "--batch", "4"), "--batch 4 belongs to no scenario asked for"),
        (("--streams", "-1"), "--streams"),
        (("--scenario", "Server", "--limit", "0"), "--limit is 0: give a positive number"),
        (("--scenario", "Server", "--limit", "nan"), "--limit is nan: give a positive number"),
        (("--time", "0"), "give a positive number of seconds"),
        (("--shape", "images"), "has the form NAME=3,224,224"),
        (("--shape", "pixels=1,32,32"), "--shape names pixels"),
        (("--shape", "images=1,16,16"), "make them fit"),
        (("--data", "cifar10:/nowhere"), "/nowhere"),
        (("--trust-manifest", "nowhere"), "no .plan file is given"),
        (("--threads", "100000"), "at most 1024"),
        (("--batch", "100000000", "--seconds", "0"), "do not fit into memory"),
        (("--device", "cuda"), "PyTorch finds no CUDA GPU"),
    ],
)
def test_bench_options(invoke: Any, options: tuple[str, ...], words: str, run_directory: Path) -> None:
    assert words in sentence(invoke("bench", run_directory / "artifacts" / "pruned.fp32.onnx", *options))


@pytest.mark.parametrize("device", ["cuda", "no such device"])
def test_bench_of_a_checkpoint_on_a_device_that_is_not_there(invoke: Any, device: str, run_directory: Path) -> None:
    assert device in sentence(invoke("bench", run_directory / "pruned", "--device", device))


@pytest.mark.parametrize("option", ["--max-batch", "--instances"])
def test_impossible_sizes_for_triton(invoke: Any, option: str, run_directory: Path, tmp_path: Path) -> None:
    sizes = {"--max-batch": "4", "--instances": "1", option: "99999999999"}
    command = ("triton", run_directory, "--name", "m", "--out", tmp_path / "repository")
    said = sentence(invoke(*command, *(part for pair in sizes.items() for part in pair)))
    assert "99999999999" in said
    assert not (tmp_path / "repository").exists()


def test_no_file_to_build_an_engine_from(invoke: Any, tmp_path: Path) -> None:
    for path in ("", tmp_path, tmp_path / "missing.onnx"):
        assert "does not exist or is not a file" in sentence(invoke("engine", path, "--batch", "1:2:3"))


def test_int8_made_for_gpus_is_not_timed_on_the_cpu(invoke: Any, run_directory: Path, tmp_path: Path) -> None:
    command = ("export", run_directory / "pruned", "--precision", "int8", "--target", "gpu", "--out", tmp_path)
    assert invoke(*command, "--calibration", "digits", "--samples", "16").exit_code == 0
    said = sentence(invoke("bench", tmp_path / "pruned.int8.gpu.onnx"))
    assert "--target cpu" in said


class TestExport:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--precision", "fp64"), "--precision names 'fp64'"),
            (("--precision", "int8"), "give --calibration DATA"),
            (("--precision", "int8", "--calibration", "glyphs"), "have shape (3, 32, 32)"),
            (("--precision", "int8", "--calibration", "digits", "--method", "guess"), "--method is 'guess'"),
            (("--precision", "int8", "--calibration", "digits", "--target", "tpu"), "--target names 'tpu'"),
            (("--precision", "fp8", "--calibration", "digits", "--target", "cpu"), "fp8 files are made for gpu alone"),
            (("--precision", "int8", "--calibration", "digits", "--exclude", "conv9"), "conv9"),
            (("--precision", "int8", "--calibration", "nonsense"), "nonsense"),
            (("--precision", "int8", "--calibration", "digits", "--max-drop", "inf"), "--max-drop is inf"),
            (("--precision", "fp32", "--max-drop", "1"), "--max-drop is for int8 and fp8"),
            (("--precision", "fp32", "--exclude", "conv1"), "--precision names nothing else"),
        ],
    )
    def test_options(
        self, invoke: Any, options: tuple[str, ...], words: str, run_directory: Path, tmp_path: Path
    ) -> None:
        result = invoke("export", run_directory / "pruned", "--out", tmp_path / "new", *options)
        assert words in sentence(result)
        assert not list(tmp_path.rglob("*.onnx"))

    def test_a_failure_leaves_what_was_there(self, invoke: Any, run_directory: Path, tmp_path: Path) -> None:
        """Another network under the same name: its fp32 file must not stand beside the old manifest."""
        folder = tmp_path / "artifacts"
        other = shutil.copytree(run_directory / "baseline", tmp_path / "other" / "pruned")
        assert invoke("export", run_directory / "pruned", "--out", folder).exit_code == 0
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        result = invoke(
            *("export", other, "--out", folder, "--precision", "fp32,int8", "--calibration", "digits"),
            *("--samples", "8", "--exclude", "*"),
        )
        said = sentence(result)
        assert "Nothing of pruned.fp32.onnx can be quantised" in said
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def test_calibration_data_of_a_wrong_type_and_none_at_all(
        self, invoke: Any, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "owndata.py").write_text(OWN_DATA)
        monkeypatch.syspath_prepend(str(tmp_path))
        for function, words in (("bytes_", "give torch.uint8"), ("nothing", "give no batch of training images")):
            result = invoke(
                *("export", run_directory / "pruned", "--out", tmp_path / "new", "--precision", "int8"),
                *("--calibration", f"owndata:{function}", "--trust", "owndata"),
            )
            assert words in sentence(result)

    def test_a_missing_extra(
        self, invoke: Any, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "modelopt.onnx.autocast", None)
        result = invoke("export", run_directory / "pruned", "--out", tmp_path, "--precision", "fp16")
        assert "pip install 'espalier[quant]'" in sentence(result)
        monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
        result = invoke("triton", run_directory, "--name", "m", "--max-batch", "4", "--out", tmp_path)
        assert "pip install 'espalier[triton]'" in sentence(result)

    def test_a_full_disk(
        self, invoke: Any, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import onnx

        def full(_: object, path: str, **__: object) -> None:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        command = ("export", run_directory / "pruned", "--out", tmp_path, "--precision", "fp32,int8")
        assert invoke(*command, "--target", "cpu", "--calibration", "digits").exit_code == 0
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        monkeypatch.setattr(onnx, "save_model", full)
        result = invoke(*command, "--target", "cpu", "--calibration", "digits", "--exclude", "fc3")
        assert result.exit_code == 1
        assert "No space left on device; free some space" in result.stderr.splitlines()[-1]
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


OWN_DATA = """\
import torch
from torch.utils.data import DataLoader, TensorDataset


def _pair(images):
    loader = DataLoader(TensorDataset(images, torch.arange(len(images)) % 10), batch_size=8)
    return loader


def bytes_():
    plain = torch.zeros(16, 1, 32, 32)
    return _pair(plain.to(torch.uint8)), _pair(plain)


def nothing():
    return _pair(torch.zeros(0, 1, 32, 32)), _pair(torch.zeros(16, 1, 32, 32))
"""
