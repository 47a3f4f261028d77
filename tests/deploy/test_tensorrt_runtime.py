"""Running engines under strict fakes of both majors, which execute the network with ONNX Runtime."""

import gc
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from torch import nn

from compress.errors import InputError, MissingExtraError, WorkError
from deploy import manifest
from deploy.engine import BatchRange, BuilderSettings, build_engine
from deploy.export import export_onnx
from deploy.parity import check_parity
from deploy.runtimes import Lane
from deploy.runtimes.cuda import CudaDevice, Stream
from deploy.runtimes.tensorrt import TensorRtRuntime
from deploy.runtimes.tensorrt_layers import Layer, LayerTensor, LayerTimes, read_layers
from deploy.tensor_spec import TensorSpec
from tests.fakes.cuda import FakeCuda, FakeStream
from tests.fakes.fixtures import install
from tests.fakes.tensorrt import build_fake, faults

LISTINGS = {path.stem: path for path in (Path(__file__).parents[1] / "fakes" / "listings").glob("*.json")}
SHAPE = (3, 8, 8)
BATCH = BatchRange(minimum=1, optimum=4, maximum=8)


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()
    path = tmp_path_factory.mktemp("export") / "net.fp32.onnx"
    return model, export_onnx(model, path, image_shape=SHAPE)


@pytest.fixture
def plan(exported: tuple[nn.Module, Path], tmp_path: Path, tensorrt: ModuleType) -> Path:
    path = tmp_path / "artifacts" / "net.fp32.plan"
    build_engine(exported[1], path, batch=BATCH)
    return path


@pytest.fixture
def runtime(plan: Path) -> Iterator[TensorRtRuntime]:
    with TensorRtRuntime(plan) as runtime:
        yield runtime


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"images": np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)}


def expected(exported: tuple[nn.Module, Path], batch: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(exported[1]), providers=["CPUExecutionProvider"])
    return session.run(None, batch)[0]


def text_model(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.mark.parametrize("count", [1, 3, 8])
def test_logits_are_those_of_onnx_runtime(
    runtime: TensorRtRuntime, exported: tuple[nn.Module, Path], count: int
) -> None:
    batch = images(count)
    outputs = runtime.run(batch)
    assert list(outputs) == ["logits"]
    np.testing.assert_allclose(outputs["logits"], expected(exported, batch), rtol=1e-5, atol=1e-6)


def test_parity_with_pytorch(runtime: TensorRtRuntime, exported: tuple[nn.Module, Path]) -> None:
    check_parity(exported[0], runtime, torch.from_numpy(images(16)["images"]))


def test_specs_are_the_engines(runtime: TensorRtRuntime) -> None:
    assert runtime.inputs == (TensorSpec("images", "float32", ("batch", *SHAPE)),)
    assert runtime.outputs == (TensorSpec("logits", "float32", ("batch", 5)),)


def test_runs_of_changing_batch(runtime: TensorRtRuntime, exported: tuple[nn.Module, Path]) -> None:
    for count in (8, 1, 5, 8):
        batch = images(count, seed=count)
        np.testing.assert_allclose(runtime.run(batch)["logits"], expected(exported, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_many_lanes_in_turn(plan: Path, exported: tuple[nn.Module, Path], cuda_graph: bool) -> None:
    """Lanes of the same shape and of others, with plain runs between them: none may disturb another."""
    with TensorRtRuntime(plan, cuda_graph=cuda_graph) as runtime:
        pools = [[images(count, seed + 10 * place) for place in range(3)] for seed, count in enumerate((4, 4, 8, 1))]
        lanes = [runtime.lane(pool) for pool in (*pools, pools[-1])]
        for index in (2, 0, 1, 2):
            for lane, pool in zip(lanes, (*pools, pools[-1]), strict=True):
                runtime.run(images(2, seed=99))
                lane.query(index)
                check(lane, exported, pool[index])
        assert runtime.description()["cuda_graph"] == ("captured" if cuda_graph else "off")
        for call in (runtime.layers, lambda: runtime.profile(images(3), runs=1)):
            call()
            lanes[0].query(1)
            check(lanes[0], exported, pools[0][1])


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_stages_of_a_query(plan: Path, exported: tuple[nn.Module, Path], cuda_graph: bool) -> None:
    with TensorRtRuntime(plan, cuda_graph=cuda_graph) as runtime:
        pool = [images(2), images(2, seed=1)]
        lane = runtime.lane(pool)
        found = lane.stages(1)
    assert found.issued_ns < found.enqueued_ns < found.done_ns
    assert (found.h2d_ms, found.compute_ms, found.d2h_ms) == pytest.approx((0.01, 0.01, 0.01))


def check(lane: Lane, exported: tuple[nn.Module, Path], batch: dict[str, np.ndarray]) -> None:
    """The latest query answered this batch."""
    np.testing.assert_allclose(lane.outputs()["logits"], expected(exported, batch), rtol=1e-5, atol=1e-6)


def test_outputs_stay_when_the_next_batch_runs(runtime: TensorRtRuntime, exported: tuple[nn.Module, Path]) -> None:
    first = runtime.run(images(2, seed=1))["logits"]
    runtime.run(images(2, seed=2))
    np.testing.assert_allclose(first, expected(exported, images(2, seed=1)), rtol=1e-5, atol=1e-6)


def test_the_pool_was_copied_and_queries_need_no_allocation(
    runtime: TensorRtRuntime, exported: tuple[nn.Module, Path], tensorrt: ModuleType
) -> None:
    batch = images(2)
    lane = runtime.lane([batch])
    batch["images"][:] = 0
    faults(tensorrt).out_of_memory_on_device = True
    faults(tensorrt).out_of_memory_in_context = True
    lane.query(0)
    check(lane, exported, images(2))


def test_a_dropped_lane_leaves_the_others_alone(runtime: TensorRtRuntime, exported: tuple[nn.Module, Path]) -> None:
    kept, dropped = runtime.lane([images(2, seed=1)]), runtime.lane([images(2, seed=2)])
    del dropped
    gc.collect()
    kept.query(0)
    check(kept, exported, images(2, seed=1))


def test_description(runtime: TensorRtRuntime, tensorrt: ModuleType) -> None:
    assert runtime.description()["cuda_graph"] == "not captured: no lane has been made yet"
    runtime.lane([images(1)])
    assert runtime.description() == {
        "runtime": "tensorrt",
        "version": tensorrt.__version__,
        "device": "cuda:0",
        "gpu": "NVIDIA H200",
        "compute_capability": [9, 0],
        "cuda_graph": "captured",
        "tf32": False,
        "profiles": {"images": {"minimum": [1, 3, 8, 8], "optimum": [4, 3, 8, 8], "maximum": [8, 3, 8, 8]}},
        "layers": len(runtime.layers()),
    }


def test_failed_capture_is_stated_and_the_lane_works_all_the_same(
    runtime: TensorRtRuntime,
    exported: tuple[nn.Module, Path],
    tensorrt: ModuleType,
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults(tensorrt).fail_capture = True
    with caplog.at_level(logging.WARNING, "deploy.runtimes.tensorrt"):
        lanes = [runtime.lane([images(2)]), runtime.lane([images(3)])]
    assert len([record for record in caplog.records if "runs without CUDA graphs" in record.message]) == 1
    assert runtime.description()["cuda_graph"].startswith("not captured: CUDA error: operation not permitted")
    for lane, count in zip(lanes, (2, 3), strict=True):
        lane.query(0)
        check(lane, exported, images(count))


def test_profile_times_every_layer_of_every_run(runtime: TensorRtRuntime) -> None:
    times = runtime.profile(images(4), runs=3)
    assert list(times) == [layer.name for layer in runtime.layers()]
    assert all(len(runs) == 3 and min(runs) > 0 for runs in times.values())
    with pytest.raises(InputError, match="0 profiled runs"):
        runtime.profile(images(4), runs=0)
    with pytest.raises(InputError, match="shape"):
        runtime.profile({"images": np.zeros((1, 2), np.float32)})


def test_layers_are_alike_in_both_majors(runtime: TensorRtRuntime) -> None:
    layers = runtime.layers()
    convolution = next(layer for layer in layers if layer.kind == "Conv")
    assert convolution.inputs[0].name == "images"
    assert convolution.inputs[0].dtype == "float32"
    assert convolution.tactic == "fake_conv"
    assert convolution.origin == f"[ONNX Layer: {convolution.name}]"
    assert layers[-1].outputs[0].name == "logits"


def test_layers_of_either_json() -> None:
    """The forms that NVIDIA documents: 10.x with one field for format and type, 11.x with two."""
    old = """{"Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm90_kernel",
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [4, 3, 8, 8],
            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [4, 8, 8, 8], "Format/Datatype": "Row major linear FP16 format"}],
        "Metadata": "[ONNX Layer: conv]"}], "Bindings": ["x", "y"]}"""
    new = """{"Layers": [{"Name": "conv", "LayerType": "CaskConvolution", "TacticName": "sm90_kernel",
        "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [4, 3, 8, 8], "DataType": "Int8",
            "Format": "Thirty-two wide channel vectorized row major Int8 format"}],
        "Outputs": [{"Name": "y", "Dimensions": [4, 8, 8, 8], "DataType": "Half",
            "Format": "Row major linear FP16 format"}],
        "Metadata": "[ONNX Layer: conv]"}], "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "Int8"}]}"""
    assert read_layers(old) == read_layers(new)
    assert read_layers(new) == (
        Layer(
            "conv",
            "CaskConvolution",
            (LayerTensor("x", (4, 3, 8, 8), "int8", "Thirty-two wide channel vectorized row major Int8 format"),),
            (LayerTensor("y", (4, 8, 8, 8), "float16", "Row major linear FP16 format"),),
            "sm90_kernel",
            "[ONNX Layer: conv]",
        ),
    )


def test_layers_without_detail_and_without_name_of_a_tactic() -> None:
    assert read_layers('{"Layers": ["conv + relu", "pool"], "Bindings": []}') == (Layer("conv + relu"), Layer("pool"))
    (layer,) = read_layers('{"Layers": [{"Name": "n", "TacticValue": "0x1f", "Inputs": [{"Name": "x"}]}]}')
    assert (layer.tactic, layer.inputs) == ("0x1f", (LayerTensor("x", (), "", ""),))


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"layers": []}', '{"Layers": [{}]}', '{"Layers": [3]}'])
def test_json_of_an_unknown_form(text: str) -> None:
    with pytest.raises(WorkError, match="engine inspector has no form that is known here"):
        read_layers(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Float", "float32"), ("FP32", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16"), ("BF16", "bfloat16"),
     ("UInt8", "uint8"), ("INT8", "int8"), ("Int64", "int64"), ("FP8", "float8"), ("Bool", "bool"), ("N/A", "")],
)  # fmt: skip
def test_types_by_our_names(text: str, name: str) -> None:
    tensor = f'{{"Layers": [{{"Name": "n", "Inputs": [{{"Name": "x", "DataType": "{text}"}}]}}]}}'
    assert read_layers(tensor)[0].inputs[0].dtype == name


def test_times_of_a_layer_that_runs_twice_add_up() -> None:
    times = LayerTimes()
    for layer, milliseconds in (("body", 1.0), ("exit", 0.5), ("body", 2.0)):
        times.report(layer, milliseconds)
    assert times.take() == {"body": 3.0, "exit": 0.5}
    assert times.take() == {}


@pytest.mark.parametrize("count", [9, 100])
def test_batch_outside_the_profile(runtime: TensorRtRuntime, count: int) -> None:
    message = (
        rf"Input images has a batch of {count}, but net\.fp32\.plan was built for batches from 1 to 8; "
        rf".*--batch 1:4:{count}"
    )
    for call in (runtime.run, lambda batch: runtime.lane([batch]), runtime.profile):
        with pytest.raises(InputError, match=message):
            call(images(count))
    assert runtime.run(images(8))["logits"].shape == (8, 5)


def test_batch_below_the_profile(exported: tuple[nn.Module, Path], tmp_path: Path, tensorrt: ModuleType) -> None:
    path = tmp_path / "net.plan"
    build_engine(exported[1], path, batch=BatchRange.parse("2:4:4"))
    with TensorRtRuntime(path) as runtime, pytest.raises(InputError, match=r"batches from 2 to 4; .*--batch 1:4:4"):
        runtime.run(images(1))


def test_wrong_image_size_is_refused_with_the_spec(runtime: TensorRtRuntime) -> None:
    with pytest.raises(InputError, match=r"\(1, 3, 9, 9\).*images: float32 \(batch, 3, 8, 8\)"):
        runtime.run({"images": np.zeros((1, 3, 9, 9), np.float32)})


def another(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **fields: Any) -> ModuleType:
    """The same major on another GPU, or of another version."""
    return install(monkeypatch, build_fake(LISTINGS[module.__version__], **fields))


L4: dict[str, Any] = {"gpu": "NVIDIA L4", "compute_capability": (8, 9)}
H100: dict[str, Any] = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": (9, 0)}


@pytest.fixture
def not_deserialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a plan reaches TensorRT."""
    monkeypatch.setattr(
        "tests.fakes.running.Runtime.deserialize_cuda_engine", lambda *_: pytest.fail("the plan was deserialised")
    )


@pytest.mark.usefixtures("not_deserialised")
@pytest.mark.parametrize("gpu", [L4, H100])
def test_another_gpu(plan: Path, tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, gpu: dict) -> None:
    another(monkeypatch, tensorrt, **gpu)
    message = rf"built for the NVIDIA H200 \(compute capability 9\.0\).*is a {gpu['gpu']}.*build it again"
    with pytest.raises(InputError, match=message):
        TensorRtRuntime(plan)


@pytest.mark.parametrize(
    ("level", "gpu", "works"),
    [
        ("same-compute-capability", H100, True),
        ("same-compute-capability", L4, False),
        ("ampere-plus", L4, True),
        ("ampere-plus", {"gpu": "Tesla T4", "compute_capability": (7, 5)}, False),
    ],
)
def test_hardware_compatible_engine(
    exported: tuple[nn.Module, Path],
    tmp_path: Path,
    level: Any,
    gpu: dict,
    works: bool,
    tensorrt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "net.plan"
    build_engine(exported[1], path, batch=BATCH, settings=BuilderSettings(hardware_compatible=level))
    another(monkeypatch, tensorrt, **gpu)
    if works:
        with TensorRtRuntime(path) as runtime:
            assert runtime.run(images(2))["logits"].shape == (2, 5)
    else:
        with pytest.raises(InputError, match="which it cannot run on"):
            TensorRtRuntime(path)


def versioned(version: str, by: int) -> str:
    major, minor, *rest = version.split(".")
    return ".".join([major, str(int(minor) + by), *rest])


@pytest.mark.usefixtures("not_deserialised")
@pytest.mark.parametrize("by", [-1, 1])
def test_another_version(plan: Path, tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch, by: int) -> None:
    built, here = tensorrt.__version__, versioned(tensorrt.__version__, by)
    another(monkeypatch, tensorrt, version=here)
    message = rf"built with TensorRT {built} and needs exactly that version, but {here} is installed"
    with pytest.raises(InputError, match=message):
        TensorRtRuntime(plan)


@pytest.mark.parametrize(("by", "works"), [(0, True), (1, True), (-1, False)])
def test_version_compatible_engine(
    exported: tuple[nn.Module, Path],
    tmp_path: Path,
    by: int,
    works: bool,
    tensorrt: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "net.plan"
    build_engine(exported[1], path, batch=BATCH, settings=BuilderSettings(version_compatible=True))
    another(monkeypatch, tensorrt, version=versioned(tensorrt.__version__, by))
    if works:
        with TensorRtRuntime(path) as runtime:
            assert runtime.run(images(2))["logits"].shape == (2, 5)
    else:
        with pytest.raises(InputError, match="needs that version or a later one"):
            TensorRtRuntime(path)


def test_what_tensorrt_itself_refuses(plan: Path, tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest says this GPU, but the plan is of another: TensorRT's own words are passed on."""
    module = another(monkeypatch, tensorrt, **L4)
    listed = manifest.read(plan.parent).model_dump(mode="json")
    listed["entries"][0]["engine"] |= {"gpu": L4["gpu"], "compute_capability": list(L4["compute_capability"])}
    path = plan.parent / manifest.FILE_NAME
    path.write_text(manifest.Manifest.model_validate(listed).model_dump_json())
    message = rf"TensorRT {module.__version__} cannot load .*expecting compute 8\.9 got compute 9\.0.*build it again"
    with pytest.raises(InputError, match=message):
        TensorRtRuntime(plan)


@pytest.mark.usefixtures("not_deserialised")
class TestTrust:
    def test_changed_byte(self, plan: Path) -> None:
        content = bytearray(plan.read_bytes())
        content[len(content) // 2] ^= 1
        plan.write_bytes(content)
        with pytest.raises(InputError, match=r"net\.fp32\.plan"):
            TensorRtRuntime(plan)

    def test_without_an_entry(self, plan: Path) -> None:
        (plan.parent / manifest.FILE_NAME).unlink()
        with pytest.raises(InputError, match="manifest"):
            TensorRtRuntime(plan)

    def test_of_somebody_else(self, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
        with pytest.raises(InputError, match="was not built by you"):
            TensorRtRuntime(plan)

    def test_without_a_record_of_the_build(self, plan: Path) -> None:
        path = plan.parent / manifest.FILE_NAME
        listed = manifest.read(plan.parent)
        entries = tuple(entry.model_copy(update={"engine": None}) for entry in listed.entries)
        path.write_text(manifest.Manifest(entries=entries).model_dump_json())
        with pytest.raises(InputError, match=r"does not say for which GPU and TensorRT .*net\.fp32\.plan was built"):
            TensorRtRuntime(plan)


def test_somebody_elses_engine_with_a_trusted_manifest(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with TensorRtRuntime(plan, trusted_manifest=plan.parent / manifest.FILE_NAME) as runtime:
        assert runtime.run(images(1))["logits"].shape == (1, 5)


def test_out_of_memory_for_a_context(plan: Path, tensorrt: ModuleType) -> None:
    with TensorRtRuntime(plan) as runtime:
        faults(tensorrt).out_of_memory_in_context = True
        for call in (runtime.run, lambda batch: runtime.lane([batch]), runtime.profile):
            with pytest.raises(
                WorkError, match=r"memory of the NVIDIA H200 does not suffice.*out of memory.*a smaller"
            ):
                call(images(2))
        faults(tensorrt).out_of_memory_in_context = False
        assert runtime.run(images(2))["logits"].shape == (2, 5)


def test_out_of_memory_for_tensors(plan: Path, tensorrt: ModuleType) -> None:
    with TensorRtRuntime(plan) as runtime:
        faults(tensorrt).out_of_memory_on_device = True
        with pytest.raises(WorkError, match=r"for net\.fp32\.plan to make a lane: CUDA out of memory"):
            runtime.lane([images(2)])
        with pytest.raises(WorkError, match=r"for net\.fp32\.plan to run: CUDA out of memory"):
            runtime.run(images(2))
    faults(tensorrt).out_of_memory_in_load = True
    with pytest.raises(WorkError, match=r"does not suffice for net\.fp32\.plan to load it: .*out of memory"):
        TensorRtRuntime(plan)


def test_failed_inference_quotes_tensorrt(runtime: TensorRtRuntime, tensorrt: ModuleType) -> None:
    lane = runtime.lane([images(2)])
    faults(tensorrt).fail_enqueue = True
    lane.query(0)  # a replayed graph does not pass through the context
    with pytest.raises(WorkError, match=r"TensorRT failed on net\.fp32\.plan: .*unspecified launch failure"):
        runtime.run(images(2))


def test_an_error_of_before_is_not_the_reason_of_the_next(runtime: TensorRtRuntime, tensorrt: ModuleType) -> None:
    switches = faults(tensorrt)
    switches.out_of_memory_in_context = True
    with pytest.raises(WorkError, match="does not suffice"):
        runtime.lane([images(2)])
    switches.out_of_memory_in_context, switches.fail_enqueue = False, True
    with pytest.raises(WorkError, match="unspecified launch failure"):
        runtime.lane([images(2)])


def test_cuda_error_during_a_query(runtime: TensorRtRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = runtime.lane([images(2)])

    def fail(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("tests.fakes.cuda.FakeStream.synchronize", fail)
    for call in (lane.query, lane.stages):
        with pytest.raises(
            WorkError, match=r"TensorRT failed on net\.fp32\.plan: CUDA error: an illegal memory access"
        ):
            call(0)
    runtime.close()  # a GPU that has failed can still be given up


def test_closed_runtime_and_its_lanes_are_refused(plan: Path) -> None:
    runtime = TensorRtRuntime(plan)
    lane = runtime.lane([images(2)])
    lane.query(0)
    runtime.close()
    runtime.close()
    for call in (
        lambda: runtime.run(images(2)),
        lambda: runtime.lane([images(2)]),
        lambda: runtime.profile(images(2)),
        runtime.layers,
        runtime.description,
        lambda: lane.query(0),
        lambda: lane.stages(0),
        lane.outputs,
    ):
        with pytest.raises(InputError, match="closed"):
            call()


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_lane_that_outlives_the_runtimes_name(plan: Path, exported: tuple[nn.Module, Path], cuda_graph: bool) -> None:
    lane = TensorRtRuntime(plan, cuda_graph=cuda_graph).lane([images(2)])
    gc.collect()
    lane.query(0)
    check(lane, exported, images(2))


def test_types_of_inputs_and_outputs(tmp_path: Path, tensorrt: ModuleType) -> None:
    path = text_model(
        tmp_path / "types.onnx",
        """
        <ir_version: 10, opset_import: ["" : 20]>
        network (bfloat16[batch, 2] images, int64[batch, 2] numbers, float16[batch, 2] halves)
            => (bfloat16[batch, 2] doubled, int8[batch, 2] small, bool[batch, 2] same, int32[batch, 2] whole)
        {
            doubled = Add(images, images)
            small = Cast<to = 3>(numbers)
            same = Equal(halves, halves)
            whole = Cast<to = 6>(halves)
        }
        """,
    )
    build_engine(path, path.with_suffix(".plan"), batch=BATCH)
    with TensorRtRuntime(path.with_suffix(".plan")) as runtime:
        assert [spec.dtype for spec in runtime.inputs] == ["bfloat16", "int64", "float16"]
        assert [spec.dtype for spec in runtime.outputs] == ["bfloat16", "int8", "bool", "int32"]
        batch = {
            "images": np.array([[1, 2]], ml_dtypes.bfloat16),
            "numbers": np.array([[-3, 4]], np.int64),
            "halves": np.array([[5, 6]], np.float16),
        }
        lane = runtime.lane([{name: 0 * array for name, array in batch.items()}, batch])
        lane.query(1)
        for outputs in (runtime.run(batch), lane.outputs()):
            assert outputs["doubled"].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(outputs["doubled"].astype(np.float32), [[2, 4]])
            np.testing.assert_array_equal(outputs["small"], np.array([[-3, 4]], np.int8), strict=True)
            np.testing.assert_array_equal(outputs["same"], np.array([[True, True]]), strict=True)
            np.testing.assert_array_equal(outputs["whole"], np.array([[5, 6]], np.int32), strict=True)


def test_type_that_cannot_be_bound(tmp_path: Path, tensorrt: ModuleType) -> None:
    path = text_model(
        tmp_path / "fp8.onnx",
        """
        <ir_version: 10, opset_import: ["" : 20]>
        network (float[batch, 2] images) => (float8e4m3fn[batch, 2] codes)
        <float scale = {1}, float8e4m3fn zero = {0}> { codes = QuantizeLinear(images, scale, zero) }
        """,
    )
    build_engine(path, path.with_suffix(".plan"), batch=BATCH)
    with pytest.raises(InputError, match=r"fp8\.plan: codes is a tensor of type .*FP8.*float32 inputs and outputs"):
        TensorRtRuntime(path.with_suffix(".plan"))


def test_missing_tensorrt_names_the_extra(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"Running a TensorRT engine needs tensorrt.*espalier\[tensorrt\]"):
        TensorRtRuntime(plan)


@pytest.mark.parametrize(("fake", "real"), [(FakeCuda, CudaDevice), (FakeStream, Stream)])
def test_the_stand_in_has_the_surface_of_the_device(fake: type, real: type) -> None:
    for name, member in vars(real).items():
        if name.startswith("_") or isinstance(member, property):
            continue
        if callable(member) and not isinstance(member, type):
            parameters = (list(inspect.signature(getattr(kind, name)).parameters) for kind in (fake, real))
            assert next(parameters) == next(parameters), name
        else:
            assert hasattr(fake, name), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_that_is_no_gpu(device: str) -> None:
    with pytest.raises(InputError, match=f"not on device {device}; choose cuda or cuda:N"):
        CudaDevice(torch.device(device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_machine_without_a_gpu() -> None:
    with pytest.raises(InputError, match="Device cuda was asked for, but PyTorch finds no CUDA GPU"):
        CudaDevice(torch.device("cuda"))
