"""The machine and the software a figure was measured on. Without them the figure means nothing.

Every field is read, never guessed: what cannot be read is None. Nothing here fails on a machine without a GPU, git
or a readable /sys.
"""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "numpy",
    "scipy",
    "accelerate",
    "timm",
)


def environment(directory: Path | None = None) -> dict[str, Any]:
    """What a reader needs to judge, and to repeat, the figures. JSON values only.

    Args:
        directory: Where to look for a git repository; the working directory by default.
    """
    return {
        "cpu": _cpu(),
        "threads": {
            "torch_intra_op": torch.get_num_threads(),
            "torch_inter_op": torch.get_num_interop_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory": {"total_bytes": psutil.virtual_memory().total},
        "gpus": _gpus(),
        "system": {
            "os": _os_name(),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "container": _container(),
        },
        "python": platform.python_version(),
        "libraries": _versions(),
        "git": _git(directory or Path.cwd()),
    }


def _cpu() -> dict[str, Any]:
    load_1, load_5, load_15 = os.getloadavg()
    return {
        "model": _field(Path("/proc/cpuinfo"), "model name", ":") or platform.processor() or None,
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "affinity": sorted(os.sched_getaffinity(0)),
        "quota": _text(Path("/sys/fs/cgroup/cpu.max")),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_average": [round(load, 2) for load in (load_1, load_5, load_15)],
    }


def _gpus() -> list[dict[str, Any]]:
    """The GPUs that the driver lists; an empty list where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [_gpu(pynvml, handle, driver) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, handle: Any, driver: str) -> dict[str, Any]:
    def read(query: Any, *arguments: Any) -> Any:
        try:
            return query(handle, *arguments)
        except pynvml.NVMLError:  # not every GPU answers every question
            return None

    memory = read(pynvml.nvmlDeviceGetMemoryInfo)
    power_mw = read(pynvml.nvmlDeviceGetPowerManagementLimit)
    capability = read(pynvml.nvmlDeviceGetCudaComputeCapability)
    mig = read(pynvml.nvmlDeviceGetMigMode)
    ecc = read(pynvml.nvmlDeviceGetEccMode)
    processes = read(pynvml.nvmlDeviceGetComputeRunningProcesses)
    return {
        "name": read(pynvml.nvmlDeviceGetName),
        "driver": driver,
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
        "memory_bytes": None if memory is None else int(memory.total),
        "power_limit_w": None if power_mw is None else power_mw / 1000,
        "sm_clock_mhz": read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": read(pynvml.nvmlDeviceGetMaxClockInfo, pynvml.NVML_CLOCK_SM),
        "temperature_c": read(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        "ecc": None if ecc is None else bool(ecc[0]),
        "mig": None if mig is None else bool(mig[0]),
        "compute_processes": None if processes is None else len(processes),
    }


def _versions() -> dict[str, str]:
    """Versions of those of `LIBRARIES` that are installed."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(directory: Path) -> dict[str, Any] | None:
    """Commit of the repository around `directory`, and whether files differ from it; None outside one."""
    status = _output(["git", "-C", str(directory), "status", "--porcelain"])
    if status is None:
        return None
    commit = _output(["git", "-C", str(directory), "rev-parse", "--verify", "--quiet", "HEAD"])
    return {"commit": commit or None, "dirty": bool(status)}


def _output(command: list[str]) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _container() -> str | None:
    """What kind of container this is, by the marks that container engines leave; None if none is seen."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    return os.environ.get("container")  # noqa: SIM112 - the name that systemd-nspawn and LXC set


def _os_name() -> str:
    name = _field(Path("/etc/os-release"), "PRETTY_NAME", "=")
    return name.strip('"') if name else platform.system()


def _field(path: Path, key: str, separator: str) -> str | None:
    """The first value of `key` in a file of `key separator value` lines."""
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
