"""A made-up pynvml: only what Espalier calls is there, every call needs an open library and a handle of its own."""

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

NOT_SUPPORTED = 3


class NVMLError(Exception):
    """As pynvml's: its value is the driver's number for what went wrong."""

    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


@dataclass
class FakeGpu:
    """A GPU under load. `unsupported` names the functions that it does not answer."""

    uuid: str = "GPU-0"
    name: str = "NVIDIA A10"
    memory_used: int = 2 << 30
    power_w: float = 120.5
    temperature: int = 61
    sm_clocks: list[int] = field(default_factory=lambda: [1410])
    """The last one stays."""
    reasons: int = 0
    processes: dict[int, int | None] = field(default_factory=dict)
    unsupported: set[str] = field(default_factory=set)


class FakeNvml(types.ModuleType):
    """Stands for the module `pynvml`; `asked` lists the functions called, `opened` counts openings."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *gpus: FakeGpu, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.gpus = gpus
        self.driver = driver
        self.opened = 0
        self.asked: list[str] = []
        for name, answer in ANSWERS.items():
            setattr(self, name, self._query(name, answer))

    def _query(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def query(handle: Any, *arguments: int) -> Any:
            self._check(name)
            if not isinstance(handle, FakeGpu):
                raise TypeError(f"{name} was given {handle!r} for a handle")
            if name in handle.unsupported:
                raise NVMLError(NOT_SUPPORTED)
            return answer(handle, *arguments)

        return query

    def _check(self, name: str) -> None:
        self.asked.append(name)
        if self.opened <= 0:
            raise NVMLError(1)

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise NVMLError(12)
        self.opened += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self._check("nvmlShutdown")
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        self._check("nvmlSystemGetDriverVersion")
        return "570.86.10"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        self._check("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:  # noqa: N802
        self._check("nvmlDeviceGetHandleByIndex")
        return self.gpus[index]


def _clock(gpu: FakeGpu, kind: int) -> int:
    if kind == FakeNvml.NVML_CLOCK_MEM:
        return 6251
    return gpu.sm_clocks.pop(0) if len(gpu.sm_clocks) > 1 else gpu.sm_clocks[0]


def _processes(gpu: FakeGpu) -> list[types.SimpleNamespace]:
    return [types.SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in gpu.processes.items()]


ANSWERS: dict[str, Callable[..., Any]] = {
    "nvmlDeviceGetName": lambda gpu: gpu.name,
    "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
    "nvmlDeviceGetCudaComputeCapability": lambda gpu: (8, 6),
    "nvmlDeviceGetMemoryInfo": lambda gpu: types.SimpleNamespace(total=24 << 30, used=gpu.memory_used),
    "nvmlDeviceGetPowerManagementLimit": lambda gpu: 140_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: 150_000,
    "nvmlDeviceGetPowerManagementLimitConstraints": lambda gpu: [100_000, 155_000],
    "nvmlDeviceGetPowerUsage": lambda gpu: int(gpu.power_w * 1000),
    "nvmlDeviceGetClockInfo": _clock,
    "nvmlDeviceGetMaxClockInfo": lambda gpu, kind: 6251 if kind == FakeNvml.NVML_CLOCK_MEM else 1710,
    "nvmlDeviceGetApplicationsClock": lambda gpu, kind: 1320,
    "nvmlDeviceGetDefaultApplicationsClock": lambda gpu, kind: 1695,
    "nvmlDeviceGetTemperatureV": lambda gpu, sensor: gpu.temperature,
    "nvmlDeviceGetTemperature": lambda gpu, sensor: gpu.temperature,
    "nvmlDeviceGetPersistenceMode": lambda gpu: 1,
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda gpu: 1,
    "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: 4,
    "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: 8,
    "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: 16,
    "nvmlDeviceGetEccMode": lambda gpu: [1, 0],
    "nvmlDeviceGetMigMode": lambda gpu: [0, 1],
    "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.reasons,
    "nvmlDeviceGetComputeRunningProcesses": _processes,
}
"""What the functions that take a handle answer."""
