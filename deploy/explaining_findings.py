"""Which reason of `deploy.explaining` each millisecond falls to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness.explanation import Cause, Finding, Layer, Row
from deploy.explaining_reasons import (
    left_blocks,
    misaligned,
    of_gain,
    of_kernel,
    of_launch,
    of_layout,
    of_memory,
    of_misaligned,
    of_outside,
    of_quantisation,
    of_type,
    of_uneven,
    of_unfused,
)

TOLERANCE = 0.1
"""A layer that takes up to so much longer than expected loses nothing to speak of: as exact as its time is."""

QUANTISATION = re.compile(r"[Qq]uantizeLinear|^Cast|PrecisionFreeCast")

LAYOUT = re.compile(r"Reorder|Transpose|Reformat|Memcpy|Shuffle|NoOp")

NEAR_FLOOR = 3.0
"""Times the price of starting a kernel, below which a kernel with little to do is bound by it."""

_SEPARATE: tuple[Cause, ...] = ("quantisation", "layout", "unfused")
"""Causes of the time of kernels that only one of the networks has."""


@dataclass(frozen=True)
class Parts:
    """The time of both networks, taken apart."""

    rows: Sequence[Row]
    only_baseline: Sequence[Layer]
    only_variant: Sequence[Layer]
    outside_baseline: float
    outside_variant: float
    ratio: float
    """Of the variant's arithmetic to the baseline's."""
    floor_ms: float
    device: str


def row(before: Layer, after: Layer, floor_ms: float, device: str) -> Row:
    """One layer of both networks, with what it lost and why."""
    if before.compute_ms and after.compute_ms:
        ratio = after.compute_ms / before.compute_ms
    elif before.bytes:
        ratio = after.bytes / before.bytes
    else:
        ratio = 1.0
    expected = before.ms * ratio
    lost = after.ms - expected
    near_floor = after.ms <= NEAR_FLOOR * floor_ms * after.launches and after.limit_ms < after.ms / NEAR_FLOOR
    memory = 0.0
    cause: Cause | None = None
    if lost > TOLERANCE * expected:
        if after.bound == "memory" and before.limit_ms:
            memory = min(lost, max(0.0, before.ms * after.limit_ms / before.limit_ms - expected))
        if lost - memory > TOLERANCE * expected:
            if after.macs and after.dtype != after.asked_dtype:
                cause = "type"
            elif near_floor:
                cause = "launch"
            elif misaligned(before, after, device):
                cause = "misaligned"
            else:
                cause = "kernel"
        else:
            memory = lost
    bound: Literal["compute", "memory", "launch"] = "launch" if near_floor else after.bound
    return Row(
        name=before.name,
        baseline=before,
        variant=after,
        expected_ms=expected,
        lost_ms=lost,
        memory_ms=memory,
        cause=cause,
        bound=bound,
    )


def findings(parts: Parts) -> list[Finding]:
    """All reasons, the largest first; together they make up the variant's time less the expected one."""
    rows = parts.rows
    unblocked = any(left_blocks(row) for row in rows)
    only = {cause: _only(parts, cause) for cause in _SEPARATE}
    gained = [row for row in rows if row.cause is None and row.memory_ms == 0]
    gone = [layer for before, after in only.values() if not after for layer in before]
    found = [
        of_misaligned(_with(rows, "misaligned"), parts.device),
        of_kernel(_with(rows, "kernel")),
        of_launch(_with(rows, "launch"), parts.floor_ms),
        of_type(_with(rows, "type")),
        of_memory([row for row in rows if row.memory_ms > 0]),
        of_quantisation(*only["quantisation"], parts.ratio),
        of_layout(*only["layout"], parts.ratio, unblocked),
        of_unfused(*only["unfused"], parts.ratio, unblocked),
        of_outside(parts.outside_baseline, parts.outside_variant, parts.ratio),
        of_uneven(rows, parts.ratio),
        of_gain(gained, gone, parts.ratio),
    ]
    return sorted((item for item in found if item is not None), key=lambda item: -item.ms)


def remedies(found: Sequence[Finding]) -> list[tuple[str, float]]:
    """What to do, with the milliseconds that hang on it, the most first."""
    sums: dict[str, float] = {}
    for item in found:
        if item.fix and item.ms > 0:
            sums[item.fix] = sums.get(item.fix, 0.0) + item.ms
    return sorted(sums.items(), key=lambda item: -item[1])


def is_conversion(layer: Layer) -> bool:
    """Whether it computes nothing, but brings a tensor into another type or layout."""
    if layer.macs:
        return False
    return bool(QUANTISATION.search(layer.kind) or LAYOUT.search(f"{layer.kind} {layer.kernel}" if layer.added else ""))


def _only(parts: Parts, cause: Cause) -> tuple[list[Layer], list[Layer]]:
    """The kernels of that cause that only the baseline has, and those that only the variant has."""
    before, after = (
        [layer for layer in side if _cause(layer) == cause] for side in (parts.only_baseline, parts.only_variant)
    )
    return before, after


def _cause(layer: Layer) -> Cause:
    if not is_conversion(layer):
        return "unfused"
    return "quantisation" if QUANTISATION.search(layer.kind) else "layout"


def _with(rows: Sequence[Row], cause: Cause) -> list[Row]:
    return [row for row in rows if row.cause == cause]
