"""The limit: how fast a network could run on a machine, and what share of that it reached.

A roofline (Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore
architectures", CACM 52(4)). A layer of M multiply-adds that moves B bytes takes no less than

    limit = max(M / peak MACs per second, B / peak bytes per second)

and is bound by compute or by memory, whichever is larger. The peaks are measured on this machine, see `peaks`.

Bytes are compulsory traffic: the layer's inputs, weights and outputs, each moved once, in the type that they are stored
in. What a kernel reads twice, pads or writes for itself alone counts as its loss. Multiply-adds are those of
`counters.macs`; other arithmetic counts as nothing, so a layer without multiply-adds is bound by memory.

Of a network there are two limits:

    limit   the sum of the limits of its layers. Each layer takes its inputs from memory and leaves its output there,
            with element-wise operations (activation, residual addition, quantisation) done in passing by the layer
            before them. So do today's runtimes work.
    floor   max(sum of M / peak, bytes of weights, input and output of the network / peak): all activations stay in
            caches. No runtime can be faster with these multiply-adds.

Both are for the arithmetic as counted. An algorithm that needs fewer multiplications (Winograd) can beat either, and
tensors that stay in a cache beat the first: then the fraction reached is above 1, and it is shown so, not clipped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.peaks import Peak

Bound = Literal["compute", "memory"]


@dataclass(frozen=True)
class Work:
    """What must be done: multiply-adds, and bytes read or written at least once."""

    macs: int
    bytes: int


@dataclass(frozen=True)
class Limit:
    """The least time that a piece of work takes, and what forbids less."""

    ms: float
    bound: Bound


@dataclass(frozen=True)
class TimedLayer:
    """One layer as it ran, or as it is to run where `ms` is None."""

    name: str
    kind: str
    work: Work
    dtype: str
    ms: float | None = None


class LayerLimit(BaseModel):
    """One layer against its limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: str = Field(description="Operator, in the runtime's words where it was timed.")
    dtype: str = Field(description="Type that it computes in, or moves where it multiplies nothing.")
    macs: int = Field(ge=0, description="Multiply-adds of the whole batch.")
    bytes: int = Field(ge=0, description="Inputs, weights and outputs, each moved once.")
    limit_ms: float = Field(ge=0)
    bound: Bound = Field(description="What the limit comes from.")
    measured_ms: float | None = Field(ge=0, description="Median time of the layer; None where it was not timed.")
    reached: float | None = Field(description="limit_ms / measured_ms; above 1 where tensors stay in caches.")


class RooflineResult(BaseModel):
    """One variant at one batch size against the limits of the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    batch_size: int = Field(ge=1)
    peaks: list[Peak] = Field(min_length=1, description="One for each type that the network computes in.")
    macs: int = Field(ge=0, description="Multiply-adds of the whole batch.")
    bytes: int = Field(ge=0, description="Traffic of all layers, each tensor once per layer.")
    network_bytes: int = Field(ge=0, description="Weights, input and output of the network, each moved once.")
    limit_ms: float = Field(ge=0, description="Sum of the limits of the layers.")
    floor_ms: float = Field(ge=0, description="The limit if all activations stayed in caches.")
    compute_bound_share: float = Field(ge=0, le=1, description="Share of limit_ms in layers bound by compute.")
    measured_ms: float = Field(gt=0, description="Median latency.")
    reached: float = Field(description="limit_ms / measured_ms; above 1 where tensors stay in caches.")
    layers: list[LayerLimit] = Field(description="As the runtime ran them, in its order; as in the file if untimed.")
    uncounted: list[str] = Field(description="Operators of the file whose work is not known, so not in the limits.")

    @classmethod
    def of(
        cls,
        *,
        batch_size: int,
        network: Sequence[TimedLayer],
        network_bytes: int,
        measured_ms: float,
        peaks: Mapping[str, Peak],
        timed: Sequence[TimedLayer] = (),
        uncounted: Sequence[str] = (),
    ) -> "RooflineResult":
        """
        Args:
            network: the layers of the network, element-wise operations taken into the layer before them.
            peaks: by type; one for each type among the layers.
            timed: the layers as the runtime executed them, with their times.

        Raises:
            HarnessInputError: a type has no peak, or the latency is not positive.
        """
        if measured_ms <= 0:
            raise HarnessInputError(f"A latency of {measured_ms} ms reaches no fraction of a limit: measure it.")
        limits = [limit(layer.work, peak_of(layer.dtype, peaks)) for layer in network]
        total = sum(item.ms for item in limits)
        compute = sum(item.ms for item in limits if item.bound == "compute")
        if not network and not timed:
            raise HarnessInputError("There is no layer whose work is known, so there is no limit.")
        used = dict.fromkeys(peak_of(layer.dtype, peaks) for layer in (*network, *timed))
        return cls(
            batch_size=batch_size,
            peaks=list(used),
            macs=sum(layer.work.macs for layer in network),
            bytes=sum(layer.work.bytes for layer in network),
            network_bytes=network_bytes,
            limit_ms=total,
            floor_ms=floor_ms(network, network_bytes, peaks),
            compute_bound_share=compute / total if total else 0.0,
            measured_ms=measured_ms,
            reached=total / measured_ms,
            layers=[layer_limit(layer, peaks) for layer in timed or network],
            uncounted=list(uncounted),
        )


def limit(work: Work, peak: Peak) -> Limit:
    """The roofline of the module's definition.

    Raises:
        HarnessInputError: there are multiply-adds to do, and the machine's peak for them is not known.
    """
    memory = 1e3 * work.bytes / peak.bytes_per_s
    if work.macs == 0:
        return Limit(memory, "memory")
    if peak.macs_per_s is None:
        raise HarnessInputError(
            f"There is no limit for multiply-adds in {peak.dtype} on {peak.device}: {peak.how}; "
            "compare in a type that the device computes in."
        )
    compute = 1e3 * work.macs / peak.macs_per_s
    return Limit(compute, "compute") if compute >= memory else Limit(memory, "memory")


def reached(bound: Limit, measured_ms: float) -> float:
    """Which fraction of the limit a measured time reached: 0.5 means twice as long as it must take.

    Raises:
        HarnessInputError: the time is not positive.
    """
    if measured_ms <= 0:
        raise HarnessInputError(f"A time of {measured_ms} ms reaches no fraction of a limit: measure it.")
    return bound.ms / measured_ms


def floor_ms(layers: Iterable[TimedLayer], network_bytes: int, peaks: Mapping[str, Peak]) -> float:
    """The limit of a network whose activations all stay in caches."""
    layers = list(layers)
    compute = sum(limit(Work(layer.work.macs, 0), peak_of(layer.dtype, peaks)).ms for layer in layers)
    fastest = max((peak.bytes_per_s for peak in peaks.values()), default=0.0)
    return max(compute, 1e3 * network_bytes / fastest if fastest else 0.0)


def layer_limit(layer: TimedLayer, peaks: Mapping[str, Peak]) -> LayerLimit:
    """One layer for the results."""
    least = limit(layer.work, peak_of(layer.dtype, peaks))
    return LayerLimit(
        name=layer.name,
        kind=layer.kind,
        dtype=layer.dtype,
        macs=layer.work.macs,
        bytes=layer.work.bytes,
        limit_ms=least.ms,
        bound=least.bound,
        measured_ms=layer.ms,
        reached=reached(least, layer.ms) if layer.ms else None,
    )


def peak_of(dtype: str, peaks: Mapping[str, Peak]) -> Peak:
    """The peak of a type; types that no network multiplies in, such as int64, only move, at the same pace in all.

    Raises:
        HarnessInputError: the type is one that networks multiply in, and it is not among the peaks.
    """
    from benchmarks.harness.peaks import DTYPES

    if dtype in peaks:
        return peaks[dtype]
    if dtype in DTYPES or not peaks:
        raise HarnessInputError(f"There is no measured peak for {dtype}: measure it with measured_peak({dtype!r}).")
    return next(iter(peaks.values()))
