"""The limits of this process's control groups, the means by which containers divide a machine.

A limit of any group holds for all groups inside it, so every group from this process's own up to the outermost one
that can be seen is read. Both versions of the interface are: version 2 and the older one, a hierarchy per controller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from benchmarks.harness.machine_files import ROOT, field, number, text, whole

UNLIMITED_BYTES = 1 << 60
"""The older interface writes the largest whole number of pages where there is no limit."""


@dataclass(frozen=True)
class Throttling:
    """How often, and how long, this process's groups had used up their quota of CPU time, since they were made."""

    periods: int
    seconds: float


@dataclass(frozen=True)
class Controller:
    """The groups of this process that divide one resource, innermost first."""

    version: int
    groups: tuple[Path, ...]


def controller(name: str, root: Path = ROOT) -> Controller | None:
    """The groups for the resource `name`, such as "cpu"; None where they cannot be seen."""
    tree = root / "sys/fs/cgroup"
    for line in (text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (tree / "cgroup.controllers").exists():
            return Controller(2, _existing(tree, path))
        if name in controllers.split(","):
            for mounted in (tree / name, tree / controllers):
                if mounted.exists():
                    return Controller(1, _existing(mounted, path))
    return None


def quota_cores(root: Path = ROOT) -> float | None:
    """How many cores' time this process may use per second; None where no quota is seen."""
    return _least("cpu", {1: _old_quota, 2: _quota}, root)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """The most memory that this process may have; None where no limit is seen."""
    limit = _least("memory", {1: _old_memory, 2: _memory}, root)
    return None if limit is None else int(limit)


def throttling(cpu: Controller | None) -> Throttling | None:
    """What the quotas have held up so far; None where nothing counts it."""
    if cpu is None:
        return None
    found = []
    for group in cpu.groups:
        periods = whole(field(group / "cpu.stat", "nr_throttled", " "))
        if periods is not None:
            microseconds = whole(field(group / "cpu.stat", "throttled_usec", " "))
            nanoseconds = whole(field(group / "cpu.stat", "throttled_time", " "))
            found.append((periods, (microseconds or 0) / 1e6 + (nanoseconds or 0) / 1e9))
    if not found:
        return None
    return Throttling(sum(periods for periods, _ in found), sum(seconds for _, seconds in found))


def _existing(tree: Path, path: str) -> tuple[Path, ...]:
    """The group at `path` and those around it, as far as they can be seen: a container often sees its own alone."""
    inner = PurePosixPath(path.lstrip("/"))
    return tuple(group for part in (inner, *inner.parents) if (group := tree / part).exists())


def _least(name: str, readers: dict[int, Callable[[Path], float | None]], root: Path) -> float | None:
    found = controller(name, root)
    if found is None:
        return None
    limits = [limit for group in found.groups if (limit := readers[found.version](group)) is not None]
    return min(limits, default=None)


def _quota(group: Path) -> float | None:
    quota, _, period = (text(group / "cpu.max") or "").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _old_quota(group: Path) -> float | None:
    quota, period = number(group / "cpu.cfs_quota_us"), number(group / "cpu.cfs_period_us")
    return quota / period if quota and period and quota > 0 else None


def _memory(group: Path) -> float | None:
    return number(group / "memory.max")


def _old_memory(group: Path) -> float | None:
    limit = number(group / "memory.limit_in_bytes")
    return limit if limit is not None and limit < UNLIMITED_BYTES else None
