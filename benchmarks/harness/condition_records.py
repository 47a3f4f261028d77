"""What is recorded of a machine while something is timed on it: one slot, and many slots together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

N = TypeVar("N", int, float)

GPU_THROTTLING: Final = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)
"""Reasons that make a slot worth timing again: heat and failing power pass, and with them what was measured.

A power cap is not one of them. It is how a large GPU runs under full load, at the clock that its budget of power
allows, and a service would meet it as well; it is recorded, and a slot timed again would show it again.
"""


class Facts(BaseModel):
    """Base of what is recorded here: immutable, no unknown keys, no NaN or infinity (they are not JSON)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Range(Facts):
    """The extremes of several figures and the one in their middle."""

    minimum: float
    median: float
    maximum: float

    @classmethod
    def of(cls, figures: Iterable[float | None]) -> Self | None:
        """None where there are no figures."""
        known = [figure for figure in figures if figure is not None]
        return cls(minimum=min(known), median=median(known), maximum=max(known)) if known else None

    @classmethod
    def over(cls, ranges: Iterable["Range | None"]) -> Self | None:
        """The extremes of all ranges, and the median of their medians."""
        known = [item for item in ranges if item is not None]
        if not known:
            return None
        return cls(
            minimum=min(item.minimum for item in known),
            median=median(item.median for item in known),
            maximum=max(item.maximum for item in known),
        )


class GpuConditions(Facts):
    """One GPU during a slot, as NVML told about every 0.1 s. None where it did not tell."""

    index: int = Field(ge=0, description="Its number with NVML: the order on the PCI bus.")
    uuid: str | None
    samples: int = Field(ge=0)
    sm_clock_mhz: Range | None
    memory_clock_mhz: Range | None
    power_w_max: float | None
    temperature_c_max: float | None
    memory_used_bytes_max: int | None = Field(description="By all processes together.")
    clock_reasons: tuple[str, ...] | None = Field(
        description="Why its clock was not the highest, but for want of work or by someone's choice (NVML's names)."
    )
    other_compute_processes: int | None = Field(
        description="At the beginning or the end, whichever is more: neither this process nor one that it started. "
        "None, too, where the driver numbers processes as the machine outside this container does."
    )


class Conditions(Facts):
    """What the machine did during one slot. None where it cannot be read."""

    seconds: float = Field(ge=0)
    cpu_busy_percent: float | None = Field(description="Of the cores that this process may use.")
    cpu_others_percent: float | None = Field(
        description="Work of the whole machine beyond that of the timed process, in percent of one core."
    )
    steal_percent: float | None = Field(description="Time in which the hypervisor ran something else on these cores.")
    load_average_1: float | None = Field(description="At the end.")
    cpu_mhz: Range | None = Field(description="Over the cores that this process may use, at the end.")
    cpu_throttle_events: int | None = Field(
        ge=0, description="Thermal events of all cores; one of a whole processor counts once for each of its cores."
    )
    quota_periods_throttled: int | None = Field(
        ge=0, description="Periods in which this container had used up its quota of CPU time."
    )
    quota_throttled_s: float | None = Field(ge=0, description="How long it waited for that.")
    gpus: tuple[GpuConditions, ...] | None = Field(description="Those watched; None where there is no driver.")

    @property
    def throttle_reasons(self) -> tuple[str, ...]:
        """What held the hardware back, such as "cpu: thermal" or "gpu 0: hw_slowdown"; empty if nothing did."""
        reasons = []
        if self.cpu_throttle_events:
            reasons.append("cpu: thermal")
        if self.quota_periods_throttled:
            reasons.append("cpu: quota")
        for gpu in self.gpus or ():
            reasons += [f"gpu {gpu.index}: {reason}" for reason in gpu.clock_reasons or () if reason in GPU_THROTTLING]
        return tuple(reasons)

    @property
    def throttled(self) -> bool:
        """Whether something held the hardware back that may pass, so that timing again is worth it."""
        return bool(self.throttle_reasons)


class GpuSummary(Facts):
    """One GPU over many slots."""

    index: int = Field(ge=0)
    uuid: str | None
    samples: int = Field(ge=0)
    sm_clock_mhz: Range | None
    memory_clock_mhz: Range | None
    power_w_max: float | None
    temperature_c_max: float | None
    memory_used_bytes_max: int | None
    clock_reasons: dict[str, int] | None = Field(description="Number of slots in which each was seen.")
    other_compute_processes_max: int | None


class ConditionsSummary(Facts):
    """Many slots: extremes of all, and medians of what the slots had. None where no slot could read it."""

    slots: int = Field(ge=0)
    throttled_slots: int = Field(ge=0, description="Slots in which something held the hardware back.")
    throttle_reasons: dict[str, int] = Field(description="Number of slots in which each was seen.")
    seconds: float = Field(ge=0, description="All slots together.")
    cpu_busy_percent: Range | None
    cpu_others_percent: Range | None
    steal_percent: Range | None
    load_average_1: Range | None
    cpu_mhz: Range | None
    cpu_throttle_events: int | None = Field(description="All slots together, as are the next two.")
    quota_periods_throttled: int | None
    quota_throttled_s: float | None
    gpus: tuple[GpuSummary, ...]


def summary(conditions: Sequence[Conditions]) -> ConditionsSummary:
    """All slots in one: their medians and extremes, and how many of them were held back by what."""
    gpus: dict[tuple[int, str | None], list[GpuConditions]] = {}
    for slot in conditions:
        for gpu in slot.gpus or ():
            gpus.setdefault((gpu.index, gpu.uuid), []).append(gpu)
    return ConditionsSummary(
        slots=len(conditions),
        throttled_slots=sum(slot.throttled for slot in conditions),
        throttle_reasons=_slots_of(slot.throttle_reasons for slot in conditions),
        seconds=sum(slot.seconds for slot in conditions),
        **{
            name: Range.of(getattr(slot, name) for slot in conditions)
            for name in ("cpu_busy_percent", "cpu_others_percent", "steal_percent", "load_average_1")
        },
        cpu_mhz=Range.over(slot.cpu_mhz for slot in conditions),
        **{
            name: _total(getattr(slot, name) for slot in conditions)
            for name in ("cpu_throttle_events", "quota_periods_throttled", "quota_throttled_s")
        },
        gpus=tuple(_gpu_summary(slots) for _, slots in sorted(gpus.items(), key=lambda item: item[0][0])),
    )


def _gpu_summary(slots: list[GpuConditions]) -> GpuSummary:
    read = [slot.clock_reasons for slot in slots if slot.clock_reasons is not None]
    return GpuSummary(
        index=slots[0].index,
        uuid=slots[0].uuid,
        samples=sum(slot.samples for slot in slots),
        sm_clock_mhz=Range.over(slot.sm_clock_mhz for slot in slots),
        memory_clock_mhz=Range.over(slot.memory_clock_mhz for slot in slots),
        power_w_max=highest(slot.power_w_max for slot in slots),
        temperature_c_max=highest(slot.temperature_c_max for slot in slots),
        memory_used_bytes_max=highest(slot.memory_used_bytes_max for slot in slots),
        clock_reasons=_slots_of(read) if read else None,
        other_compute_processes_max=highest(slot.other_compute_processes for slot in slots),
    )


def highest(figures: Iterable[N | None]) -> N | None:
    """None where there are no figures."""
    return max((figure for figure in figures if figure is not None), default=None)


def _slots_of(reasons: Iterable[tuple[str, ...]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for slot in reasons for reason in slot).items()))


def _total(figures: Iterable[N | None]) -> N | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known[1:], start=known[0]) if known else None
