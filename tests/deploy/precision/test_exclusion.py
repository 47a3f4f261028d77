import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import InputError, WorkError
from deploy.export import export_onnx
from deploy.metadata import write_metadata
from deploy.onnx_file import read_metadata, read_onnx
from deploy.parity import evaluate_runtime
from deploy.precision import Target
from deploy.precision.calibration import Ranges, calibrate
from deploy.precision.exclusion import Exclusion, _fewest, least_exclusion
from deploy.precision.quantisation import quantise
from deploy.runtimes import open_runtime

IMAGES = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Three convolutions and a linear layer, with a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(images).relu()).relu()
        return self.fc((self.conv3(x) + x).relu().flatten(1))


def shout(layer: nn.Conv2d, listener: nn.Conv2d, factor: float = 1e4) -> None:
    """One channel between two layers becomes so large that in int8 the others are lost; nobody listens to it."""
    with torch.no_grad():
        layer.weight[0] *= factor
        listener.weight[:, 0] = 0


def shouting_images() -> torch.Tensor:
    return IMAGES * torch.tensor([1e4, 1.0, 1.0]).view(3, 1, 1)


class Case:
    """A network's file; the labels are its own answers, so its top-1 is 100 %."""

    def __init__(self, model: nn.Module, path: Path, images: torch.Tensor, target: Target) -> None:
        self.source = export_onnx(model, path, image_shape=(3, 6, 6))
        self.target = target
        self.ranges: Ranges = calibrate(path, images.numpy(), target=target)
        with torch.no_grad():
            labels = model.eval()(images).argmax(1)
        self.loader = DataLoader(TensorDataset(images, labels), batch_size=16)

    def search(self, max_drop: float, exclude: tuple[str, ...] = ()) -> Exclusion:
        return least_exclusion(
            self.source,
            precision="int8",
            target=self.target,
            ranges=self.ranges,
            loader=self.loader,
            max_drop=max_drop,
            exclude=exclude,
        )

    def top1(self, exclude: tuple[str, ...]) -> float:
        path = self.source.with_name("again.onnx")
        quantise(self.source, path, precision="int8", target=self.target, ranges=self.ranges, exclude=exclude)
        model = onnx.load(path)
        about = read_metadata(path).model_copy(update={"precision": "int8", "target": self.target})
        write_metadata(model, about)
        onnx.save(model, path)
        with open_runtime(path, for_verification=True) as runtime:
            return evaluate_runtime(runtime, self.loader).top1


@pytest.fixture(params=["cpu", "gpu"])
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    return request.param


def test_the_hostile_layer_is_left_out(tmp_path: Path, target: Target) -> None:
    model = Net()
    shout(model.conv1, model.conv2)
    case = Case(model, tmp_path / "net.onnx", IMAGES, target)
    assert case.top1(()) < 60
    found = case.search(5.0)
    # CPU kernels take a layer's output in int8, too: there both sides of the loud channel must be left out.
    assert set(found.layers) == ({"conv2"} if target == "gpu" else {"conv1", "conv2"})
    assert found.reference_top1 == 100
    assert found.top1 >= 95
    assert found.top1 == case.top1(found.excluded)
    assert max(found.harm, key=found.harm.__getitem__) == found.layers[0]
    assert found.harm[found.layers[0]] > 10 * found.harm["conv3"]
    assert list(found.harm) == ["conv1", "conv2", "conv3", "fc"]
    assert dict(found.curve)[len(found.layers)] == found.top1
    assert dict(found.curve)[0] == case.top1(()) == min(top1 for _, top1 in found.curve)


def test_nothing_is_left_out_where_nothing_harms(tmp_path: Path, target: Target) -> None:
    found = Case(Net(), tmp_path / "net.onnx", IMAGES, target).search(10.0)
    assert found.layers == found.excluded == ()
    assert found.harm == {}
    assert found.curve == ((0, found.top1),)


def test_a_drop_that_is_met_exactly(tmp_path: Path) -> None:
    model = Net()
    shout(model.conv1, model.conv2)
    case = Case(model, tmp_path / "net.onnx", IMAGES[:60], "gpu")  # percentages of 60 images are rounded
    assert case.search(100 - case.top1(())).layers == ()


def test_what_the_user_left_out_stays_out(tmp_path: Path) -> None:
    model = Net()
    shout(model.conv1, model.conv2)
    shout(model.conv2, model.conv3)
    with torch.no_grad():  # the residual addition passes the loud channel on
        model.fc.weight[:, :36] = 0
    case = Case(model, tmp_path / "net.onnx", IMAGES, "gpu")
    found = case.search(5.0, exclude=("conv2",))
    assert "conv2" not in found.harm
    assert found.excluded[0] == "conv2"
    assert {"conv3", "fc"} & set(found.layers)
    assert case.top1(found.excluded) == found.top1 >= 95


def test_a_drop_that_cannot_be_met(tmp_path: Path, target: Target) -> None:
    model = Net()
    images = shouting_images()
    for layer in (model.conv1, model.conv2, model.conv3):
        with torch.no_grad():
            layer.weight[:, 0] = 0
    for layer in (model.conv1, model.conv2, model.conv3):
        with torch.no_grad():
            layer.weight[0] = 1e4 * torch.rand_like(layer.weight[0])
            layer.weight[0, 0] = 0
    with torch.no_grad():
        model.fc.weight[:, :36] = 0
    case = Case(model, tmp_path / "net.onnx", images, target)
    with pytest.raises(
        WorkError, match=r"in int8 has a top-1 of .* with 3 of its 4 layers left out, more than 0 points"
    ):
        case.search(0.0)


def test_a_network_of_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 10))
    with torch.no_grad():
        model[1].weight[:, :36] = 0
    case = Case(model, tmp_path / "net.onnx", shouting_images(), "gpu")
    with pytest.raises(WorkError, match=r"with 0 of its 1 layers left out"):
        case.search(1.0)


def test_scratch_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    model = Net()
    shout(model.conv1, model.conv2)
    case = Case(model, tmp_path / "net.onnx", IMAGES, "gpu")
    before = sorted(tmp_path.iterdir())
    case.search(5.0)
    with pytest.raises(InputError):
        case.search(5.0, exclude=("conv9",))
    assert sorted(tmp_path.iterdir()) == before
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("max_drop", [-1.0, math.nan, math.inf])
def test_a_drop_that_is_none(tmp_path: Path, max_drop: float) -> None:
    case = Case(Net(), tmp_path / "net.onnx", IMAGES, "cpu")
    with pytest.raises(InputError, match="allowed to drop by"):
        case.search(max_drop)


def test_no_labelled_images(tmp_path: Path) -> None:
    case = Case(Net(), tmp_path / "net.onnx", IMAGES, "cpu")
    case.loader = DataLoader(TensorDataset(IMAGES[:0], torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InputError, match="empty"):
        case.search(1.0)


def test_nodes_without_weights_go_with_the_layer_before_them(tmp_path: Path) -> None:
    model = Net()
    shout(model.conv1, model.conv2)
    case = Case(model, tmp_path / "net.onnx", IMAGES, "cpu")
    found = case.search(5.0)
    kinds = {node.name: node.op_type for node in read_onnx(case.source).graph.node}
    assert [kinds[name] for name in found.excluded] == ["Conv", "Relu", "Conv", "Relu"]


@given(st.lists(st.booleans(), max_size=60))
def test_the_number_found_meets_and_the_one_before_does_not(rest: list[bool]) -> None:
    met = [False, *rest]
    asked: list[int] = []

    def meets(count: int) -> bool:
        asked.append(count)
        return met[count]

    found = _fewest(meets, len(rest))
    if found is None:
        assert not met[-1]
    else:
        assert met[found]
        assert not met[found - 1]
    assert len(asked) == len(set(asked)) <= 2 * np.log2(max(len(rest), 1)) + 1
    if sorted(met) == met:  # where more layers never do worse, it is the least number
        assert found == (met.index(True) if any(met) else None)
