"""Each reason of `deploy.explaining` in words: the fact, why it is so, what to do about it."""

from collections.abc import Sequence

from benchmarks.harness import numerals
from benchmarks.harness.explanation import Cause, Finding, Layer, Row

FEW_CHANNELS = 8
"""Fewer input channels than this fill no block of a kernel: those of an image."""


def alignment(device: str, dtype: str) -> int:
    """Channels that a kernel takes at once, of which widths should be multiples.

    GPU: tensor cores take 16 bytes at a time: 8 channels of 16 bits, 16 of 8 bits (NVIDIA, "Matrix multiplication
    background user's guide"). CPU: ONNX Runtime leaves its blocked layout for widths that are no multiples of 4 and
    pads to its block of 8 channels, with AVX-512 16; what is a multiple of 8 lost nothing measurable.
    """
    if device.startswith("cuda"):
        return 16 if dtype in ("int8", "float8") else 8
    return 8


def misaligned(before: Layer, after: Layer, device: str) -> list[int]:
    """The widths that changed and are no multiples of what the kernels want."""
    wanted = alignment(device, after.dtype)
    changed = [
        new
        for old, new in ((before.in_channels, after.in_channels), (before.out_channels, after.out_channels))
        if new is not None and new != old
    ]
    return [width for width in changed if width % wanted]


def left_blocks(row: Row) -> bool:
    """Whether ONNX Runtime ran the layer in its blocked layout, and no longer does, in the same type."""
    before, after = row.baseline, row.variant
    return "_nchwc" in before.kernel and "_nchwc" not in after.kernel and before.dtype == after.dtype


def _rest(rows: Sequence[Row]) -> float:
    return sum(row.lost_ms - row.memory_ms for row in rows)


def _names(rows: Sequence[Row]) -> list[str]:
    return [row.name for row in sorted(rows, key=lambda row: -row.lost_ms)]


def _times(rows: Sequence[Row]) -> str:
    return (
        f"{numerals.significant(sum(row.baseline.ms for row in rows))} ms became "
        f"{numerals.significant(sum(row.variant.ms for row in rows))} ms, expected "
        f"{numerals.significant(sum(row.expected_ms for row in rows))}"
    )


def _reached(rows: Sequence[Row]) -> str:
    before = sum(row.baseline.limit_ms for row in rows) / sum(row.baseline.ms for row in rows)
    after = sum(row.variant.limit_ms for row in rows) / sum(row.variant.ms for row in rows)
    return f"they reach {100 * after:.0f} % of their limit, in the baseline {100 * before:.0f} %"


_FUSED = (
    "Use operators that the runtime fuses in this precision (in int8 ReLU, not hard-swish), or leave the layers around "
    "them in the baseline's precision."
)

_ROUND = "Prune with prune.round_to={}."


def _have(rows: Sequence[Row]) -> str:
    return "has" if len(rows) == 1 else "have"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def of_misaligned(rows: list[Row], device: str) -> Finding | None:
    if not rows:
        return None
    worst = max(rows, key=lambda row: row.lost_ms)
    wanted = alignment(device, worst.variant.dtype)
    widths = sorted({width for row in rows for width in misaligned(row.baseline, row.variant, device)})
    left = sum(left_blocks(row) for row in rows)
    unblocked = (
        f"; {left} of them left ONNX Runtime's blocked layout, in which the baseline runs them, for a slower kernel"
        if left
        else ""
    )
    return Finding(
        cause="misaligned",
        ms=_rest(rows),
        fact=f"{_layers(len(rows))} {_have(rows)} widths that are no multiples of {wanted} "
        f"({', '.join(map(str, widths[:6]))}{', …' if len(widths) > 6 else ''}): {_times(rows)}",
        why=f"Kernels work on blocks of channels, and what is left over costs a whole block or another kernel: "
        f"{_reached(rows)}{unblocked}.",
        fix=_ROUND.format(wanted),
        layers=_names(rows),
    )


def of_kernel(rows: list[Row]) -> Finding | None:
    if not rows:
        return None
    narrower = any((row.variant.out_channels or 0) < (row.baseline.out_channels or 0) for row in rows)
    converted = any(row.variant.dtype != row.baseline.dtype for row in rows)
    reasons = [f"their kernels use the machine less well: {_reached(rows)}"]
    depthwise = [row for row in rows if row.variant.groups > 1]
    if depthwise:
        reasons.append(
            f"{numerals.significant(_rest(depthwise))} ms of it in {len(depthwise)} grouped or depthwise convolutions, "
            "whose few multiply-adds per byte no type makes cheap"
        )
    first = [row for row in rows if row.variant.groups == 1 and (row.variant.in_channels or 99) < FEW_CHANNELS]
    if first:
        reasons.append(
            f"{numerals.significant(_rest(first))} ms in layers that read only a few channels, as of an image"
        )
    if narrower:
        reasons.append("with fewer channels there is less to keep all units busy with")
    return Finding(
        cause="kernel",
        ms=_rest(rows),
        fact=f"{_layers(len(rows))} took longer than their work says, though their widths suit: {_times(rows)}",
        why=f"{reasons[0][0].upper()}{'; '.join(reasons)[1:]}.",
        fix="Leave those layers in the baseline's precision (export.exclude) and measure again, or try another runtime."
        if converted
        else "Give the kernels more at once with a larger batch, or prune to a latency budget, which takes channels "
        "where it saves time.",
        layers=_names(rows),
    )


def of_launch(rows: list[Row], floor_ms: float) -> Finding | None:
    if not rows:
        return None
    return Finding(
        cause="launch",
        ms=_rest(rows),
        fact=f"Hardly longer than starting a kernel: {_layers(len(rows))}: {_times(rows)}",
        why=f"A kernel takes about {1e3 * floor_ms:.0f} µs here however little it has to do, and these are near it.",
        fix="Use a larger batch, or remove whole layers; on a GPU, CUDA graphs make starting cheaper.",
        layers=_names(rows),
    )


def of_type(rows: list[Row]) -> Finding | None:
    if not rows:
        return None
    first = rows[0].variant
    return Finding(
        cause="type",
        ms=_rest(rows),
        fact=f"{_layers(len(rows))} ran in {first.dtype}, though the file asks for {first.asked_dtype}: {_times(rows)}",
        why="The runtime has no kernel for them in that type, or does not see the pattern of Q/DQ pairs that it needs.",
        fix="Export for the target that runs it (--target), or exclude these layers from quantisation.",
        layers=_names(rows),
    )


def of_memory(rows: list[Row]) -> Finding | None:
    if not rows:
        return None
    moved = sum(row.variant.bytes for row in rows) / sum(row.baseline.bytes for row in rows)
    return Finding(
        cause="memory",
        ms=sum(row.memory_ms for row in rows),
        fact=f"Bound by memory: {_layers(len(rows))}: {_times(rows)}",
        why=f"They wait for data, and their bytes fell to {100 * moved:.0f} % only: fewer multiply-adds or a faster "
        "type do not help where little is multiplied with each byte.",
        fix="Prune the widths of the tensors that they read and write, use a smaller type, or choose a runtime that "
        "fuses them with their neighbours.",
        layers=_names(rows),
    )


def _kinds(side: Sequence[Layer]) -> str:
    totals: dict[str, list[float]] = {}
    for layer in side:
        totals.setdefault(layer.kind, []).append(layer.ms)
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))
    named = [f"{len(times)} {kind} {numerals.significant(sum(times), 2)} ms" for kind, times in ranked[:4]]
    rest = [ms for _, times in ranked[4:] for ms in times]
    return ", ".join([*named, *([f"{len(rest)} others {numerals.significant(sum(rest), 2)} ms"] if rest else [])])


def _sum(side: Sequence[Layer]) -> float:
    return sum(layer.ms for layer in side)


def _slowest(side: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in sorted(side, key=lambda layer: -layer.ms)]


def of_quantisation(before: list[Layer], after: list[Layer], ratio: float) -> Finding | None:
    return _of_kernels(
        "quantisation",
        (before, after, ratio),
        fact=f"kernels only convert types: {_kinds(after)}" + _counterparts(before),
        why="Around every operation without an integer kernel values go back to floating point and forth again, and "
        "each conversion reads and writes a whole tensor.",
        fix=_FUSED,
    )


def of_layout(before: list[Layer], after: list[Layer], ratio: float, unblocked: bool) -> Finding | None:
    return _of_kernels(
        "layout",
        (before, after, ratio),
        fact=f"kernels only bring tensors into another layout: {_kinds(after)}" + _counterparts(before),
        why="The runtime puts them in where neighbours want different layouts: a layer that has no kernel for the "
        "blocked layout pays on both sides.",
        fix=_ROUND.format(8) if unblocked else "",
    )


def of_unfused(before: list[Layer], after: list[Layer], ratio: float, unblocked: bool) -> Finding | None:
    gone = f" (and {len(before)} of its own, {_total(before)} ms, are gone)" if before else ""
    return _of_kernels(
        "unfused",
        (before, after, ratio),
        fact=f"kernels have no counterpart in the baseline: {_kinds(after)}{gone}",
        why="In the blocked layout a convolution adds and activates in passing; outside of it, these run alone."
        if unblocked
        else "In the baseline the same is done in passing by the kernel before.",
        fix=_ROUND.format(8) if unblocked else _FUSED,
    )


def _of_kernels(
    cause: Cause, sides: tuple[list[Layer], list[Layer], float], *, fact: str, why: str, fix: str
) -> Finding | None:
    """Kernels that compute no layer of their own; `sides`: of the baseline, of the variant, ratio of arithmetic."""
    before, after, ratio = sides
    if not after:
        return None
    return Finding(
        cause=cause,
        ms=_sum(after) - ratio * _sum(before),
        fact=f"{len(after)} {fact}",
        why=why,
        fix=fix,
        layers=_slowest(after),
    )


def _counterparts(before: list[Layer]) -> str:
    return f" (the baseline has {len(before)}, {_total(before)} ms)" if before else ""


def _total(side: Sequence[Layer]) -> str:
    return numerals.significant(_sum(side), 2)


def of_outside(before: float, after: float, ratio: float) -> Finding | None:
    if before == after == 0:
        return None
    return Finding(
        cause="outside",
        ms=after - ratio * before,
        fact=f"{numerals.significant(after)} ms of the latency pass outside of the layers, in the baseline "
        f"{numerals.significant(before)} ms",
        why="Starting the inference, waiting for threads, handing over inputs and outputs: that does not depend on the "
        "widths.",
        fix="Use a larger batch, or bind inputs and outputs once.",
        layers=[],
    )


def of_uneven(rows: Sequence[Row], ratio: float) -> Finding | None:
    """What is lost where arithmetic fell less than on average, less what is won where it fell more."""
    extra = {row.name: row.expected_ms - ratio * row.baseline.ms for row in rows}
    ms = sum(extra.values())
    less = sorted((row for row in rows if extra[row.name] > 0), key=lambda row: -extra[row.name])
    if not rows or ms == 0:
        return None
    share = sum(row.baseline.ms for row in less) / sum(row.baseline.ms for row in rows)
    still = sum(row.macs_ratio is None for row in less)
    return Finding(
        cause="uneven",
        ms=ms,
        fact=f"{_layers(len(less))}, {100 * share:.0f} % of the baseline's time, got less relief than the "
        f"{100 * (1 - ratio):.0f} % that the whole got; {still} of them multiply nothing"
        if ms > 0
        else "Arithmetic fell most in layers that take much time",
        why="A multiply-add takes longer in some layers than in others, and where it went is not where the time goes.",
        fix="Prune to a latency budget, which counts milliseconds in place of multiply-adds."
        if ms > 0 and any(row.macs_ratio is not None and row.macs_ratio < 0.99 for row in rows)
        else "",
        layers=[row.name for row in less] if ms > 0 else [],
    )


def of_gain(rows: list[Row], gone: list[Layer], ratio: float) -> Finding | None:
    if not rows and not gone:
        return None
    saved = f"; {len(gone)} kernels of the baseline are gone ({_kinds(gone)})" if gone else ""
    return Finding(
        cause="gain",
        ms=sum(row.lost_ms for row in rows) - ratio * _sum(gone),
        fact=f"{_layers(len(rows))} took what was expected of them, or less: {_times(rows)}{saved}",
        why=f"Of the layers as a whole, {_reached(rows)}." if rows else "",
        fix="",
        layers=_names(rows),
    )
