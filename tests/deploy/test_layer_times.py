import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import InputError, WorkError
from deploy.export import export_onnx
from deploy.layer_matching import origins
from deploy.layer_timers import TensorRtTimer, read_kernels
from deploy.layer_times import Timed, layer_times, layer_times_together
from deploy.precision.calibration import calibrate
from deploy.precision.quantisation import quantise
from deploy.work import onnx_work

IMAGES = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.narrow = nn.Conv2d(16, width, 1)
        self.swish = nn.Hardswish()
        self.wide = nn.Conv2d(width, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(images)).relu()
        x = x + self.wide(self.swish(self.narrow(x)))
        return self.head(x.relu().mean((2, 3)))


def exported(folder: Path, width: int) -> Path:
    return export_onnx(Net(width), folder / f"net{width}.onnx", image_shape=(3, 8, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layers")


@pytest.fixture(scope="module")
def net(folder: Path) -> Path:
    return exported(folder, 16)


def test_every_multiply_add_belongs_to_one_kernel(net: Path) -> None:
    times = layer_times(net, batch=[IMAGES], threads=1, runs=2)
    work = onnx_work(net, 2)
    found = [work.of(time.origin) for time in times if time.origin]
    assert sum(layer.macs for layer in found) == work.macs
    assert {layer.module for layer in found if layer.macs} == {"stem", "narrow", "wide", "head"}
    assert all(time.ms >= 0 and time.launches == 1 for time in times)
    assert all(time.dtype == "float32" and time.bytes is not None for time in times if "Conv" in time.kind)
    (wide,) = [time for time in times if any(work.by_name[name].module == "wide" for name in time.origin)]
    assert {work.by_name[name].kind for name in wide.origin} == {"Conv", "Add", "Relu"}
    assert pickle.loads(pickle.dumps(times)) == times  # noqa: S301  our own


def test_what_the_runtime_puts_in_has_no_origin(folder: Path) -> None:
    times = layer_times(exported(folder, 13), batch={"images": IMAGES}, threads=1, runs=1)
    added = {time.kind for time in times if time.added}
    assert added
    assert all("Reorder" in kind for kind in added)


def test_an_int8_file_is_matched_too(net: Path, folder: Path) -> None:
    path = folder / "net.int8.onnx"
    ranges = calibrate(net, IMAGES, target="cpu")
    quantise(net, path, precision="int8", target="cpu", ranges=ranges)
    times = layer_times(path, batch=[IMAGES], threads=1, runs=1)
    work = onnx_work(path, 2)
    assert sum(work.of(time.origin).macs for time in times if time.origin) == work.macs == onnx_work(net, 2).macs
    (narrow,) = [time for time in times if any(work.by_name[name].module == "narrow" for name in time.origin)]
    assert (narrow.kind, narrow.dtype, work.of(narrow.origin).dtype) == ("QLinearConv", "int8", "int8")
    parts = [time.kind for time in times if [work.by_name[name].kind for name in time.origin] == ["HardSwish"]]
    assert parts in (["HardSwish"], ["HardSigmoid", "Mul"])


def test_a_module_is_timed_leaf_by_leaf() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(self.conv(x)).mean((2, 3)))

    model = Twice()
    times = layer_times(model, batch=[IMAGES], runs=3, runtime="pytorch:channels_last=true")
    assert [(time.name, time.kind, time.launches, time.origin) for time in times] == [
        ("conv", "Conv2d", 2, ("conv",)),
        ("head", "Linear", 1, ("head",)),
    ]
    assert all(time.ms > 0 for time in times)
    assert not model.conv._forward_hooks
    assert not model.conv._forward_pre_hooks
    with pytest.raises(InputError, match="compile=true"):
        layer_times(model, batch=[IMAGES], runtime="pytorch:compile=true")


def test_several_take_turns(net: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.layer_times.TURN", 2)
    asked = [Timed(net, [IMAGES], threads=1), Timed(Net(16).eval(), {"images": IMAGES})]
    first, second = layer_times_together(asked, runs=3)
    assert [time.name for time in first] == [time.name for time in layer_times(net, batch=[IMAGES], threads=1, runs=1)]
    assert {time.name for time in second} == {"stem", "norm", "narrow", "swish", "wide", "head"}


def test_impossible_requests_are_refused(net: Path) -> None:
    with pytest.raises(InputError, match="0 timed runs"):
        layer_times(net, batch=[IMAGES], runs=0)
    with pytest.raises(InputError, match="2 inputs were given"):
        layer_times(net, batch=[IMAGES, IMAGES], threads=1)
    with pytest.raises(InputError, match="has shape"):
        layer_times(net, batch=[IMAGES[:, :2]], threads=1)


def event(name: str, dur: int, **facts: Any) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": "Conv", **facts}}


SIZES = {"activation_size": "10", "parameter_size": "20", "output_size": "30"}


def test_the_profile_by_hand() -> None:
    events = [{"cat": "Session", "name": "model_run", "dur": 9, "args": {}}]
    for dur in (900, 10, 30, 20):  # the first one is left out
        events.append(event("conv", dur, **SIZES, input_type_shape=[{"float": [1, 3]}, {"uint8": [1]}]))
        events += [event("twice", 5), event("twice", dur)]
    conv, twice = read_kernels(events, [False, True, True, True])
    assert (conv.name, conv.kind, conv.ms, conv.launches) == ("conv", "Conv", 0.02, 1)
    assert (conv.bytes, conv.dtype) == (60, "float32")
    assert (twice.ms, twice.launches, twice.bytes, twice.dtype) == (0.025, 2, None, "")
    with pytest.raises(WorkError, match="conv 4 times in 3 inferences"):
        read_kernels(events, [True] * 3)


def test_tensorrt_names_the_nodes_of_its_layers() -> None:
    layers = [
        SimpleNamespace(name="fused", kind="CaskConv", origin="[ONNX Layer: c]\x1e[ONNX Layer: r]", inputs=()),
        SimpleNamespace(name="reformat", kind="Reformat", origin="", inputs=(SimpleNamespace(dtype="float16"),)),
    ]

    class Runtime:
        def profile(self, batch: object, *, runs: int) -> dict[str, list[float]]:
            return {"fused": [9.0] + [2.0] * (runs - 1), "reformat": [9.0] + [1.0] * (runs - 1), "new": [3.0] * runs}

        def layers(self) -> list[SimpleNamespace]:
            return layers

    timer = TensorRtTimer(Runtime(), {})
    timer.run(warm_up=1, count=2)
    timer.run(warm_up=1, count=1)
    fused, reformat, new = timer.layers()
    assert (fused.ms, fused.origin, fused.added) == (2.0, ("c", "r"), False)
    assert (reformat.ms, reformat.dtype, reformat.added) == (1.0, "float16", True)
    assert (new.ms, new.kind) == (3.0, "")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([("a_relu_nchwc", "Conv"), ("node_b", "Conv")], [("node_a", "node_r"), ("node_b",)]),
        ([("fused node_a", "FusedConv"), ("node_b_token_3", "Conv")], [("node_a", "node_r"), ("node_b",)]),
        ([("x", "Conv"), ("ReorderOutput", "ReorderOutput"), ("y", "Conv")], [("node_a", "node_r"), (), ("node_b",)]),
    ],
)
def test_names_lead_back_to_nodes(
    names: list[tuple[str, str]], expected: list[tuple[str, ...]], tmp_path: Path
) -> None:
    from tests.deploy.test_work import parsed

    model = parsed(
        """net (float[batch, 4, 8, 8] x) => (float[batch, 4, 8, 8] b) <float[4, 4, 1, 1] v>
        { a = Conv(x, v)  a_relu = Relu(a)  b = Conv(a_relu, v) }"""
    )
    for node, name in zip(model.graph.node, ("node_a", "node_r", "node_b"), strict=True):
        node.name = name
    import onnx

    onnx.save(model, tmp_path / "net.onnx")
    assert origins(names, onnx_work(tmp_path / "net.onnx", 1).graph) == expected
