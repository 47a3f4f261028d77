"""The fake builds as TensorRT does: protocol, refusals, profiles, progress, timing caches, errors."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.fakes.fixtures import LISTINGS
from tests.fakes.protocol import Bound, Session, expected, images, network, quantised, with_node
from tests.fakes.tensorrt import build_fake, faults


def test_the_network_must_be_strongly_typed(session: Session) -> None:
    with pytest.raises(RuntimeError, match="STRONGLY_TYPED"):
        session.builder.create_network()


def test_plugins_come_before_parsing(tensorrt: ModuleType, tmp_path: Path) -> None:
    logger = tensorrt.Logger()
    builder = tensorrt.Builder(logger)
    net = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(net, logger)
    with pytest.raises(RuntimeError, match="init_libnvinfer_plugins"):
        parser.parse_from_file("model.onnx")


def test_a_parsed_network_can_be_read(session: Session, tmp_path: Path) -> None:
    assert session.parse(tmp_path, network())
    tensor = session.network.get_input(0)
    assert (tensor.name, tuple(tensor.shape), tensor.dtype) == ("images", (-1, 3, 8, 8), session.trt.DataType.FLOAT)
    assert tensor.get_dimension_name(0) == "batch"
    assert session.network.num_outputs == 1
    assert session.network.num_layers == 7


def unmixed() -> onnx.ModelProto:
    model = network()
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    return model


BAD_MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "opset": (lambda: network(opset=25), "UNSUPPORTED_GRAPH", "opset 25"),
    "operator": (
        lambda: with_node(network(), helper.make_node("Unique", ["images"], ["u"], name="odd")),
        "UNSUPPORTED_NODE",
        "Plugin not found",
    ),
    "domain": (
        lambda: with_node(network(), helper.make_node("Gelu", ["images"], ["u"], name="odd", domain="com.microsoft")),
        "UNSUPPORTED_NODE",
        "Plugin not found",
    ),
    "asymmetric": (lambda: quantised(np.int8, 3), "UNSUPPORTED_NODE", "Non-zero zero point"),
    "unsigned": (lambda: quantised(np.uint8, 0), "UNSUPPORTED_NODE_DATATYPE", "of UINT8"),
    "bias": (
        lambda: quantised(np.int32, 0, operator="DequantizeLinear"),
        "UNSUPPORTED_NODE_DATATYPE",
        "of INT32",
    ),
    "mixed types": (unmixed, "UNSUPPORTED_NODE_DATATYPE", "FLOAT and FLOAT16"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_the_parser_refuses(session: Session, tmp_path: Path, case: str) -> None:
    make, code, text = BAD_MODELS[case]
    assert not session.parse(tmp_path, make())
    assert session.parser.num_errors >= 1
    error = session.parser.get_error(0)
    assert error.code() == getattr(session.trt.ErrorCode, code)
    assert text in error.desc()
    if code != "UNSUPPORTED_GRAPH":
        node = make().graph.node[error.node()]
        assert (error.node_name(), error.node_operator()) == (node.name, node.op_type)
    assert session.logger.messages[-1][0] == session.trt.ILogger.ERROR


def test_the_parser_refuses_files(session: Session, tmp_path: Path) -> None:
    assert not session.parser.parse_from_file(str(tmp_path / "absent.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 64)
    assert not session.parser.parse_from_file(str(tmp_path / "bad.onnx"))
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    assert not session.parser.parse_from_file(str(tmp_path / "m.onnx"))
    assert "external data" in session.parser.get_error(2).desc()


def test_external_weights_go_into_the_plan(session: Session, tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert session.parser.parse_from_file(str(tmp_path / "m.onnx"))
    session.add_profile()
    plan = bytes(session.builder.build_serialized_network(session.network, session.config))
    (tmp_path / "m.data").unlink()
    run = Bound(session, session.context(plan), images())
    run.enqueue()
    np.testing.assert_allclose(run.result(), expected(network(), images()), rtol=1e-4, atol=1e-5)


def test_a_dynamic_network_needs_a_profile(session: Session, tmp_path: Path) -> None:
    assert session.parse(tmp_path, network())
    assert session.builder.build_serialized_network(session.network, session.config) is None
    code, text = session.recorder.errors[-1]
    assert code == session.trt.ErrorCodeTRT.INVALID_CONFIG
    assert "no optimization profile" in text
    assert session.logger.messages[-1] == (session.trt.ILogger.ERROR, text)


def test_profiles_must_be_consistent(session: Session, tmp_path: Path) -> None:
    profile = session.builder.create_optimization_profile()
    with pytest.raises(RuntimeError, match="opt is inconsistent"):
        profile.set_shape("images", (4, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))
    profile.set_shape("images", (1, 3, 9, 8), (2, 3, 9, 8), (8, 3, 9, 8))
    session.config.add_optimization_profile(profile)
    assert session.parse(tmp_path, network())
    assert session.builder.build_serialized_network(session.network, session.config) is None
    assert "Dimensions in profile 0" in session.recorder.errors[-1][1]


def test_the_configuration_keeps_what_is_set(session: Session) -> None:
    trt, config = session.trt, session.config
    assert config.get_flag(trt.BuilderFlag.TF32)
    config.clear_flag(trt.BuilderFlag.TF32)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 30
    config.builder_optimization_level = 6
    assert config.builder_optimization_level == 3
    assert "level" in session.recorder.errors[-1][1]


def test_a_plan_depends_on_nothing_but_the_input(tensorrt: ModuleType, tmp_path: Path) -> None:
    assert Session(tensorrt).plan(tmp_path) == Session(tensorrt).plan(tmp_path)


def test_host_memory_is_a_buffer_and_nothing_more(session: Session, tmp_path: Path) -> None:
    assert session.parse(tmp_path, network())
    session.add_profile()
    memory = session.builder.build_serialized_network(session.network, session.config)
    assert memory.nbytes == len(bytes(memory)) == memoryview(memory).nbytes
    assert memory
    with pytest.raises(TypeError):
        len(memory)
    with pytest.raises(AttributeError):
        memory.hex()
    (tmp_path / "file").write_bytes(memory)
    assert session.runtime.deserialize_cuda_engine(memory) is not None


def test_progress_is_reported_in_nested_phases(session: Session, tmp_path: Path) -> None:
    events: list[tuple[Any, ...]] = []

    class Monitor(session.trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            events.append(("start", phase_name, parent_phase))

        def step_complete(self, phase_name: str, step: int) -> bool:
            events.append(("step", phase_name, step))
            return True

        def phase_finish(self, phase_name: str) -> None:
            events.append(("finish", phase_name))

    monitor = Monitor()
    session.config.progress_monitor = monitor
    session.plan(tmp_path)
    assert events[0] == ("start", "Building Engine", None)
    assert events[1] == ("start", "Tactic Selection", "Building Engine")
    assert events[-1] == ("finish", "Building Engine")


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_monitor_cancels_a_build(session: Session, tmp_path: Path, interrupted: bool) -> None:
    finished: list[str] = []

    class Monitor(session.trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            if interrupted:
                raise KeyboardInterrupt
            return False

        def phase_finish(self, phase_name: str) -> None:
            finished.append(phase_name)

    monitor = Monitor()
    session.config.progress_monitor = monitor
    assert session.parse(tmp_path, network())
    session.add_profile()
    assert session.builder.build_serialized_network(session.network, session.config) is None
    assert finished == ["Tactic Selection", "Building Engine"]
    assert session.recorder.errors == []


def test_a_callback_that_fails_is_found_out(session: Session, tmp_path: Path) -> None:
    class Monitor(session.trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None) -> None: ...

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def phase_finish(self, phase_name: str) -> None: ...

    monitor = Monitor()
    session.config.progress_monitor = monitor
    assert session.parse(tmp_path, network())
    session.add_profile()
    with pytest.raises(RuntimeError, match="phase_start raised"):
        session.builder.build_serialized_network(session.network, session.config)


def test_a_timing_cache_is_filled_kept_and_checked(session: Session, tmp_path: Path) -> None:
    config = session.config
    assert config.get_timing_cache() is None
    assert config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    session.plan(tmp_path)
    data = bytes(config.get_timing_cache().serialize())
    assert config.set_timing_cache(config.create_timing_cache(data), False)
    assert config.create_timing_cache(data[:-3]) is None
    other = build_fake(LISTINGS["11.4" if session.trt.__version__.startswith("10") else "10.16"])
    elsewhere = Session(other)
    assert not elsewhere.config.set_timing_cache(elsewhere.config.create_timing_cache(data), True)
    gpu = Session(build_fake(LISTINGS[".".join(session.trt.__version__.split(".")[:2])], gpu="NVIDIA L4"))
    assert not gpu.config.set_timing_cache(gpu.config.create_timing_cache(data), False)
    assert "timing cache" in gpu.recorder.errors[-1][1]
    assert gpu.config.set_timing_cache(gpu.config.create_timing_cache(data), True)


def test_failures_of_a_build_are_reported(session: Session, tmp_path: Path) -> None:
    assert session.parse(tmp_path, network())
    session.add_profile()
    faults(session.trt).out_of_memory_in_build = True
    assert session.builder.build_serialized_network(session.network, session.config) is None
    assert "OutOfMemory" in session.recorder.errors[-1][1]
    faults(session.trt).out_of_memory_in_build = False
    faults(session.trt).fail_build = True
    assert session.builder.build_serialized_network(session.network, session.config) is None
    assert "Could not find any implementation" in session.recorder.errors[-1][1]
