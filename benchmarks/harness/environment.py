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

from benchmarks.harness.cgroups import memory_limit_bytes
from benchmarks.harness.machine_cpu import cpu_facts, virtual_machine
from benchmarks.harness.machine_files import ROOT, field, text
from benchmarks.harness.machine_gpu import gpu_facts

LIBRARIES = (
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "nvidia-modelopt",
    "torch-pruning",
    "numpy",
    "scipy",
    "accelerate",
    "timm",
)


def environment(directory: Path | None = None, *, root: Path = ROOT) -> dict[str, Any]:
    """What a reader needs to judge, and to repeat, the figures. JSON values only.

    Args:
        directory: Where to look for a git repository; the working directory by default.
        root: Where /proc, /sys and /etc lie; tests give a made-up machine.
    """
    return {
        "cpu": cpu_facts(root),
        "threads": _threads(),
        "memory": _memory(root),
        "gpus": gpu_facts(),
        "system": {
            "os": _os_name(root),
            "kernel": platform.release(),
            "machine": platform.machine(),
            "clock_source": text(root / "sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "virtual_machine": virtual_machine(root),
            "vendor": text(root / "sys/class/dmi/id/sys_vendor"),
            "product": text(root / "sys/class/dmi/id/product_name"),
            "container": _container(root),
        },
        "python": platform.python_version(),
        "libraries": _versions(),
        "git": _git(directory or Path.cwd()),
    }


def _threads() -> dict[str, Any]:
    import torch  # here, so that a process that never asks can do without

    return {
        "torch_intra_op": torch.get_num_threads(),
        "torch_inter_op": torch.get_num_interop_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }


def _memory(root: Path) -> dict[str, Any]:
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "limit_bytes": memory_limit_bytes(root),
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
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


def _container(root: Path) -> str | None:
    """What kind of container this is, by the marks that container engines leave; None if none is seen."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    return os.environ.get("container")  # noqa: SIM112 - the name that systemd-nspawn and LXC set


def _os_name(root: Path) -> str:
    name = field(root / "etc/os-release", "PRETTY_NAME", "=")
    return name.strip('"') if name else platform.system()
