"""Memory of processes: in the host by the kernel, on GPUs by their driver. Takes the standard library only."""

import os
import resource
from pathlib import Path

from benchmarks.harness.machine_files import field
from benchmarks.harness.machine_gpu import Nvml

STATUS = Path("/proc/self/status")


def host_bytes() -> int:
    """Memory of this process that lies in RAM now (its resident set)."""
    now = _kilobytes("VmRSS")
    return host_peak_bytes() if now is None else now * 1024


def host_peak_bytes() -> int:
    """The most memory of this process that has ever lain in RAM at once.

    By the kernel's own high-water mark, which begins anew with every program; `getrusage`, taken only where there is
    no such mark, also remembers what the process was before it became this program.
    """
    peak = _kilobytes("VmHWM")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if peak is None else peak) * 1024


def device_bytes(pid: int | None = None) -> int | None:
    """Memory that process `pid`, or this one, holds on all GPUs together, its CUDA contexts included.

    None where there is no GPU, where the process has nothing on one, or where the driver does not tell: in a
    container it may number processes as the machine outside does.
    """
    nvml = Nvml.open()
    if nvml is None:
        return None
    try:
        wanted = os.getpid() if pid is None else pid
        found = [
            processes[wanted]
            for handle in nvml.handles(True).values()
            if wanted in (processes := nvml.compute_processes(handle) or {})
        ]
    finally:
        nvml.close()
    known = [held for held in found if held is not None]
    return sum(known) if known and len(known) == len(found) else None


def _kilobytes(key: str) -> int | None:
    written = field(STATUS, key, ":")
    return None if written is None else int(written.split()[0])
