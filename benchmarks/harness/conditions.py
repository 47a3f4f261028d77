"""What the machine did while something was timed: who else worked, at which clocks, and what held it back.

Nothing here changes the machine. Clocks need not be locked: what they were is recorded, and a slot during which the
hardware was held back can be told from the others and timed again.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.harness.cgroups import controller, throttling
from benchmarks.harness.condition_records import (
    Conditions,
    ConditionsSummary,
    GpuConditions,
    GpuSummary,
    N,
    Range,
    highest,
    summary,
)
from benchmarks.harness.machine_cpu import allowed_cores, frequencies_mhz
from benchmarks.harness.machine_files import ROOT, number, text
from benchmarks.harness.machine_gpu import PLAIN, GpuSample, Nvml, reason_names, strangers

__all__ = ["Conditions", "ConditionsSummary", "GpuConditions", "GpuSummary", "Range", "Watch", "summary"]

SAMPLE_SECONDS = 0.1


class Watch:
    """Watches the machine during one slot after another: `start()`, the work, `stop()`; at last `close()`.

    As a context manager it watches one slot, whose outcome is `conditions`; who knows the CPU time of what was timed
    stops it inside. It belongs in a process that does not
    work meanwhile. Files are read at the start and at the stop; a thread asks the driver every 0.1 s if a GPU is
    watched, and does nothing else.
    """

    def __init__(
        self, gpus: bool | Sequence[int | str] = False, *, interval_s: float = SAMPLE_SECONDS, root: Path = ROOT
    ) -> None:
        """`gpus`: all that the driver lists, none, or some by NVML's number or, better, by UUID.

        Raises:
            HarnessInputError: a GPU is chosen that the driver does not list.
        """
        self.conditions: Conditions | None = None
        self._interval_s = interval_s
        self._root = root
        self._cores = allowed_cores()
        self._thermal = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
        self._quota = controller("cpu", root)
        self._before: tuple[_Counts, _Moment] | None = None
        self._nvml = Nvml.open() if gpus else None
        self._unread = bool(gpus) and self._nvml is None
        self._logs = (
            [] if self._nvml is None else [_Log(self._nvml, *item) for item in self._nvml.handles(gpus).items()]
        )
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def start(self) -> Self:
        """Begin a slot; one that was never stopped, since the work in it failed, is forgotten."""
        self._end_sampling()
        for log in self._logs:
            log.begin()
        if self._logs:
            self._ended.clear()
            self._thread = threading.Thread(target=self._sample, name="watch", daemon=True)
            self._thread.start()
        counts = self._counts()
        self._before = counts, _Moment.now(self._root)  # the moment last, so that the reading does not count
        return self

    def stop(self, own_cpu_s: float | None = None) -> Conditions:
        """What happened since the start.

        Args:
            own_cpu_s: CPU time that the timed process used meanwhile; without it the others' share is unknown.
        """
        if self._before is None:
            raise RuntimeError("This watch has not been started: call start() first.")
        (counted, begin), self._before = self._before, None
        end = _Moment.now(self._root)
        mhz = frequencies_mhz(self._cores, self._root)  # soon, while they are still what they were
        self._end_sampling()
        counts = self._counts()
        self.conditions = Conditions(
            seconds=end.time_s - begin.time_s,
            cpu_busy_percent=end.busy_percent(begin, self._cores),
            cpu_others_percent=None if own_cpu_s is None else end.others_percent(begin, own_cpu_s),
            steal_percent=end.steal_percent(begin, self._cores),
            load_average_1=os.getloadavg()[0],
            cpu_mhz=Range.of(mhz),
            cpu_throttle_events=_increase(counted.thermal, counts.thermal),
            quota_periods_throttled=_increase(counted.quota_periods, counts.quota_periods),
            quota_throttled_s=_increase(counted.quota_s, counts.quota_s),
            gpus=None if self._unread else tuple(log.end() for log in self._logs),
        )
        return self.conditions

    def close(self) -> None:
        """Release the driver."""
        self._end_sampling()
        if self._nvml is not None:
            self._nvml.close()
            self._nvml, self._logs = None, []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.stop()
        self.close()

    def _counts(self) -> "_Counts":
        counts = [count for path in self._thermal if (count := number(path)) is not None]
        quota = throttling(self._quota)
        return _Counts(
            thermal=sum(counts) if counts else None,
            quota_periods=None if quota is None else quota.periods,
            quota_s=None if quota is None else quota.seconds,
        )

    def _end_sampling(self) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _sample(self) -> None:
        wait_s = self._interval_s / 2  # the first moments of a slot show the clocks of the pause before it
        while not self._ended.wait(wait_s):
            for log in self._logs:
                log.sample()
            wait_s = self._interval_s


class _Counts(NamedTuple):
    """What counts how often the processor was held back, since the machine or the container started."""

    thermal: int | None
    quota_periods: int | None
    quota_s: float | None


class _Ticks(NamedTuple):
    """Clock ticks that a core has spent since the machine started."""

    busy: int
    steal: int
    total: int


@dataclass(frozen=True)
class _Moment:
    """What the cores had done up to this moment."""

    time_s: float
    cores: dict[int, _Ticks]

    @classmethod
    def now(cls, root: Path) -> "_Moment":
        time_s = time.monotonic()
        cores = {}
        for line in (text(root / "proc/stat") or "").splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name != "cpu" and len(ticks) >= 8:
                user, nice, system, idle, iowait, irq, softirq, steal = map(int, ticks[:8])  # user holds guests, too
                busy = user + nice + system + irq + softirq
                cores[int(name.removeprefix("cpu"))] = _Ticks(busy, steal, busy + steal + idle + iowait)
        return cls(time_s, cores)

    def busy_percent(self, begin: "_Moment", cores: list[int]) -> float | None:
        spent = self._since(begin, cores)
        return 100 * spent.busy / spent.total if spent.total > 0 else None

    def steal_percent(self, begin: "_Moment", cores: list[int]) -> float | None:
        spent = self._since(begin, cores)
        return 100 * spent.steal / spent.total if spent.total > 0 else None

    def others_percent(self, begin: "_Moment", own_cpu_s: float) -> float | None:
        """The kernel counts in ticks, the process more finely, so the difference can fall below nothing."""
        spent = self._since(begin, list(self.cores))
        if spent.total <= 0:
            return None
        busy_s = spent.busy / os.sysconf("SC_CLK_TCK")
        return max(0.0, 100 * (busy_s - own_cpu_s) / (self.time_s - begin.time_s))

    def _since(self, begin: "_Moment", cores: list[int]) -> _Ticks:
        both = [(self.cores[core], begin.cores[core]) for core in cores if core in self.cores and core in begin.cores]
        busy, steal, total = (sum(end[i] - start[i] for end, start in both) for i in range(3))
        return _Ticks(busy, steal, total)


class _Log:
    """The samples of one GPU during one slot."""

    def __init__(self, nvml: Nvml, index: int, handle: Any) -> None:
        self._nvml, self._index, self._handle = nvml, index, handle
        self._uuid = nvml.ask("nvmlDeviceGetUUID", handle)
        self._samples: list[GpuSample] = []
        self._others: list[int | None] = []

    def begin(self) -> None:
        self._samples = []
        self._others = [self._strangers()]

    def sample(self) -> None:
        self._samples.append(self._nvml.sample(self._handle))

    def end(self) -> GpuConditions:
        if not self._samples:  # a slot shorter than the interval
            self.sample()
        samples, others = self._samples, [*self._others, self._strangers()]
        seen = [sample.reasons for sample in samples if sample.reasons is not None]
        names = {name for bits in seen for name in reason_names(bits)}
        return GpuConditions(
            index=self._index,
            uuid=self._uuid,
            samples=len(samples),
            sm_clock_mhz=Range.of(sample.sm_clock_mhz for sample in samples),
            memory_clock_mhz=Range.of(sample.memory_clock_mhz for sample in samples),
            power_w_max=highest(sample.power_w for sample in samples),
            temperature_c_max=highest(sample.temperature_c for sample in samples),
            memory_used_bytes_max=highest(sample.memory_used_bytes for sample in samples),
            clock_reasons=tuple(sorted(names - PLAIN)) if seen else None,
            other_compute_processes=None if None in others else highest(others),
        )

    def _strangers(self) -> int | None:
        processes = self._nvml.compute_processes(self._handle)
        return None if processes is None else strangers(processes)


def _increase(before: N | None, after: N | None) -> N | None:
    return None if before is None or after is None else after - before
