"""TensorRT engines, built on the spot; and which modes can run here at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_suite.groups import Kind, Mode, Precision
from benchmarks.gpu_suite.networks import CHECKPOINT, Network
from benchmarks.harness.processes import call
from benchmarks.harness.results import Artefact
from compress.errors import InputError, first_line
from deploy.engine import BatchRange, BuilderSettings, build_engine
from deploy.runtimes import ort_providers
from deploy.runtimes.device import parse_device
from deploy.tensorrt_binding import import_tensorrt


def unavailable(mode: Mode, device: str) -> str | None:
    """Why nothing can run in this mode here; None where nothing speaks against it."""
    try:
        if mode.opens == "onnx":
            place = parse_device(device)
            ort_providers.library(ort_providers.choose(None, place), place)
        elif mode.opens == "plan":
            import_tensorrt("Building TensorRT engines")
        elif "compile=true" in mode.runtime and device != "cpu" and find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU, which is not installed."
    except InputError as error:
        return str(error)
    return None


@dataclass
class Files:
    """What each network is opened from; engines are built when they are first asked for."""

    folder: Path
    networks: Mapping[str, Network]
    batches: BatchRange
    failures: dict[tuple[str, Kind, Precision], str] = field(default_factory=dict)
    """(network, kind, precision) -> why it is missing."""
    _engines: dict[tuple[str, Precision], Artefact] = field(default_factory=dict)

    def artefact(self, network: str, kind: Kind, precision: Precision) -> Artefact | None:
        """The file, or the checkpoint as it is once it was converted; None if it is missing."""
        made = self.networks[network].artefacts
        if kind == "checkpoint":
            return made[CHECKPOINT].model_copy(update={"precision": precision})
        if kind == "plan":
            return self._engine(network, precision)
        if precision not in made:
            self.failures[network, kind, precision] = self.networks[network].failures[f"{precision}.onnx"]
        return made.get(precision)

    def path(self, artefact: Artefact) -> Path:
        return self.folder / artefact.path

    def _engine(self, network: str, precision: Precision) -> Artefact | None:
        key = network, precision
        if key in self._engines or (network, "plan", precision) in self.failures:
            return self._engines.get(key)
        source = self.artefact(network, "onnx", precision)
        if source is None:
            self.failures[network, "plan", precision] = self.failures[network, "onnx", precision]
            return None
        path = self.path(source)
        plan = path.with_suffix(".plan")
        settings = BuilderSettings(timing_cache=self.folder / "tensorrt.timing")
        arguments = {"onnx": path, "plan": plan, "batch": self.batches, "settings": settings}
        try:
            entry = call(build_engine, arguments, what=f"Building the engine of {network!r}")
        except Exception as error:  # noqa: BLE001 - the other networks' engines may build
            self.failures[network, "plan", precision] = f"{type(error).__name__}: {first_line(error)}"
            return None
        self._engines[key] = Artefact(
            path=str(plan.relative_to(self.folder)),
            sha256=entry.sha256,
            size_bytes=entry.size_bytes,
            precision=precision,
        )
        return self._engines[key]
