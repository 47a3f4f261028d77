"""The building side: Builder, networks, and the build itself."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from tests.fakes.classes import Api, Borrowed, Model
from tests.fakes.configuration import BuilderConfig, OptimizationProfile
from tests.fakes.interfaces import Callback, Dims, ErrorReporter, HostMemory, Reporting, call
from tests.fakes.plan import Header, Layer, Plan, Tensor, is_typed, tensor_of

WHERE = "IBuilder::buildSerializedNetwork"


class CancelledError(Exception):
    """The progress monitor asked for the build to stop."""


class Builder(ErrorReporter):
    public = "Builder"
    settable: ClassVar[Mapping[str, str]] = {**ErrorReporter.settable, "max_threads": "SupportsInt"}
    logger = Callback("the logger given to a Builder")

    def __init__(self, api: Api, logger: Any) -> None:
        super().__init__(api)
        self.logger = logger
        self.max_threads = 1

    def create_network(self, flags: int) -> "NetworkDefinition":
        known = self.api.enums["NetworkDefinitionCreationFlag"].__members__
        bits = {name: 1 << int(flag) for name, flag in known.items()}
        if flags & ~sum(bits.values()):
            raise RuntimeError(f"create_network: {flags:#x} has bits that are no NetworkDefinitionCreationFlag")
        if not flags & bits["STRONGLY_TYPED"]:
            raise RuntimeError("create_network: the network must be STRONGLY_TYPED (bit 1 << int(flag))")
        return NetworkDefinition(self, flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig(self.api, self)

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile(self.api, self)

    def build_serialized_network(self, network: Any, config: Any, kernel_text: Any = None) -> HostMemory | None:
        """A plan, or None with the error reported, or None where the progress monitor cancels."""
        if kernel_text is not None:
            raise NotImplementedError("the fake of tensorrt does not model kernel_text")
        definition, settings = self.api.model(network), self.api.model(config)
        if definition.parent is not self or settings.parent is not self:
            raise RuntimeError("the network and its configuration must come from the Builder that builds")
        problem = definition.problem() or settings.problem(definition.inputs)
        if problem:
            self.report("INVALID_CONFIG", WHERE, problem)
            return None
        faults = self.api.machine.faults
        if faults.out_of_memory_in_build:
            self.report_out_of_memory("[builder.cpp::buildSerializedNetwork::751]", 68_719_476_736)
            return None
        if faults.fail_build:
            text = f"Could not find any implementation for node {definition.layers[0].name}."
            self.report("INTERNAL_ERROR", WHERE, text, label="Internal Error")
            return None
        try:
            self._select_tactics(definition.layers, settings)
        except CancelledError:
            self.log("INFO", "The build was cancelled by the progress monitor.")
            return None
        self.log("INFO", "Engine generation completed.")
        header = self._header(definition, settings)
        return HostMemory(self.api, Plan(header, definition.model.SerializeToString(deterministic=True)).encode())

    def _select_tactics(self, layers: tuple[Layer, ...], settings: BuilderConfig) -> None:
        monitor = settings.progress_monitor
        with _phase(monitor, "Building Engine", None, 2):
            # One step more than comes: a phase may end early.
            with _phase(monitor, "Tactic Selection", "Building Engine", len(layers) + 1):
                for step, layer in enumerate(layers):
                    settings.remember_timing(layer)
                    self.log("VERBOSE", f"Layer {layer.name} ({layer.operator}): tactic selected")
                    _step(monitor, "Tactic Selection", step)
            _step(monitor, "Building Engine", 0)
            with _phase(monitor, "Serialization", "Building Engine", 1):
                _step(monitor, "Serialization", 0)
            _step(monitor, "Building Engine", 1)

    def _header(self, definition: "NetworkDefinition", settings: BuilderConfig) -> Header:
        flags = settings.flag_names
        machine = self.api.machine
        return Header(
            version=self.api.version,
            gpu=machine.gpu,
            compute_capability=machine.compute_capability,
            hardware_compatibility=settings.hardware_compatibility_level.name,
            version_compatible="VERSION_COMPATIBLE" in flags,
            lean_runtime="VERSION_COMPATIBLE" in flags and "EXCLUDE_LEAN_RUNTIME" not in flags,
            refittable="REFIT" in flags,
            tf32="TF32" in flags,
            verbosity=settings.profiling_verbosity.name,
            optimization_level=settings.builder_optimization_level,
            workspace_bytes=settings.workspace_bytes,
            name=definition.name,
            profiles=tuple(dict(profile.shapes) for profile in settings.profiles),
            inputs=definition.inputs,
            outputs=definition.outputs,
            tensors=definition.tensors,
            layers=definition.layers,
        )


@contextmanager
def _phase(monitor: Any, name: str, parent: str | None, steps: int) -> Iterator[None]:
    if monitor is not None:
        call(monitor, "phase_start", None, name, parent, steps)
    try:
        yield
    finally:
        if monitor is not None:
            call(monitor, "phase_finish", None, name)


def _step(monitor: Any, name: str, step: int) -> None:
    # None: interrupted, which TensorRT takes as a wish to cancel.
    if monitor is not None and not call(monitor, "step_complete", bool, name, step):
        raise CancelledError


class NetworkDefinition(Reporting):
    """Empty until the parser fills it."""

    public = "INetworkDefinition"
    settable: ClassVar[Mapping[str, str]] = {"name": "str"}
    builder = Borrowed("the Builder of a network")

    def __init__(self, builder: Builder, flags: int) -> None:
        super().__init__(builder.api, builder)
        self.builder = builder.api.expose(builder)
        self.flags = flags
        self.name = "Unnamed Network 0"
        self.model: Any = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.tensors: tuple[Tensor, ...] = ()
        self.layers: tuple[Layer, ...] = ()

    def fill(self, model: Any) -> None:
        """Take over a parsed ONNX model."""
        weights = {tensor.name for tensor in model.graph.initializer}
        self.model = model
        self.name = model.graph.name or self.name
        self.inputs = tuple(tensor_of(value) for value in model.graph.input if value.name not in weights)
        self.outputs = tuple(tensor_of(value) for value in model.graph.output)
        self.tensors = tuple(tensor_of(value) for value in model.graph.value_info if is_typed(value))
        self.layers = tuple(
            Layer(
                node.name or f"{node.op_type}_{place}",
                node.op_type,
                tuple(name for name in node.input if name and name not in weights),
                tuple(name for name in node.output if name),
            )
            for place, node in enumerate(model.graph.node)
        )

    def problem(self) -> str | None:
        """Why it cannot be built, or None."""
        return None if self.outputs else "Network must have at least one output"

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, index: int) -> "NetworkTensor":
        return NetworkTensor(self, self.inputs[index], is_input=True)

    def get_output(self, index: int) -> "NetworkTensor":
        return NetworkTensor(self, self.outputs[index], is_input=False)

    def get_flag(self, flag: Any) -> bool:
        return bool(self.flags & 1 << int(flag))


class NetworkTensor(Model):
    """An input or output of a network; it can be read, not changed."""

    public = "ITensor"
    network = Borrowed("the network of a tensor")

    def __init__(self, network: NetworkDefinition, tensor: Tensor, *, is_input: bool) -> None:
        super().__init__(network.api, network)
        self.network = network.api.expose(network)
        self.name = tensor.name
        self.is_network_input = is_input
        self.is_network_output = not is_input
        self.is_execution_tensor = True
        self.is_shape_tensor = False
        self._tensor = tensor

    @property
    def dtype(self) -> Any:
        return getattr(self.api.enums["DataType"], self._tensor.data_type)

    @property
    def shape(self) -> Dims:
        return Dims(self.api, self._tensor.shape)

    def get_dimension_name(self, index: int) -> str:
        return self._tensor.dimensions[index]


MODELS: tuple[type[Model], ...] = (Builder, NetworkDefinition, NetworkTensor)
