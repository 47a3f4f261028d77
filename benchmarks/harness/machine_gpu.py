"""NVIDIA's GPUs by NVML, the driver's own library. It makes no CUDA context, so it takes no memory on the GPU.

GPUs are numbered as NVML lists them, in the order of the PCI bus: CUDA_VISIBLE_DEVICES does not apply here, so where
it may be set a UUID is the safe name.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.machine_files import ROOT, text

REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
"""Why a GPU does not run at its highest clock: nvmlClocksEventReason* of nvml.h."""

PLAIN = frozenset({"gpu_idle", "applications_clocks_setting"})
"""Reasons that tell nothing went wrong: there was no work, or someone chose the clock."""


class GpuSample(NamedTuple):
    """A GPU at one moment."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    reasons: int | None
    memory_used_bytes: int | None


class Nvml:
    """The opened library. Not every GPU and driver answers every question: those not answered are None."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def open(cls) -> "Nvml | None":
        """None where there is no driver."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        return cls(pynvml)

    def close(self) -> None:
        self.ask("nvmlShutdown")

    def ask(self, query: str, *arguments: Any) -> Any:
        """Call the library's function `query`; an argument that is the name of a constant stands for its value."""
        function = getattr(self._library, query, None)
        if function is None:  # another version of the Python package
            return None
        values = [getattr(self._library, item) if isinstance(item, str) else item for item in arguments]
        try:
            return function(*values)
        except self._library.NVMLError:
            return None

    def handles(self, chosen: bool | Sequence[int | str]) -> dict[int, Any]:
        """Number and handle of every GPU, or of those chosen by number or UUID.

        Raises:
            HarnessInputError: a GPU is chosen that the driver does not list.
        """
        listed = {index: self.ask("nvmlDeviceGetHandleByIndex", index) for index in range(self.count())}
        if isinstance(chosen, bool):
            return listed if chosen else {}
        numbers: dict[int | str, int] = {index: index for index in listed}
        for index, handle in listed.items():
            uuid = self.ask("nvmlDeviceGetUUID", handle)
            if uuid is not None:
                numbers[uuid] = index
        unknown = [str(item) for item in chosen if item not in numbers]
        if unknown:
            raise HarnessInputError(
                f"There is no GPU {unknown[0]}: the driver lists {', '.join(map(str, numbers)) or 'none'}; choose "
                "one of them."
            )
        return {numbers[item]: listed[numbers[item]] for item in chosen}

    def count(self) -> int:
        return self.ask("nvmlDeviceGetCount") or 0

    def sample(self, handle: Any) -> GpuSample:
        memory = self.ask("nvmlDeviceGetMemoryInfo", handle)
        return GpuSample(
            sm_clock_mhz=self.ask("nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_SM"),
            memory_clock_mhz=self.ask("nvmlDeviceGetClockInfo", handle, "NVML_CLOCK_MEM"),
            power_w=_thousandth(self.ask("nvmlDeviceGetPowerUsage", handle)),
            temperature_c=self.temperature_c(handle),
            reasons=self.ask("nvmlDeviceGetCurrentClocksEventReasons", handle),
            memory_used_bytes=None if memory is None else int(memory.used),
        )

    def temperature_c(self, handle: Any) -> int | None:
        found = self.ask("nvmlDeviceGetTemperatureV", handle, "NVML_TEMPERATURE_GPU")
        # Older drivers do not know that function, and later packages will not know this one.
        return self.ask("nvmlDeviceGetTemperature", handle, "NVML_TEMPERATURE_GPU") if found is None else found

    def compute_processes(self, handle: Any) -> dict[int, int | None] | None:
        """Bytes on the GPU by process; the bytes are None where the driver does not tell."""
        processes = self.ask("nvmlDeviceGetComputeRunningProcesses", handle)
        if processes is None:
            return None
        return {process.pid: process.usedGpuMemory for process in processes}


def gpu_facts() -> list[dict[str, Any]]:
    """What is read of the GPUs that the driver lists; JSON values, an empty list where there is no driver."""
    nvml = Nvml.open()
    if nvml is None:
        return []
    try:
        driver = nvml.ask("nvmlSystemGetDriverVersion")
        return [_facts(nvml, index, handle, driver) for index, handle in nvml.handles(True).items()]
    finally:
        nvml.close()


def reason_names(bits: int) -> list[str]:
    """The names of the reasons in `bits`; a bit that has none here is given as a number."""
    return [REASONS.get(1 << place, hex(1 << place)) for place in range(bits.bit_length()) if bits >> place & 1]


def strangers(processes: Iterable[int], root: Path = ROOT) -> int | None:
    """How many of `processes` neither are this process nor descend from it.

    None where one of them cannot be seen from here: the driver may number processes as the machine outside this
    container does, and then nobody can tell whose they are.
    """
    ours = [_descends(process, root) for process in processes]
    return None if None in ours else ours.count(False)


def _descends(process: int, root: Path) -> bool | None:
    first = process
    while process != os.getpid():
        status = text(root / f"proc/{process}/stat")
        if status is None:
            return None if process == first else False
        process = int(status.rpartition(")")[2].split()[1])
        if process == 0:
            return False
    return True


def _facts(nvml: Nvml, index: int, handle: Any, driver: str | None) -> dict[str, Any]:
    def read(query: str, *arguments: str) -> Any:
        return nvml.ask(query, handle, *arguments)

    memory = read("nvmlDeviceGetMemoryInfo")
    capability = read("nvmlDeviceGetCudaComputeCapability")
    processes = nvml.compute_processes(handle)
    limits = read("nvmlDeviceGetPowerManagementLimitConstraints") or (None, None)
    return {
        "index": index,
        "name": read("nvmlDeviceGetName"),
        "uuid": read("nvmlDeviceGetUUID"),
        "driver": driver,
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
        "memory_bytes": None if memory is None else int(memory.total),
        "power_limit_w": _thousandth(read("nvmlDeviceGetPowerManagementLimit")),
        "power_limit_default_w": _thousandth(read("nvmlDeviceGetPowerManagementDefaultLimit")),
        "power_limit_max_w": _thousandth(limits[1]),
        "sm_clock_mhz": read("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        "sm_clock_max_mhz": read("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
        "sm_clock_application_mhz": read("nvmlDeviceGetApplicationsClock", "NVML_CLOCK_SM"),
        "sm_clock_application_default_mhz": read("nvmlDeviceGetDefaultApplicationsClock", "NVML_CLOCK_SM"),
        "memory_clock_mhz": read("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        "memory_clock_max_mhz": read("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_MEM"),
        "temperature_c": nvml.temperature_c(handle),
        "persistence_mode": _enabled(read("nvmlDeviceGetPersistenceMode")),
        "pcie_generation": read("nvmlDeviceGetCurrPcieLinkGeneration"),
        "pcie_generation_max": read("nvmlDeviceGetMaxPcieLinkGeneration"),
        "pcie_width": read("nvmlDeviceGetCurrPcieLinkWidth"),
        "pcie_width_max": read("nvmlDeviceGetMaxPcieLinkWidth"),
        "ecc": _enabled(read("nvmlDeviceGetEccMode")),
        "mig": _enabled(read("nvmlDeviceGetMigMode")),
        "compute_processes": None if processes is None else len(processes),
        "other_compute_processes": None if processes is None else strangers(processes),
    }


def _thousandth(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _enabled(mode: Any) -> bool | None:
    """The current mode, of a pair of the current and the pending one."""
    if mode is None:
        return None
    return bool(mode[0] if isinstance(mode, list | tuple) else mode)
