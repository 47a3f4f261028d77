"""What inspect says of checkpoints, ONNX files and runs."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from rich.console import Console
from torch import nn

import compress
from compress import models
from compress.errors import InputError
from deploy import inspection
from deploy.artefacts import export_checkpoint
from deploy.recipe_text import dump, read_recipe
from deploy.run_directory import RunDirectory


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a LeNet3 whose first convolution lost half of its 16 channels, beside its ONNX file."""
    directory = tmp_path_factory.mktemp("inspected") / "pruned"
    torch.manual_seed(0)
    kwargs = {"in_channels": 1, "image_size": 16}
    model = models.build("espalier:lenet3", **kwargs)
    images = torch.randn(4, 1, 16, 16)
    pruner = compress.Pruner(
        model,
        images,
        budget=compress.Budget(channels=0.5),
        events=1,
        interval=1,
        ignore=["conv2", "fc1", "fc2"],
    )
    nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
    pruner.step()
    compress.save(
        model,
        directory,
        factory="espalier:lenet3",
        kwargs=kwargs,
        image_shape=(1, 16, 16),
        classes=tuple("0123456789"),
        mean=(0.5,),
        std=(0.25,),
        provenance={"accuracy": {"top1": 97.5, "samples": 40}},
    )
    export_checkpoint(directory, directory.parent, name="pruned")
    return directory


def shown(found: dict[str, Any]) -> str:
    console = Console(width=120, markup=False)
    with console.capture() as capture:
        for part in inspection.tables(found):
            console.print(part)
    return capture.get()


def test_checkpoint(pruned: Path) -> None:
    found = inspection.inspect(pruned)
    assert found["kind"] == "checkpoint"
    assert found["kwargs"] == {"in_channels": 1, "image_size": 16}
    widths = {layer["name"]: (layer["dense_width"], layer["width"]) for layer in found["layers"]}
    assert widths == {"conv1": (16, 8), "conv2": (32, 32), "fc1": (120, 120), "fc2": (84, 84), "fc3": (10, 10)}
    # conv1 8 x 25 + 8, conv2 32 x 8 x 25 + 32, fc1 120 x 32 + 120, fc2 84 x 120 + 84, fc3 10 x 84 + 10
    assert found["numbers_stored"] == 208 + 6432 + 3960 + 10164 + 850
    assert json.loads(json.dumps(found)) == found
    text = shown(found)
    for expected in ("top-1 97.50 % of 40 images", found["sha256"], "1 x 16 x 16", "50 %"):
        assert expected in text


def test_onnx_file_of_ours(pruned: Path) -> None:
    found = inspection.inspect(pruned.parent / "pruned.fp32.onnx")
    assert found["kind"] == "onnx"
    assert found["inputs"] == ["images: float32 (batch, 1, 16, 16)"]
    assert found["outputs"] == ["logits: float32 (batch, 10)"]
    assert found["operators"]["Conv"] == 2
    assert found["in_manifest"] is True
    assert found["metadata"]["checkpoint_sha256"] == inspection.inspect(pruned)["sha256"]
    assert "listed, unchanged" in shown(found)


def test_onnx_file_of_others(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.INT64, [None, 3])
    result = helper.make_tensor_value_info("y", TensorProto.INT64, ["n", 3])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "other.onnx")
    found = inspection.inspect(tmp_path / "other.onnx")
    assert found["inputs"] == ["x: int64 (?, 3)"]
    assert found["outputs"] == ["y: int64 (n, 3)"]
    assert found["opset"] == {"ai.onnx": 18}
    assert found["metadata"] is None
    assert found["in_manifest"] is None
    assert "there is no manifest beside it" in shown(found)


def test_unfinished_run(pruned: Path, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.recipe.write_text(dump(read_recipe(None)))
    for stage in ("baseline", "prune"):
        directory.finish(stage, {})
    found = inspection.inspect(tmp_path)
    assert found["kind"] == "run"
    assert not found["complete"]
    assert found["stages_finished"] == ["baseline", "prune"]
    assert "unfinished; stages finished: baseline, prune" in shown(found)


@pytest.mark.parametrize("name", ["nothing", "text.txt", "empty"])
def test_what_is_nothing_of_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=str(tmp_path / name)):
        inspection.inspect(tmp_path / name)


def test_weights_that_are_gone(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "architecture.json").write_bytes((pruned / "architecture.json").read_bytes())
    with pytest.raises(InputError, match=r"model\.safetensors is missing or was changed"):
        inspection.inspect(tmp_path)
