"""Why is it not faster? Two networks compared layer by layer, and every millisecond lost given a reason.

Where the time should have fallen to: the baseline's time, times the ratio of the two networks' arithmetic

    expected = t_A · (Σ M_B / peak_B) / (Σ M_A / peak_A)

with M the multiply-adds and peak the most of them that the machine does in a second in the type that the file asks for:
half the multiply-adds, half the time; int8 instead of fp32, as much less as int8 is faster here. What the variant takes
beyond that is taken apart, so that the parts add up to the time measured:

- each layer's own expectation is its time in the baseline times the ratio of its own arithmetic, of its bytes where it
  multiplies nothing. Their sum differs from the above where arithmetic fell in layers that took little time (`uneven`);
- a layer that takes longer than its expectation loses, first, what its limit (`benchmarks.harness.roofline`) grew
  beyond it because memory does not get faster (`memory`), then the rest, for the first of these causes that is true of
  it: it runs in another type than the file asks for (`type`), it is near the fixed price of starting a kernel
  (`launch`), its widths do not suit the kernels (`misaligned`), it reaches less of its limit (`kernel`);
- kernels that only one of the two networks has: conversions of type (`quantisation`) or of layout (`layout`), and what
  the other does in passing (`unfused`);
- layers that took less time than expected, against all that (`gain`).

The times are those of layers timed one by one, as `deploy.layer_times` gives them.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from benchmarks.harness.explanation import Explanation, Layer
from benchmarks.harness.peaks import Peak
from benchmarks.harness.roofline import Work, limit, peak_of
from compress.errors import InputError
from deploy.explaining_findings import NEAR_FLOOR, Parts, findings, is_conversion, row
from deploy.layer_times import LayerTime
from deploy.work import LayerWork, OnnxWork

FLOOR_LIMIT_MS = 1e-3
"""A kernel that need not take a microsecond shows what starting a kernel takes."""

LAUNCH_FLOOR_MS = 5e-3
"""The price of a kernel where no kernel shows it: ONNX Runtime's smallest on a CPU take 3 to 5 µs, a GPU's 2 to 5."""


@dataclass(frozen=True)
class Side:
    """One of the two networks."""

    name: str
    layers: Sequence[Layer]
    latency_ms: float | None = None
    """Median latency measured as a whole; None leaves out what lies outside of the layers."""

    @property
    def ms(self) -> float:
        return sum(layer.ms for layer in self.layers)

    @property
    def floor_ms(self) -> float:
        """The price of one kernel, however small: the median of those that have next to nothing to do."""
        small = sorted(
            layer.ms / layer.launches
            for layer in self.layers
            if layer.limit_ms < FLOOR_LIMIT_MS and layer.ms / layer.launches < NEAR_FLOOR * LAUNCH_FLOOR_MS
        )
        return small[len(small) // 2] if small else LAUNCH_FLOOR_MS


def layers(times: Iterable[LayerTime], work: OnnxWork | Sequence[LayerWork], peaks: Mapping[str, Peak]) -> list[Layer]:
    """Join what each layer took with what it had to do.

    Args:
        times: from `layer_times`, on a batch of the size of `work`.
        work: of the ONNX file that ran or that the engine was built from; of a module, its layers from `module_work`.
        peaks: by type, one for each that the network computes in.

    Raises:
        InputError: a layer has an origin that the work lacks: they are not of one network.
        HarnessInputError: a type has no peak.
    """
    known = work.by_name if isinstance(work, OnnxWork) else {layer.name: layer for layer in work}
    found: list[Layer] = []
    used: dict[str, int] = {}
    parts: dict[tuple[str, ...], int] = {}
    for time in times:
        missing = [name for name in time.origin if name not in known]
        if missing:
            raise InputError(
                f"The layer {time.name} computes {missing[0]}, which is not in the file whose work was counted: "
                "give the times and the work of one network."
            )
        if not time.origin:
            done = LayerWork(time.name, time.kind, "", 0, time.bytes or 0, dtype=time.dtype or "float32")
        elif isinstance(work, OnnxWork):
            done = work.of(time.origin)
        else:
            done = known[time.origin[0]]
        name = (done.module or done.name) if done.macs else done.name
        ran = time.dtype if time.dtype in peaks else done.dtype
        moved = done.bytes if time.bytes is None else time.bytes
        least = limit(Work(done.macs, moved), peak_of(ran, peaks))
        if time.origin and time.origin in parts and not done.macs:
            found[parts[time.origin]] = _joined(found[parts[time.origin]], time, least.ms, moved)
            continue
        parts[time.origin] = len(found)
        used[name] = used.get(name, 0) + 1
        found.append(
            Layer(
                name=name if used[name] == 1 else f"{name} ({used[name]})",
                kernel=time.name,
                kind=time.kind,
                ms=time.ms,
                launches=time.launches,
                macs=done.macs,
                bytes=moved,
                in_channels=done.in_channels,
                out_channels=done.out_channels,
                groups=done.groups,
                dtype=ran,
                asked_dtype=done.dtype,
                limit_ms=least.ms,
                compute_ms=limit(Work(done.macs, 0), peak_of(done.dtype, peaks)).ms,
                bound=least.bound,
                added=time.added,
            )
        )
    return found


def _joined(first: Layer, time: LayerTime, limit_ms: float, moved: int) -> Layer:
    """One layer of several kernels that together compute one node, as HardSigmoid and Mul compute a HardSwish."""
    return first.model_copy(
        update={
            "kernel": f"{first.kernel} + {time.name}",
            "kind": first.kind if time.kind in first.kind.split(" + ") else f"{first.kind} + {time.kind}",
            "ms": first.ms + time.ms,
            "launches": first.launches + time.launches,
            "bytes": first.bytes + moved,
            "limit_ms": first.limit_ms + limit_ms,
        }
    )


def explain(baseline: Side, variant: Side, *, device: str, batch_size: int) -> Explanation:
    """Compare two networks layer by layer; both timed on the same device and batch.

    Raises:
        InputError: a network has no layers.
    """
    for side in (baseline, variant):
        if not side.layers or side.ms == 0:
            raise InputError(f"{side.name} has no layer times: time its layers with layer_times.")
    pairs, only_baseline, only_variant = matched(baseline.layers, variant.layers)
    rows = [row(before, after, variant.floor_ms, device) for before, after in pairs]
    macs = [sum(layer.macs for layer in side.layers) for side in (baseline, variant)]
    compute = [sum(layer.compute_ms for layer in side.layers) for side in (baseline, variant)]
    ratio = compute[1] / compute[0] if compute[0] else 1.0
    total = [side.ms if side.latency_ms is None else max(side.latency_ms, side.ms) for side in (baseline, variant)]
    if baseline.latency_ms is None or variant.latency_ms is None:
        total = [baseline.ms, variant.ms]
    outside = total[0] - baseline.ms, total[1] - variant.ms
    macs_ratio = macs[1] / macs[0] if macs[0] else None
    expected = total[0] * ratio
    return Explanation(
        baseline=baseline.name,
        variant=variant.name,
        device=device,
        batch_size=batch_size,
        baseline_ms=total[0],
        variant_ms=total[1],
        expected_ms=expected,
        macs_ratio=macs_ratio,
        peak_ratio=macs_ratio / ratio if macs_ratio and ratio else 1.0,
        variant_limit_ms=sum(layer.limit_ms for layer in variant.layers),
        findings=findings(
            Parts(rows, only_baseline, only_variant, outside[0], outside[1], ratio, variant.floor_ms, device)
        ),
        rows=rows,
        only_baseline=only_baseline,
        only_variant=only_variant,
    )


def matched(
    before: Sequence[Layer], after: Sequence[Layer]
) -> tuple[list[tuple[Layer, Layer]], list[Layer], list[Layer]]:
    """Pairs of layers of one name; of the rest, conversions left out, those of one operator in the same order."""
    theirs = {layer.name: layer for layer in after if not layer.added}
    pairs = [(layer, theirs[layer.name]) for layer in before if not layer.added and layer.name in theirs]
    names = {layer.name for layer, _ in pairs}
    rest = [[layer for layer in side if layer.name not in names or layer.added] for side in (before, after)]
    left, right = ([layer for layer in side if not is_conversion(layer)] for side in rest)
    alike = SequenceMatcher(None, [family(layer.kind) for layer in left], [family(layer.kind) for layer in right])
    for block in alike.get_matching_blocks():
        pairs += [(left[block.a + i], right[block.b + i]) for i in range(block.size)]
    done = [{id(pair[side]) for pair in pairs} for side in (0, 1)]
    order = {id(layer): position for position, layer in enumerate(before)}
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return pairs, [x for x in before if id(x) not in done[0]], [x for x in after if id(x) not in done[1]]


def family(kind: str) -> str:
    """Operator without what a runtime puts around its name: QLinearConv, FusedConv and NhwcConv are a Conv."""
    return re.sub(r"^(QLinear|Fused|Nhwc|Q(?=[A-Z]))|(Integer)$", "", kind)
