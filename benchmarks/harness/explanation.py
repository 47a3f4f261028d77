"""What `deploy.explaining` finds out, as records that can be written as JSON."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.harness.roofline import Bound
from benchmarks.harness.statistics import Verdict

Cause = Literal[
    "uneven", "memory", "type", "launch", "misaligned", "kernel", "quantisation", "layout", "unfused", "outside", "gain"
]


CAUSES: dict[Cause, str] = {
    "uneven": "work fell where little time is spent",
    "memory": "layers wait for memory",
    "type": "layers run in another type",
    "launch": "layers too small for a kernel",
    "misaligned": "widths that do not suit the kernels",
    "kernel": "kernels use the machine less well",
    "quantisation": "conversions of type",
    "layout": "conversions of layout",
    "unfused": "kernels that the baseline does not need",
    "outside": "time outside of the layers",
    "gain": "layers as fast as expected, or faster",
}
"""What each cause is called where people read it."""

UNCLEAR = "Whether one is faster is unclear; what follows tells how the layers were timed, and no more."
"""What stands above an explanation of a difference that was not established."""


class Record(BaseModel):
    """Base of what is reported: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Layer(Record):
    """One layer of one network: what it has to do, what it took, and the least it could take."""

    name: str = Field(description="The PyTorch module, else the node of the file, else the runtime's own name.")
    kernel: str = Field(description="The runtime's name of it.")
    kind: str = Field(description="Operator in the runtime's words.")
    ms: float = Field(ge=0)
    launches: int = Field(ge=1)
    macs: int = Field(ge=0)
    bytes: int = Field(ge=0)
    in_channels: int | None
    out_channels: int | None
    groups: int = Field(ge=1)
    dtype: str = Field(description="Type that it ran in.")
    asked_dtype: str = Field(description="Type that the file asks for.")
    limit_ms: float = Field(ge=0)
    compute_ms: float = Field(ge=0, description="Its multiply-adds at the peak of the type that the file asks for.")
    bound: Bound
    added: bool = Field(description="Whether the runtime put it in: no node of the file is behind it.")


class Row(Record):
    """One layer of both networks."""

    name: str
    baseline: Layer
    variant: Layer
    expected_ms: float = Field(ge=0, description="The baseline's time times the ratio of the layer's arithmetic.")
    lost_ms: float = Field(description="Time beyond the expectation; negative where it took less.")
    memory_ms: float = Field(ge=0, description="Of that, what memory costs that does not get faster.")
    cause: Cause | None = Field(description="Of the rest; None where nothing to speak of is lost.")
    bound: Literal["compute", "memory", "launch"] = Field(description="What forbids the variant to be much faster.")

    @property
    def macs_ratio(self) -> float | None:
        return self.variant.macs / self.baseline.macs if self.baseline.macs else None

    @property
    def reached(self) -> float:
        """Fraction of the variant's limit that it reached."""
        return self.variant.limit_ms / self.variant.ms if self.variant.ms else 0.0


class Finding(Record):
    """One reason, with the milliseconds of one inference that hang on it."""

    cause: Cause
    ms: float = Field(description="Negative for what was won beyond the expectation.")
    fact: str
    why: str
    fix: str = Field(description="Empty where there is nothing to do about it.")
    layers: list[str] = Field(description="The layers concerned, those with most at stake first.")


class Explanation(Record):
    """Where the time of the variant went; the findings add up from `expected_ms` to `variant_ms`."""

    baseline: str
    variant: str
    device: str
    batch_size: int
    baseline_ms: float = Field(description="Sum of the layers, and with a latency given, what is outside of them.")
    variant_ms: float
    expected_ms: float
    verdict: Verdict | None = Field(None, description="Of the whole latencies, measured apart from the layers.")
    macs_ratio: float | None
    peak_ratio: float = Field(description="How many times faster the machine multiplies in the variant's types.")
    variant_limit_ms: float = Field(description="Sum of the limits of the variant's layers as they ran.")
    findings: list[Finding]
    rows: list[Row]
    only_baseline: list[Layer]
    only_variant: list[Layer]
