"""The processor: what it is, what it may do, and how fast it is allowed to run."""

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.cgroups import quota_cores
from benchmarks.harness.machine_files import ROOT, field, listed, number, text

FLAGS = frozenset(
    {
        *("f16c", "fma", "avx", "avx2", "avx_vnni", "avx_vnni_int8", "avx_vnni_int16"),
        *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
        *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme", "sme2"),
    }
)
"""Instructions that decide how fast fp32, fp16, bf16 and int8 are, by the kernel's names (x86-64, then Arm)."""


def cpu_facts(root: Path = ROOT) -> dict[str, Any]:
    """What is read of the processor; JSON values, None where it cannot be read."""
    devices, described = root / "sys/devices/system/cpu", root / "proc/cpuinfo"
    cores = allowed_cores()
    frequency = devices / f"cpu{cores[0]}/cpufreq"
    seen = instructions(root)
    return {
        "model": field(described, "model name", ":") or platform.processor() or None,
        "microcode": field(described, "microcode", ":"),
        "flags": None if seen is None else sorted(FLAGS & seen),
        "sockets": _sockets(devices),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "smt": _switch(devices / "smt/active"),
        "affinity": cores,
        "numa_nodes": _numa_nodes(root, set()),
        "affinity_numa_nodes": _numa_nodes(root, set(cores)),
        "caches": _caches(devices / f"cpu{cores[0]}/cache"),
        "quota": text(root / "sys/fs/cgroup/cpu.max"),
        "quota_cores": quota_cores(root),
        "governor": text(frequency / "scaling_governor"),
        "frequency_driver": text(frequency / "scaling_driver"),
        "frequency_min_mhz": _mhz(frequency / "scaling_min_freq"),
        "frequency_max_mhz": _mhz(frequency / "scaling_max_freq"),
        "energy_preference": text(frequency / "energy_performance_preference"),
        "boost": _boost(devices),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def allowed_cores() -> list[int]:
    """The logical cores that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def instructions(root: Path = ROOT) -> set[str] | None:
    """All flags that the kernel lists of the processor; None where it lists none."""
    described = root / "proc/cpuinfo"
    flags = field(described, "flags", ":") or field(described, "Features", ":")
    return None if flags is None else set(flags.split())


def virtual_machine(root: Path = ROOT) -> bool | None:
    """Whether a hypervisor runs below this kernel; None where neither the processor nor the kernel tells."""
    if (root / "sys/hypervisor/type").exists():
        return True
    flags = field(root / "proc/cpuinfo", "flags", ":")  # Arm has "Features", which do not tell
    return None if flags is None else "hypervisor" in flags.split()


def frequencies_mhz(cores: list[int], root: Path = ROOT) -> list[float]:
    """The clock that each of `cores` runs at now; empty where the kernel does not measure it.

    Without frequency scaling and without the counters called aperfmperf, as in most virtual machines, the "cpu MHz"
    of /proc/cpuinfo is a constant (arch_freq_get_on_cpu in arch/x86/kernel/cpu/aperfmperf.c) and is not taken.
    """
    devices = root / "sys/devices/system/cpu"
    scaled = [_mhz(devices / f"cpu{core}/cpufreq/scaling_cur_freq") for core in cores]
    found = [mhz for mhz in scaled if mhz is not None]
    if found or "aperfmperf" not in (instructions(root) or ()):
        return found
    core = None
    for line in (text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "processor":
            core = int(value)
        elif key == "cpu MHz" and core in cores:
            found.append(float(value))
    return found


def _sockets(devices: Path) -> int | None:
    packages = {number(path) for path in devices.glob("cpu[0-9]*/topology/physical_package_id")} - {None, -1}
    return len(packages) or None


def _numa_nodes(root: Path, cores: set[int]) -> list[int] | None:
    """The memory nodes that have one of `cores`, or all where no cores are given."""
    folders = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    if not folders:
        return None
    return sorted(
        int(folder.name.removeprefix("node"))
        for folder in folders
        if not cores or cores & set(listed(text(folder / "cpulist")))
    )


def _caches(folder: Path) -> list[dict[str, Any]] | None:
    """The caches that one core sees, from the nearest to the farthest."""
    caches = [
        {
            "level": number(index / "level"),
            "type": (text(index / "type") or "").lower() or None,
            "size_bytes": _size_bytes(text(index / "size")),
            "shared_by_cores": len(listed(text(index / "shared_cpu_list"))) or None,
        }
        for index in sorted(folder.glob("index*"))
    ]
    return caches or None


def _size_bytes(written: str | None) -> int | None:
    """32K or 8M as bytes."""
    if not written or not written[:-1].isdigit():
        return None
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(written[-1])
    return None if unit is None else int(written[:-1]) * unit


def _boost(devices: Path) -> bool | None:
    """Whether cores may run above their base clock."""
    disabled = _switch(devices / "intel_pstate/no_turbo")
    return _switch(devices / "cpufreq/boost") if disabled is None else not disabled


def _switch(path: Path) -> bool | None:
    value = number(path)
    return None if value is None else bool(value)


def _mhz(path: Path) -> float | None:
    khz = number(path)
    return None if khz is None else khz / 1000
