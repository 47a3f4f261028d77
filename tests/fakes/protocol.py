"""The protocol of TensorRT kept in order, and a network small enough to build in every test."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.reference
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.fakes import cuda
from tests.fakes.machine import Machine


def network(*, opset: int = 20, element: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Images (N, 3, 8, 8) -> Conv -> Relu -> mean -> Gemm -> logits (N, 5); inputs and outputs in float32."""
    random = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(element)
    weights = {
        "conv.weight": random.normal(size=(4, 3, 3, 3)),
        "conv.bias": random.normal(size=4),
        "head.weight": random.normal(size=(5, 4)),
        "head.bias": random.normal(size=5),
    }
    cast = helper.make_node("Cast", ["images"], ["x"], name="cast_in", to=element)
    nodes = [
        cast,
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="mean"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["h"], name="head", transB=1),
        helper.make_node("Cast", ["h"], ["logits"], name="cast_out", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "little",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype(kind), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def with_node(model: onnx.ModelProto, node: onnx.NodeProto, *constants: onnx.TensorProto) -> onnx.ModelProto:
    """The network with one more node, whose outputs are not used."""
    model.graph.initializer.extend(constants)
    model.graph.node.insert(1, node)
    return model


def quantised(kind: type[np.generic], zero: int, *, operator: str = "QuantizeLinear") -> onnx.ModelProto:
    """The network with a quantising node on the images, or a dequantising one on a constant."""
    constants = [
        numpy_helper.from_array(np.array(0.1, np.float32), "scale"),
        numpy_helper.from_array(np.array(zero, kind), "zero"),
        numpy_helper.from_array(np.ones(3, kind), "constant"),
    ]
    given = "images" if operator == "QuantizeLinear" else "constant"
    return with_node(network(), helper.make_node(operator, [given, "scale", "zero"], ["q"], name="q"), *constants)


class Session:
    """The protocol of TensorRT, kept in order, with every object kept alive."""

    def __init__(self, trt: ModuleType) -> None:
        class Logger(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()
                self.messages: list[tuple[Any, str]] = []

            def log(self, severity: Any, msg: str) -> None:
                self.messages.append((severity, msg))

        class Recorder(trt.IErrorRecorder):
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[tuple[Any, str]] = []

            def report_error(self, code: Any, text: str) -> bool:
                self.errors.append((code, text))
                return False

            def num_errors(self) -> int:
                return len(self.errors)

            def get_error_code(self, index: int) -> Any:
                return self.errors[index][0]

            def get_error_desc(self, index: int) -> str:
                return self.errors[index][1]

            def has_overflowed(self) -> bool:
                return False

            def clear(self) -> None:
                self.errors.clear()

        self.trt = trt
        self.logger = Logger()
        self.recorder = Recorder()
        self.builder = trt.Builder(self.logger)
        self.builder.error_recorder = self.recorder
        trt.init_libnvinfer_plugins(self.logger, "")
        self.network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self.runtime = trt.Runtime(self.logger)
        self.runtime.error_recorder = self.recorder

    def parse(self, path: Path, model: onnx.ModelProto) -> bool:
        onnx.save(model, path / "model.onnx")
        return self.parser.parse_from_file(str(path / "model.onnx"))

    def add_profile(self, least: int = 1, best: int = 2, most: int = 4) -> None:
        self.profile = self.builder.create_optimization_profile()
        self.profile.set_shape("images", *((size, 3, 8, 8) for size in (least, best, most)))
        assert self.config.add_optimization_profile(self.profile) == 0

    def plan(self, path: Path, model: onnx.ModelProto | None = None) -> bytes:
        assert self.parse(path, model or network())
        self.add_profile()
        memory = self.builder.build_serialized_network(self.network, self.config)
        assert memory is not None, self.recorder.errors
        return bytes(memory)

    def context(self, plan: bytes) -> Any:
        self.engine = self.runtime.deserialize_cuda_engine(plan)
        assert self.engine is not None, self.recorder.errors
        return self.engine.create_execution_context()


class Bound:
    """A context with a batch of the little network bound."""

    def __init__(self, session: Session, context: Any, images: np.ndarray) -> None:
        self.device = cuda.fake_cuda(Machine("NVIDIA H200", (9, 0)))(torch.device("cuda"))
        self.stream = self.device.stream()
        self.context = context
        assert context.set_optimization_profile_async(0, self.stream.handle)
        self.stream.synchronize()
        self.bind(images)

    def bind(self, images: np.ndarray) -> None:
        assert self.context.set_input_shape("images", images.shape)
        assert self.context.infer_shapes() == []
        self.images = self.device.put(images)
        self.logits = self.device.empty(tuple(self.context.get_tensor_shape("logits")), torch.float32)
        assert self.context.set_tensor_address("images", self.images.data_ptr())
        assert self.context.set_tensor_address("logits", self.logits.data_ptr())

    def enqueue(self) -> None:
        assert self.context.execute_async_v3(self.stream.handle)

    def result(self) -> np.ndarray:
        self.stream.synchronize()
        return self.device.take(self.logits)


def images(batch: int = 2, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, 3, 8, 8)).astype(np.float32)


def expected(model: onnx.ModelProto, batch: np.ndarray) -> np.ndarray:
    return onnx.reference.ReferenceEvaluator(model).run(None, {"images": batch})[0]


def bound(session: Session, path: Path) -> Bound:
    """A context of a freshly built little network, with a batch of two bound."""
    return Bound(session, session.context(session.plan(path)), images())
