"""What a comparison of two results documents tells, in one validated document of its own."""

from typing import Final, Literal

from pydantic import AwareDatetime, Field

from benchmarks.harness.cells import Record
from benchmarks.harness.measure import Scenario
from benchmarks.harness.regression_environment import Difference
from benchmarks.harness.statistics import Estimate, Verdict

SCHEMA_VERSION: Final = "espalier-regression/1"

Unit = Literal["ms", "queries/s", "samples/s"]


class Cell(Record):
    """By what figures of two documents correspond."""

    variant: str
    runtime: str
    device: str
    precision: str
    batch_size: int | None = Field(ge=1, description="None for the throughput, whose best batch size is a result.")
    scenario: Scenario | Literal["Server", "Throughput"] = Field(
        description="Server: the highest rate within the limit. Throughput: that at the knee. Else: the latency."
    )


class CellChange(Record):
    """One cell that both documents have."""

    cell: Cell
    new_device: str | None = Field(description="Where NEW ran on another device than OLD.")
    unit: Unit = Field(description="Of the two figures.")
    old: float | None = Field(description="Median of round medians, or the rate; None where there is none.")
    new: float | None
    ratio: Estimate | None = Field(
        description="Above 1 NEW is better: OLD's latency over NEW's, or NEW's rate over OLD's. The interval of a "
        "Server rate is that of the two searches' brackets. None where the figures do not compare."
    )
    spread: float = Field(ge=1, description="The larger A/A spread of the two documents: no claim within it.")
    verdict: Verdict
    control: bool = Field(description="The same file, runtime version and environment in both: it ought to be 1.")
    note: str | None = Field(description="Why there is no ratio, or what else differs.")


class Count(Record):
    """A figure without uncertainty, of both documents."""

    old: int | None
    new: int | None


class VariantChange(Record):
    """What else is known of a variant that both documents have."""

    variant: str
    runtime: str
    device: str
    new_device: str | None = Field(description="Where NEW ran on another device than OLD.")
    precision: str
    artefact_changed: bool
    old_sha256: str
    new_sha256: str
    old_runtime_version: str
    new_runtime_version: str
    old_top1_percent: Estimate | None
    new_top1_percent: Estimate | None
    top1_points: float | None = Field(
        description="NEW's less OLD's; None where one of them has no accuracy, or they are of other metrics."
    )
    metric: str = Field("top-1", description="What the accuracies are, see results.Accuracy.")
    parameters: Count
    macs: Count
    size_bytes: Count


class Failure(Record):
    """Something that has no figures in one document or in both, and why."""

    variant: str
    runtime: str
    device: str
    precision: str
    what: str | None = Field(description="Which part of it failed; None for the variant itself.")
    old: str | None = Field(description="Reason in OLD; None where it did not fail.")
    new: str | None
    regression: bool = Field(description="It fails in NEW only.")


class Origin(Record):
    """Where a document comes from."""

    created: AwareDatetime
    commit: str | None


class Regression(Record):
    """NEW against OLD."""

    schema_version: Literal["espalier-regression/1"] = SCHEMA_VERSION
    old: Origin
    new: Origin
    warnings: list[str] = Field(description="What to know before the figures, the gravest first.")
    cells: list[CellChange] = Field(description="The worst first.")
    only_old: list[Cell] = Field(description="Measured in OLD only.")
    only_new: list[Cell] = Field(description="Measured in NEW only.")
    variants: list[VariantChange]
    failures: list[Failure]
    environment: list[Difference]


def written(ratio: Estimate) -> str:
    """A ratio with its interval; three decimals, as limits are of a few percent: '0.912× [0.903, 0.921]'."""
    return f"{ratio.value:.3f}× [{ratio.low:.3f}, {ratio.high:.3f}]"


def described(cell: Cell) -> str:
    """A cell in words, in full."""
    batch = [] if cell.batch_size is None else [f"batch {cell.batch_size}"]
    return ", ".join((cell.variant, cell.precision, cell.runtime, cell.device, *batch, cell.scenario))
