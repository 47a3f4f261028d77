"""What a user may name as a target, and which inputs targets have in common."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from compress import checkpoint, models
from compress.errors import InputError
from deploy.bench_targets import Opening, Target, common_inputs, read_shapes, read_targets
from deploy.subjects import open_artefact, open_callable
from deploy.tensor_spec import TensorSpec

CPU = Opening(threads=1)


def relu(path: Path, shape: list[int | str], *, name: str = "x", dtype: int = TensorProto.FLOAT) -> Path:
    value = helper.make_tensor_value_info(name, dtype, shape)
    result = helper.make_tensor_value_info("y", dtype, shape)
    graph = helper.make_graph([helper.make_node("Relu", [name], ["y"])], "g", [value], [result])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return relu(tmp_path / "a.onnx", ["batch", 3, 8, 8])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arguments = {"num_classes": 3, "in_channels": 1, "image_size": 16}
    model = models.build("espalier:lenet3", **arguments)
    checkpoint.save(model, tmp_path / "net", factory="espalier:lenet3", kwargs=arguments, image_shape=(1, 16, 16))
    return tmp_path / "net"


def test_a_file_a_folder_and_a_function(file, folder, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def predict(images):\n    return images\n")
    monkeypatch.chdir(tmp_path)
    texts = [str(file), f"{folder}@pytorch:channels_last=true", "mine:predict"]
    onnx_file, network, function = read_targets(texts, (), CPU)

    assert (onnx_file.kind, onnx_file.runtime, onnx_file.artefact.precision) == ("onnx", None, "not stated")
    assert onnx_file.inputs == (TensorSpec("x", "float32", ("batch", 3, 8, 8)),)
    assert (network.kind, network.place, network.runtime) == ("checkpoint", str(folder), "pytorch:channels_last=true")
    assert network.inputs == (TensorSpec("images", "float32", ("batch", 1, 16, 16)),)
    assert network.artefact.sha256 == checkpoint.Architecture.read(folder).sha256
    assert (function.kind, function.inputs) == ("function", None)
    assert [target.name for target in (onnx_file, network, function)] == texts

    candidate = CPU.candidate(network, pool=tmp_path / "pool", batch_size=4)
    assert candidate.open is open_artefact
    assert candidate.arguments["artefact"] == str(folder)
    assert candidate.arguments["threads"] == 1
    candidate = CPU.candidate(function, pool=tmp_path / "pool", batch_size=4)
    assert candidate.open is open_callable
    assert candidate.arguments["search"] == str(tmp_path)


def test_one_file_in_two_runtimes(file):
    first, second = read_targets([str(file), f"{file}@onnxruntime:provider=cpu"], (), CPU)
    assert (first.runtime, second.runtime) == (None, "onnxruntime:provider=cpu")
    assert first.artefact.sha256 == second.artefact.sha256


def test_a_runtime_for_a_kind_and_one_for_a_single_target(file, tmp_path):
    other = relu(tmp_path / "b.onnx", ["batch", 3, 8, 8])
    first, second = read_targets([str(file), f"{other}@onnxruntime"], ["onnxruntime:provider=cpu"], CPU)
    assert (first.runtime, second.runtime) == ("onnxruntime:provider=cpu", "onnxruntime")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.onnx", "does not exist or is not a file"),
        ("missing", "does not exist or is not a file"),
        ("conftest.txt", "has the suffix .txt, which no runtime executes"),
        ("nowhere:predict", "there is no Python module nowhere"),
        ("sys:exit", "there is no Python module sys"),
        ("a.plan", "does not exist or is not a file"),
    ],
)
def test_what_is_no_target(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conftest.txt").write_text("")
    with pytest.raises(InputError, match=message):
        read_targets([text], (), CPU)


def test_twice_the_same(file):
    with pytest.raises(InputError, match="given twice: the first is timed against itself anyway"):
        read_targets([str(file), str(file)], (), CPU)


def test_a_function_in_a_runtime(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def predict(images):\n    return images\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="leave out @pytorch"):
        read_targets(["mine:predict@pytorch"], (), CPU)


def target(name: str, *specs: TensorSpec) -> Target:
    return Target(name, "onnx", name, None, specs or None, None)  # type: ignore[arg-type]


IMAGES = TensorSpec("images", "float32", ("batch", 3, 8, 8))


def test_inputs_correspond_by_position_and_family_of_types():
    half = TensorSpec("x", "float16", ("n", 3, 8, 8))
    assert common_inputs([target("f"), target("a", IMAGES), target("b", half)], {}, (1, 8)) == (IMAGES,)


def test_open_sizes_are_given_by_shape():
    opened = TensorSpec("x", "float32", ("batch", 3, "height", "width"))
    with pytest.raises(InputError, match=r"leaves sizes open: give them, without the batch, as --shape x=3,224,224"):
        common_inputs([target("a", opened)], {}, (1,))
    (found,) = common_inputs([target("a", opened)], {"x": (3, 16, 24)}, (1,))
    assert found.shape == ("batch", 3, 16, 24)
    with pytest.raises(InputError, match="make them fit"):
        common_inputs([target("a", opened)], {"x": (1, 16, 24)}, (1,))
    with pytest.raises(InputError, match="--shape names y, but a takes x"):
        common_inputs([target("a", opened)], {"x": (3, 16, 24), "y": (1,)}, (1,))


def test_a_fixed_batch():
    fixed = TensorSpec("x", "float32", (4, 3, 8, 8))
    assert common_inputs([target("a", fixed)], {}, (4,))[0].shape == ("batch", 3, 8, 8)
    with pytest.raises(InputError, match="a batch of 4 and no other, but --batch asks for 1, 4"):
        common_inputs([target("a", fixed)], {}, (1, 4))


@pytest.mark.parametrize(
    "other",
    [
        TensorSpec("images", "float32", ("batch", 3, 8, 9)),
        TensorSpec("images", "int64", ("batch", 3, 8, 8)),
        TensorSpec("images", "float32", ("batch", 3, 8)),
    ],
)
def test_different_inputs_do_not_compare(other):
    with pytest.raises(InputError, match="give files of one input size"):
        common_inputs([target("a", IMAGES), target("b", other)], {}, (1,))


def test_functions_alone_need_a_shape():
    with pytest.raises(InputError, match="f is a function, which does not say what it takes: give --shape"):
        common_inputs([target("f")], {}, (1,))
    (found,) = common_inputs([target("f")], {"images": (3, 8, 8)}, (1,))
    assert found == TensorSpec("images", "float32", ("batch", 3, 8, 8))


def test_shapes():
    assert read_shapes(["x=3,8,8", "y=1"]) == {"x": (3, 8, 8), "y": (1,)}
    for text in ("x", "x=", "=3", "x=3,a", "x=0,3", "x=-1"):
        with pytest.raises(InputError, match="has the form NAME=3,224,224"):
            read_shapes([text])
