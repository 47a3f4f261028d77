import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import onnx
import pytest

from compress.errors import InputError
from deploy import manifest
from deploy.runtimes import TensorSpec

INPUTS = (TensorSpec("images", "float32", ("batch", 3, 8, 8)),)
OUTPUTS = (TensorSpec("logits", "float32", ("batch", None)),)


def enter(directory: Path, file: str, content: bytes) -> manifest.Entry:
    (directory / file).write_bytes(content)
    return manifest.add(
        directory,
        file,
        kind="onnx",
        precision="fp32",
        inputs=INPUTS,
        outputs=OUTPUTS,
        checkpoint_digest="ab" * 32,
    )


def enter_many(place: tuple[Path, str]) -> None:
    directory, name = place
    for _ in range(30):
        manifest.add(directory, name, kind="onnx", precision="fp32", inputs=INPUTS, outputs=OUTPUTS)


def test_entry_says_what_the_file_is(tmp_path: Path) -> None:
    entry = enter(tmp_path, "net.fp32.onnx", b"weights")
    assert entry.sha256 == hashlib.sha256(b"weights").hexdigest()
    assert entry.size_bytes == 7
    assert entry.tool_versions["torch"] == version("torch")
    assert entry.tool_versions["onnx"] == onnx.__version__
    assert datetime.fromisoformat(entry.created).utcoffset().total_seconds() == 0
    assert manifest.read(tmp_path).entries == (entry,)
    assert manifest.read(tmp_path).entry("net.fp32.onnx").inputs == INPUTS
    assert manifest.read(tmp_path).entry("other.onnx") is None


def test_entry_of_the_same_file_is_replaced(tmp_path: Path) -> None:
    enter(tmp_path, "a.onnx", b"one")
    second = enter(tmp_path, "b.onnx", b"two")
    newer = enter(tmp_path, "a.onnx", b"three")
    assert manifest.verify(tmp_path).entries == (second, newer)


def test_entries_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).write_bytes(b"weights")
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(enter_many, [(tmp_path, name) for name in ("a", "b", "c", "d")]))
    assert {entry.file for entry in manifest.verify(tmp_path).entries} == {"a", "b", "c", "d"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "manifest.json"]


@pytest.mark.parametrize("position", [0, 500, 999])
def test_one_changed_byte_is_found(tmp_path: Path, position: int) -> None:
    content = bytearray(range(250)) * 4
    enter(tmp_path, "good.onnx", b"untouched")
    enter(tmp_path, "net.onnx", bytes(content))
    manifest.verify(tmp_path)
    content[position] ^= 1
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"net\.onnx is not the file that the manifest records") as caught:
        manifest.verify(tmp_path)
    assert "good.onnx" not in str(caught.value)


def test_cut_off_and_missing_files_are_found(tmp_path: Path) -> None:
    enter(tmp_path, "net.onnx", b"weights")
    (tmp_path / "net.onnx").write_bytes(b"weig")
    with pytest.raises(InputError, match=r"net\.onnx has 4 bytes, but the manifest records 7"):
        manifest.verify(tmp_path)
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(InputError, match=r"Cannot read .*net\.onnx: No such file"):
        manifest.verify(tmp_path)


def test_external_weights_belong_to_the_entry(tmp_path: Path) -> None:
    (tmp_path / "net.onnx.data").write_bytes(b"large")
    entry = enter(tmp_path, "net.onnx", b"graph")
    assert entry.weights.file == "net.onnx.data"
    (tmp_path / "net.onnx.data").write_bytes(b"Large")
    with pytest.raises(InputError, match=r"net\.onnx\.data is not the file"):
        manifest.verify(tmp_path)


def test_adding_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx"):
        manifest.add(tmp_path, "absent.onnx", kind="onnx", precision="fp32", inputs=INPUTS, outputs=OUTPUTS)
    assert not (tmp_path / manifest.FILE_NAME).exists()


def damage(document: dict, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        document = document[int(parent)] if parent.isdigit() else document[parent]
    document[last] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("author", "unknown key"),
        ("entries.0.trusted", True),
        ("entries.0.sha256", "not a digest"),
        ("entries.0.size_bytes", -1),
        ("entries.0.kind", "pickle"),
        ("entries.0.file", "../net.onnx"),
        ("entries.0.file", "/etc/passwd"),
        ("entries.0.file", ".."),
        ("entries.0.inputs.0.layout", "NHWC"),
    ],
)
def test_damaged_manifest_is_refused(tmp_path: Path, key: str, value: object) -> None:
    enter(tmp_path, "net.onnx", b"weights")
    path = tmp_path / manifest.FILE_NAME
    document = json.loads(path.read_text())
    damage(document, key, value)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest of this version") as caught:
        manifest.verify(tmp_path)
    assert key.rsplit(".", 1)[-1] in str(caught.value)


def test_truncated_or_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: No such file"):
        manifest.read(tmp_path)
    enter(tmp_path, "net.onnx", b"weights")
    path = tmp_path / manifest.FILE_NAME
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"manifest\.json is not a manifest"):
        manifest.read(tmp_path)
