"""Reading and writing ONNX files: nothing outside the folder is read, nothing half-written is left."""

import errno
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import deploy.onnx_file
from compress.errors import InputError, WorkError
from deploy.onnx_file import load_onnx, read_onnx, write_onnx

WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def network() -> onnx.ModelProto:
    """logits = images · weights"""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "weights"], ["logits"])],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def referring_to(location: str, path: Path) -> Path:
    model = network()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../secret", ""])
def test_weights_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    (tmp_path / "inside").mkdir()
    path = referring_to(location, tmp_path / "inside" / "net.onnx")
    for read in (read_onnx, load_onnx):
        with pytest.raises(InputError, match=r"net\.onnx takes the weights weights from .* outside its own folder"):
            read(path)


def test_a_link_does_not_lead_outside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(48))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "innocent.data").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="outside its own folder"):
        read_onnx(referring_to("innocent.data", tmp_path / "inside" / "net.onnx"))


def test_tensors_of_attributes_and_branches_are_looked_at_too(tmp_path: Path) -> None:
    outside = TensorProto(name="hidden", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    constant = helper.make_node("Constant", [], ["value"])
    constant.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=outside))
    branch = helper.make_graph(
        [constant], "branch", [], [helper.make_tensor_value_info("value", TensorProto.FLOAT, [1])]
    )
    model = network()
    model.graph.node.append(helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch))
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="takes the weights hidden from"):
        read_onnx(path)


def test_missing_external_weights_are_named(tmp_path: Path) -> None:
    path = referring_to("gone.data", tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"The weights of .*net\.onnx cannot be read"):
        load_onnx(path)


def test_large_weights_go_beside_the_file_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    monkeypatch.setattr(deploy.onnx_file, "MAX_INLINE_BYTES", 10)
    # onnx leaves tensors below a kilobyte in the file in any case.
    model = network()
    large = np.random.default_rng(0).normal(size=(4, 300)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(large, "weights"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 300
    write_onnx(model, path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert read_onnx(path).graph.initializer[0].raw_data == b""
    np.testing.assert_array_equal(numpy_helper.to_array(load_onnx(path).graph.initializer[0]), large)


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, WorkError), (errno.EACCES, InputError)])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    code: int, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the old file")

    def fail(model: onnx.ModelProto, target: str, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(code, "it failed")

    monkeypatch.setattr(onnx, "save_model", fail)
    with pytest.raises(kind, match=r"net\.onnx.*it failed"):
        write_onnx(network(), path)
    assert [item.name for item in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == b"the old file"


def test_what_is_not_valid_is_not_written(tmp_path: Path) -> None:
    model = network()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(WorkError, match=r"net\.onnx is not valid ONNX"):
        write_onnx(model, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_fixed_batch_is_refused(tmp_path: Path) -> None:
    model = network()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(WorkError, match="cannot be exported with a dynamic batch"):
        write_onnx(model, tmp_path / "net.onnx")
