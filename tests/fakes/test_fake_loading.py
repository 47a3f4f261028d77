"""The fake loads what it built, refuses other plans, and describes the engine."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from onnx import TensorProto

from tests.fakes.cuda import FakeStream
from tests.fakes.fixtures import LISTINGS
from tests.fakes.protocol import Session, network
from tests.fakes.tensorrt import build_fake


def test_plans_of_other_versions_are_refused(tensorrt: ModuleType, tmp_path: Path) -> None:
    short = ".".join(tensorrt.__version__.split(".")[:2])
    older = Session(build_fake(LISTINGS[short], version="10.13.0.1"))
    session = Session(tensorrt)
    assert session.runtime.deserialize_cuda_engine(older.plan(tmp_path)) is None
    code, text = session.recorder.errors[-1]
    assert code == tensorrt.ErrorCodeTRT.FAILED_INITIALIZATION
    assert "10.13.0.1" in text
    compatible = Session(build_fake(LISTINGS[short], version="10.13.0.1"))
    compatible.config.set_flag(compatible.trt.BuilderFlag.VERSION_COMPATIBLE)
    plan = compatible.plan(tmp_path)
    assert session.runtime.deserialize_cuda_engine(plan) is None
    assert "host code" in session.recorder.errors[-1][1]
    session.runtime.engine_host_code_allowed = True
    assert session.runtime.deserialize_cuda_engine(plan) is not None


def test_plans_of_other_gpus_are_refused(tensorrt: ModuleType, tmp_path: Path) -> None:
    listing = LISTINGS[".".join(tensorrt.__version__.split(".")[:2])]
    session = Session(tensorrt)
    ada = build_fake(listing, gpu="NVIDIA L4", compute_capability=(8, 9))
    assert session.runtime.deserialize_cuda_engine(Session(ada).plan(tmp_path)) is None
    assert "expecting compute 9.0 got compute 8.9" in session.recorder.errors[-1][1]
    compatible = Session(ada)
    compatible.config.hardware_compatibility_level = ada.HardwareCompatibilityLevel.AMPERE_PLUS
    assert session.runtime.deserialize_cuda_engine(compatible.plan(tmp_path)) is not None
    sibling = build_fake(listing, gpu="NVIDIA H100")
    assert session.runtime.deserialize_cuda_engine(Session(sibling).plan(tmp_path)) is not None
    assert session.logger.messages[-1][0] == tensorrt.ILogger.WARNING


def test_garbage_is_no_plan(session: Session, tmp_path: Path) -> None:
    plan = session.plan(tmp_path)
    for data in (b"", b"garbage", plan[:-1], plan[:-1] + bytes([plan[-1] ^ 1])):
        assert session.runtime.deserialize_cuda_engine(data) is None
        assert "Serialization" in session.recorder.errors[-1][1]


def test_an_engine_describes_itself(session: Session, tmp_path: Path) -> None:
    trt = session.trt
    session.context(session.plan(tmp_path))
    engine = session.engine
    assert [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)] == ["images", "logits"]
    assert engine.get_tensor_mode("logits") == trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_dtype("images") == trt.DataType.FLOAT
    assert engine.get_tensor_location("images") == trt.TensorLocation.DEVICE
    assert tuple(engine.get_tensor_shape("logits")) == (-1, 5)
    assert [shape[0] for shape in engine.get_tensor_profile_shape("images", 0)] == [1, 2, 4]
    assert engine.num_optimization_profiles == 1


def test_the_inspector_changed_its_keys(session: Session, tmp_path: Path) -> None:
    session.context(session.plan(tmp_path))
    inspector = session.engine.create_engine_inspector()
    information = json.loads(inspector.get_engine_information(session.trt.LayerInformationFormat.JSON))
    assert [layer["Name"] for layer in information["Layers"]][1] == "conv"
    if session.trt.__version__.startswith("10"):
        assert information["Bindings"] == ["images", "logits"]
    else:
        assert [tensor["Name"] for tensor in information["I/O Tensors"]] == ["images", "logits"]


def test_the_inspector_knows_dynamic_shapes_with_a_context(session: Session, tmp_path: Path) -> None:
    context = session.context(session.plan(tmp_path, network(element=TensorProto.FLOAT16)))
    inspector = session.engine.create_engine_inspector()
    key = "Format/Datatype" if session.trt.__version__.startswith("10") else "DataType"

    def conv() -> dict[str, Any]:
        text = inspector.get_engine_information(session.trt.LayerInformationFormat.JSON)
        return json.loads(text)["Layers"][1]

    assert conv()["Inputs"] == [conv()["Inputs"][0] | {"Dimensions": [-1, 3, 8, 8], key: "N/A due to dynamic shapes"}]
    stream = FakeStream()
    context.set_optimization_profile_async(0, stream.handle)
    context.set_input_shape("images", (3, 3, 8, 8))
    inspector.execution_context = context
    assert conv()["Outputs"][0]["Dimensions"] == [3, 4, 8, 8]
    assert conv()["Outputs"][0][key] == "Half"


def test_without_detail_the_inspector_gives_names(session: Session, tmp_path: Path) -> None:
    session.config.profiling_verbosity = session.trt.ProfilingVerbosity.LAYER_NAMES_ONLY
    session.context(session.plan(tmp_path))
    inspector = session.engine.create_engine_inspector()
    information = json.loads(inspector.get_engine_information(session.trt.LayerInformationFormat.JSON))
    assert information["Layers"][1] == "conv"
