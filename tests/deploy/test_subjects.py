import subprocess
import sys
import threading
from pathlib import Path
from platform import python_version

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from benchmarks.harness.subject import Lane, Subject
from compress import checkpoint
from compress.errors import InputError, WorkError
from compress.models import build
from deploy.pool import write_pool
from deploy.runtimes import open_runtime
from deploy.subjects import open_artefact, open_callable, subject_of
from tests.deploy.two_pixels import CASTS, NETWORK, images

POOL = images((1, 0), (0, 1), (1, 2), (2, 1), (5, 5))["images"]
LOGITS = [[1, 2], [3, 4], [7, 10], [5, 8]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "network.onnx"
    onnx.save(onnx.parser.parse_model(NETWORK), path)
    return path


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    write_pool(tmp_path / "pool", [POOL])
    return tmp_path / "pool"


def answers(subject: Subject) -> list[list]:
    lane = subject.lane()
    found = []
    for index in range(lane.size):
        lane.query(index)
        found.append(lane.outputs()["logits"].tolist())
    return found


@pytest.mark.parametrize("network", [NETWORK, CASTS])
def test_onnx_file(path: Path, pool: Path, network: str) -> None:
    onnx.save(onnx.parser.parse_model(network), path)
    subject = open_artefact(artefact=str(path), pool=str(pool), batch_size=2, threads=1)
    assert answers(subject) == [LOGITS[:2], LOGITS[2:]]
    found = subject.description()
    assert (found["runtime"], found["device"], found["threads"]) == ("onnxruntime", "cpu", 1)
    subject.close()
    with pytest.raises(InputError, match="closed"):
        subject.lane()


def test_the_pool_is_read_with_the_first_lane_and_shared(path: Path, pool: Path, tmp_path: Path) -> None:
    subject = open_artefact(artefact=str(path), pool=str(tmp_path / "absent"), batch_size=1, threads=1)
    with pytest.raises(InputError, match="Cannot read the pool"):
        subject.lane()
    subject = open_artefact(artefact=str(path), pool=str(pool), batch_size=1, threads=1)
    first = subject.lane()
    for file in pool.iterdir():
        file.unlink()
    second = subject.lane()
    assert first.size == second.size == 5
    assert first._inputs is not second._inputs
    assert first._inputs[0][1] is second._inputs[0][1]


def test_pool_that_does_not_fit(path: Path, pool: Path) -> None:
    subject = open_artefact(artefact=str(path), pool=str(pool), batch_size=6, threads=1)
    with pytest.raises(InputError, match="A batch of 6 was asked for"):
        subject.lane()


def test_checkpoint_of_images_that_are_not_square(tmp_path: Path) -> None:
    model = build("espalier:resnet20", num_classes=3).eval()
    place = tmp_path / "checkpoint"
    factory = {"factory": "espalier:resnet20", "kwargs": {"num_classes": 3}}
    checkpoint.save(model, place, **factory, image_shape=(3, 32, 64))
    pixels = np.random.default_rng(0).standard_normal((4, 3, 32, 64), np.float32)
    write_pool(tmp_path / "pool", [pixels])
    subject = open_artefact(
        artefact=str(place), pool=str(tmp_path / "pool"), batch_size=2, threads=1, runtime="pytorch:channels_last=true"
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(np.concatenate(answers(subject)), expected, rtol=1e-4, atol=1e-5)
    found = subject.description()
    assert (found["runtime"], found["channels_last"]) == ("pytorch", True)
    subject.close()


def test_what_cannot_be_opened(path: Path, pool: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"artefact": str(tmp_path / "absent.onnx")}, "does not exist"),
        ({"runtime": "pytorch"}, "executes modules"),
        ({"runtime": "onnxruntime", "artefact": str(pool)}, r"pool.*architecture\.json"),
        ({"device": "gpu"}, 'no device "gpu"'),
        ({"trusted_manifest": "manifest.json"}, "only TensorRT engines"),
    ):
        with pytest.raises(InputError, match=message):
            open_artefact(**{"artefact": str(path), "pool": str(pool), "batch_size": 1, **given})


def test_runtime_that_is_open_already(path: Path) -> None:
    runtime = open_runtime(path, threads=1)
    subject = subject_of(runtime, [images((1, 0)), images((0, 1))])
    assert answers(subject) == [[[1, 2]], [[3, 4]]]
    assert subject.description() == runtime.description()
    subject.close()
    with pytest.raises(InputError, match="closed"):
        runtime.run(images((1, 0)))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_onnx_file_on_the_cpu_goes_without_pytorch(path: Path, pool: Path, batch_size: int) -> None:
    script = f"""
import sys
import deploy.subjects
subject = deploy.subjects.open_artefact(
    artefact={str(path)!r}, pool={str(pool)!r}, batch_size={batch_size}, device="cpu", threads=1
)
lanes = [subject.lane(), subject.lane()]
for lane in lanes:
    for index in range(lane.size):
        lane.query(index)
        lane.stages(index)
assert lanes[0].outputs()["logits"].shape == ({batch_size}, 2)
subject.description()
subject.close()
print(sorted({{"torch", "scipy", "matplotlib", "sklearn", "PIL"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- Python functions ------------------------------------------------------------------------------------------------


MODULE = """
import numpy

CALLS = []
number = 3

def infer(images, scale):
    assert type(images) is numpy.ndarray
    CALLS.append((images[:, 0].tolist(), scale.tolist()))

def fails(*arrays):
    raise KeyError("no such model\\nat all")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module; two inputs of three samples lie in its pool."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "package_of_mine").mkdir()
    (tmp_path / "package_of_mine" / "serving.py").write_text(MODULE)
    (tmp_path / "broken_of_mine.py").write_text("raise RuntimeError('out of luck')")
    write_pool(tmp_path / "pool", [np.arange(6.0).reshape(3, 2), np.array([7, 8, 9])])
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_of_mine") or name.startswith("package_of_mine")]:
        del sys.modules[name]


def opened(mine: Path, target: str, batch_size: int = 1) -> Subject:
    return open_callable(target=target, pool=str(mine / "pool"), batch_size=batch_size, search=str(mine))


def test_function_takes_the_inputs_in_their_order(mine: Path) -> None:
    subject = opened(mine, "package_of_mine.serving:infer", batch_size=2)
    lane = subject.lane()
    calls = sys.modules["package_of_mine.serving"].CALLS
    assert (lane.size, calls) == (1, [])
    lane.query(0)
    assert calls == [([0, 2], [7, 8])]
    assert subject.description() == {
        "runtime": "python",
        "version": python_version(),
        "device": "not known",
        "function": "package_of_mine.serving:infer",
    }
    subject.close()


def test_lanes_of_a_function_share_the_pool(mine: Path) -> None:
    subject = opened(mine, "package_of_mine.serving:infer")
    lanes: list[Lane] = [subject.lane() for _ in range(3)]
    assert lanes[0]._pool is lanes[2]._pool
    threads = [threading.Thread(target=lane.query, args=(index,)) for index, lane in enumerate(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sys.modules["package_of_mine.serving"].CALLS) == [([0], [7]), ([2], [8]), ([4], [9])]
    found = lanes[1].stages(1)
    assert found.issued_ns == found.enqueued_ns < found.done_ns


def test_function_that_fails(mine: Path) -> None:
    lane = opened(mine, "package_of_mine.serving:fails").lane()
    for call in (lane.query, lane.stages):
        with pytest.raises(WorkError, match=r"^KeyError: 'no such model"):
            call(0)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("package_of_mine.serving", r'"package_of_mine\.serving" names no function; write package\.module:function'),
        (":infer", "names no function"),
        ("package_of_mine.serving:", "names no function"),
        ("package_of_mine.absent:infer", "cannot be imported from .*ModuleNotFoundError"),
        ("package_of_mine.serving:absent", "cannot be imported from .*AttributeError"),
        ("broken_of_mine:infer", "cannot be imported from .*RuntimeError: out of luck;"),
        ("package_of_mine.serving:number", "is a int and cannot be called"),
    ],
)
def test_what_is_no_function(mine: Path, target: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(mine, target)
