"""Loading: Runtime and engines."""

from collections.abc import Mapping
from typing import Any, ClassVar

from tests.fakes.classes import Api, Borrowed, Model
from tests.fakes.context import SCRATCH_BYTES, ExecutionContext
from tests.fakes.execution import Session
from tests.fakes.inspection import EngineInspector
from tests.fakes.interfaces import Callback, Dims, ErrorReporter, HostMemory
from tests.fakes.plan import Header, Plan, Shape, Tensor, UnreadableError


class Runtime(ErrorReporter):
    public = "Runtime"
    settable: ClassVar[Mapping[str, str]] = {
        **ErrorReporter.settable,
        "max_threads": "SupportsInt",
        "engine_host_code_allowed": "bool",
    }
    logger = Callback("the logger given to a Runtime")

    def __init__(self, api: Api, logger: Any) -> None:
        super().__init__(api)
        self.logger = logger
        self.max_threads = 1
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: memoryview) -> "CudaEngine | None":
        """None with an error for what is no plan, or one of another version or GPU."""
        data = bytes(serialized_engine)
        where = "IRuntime::deserializeCudaEngine"
        try:
            plan = Plan.decode(data)
        except UnreadableError as error:
            self.report("UNSPECIFIED_ERROR", where, f"Serialization assertion failed. {error}", label="Serialization")
            return None
        problem = self._problem(plan.header)
        if problem:
            self.report("FAILED_INITIALIZATION", where, problem)
            return None
        machine = self.api.machine
        if machine.faults.out_of_memory_in_load:
            self.report_out_of_memory("[engine.cpp::deserializeEngine::1148]", len(plan.model))
            return None
        if plan.header.gpu != machine.gpu and plan.header.hardware_compatibility == "NONE":
            text = "Using an engine plan file across different models of devices is not recommended and is likely to "
            self.log("WARNING", text + "affect performance or even cause errors.")
        return CudaEngine(self, plan, data)

    def _problem(self, header: Header) -> str | None:
        if header.lean_runtime and not self.engine_host_code_allowed:
            return "The engine plan file has host code, which engine_host_code_allowed does not permit."
        if header.version != self.api.version and not header.version_compatible:
            return (
                "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{self.api.version} got {header.version}, please rebuild."
            )
        here, built = self.api.machine.compute_capability, header.compute_capability
        if here != built and not (header.hardware_compatibility == "AMPERE_PLUS" and min(here, built) >= (8, 0)):
            return (
                "The engine plan file is generated on an incompatible device, expecting compute "
                f"{here[0]}.{here[1]} got compute {built[0]}.{built[1]}, please rebuild."
            )
        return None


class CudaEngine(ErrorReporter):
    """A deserialised plan; its ONNX Runtime session is made when it is first used."""

    public = "ICudaEngine"
    special = ("__len__", "__getitem__")
    runtime = Borrowed("the Runtime of an engine")

    def __init__(self, runtime: Runtime, plan: Plan, data: bytes) -> None:
        super().__init__(runtime.api, runtime)
        self.runtime = runtime.api.expose(runtime)
        self.plan = plan.header
        self.session = Session(plan)
        self.tensors = {tensor.name: tensor for tensor in (*plan.header.inputs, *plan.header.outputs)}
        self._data = data

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    @property
    def num_layers(self) -> int:
        return len(self.plan.layers)

    @property
    def num_optimization_profiles(self) -> int:
        return max(1, len(self.plan.profiles))

    @property
    def refittable(self) -> bool:
        return self.plan.refittable

    @property
    def profiling_verbosity(self) -> Any:
        return getattr(self.api.enums["ProfilingVerbosity"], self.plan.verbosity)

    @property
    def hardware_compatibility_level(self) -> Any:
        return getattr(self.api.enums["HardwareCompatibilityLevel"], self.plan.hardware_compatibility)

    @property
    def device_memory_size_v2(self) -> int:
        return SCRATCH_BYTES

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return SCRATCH_BYTES

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self.api.enums["TensorIOMode"]
        if self._tensor(name, "getTensorIOMode") is None:
            return modes.NONE
        return modes.INPUT if self.is_input(name) else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        tensor = self._tensor(name, "getTensorDataType")
        return getattr(self.api.enums["DataType"], tensor.data_type if tensor else "FLOAT")

    def get_tensor_shape(self, name: str) -> Dims:
        tensor = self._tensor(name, "getTensorShape")
        return Dims(self.api, tensor.shape if tensor else ())

    def get_tensor_location(self, name: str) -> Any:
        self._tensor(name, "getTensorLocation")
        return self.api.enums["TensorLocation"].DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Minimum, optimum and maximum of an input; all the same where it is static."""
        if not self.is_input(name) or not 0 <= profile_index < self.num_optimization_profiles:
            self.report("INVALID_ARGUMENT", "ICudaEngine::getProfileShape", f"{name} or {profile_index} is invalid")
            return []
        return [Dims(self.api, shape) for shape in self.profile_shapes(name, profile_index)]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def serialize(self) -> HostMemory:
        return HostMemory(self.api, self._data)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector(self)

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> ExecutionContext | None:
        """None with an error reported where there is not enough memory."""
        if runtime_config is not None or (strategy is not None and strategy.name == "ON_PROFILE_CHANGE"):
            raise NotImplementedError("the fake of tensorrt models contexts of strategy STATIC and USER_MANAGED only")
        if self.api.machine.faults.out_of_memory_in_context:
            self.report_out_of_memory("[executionContext.cpp::initializeExecutionContext::575]", SCRATCH_BYTES)
            return None
        return ExecutionContext(self, user_managed=strategy is not None and strategy.name == "USER_MANAGED")

    def is_input(self, name: str) -> bool:
        """Whether an input has this name."""
        return any(tensor.name == name for tensor in self.plan.inputs)

    def profile_shapes(self, name: str, profile: int) -> tuple[Shape, Shape, Shape]:
        """Minimum, optimum and maximum of an input."""
        static = self.tensors[name].shape
        return self.plan.profiles[profile].get(name, (static,) * 3) if self.plan.profiles else (static,) * 3

    def _tensor(self, name: str, where: str) -> Tensor | None:
        if name not in self.tensors:
            self.report("INVALID_ARGUMENT", f"ICudaEngine::{where}", f"Given invalid tensor name: {name}")
        return self.tensors.get(name)


MODELS: tuple[type[Model], ...] = (Runtime, CudaEngine)
