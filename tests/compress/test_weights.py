"""State dicts from files: every accepted form, and what does not fit is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compress import models
from compress.errors import InputError


@pytest.fixture
def trained() -> nn.Module:
    return models.lenet3(num_classes=4, in_channels=1)


def build(weights: Path, num_classes: int = 4) -> nn.Module:
    return models.build("espalier:lenet3", num_classes=num_classes, in_channels=1, weights=str(weights))


@pytest.mark.parametrize("form", ["safetensors", "bare", "state_dict", "model", "replica"])
def test_every_form_is_loaded(form: str, trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(state, path)
    elif form == "replica":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        torch.save(state if form == "bare" else {form: state, "epoch": 3}, path)
    loaded = build(path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_other_class_count_is_said_clearly(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    with pytest.raises(InputError, match="are for 4 classes and the model has 9"):
        build(tmp_path / "w.pt", num_classes=9)


def test_other_tensors_are_named(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    state["extra.weight"] = state.pop("conv2.weight")
    state["fc1.weight"] = torch.zeros(120, 7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        build(tmp_path / "w.pth")
    assert "missing from the file: conv2.weight" in str(caught.value)
    assert "unknown to the model: extra.weight" in str(caught.value)
    assert "fc1.weight is (120, 7) in the file and (120, 800) in the model" in str(caught.value)


def test_files_from_before_batch_counters_are_loaded(tmp_path: Path) -> None:
    state = models.resnet20().state_dict()
    old = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    torch.save(old, tmp_path / "w.pth")
    model = models.build("espalier:resnet20", weights=str(tmp_path / "w.pth"))
    assert torch.equal(model.state_dict()["conv1.weight"], state["conv1.weight"])


def test_pickled_modules_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "w.pth")
    with pytest.raises(InputError, match="not a plain state dict"):
        build(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [{}, {"conv1.weight": "text"}, [torch.zeros(1)]])
def test_content_that_is_no_state_dict(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"save model\.state_dict\(\)"):
        build(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_files_are_refused(name: str, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=name):
        build(path)


@pytest.mark.parametrize(("name", "message"), [("none.pth", "do not exist"), ("w.bin", "not a file ending in")])
def test_missing_or_strange_file(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path / name)
