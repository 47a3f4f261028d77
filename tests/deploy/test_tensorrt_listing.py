"""Every attribute of TensorRT that the code touches exists in the real bindings of both majors."""

import json
from pathlib import Path

import pytest

from tests.deploy.tensorrt_attributes import Found, missing, touching, walk

ROOT = Path(__file__).parents[2]
LISTINGS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "tests" / "fakes" / "listings").glob("*.json"))
}
OLD, NEW = sorted(LISTINGS)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    every = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "deploy").rglob("*.py"))
    }
    return {name: every[name] for name in touching(every)}


@pytest.mark.parametrize("version", sorted(LISTINGS))
def test_every_attribute_exists(sources: dict[str, str], version: str) -> None:
    found = walk(sources, LISTINGS[version])
    assert {name: missing(item, LISTINGS[version]) for name, item in found.items()} == {name: [] for name in sources}
    assert {name: item.problems for name, item in found.items()} == {name: [] for name in sources}


def test_the_walk_sees_the_whole_path(sources: dict[str, str]) -> None:
    """Were an object lost on the way, what is called on it would be missing here."""
    touched = {pair for item in walk(sources, LISTINGS[NEW]).values() for pair in item.touched}
    assert touched >= {
        ("", "init_libnvinfer_plugins"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("OnnxParser", "parse_from_file"),
        ("ParserError", "node_operator"),
        ("IBuilderConfig", "progress_monitor"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("IOptimizationProfile", "set_shape"),
        ("ITimingCache", "serialize"),
        ("Builder", "build_serialized_network"),
        ("Runtime", "deserialize_cuda_engine"),
        ("Runtime", "error_recorder"),
        ("ICudaEngine", "create_execution_context"),
        ("ICudaEngine", "get_tensor_profile_shape"),
        ("IExecutionContext", "set_optimization_profile_async"),
        ("IExecutionContext", "set_input_shape"),
        ("IExecutionContext", "execute_async_v3"),
        ("IExecutionContext", "profiler"),
        ("EngineInspector", "get_engine_information"),
        ("IErrorRecorder", "report_error"),
        ("IProgressMonitor", "step_complete"),
        ("IProfiler", "report_layer_time"),
    }


def of(source: str, version: str = NEW) -> tuple[Found, list[str]]:
    found = walk({"code.py": source}, LISTINGS[version])["code.py"]
    return found, missing(found, LISTINGS[version])


MADE_UP = """
import tensorrt as trt
trt.Bilder
---
def f(trt: ModuleType):
    return trt.BuilderFlag.TF33
---
def f(trt: ModuleType):
    levels = trt.HardwareCompatibilityLevel
    return {"hopper": levels.HOPPER}
---
def f(trt: ModuleType):
    builder = trt.Builder(logger)
    network = builder.create_network(1)
    return network.layers
---
def f(engine: "tensorrt.ICudaEngine"):
    engine.num_bindings
---
def f(engine: "tensorrt.ICudaEngine | None"):
    engine.create_engine_inspector().text()
---
def f(parser: "tensorrt.OnnxParser"):
    return [parser.get_error(index).message() for index in range(3)]
---
def f(parser: "tensorrt.OnnxParser"):
    return [error.what() for error in [parser.get_error(index) for index in range(3)]]
---
def f(config: "tensorrt.IBuilderConfig"):
    config.max_workspace_size = 1
---
class A:
    def f(self):
        self._engine.go()
    def g(self, engine):
        self._engine: tensorrt.ICudaEngine = engine
---
def import_tensorrt() -> ModuleType: ...
class A:
    def f(self):
        self._trt = import_tensorrt()
        self._trt.nothing
---
def f(trt: ModuleType):
    class Profiler(trt.IProfiler):
        def report_time(self): ...
---
def make() -> "tensorrt.ILogger": ...
make().level
---
def f(runtime: "tensorrt.Runtime"):
    def g():
        with h():
            try:
                runtime.a
            finally:
                pass
"""
NAMES = """
Bilder BuilderFlag.TF33 HardwareCompatibilityLevel.HOPPER INetworkDefinition.layers ICudaEngine.num_bindings
EngineInspector.text ParserError.message ParserError.what IBuilderConfig.max_workspace_size ICudaEngine.go nothing
IProfiler.report_time ILogger.level Runtime.a
"""


@pytest.mark.parametrize(("source", "name"), list(zip(MADE_UP.split("---\n"), NAMES.split(), strict=True)))
def test_a_made_up_attribute_is_found(source: str, name: str) -> None:
    assert [item.partition(": ")[2] for item in of(source)[1]] == [f"tensorrt.{name}"]


def test_what_only_one_major_has_is_found() -> None:
    weakly_typed = "def f(trt: ModuleType):\n  return trt.BuilderFlag.FP16"
    assert of(weakly_typed, OLD)[1] == []
    assert of(weakly_typed, NEW)[1] == ["line 2: tensorrt.BuilderFlag.FP16"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(context):\n  context.execute_async_v3(1)",
        "def f(context: Any):\n  context.anything",
        "def f(trt: ModuleType):\n  getattr(trt, name)",
        "def f(engine: 'tensorrt.ICudaEngine'):\n  hasattr(engine, 'x')",
        "g(lambda engine: engine.num_layers)",
    ],
)
def test_what_cannot_be_followed_is_reported(source: str) -> None:
    assert of(source)[0].problems


def test_what_is_not_of_tensorrt_is_left_alone() -> None:
    found, lacking = of("import numpy as np\ndef f(path: Path, trt: ModuleType):\n  path.name\n  np.zeros(3).sum()")
    assert (found.touched, found.problems, lacking) == ({}, [], [])
