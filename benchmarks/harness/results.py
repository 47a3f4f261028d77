"""The results document: every number of a run, raw samples included, in one validated JSON file.

The models below are the definition; `results.schema.json` beside this file is `schema()` written out, and a test
holds the two equal. The version changes whenever a document of the old form would no longer be read the same way.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import AwareDatetime, Field, JsonValue, ValidationError, model_validator

from benchmarks.harness.cells import BatchMeasurement, Record
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.explanation import Explanation
from benchmarks.harness.result_rows import csv_text as csv_text
from benchmarks.harness.result_rows import rows as rows
from benchmarks.harness.roofline import RooflineResult
from benchmarks.harness.server import NullOverhead, ServerResult
from benchmarks.harness.statistics import Estimate, Speedup, proportion_estimate_percent
from benchmarks.harness.throughput import ThroughputResult

SCHEMA_VERSION: Final = "espalier-results/2"


Section = Literal["accuracy", "server", "throughput", "roofline", "layers", "phases"]
"""Parts of the document that a measurement may leave out."""


class Artefact(Record):
    """The file that was timed."""

    path: str = Field(description="Path, relative to the run directory where it lies inside.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)
    precision: str = Field(description="Such as fp32, fp16, int8.")


class Runtime(Record):
    """What executed the artefact, and the proof that it did so on the device named."""

    name: str
    version: str
    device: str
    proof: JsonValue = Field(None, description="What the runtime itself reports, such as nodes per provider.")


class Accuracy(Record):
    """Accuracy of the very artefact that is timed, on the test split."""

    top1_percent: Estimate = Field(description="Share of what is right among what `metric` counts.")
    top5_percent: Estimate | None = Field(description="None where there are five classes or fewer, or no such figure.")
    loss: float | None = Field(description="Mean cross-entropy; None where the artefact gives no logits.")
    metric: str = Field("top-1", description="What top1_percent is: top-1, pixel accuracy, or a task's own word.")
    others_percent: dict[str, float] = Field(
        default_factory=dict, description="Further figures of the task, such as mean IoU, without intervals."
    )

    @classmethod
    def of(
        cls,
        *,
        top1_percent: float,
        top5_percent: float | None,
        loss: float | None,
        samples: int,
        metric: str = "top-1",
        others_percent: Mapping[str, float] | None = None,
    ) -> "Accuracy":
        """From plain figures over `samples` images, adding their Wilson intervals.

        Pixels of one image are not independent of each other, so that images are counted as samples there, too: no
        share in [0, 1] varies more from image to image than one that is 0 or 1, and the interval is rather too wide.
        """
        return cls(
            top1_percent=proportion_estimate_percent(top1_percent, samples),
            top5_percent=None if top5_percent is None else proportion_estimate_percent(top5_percent, samples),
            loss=loss,
            metric=metric,
            others_percent=dict(others_percent or {}),
        )


class VariantResult(Record):
    """One network in one precision on one runtime."""

    name: str
    kind: Literal["dense", "pruned"] | None = Field(None, description="None where that is not known.")
    artefact: Artefact
    runtime: Runtime
    parameters: int | None = Field(ge=0, description="None where the artefact does not tell.")
    macs: int | None = Field(ge=0, description="Multiply-adds of one sample; None where the artefact does not tell.")
    accuracy: Accuracy | None
    parity: dict[str, JsonValue] | None = Field(description="How far its outputs lie from PyTorch's.")
    measurements: list[BatchMeasurement]
    server: ServerResult | None = Field(None, description="Latency against offered load; None where not measured.")
    throughput: ThroughputResult | None = Field(
        None, description="Over batch sizes and lanes; None where not measured."
    )
    rooflines: list[RooflineResult] = Field(default_factory=list, description="One for each batch size, where known.")
    failure: str | None = Field(None, description="Why it could not be timed, or not to the end.")


class BudgetResult(Record):
    """What pruning was to reach and what it reached, as fractions of the dense network's cost."""

    quantity: Literal["channels", "parameters", "macs", "latency"]
    requested_fraction: float = Field(gt=0, le=1)
    achieved_fraction: float = Field(gt=0)
    dense_cost: float = Field(gt=0, description="In the quantity's own unit; latency in milliseconds.")


class LayerWidths(Record):
    """Output channels of one layer."""

    name: str
    width_before: int = Field(ge=1)
    width_after: int = Field(ge=1)


class PruningEvent(Record):
    """One moment at which channels were removed."""

    index: int = Field(ge=1)
    minibatch: int = Field(ge=0, description="Minibatches seen when it happened.")
    loss: float | None = Field(description="Mean training loss since the event before.")
    cost: float = Field(ge=0, description="Cost after the event, in the unit of the budget's quantity.")
    widths: dict[str, int] = Field(description="Channels of every group after the event.")


class Pruning(Record):
    """How the dense network became the pruned one."""

    budget: BudgetResult
    layers: list[LayerWidths]
    events: list[PruningEvent]


class Results(Record):
    """The whole document."""

    schema_version: Literal["espalier-results/2"] = SCHEMA_VERSION
    created: AwareDatetime
    recipe: dict[str, JsonValue] = Field(description="The resolved recipe, or as much of it as there is.")
    seeds: dict[str, int]
    environment: dict[str, JsonValue]
    variants: list[VariantResult] = Field(min_length=1)
    pruning: Pruning | None
    training: dict[str, list[dict[str, float | int | None]]] = Field(
        description="Per phase, one record per epoch; units in the keys."
    )
    overhead: NullOverhead | None = Field(
        None, description="What the harness itself takes, with a model that does nothing; measured with the server."
    )
    explanations: list[Explanation] = Field(
        default_factory=list, description="Why each variant is as fast as it is, against the first one, layer by layer."
    )
    not_measured: dict[Section, str] = Field(default_factory=dict, description="Section -> why it is empty.")
    provenance: dict[str, JsonValue] = Field(
        description="Where it came from: command, checkpoints, versions, and why this runtime."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        keys = Counter((v.name, v.runtime.name, v.runtime.device, v.artefact.precision) for v in self.variants)
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise ValueError(f"variant {' / '.join(twice[0])} appears twice")
        return self

    def baseline_of(self, variant: VariantResult, speedup: Speedup) -> VariantResult | None:
        """The variant that `speedup` was measured against.

        It may have run elsewhere, since what is measured together compares; of several with its name it is the one
        most like the variant in runtime, device and precision.
        """

        def unlike(other: VariantResult) -> tuple[bool, bool, bool]:
            return (
                other.runtime.name != variant.runtime.name,
                other.runtime.device != variant.runtime.device,
                other.artefact.precision != variant.artefact.precision,
            )

        return min((other for other in self.variants if other.name == speedup.baseline), key=unlike, default=None)

    def to_json(self) -> str:
        """The document as indented JSON text; the raw samples of a round stand on one line."""
        text = json.dumps(self.model_dump(mode="json"), allow_nan=False, indent=1)
        # Inside a JSON string a line break is always escaped, so this touches arrays of numbers only.
        return re.sub(r"\[\n[-+.,\deE\s]+\]", lambda match: re.sub(r"\s+", "", match[0]), text) + "\n"


def load(path: Path) -> Results:
    """Read and validate a results document.

    Raises:
        HarnessInputError: the file cannot be read, is not JSON, or is no document of this version.
    """
    try:
        return Results.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HarnessInputError(f"Cannot read {path}: {error.strerror}; give the path of a results.json.") from error
    except UnicodeDecodeError as error:
        raise HarnessInputError(f"{path} is not text, so it is no results document.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise HarnessInputError(
            f"{path} is no document of {SCHEMA_VERSION}: {place}: {first['msg']}; write it again with this version."
        ) from error


def schema() -> dict[str, Any]:
    """The document's JSON Schema (2020-12)."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA_VERSION.replace('/', ':')}",
        **Results.model_json_schema(mode="serialization"),
    }
