"""What the table knows of one model: the row that its process writes while it works, and that the table is made of."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.files import write_text

STAGES = ("build", "forward", "trace", "removal", "parity", "costs", "training", "export", "runtime")
"""In their order; the first three once for each model, the others for each share."""

COMPARISON = "groups"
"""A stage of Torch-Pruning's side alone, after all others: its groups against ours."""

Kind = Literal["refused", "wrong", "error", "time", "memory", "died"]


class Record(BaseModel):
    """Base of all parts: no unknown keys, no NaN (it is not JSON)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Request(Record):
    """What is asked of the process of one model."""

    model: str = Field(description="torchvision:NAME, timm:NAME, or any other factory.")
    size: int = Field(description="Side of the square image in pixels.")
    build: dict[str, Any] = Field(description="Further arguments of the factory.")
    part: str | None = Field(description="Submodule that alone is traced and pruned; None for the whole model.")
    side: Literal["espalier", "torch-pruning"]
    shares: tuple[float, ...] = Field(description="Of the channels of every group that are removed, each on its own.")
    until: str = Field(description="The last stage.")
    trace: dict[str, Any] = Field(description="Options of `compress.graph.trace`.")
    threads: int
    seed: int = 0


class Stage(Record):
    """What a stage took."""

    seconds: float
    before_bytes: int = Field(description="Memory of the process that lay in RAM when the stage began.")
    peak_bytes: int = Field(description="The most of it that did so during the stage.")


class Failure(Record):
    """Where the work ended, and why."""

    stage: str
    kind: Kind = Field(description="Refused by an error made for users, wrong figures, another error, or a limit.")
    reason: str
    traceback: str = Field(default="", description="Its last lines.")


class LeftOut(Record):
    """Layers whose channels stay, for one reason."""

    reason: str
    layers: int
    first: tuple[str, ...] = Field(description="Names of the first of them.")


class Graph(Record):
    """What was found to be removable, and what was not."""

    groups: int
    removable: int = Field(description="Output channels that stand in a group.")
    channels: int = Field(description="Output channels of all layers.")
    left_out: tuple[LeftOut, ...]
    operators_without_rule: dict[str, int] = Field(description="Operator -> uses.")
    residue: dict[str, str] = Field(description="Group -> layer that reads something else than 0 from gated channels.")
    mixed: dict[str, str] = Field(description="Group -> normalisation that mixes it with channels that stay.")


class Share(Record):
    """The model without one share of its channels."""

    stages: dict[str, Stage] = {}
    removed: float | None = Field(default=None, description="Share of the output channels of all layers that went.")
    parity: float | None = Field(default=None, description="Error of removal against zeroing, without mixed groups.")
    mixed_parity: float | None = Field(default=None, description="The same with the mixed groups, where there are any.")
    effect: float | None = Field(default=None, description="By how much the zeroed network differs from the dense one.")
    macs: int | None = None
    parameters: int | None = None
    losses: tuple[float, ...] = ()
    runtime: dict[str, float] = Field(default={}, description="Batch -> error of ONNX Runtime against PyTorch.")
    failure: Failure | None = None


class Row(Record):
    """One model, on one side."""

    request: Request
    stages: dict[str, Stage] = {}
    parameters: int | None = None
    bytes: int | None = Field(default=None, description="Of all parameters and buffers.")
    macs: int | None = None
    graph: Graph | None = None
    equal_groups: bool | None = Field(default=None, description="Whether both sides found the same groups.")
    contained: bool | None = Field(
        default=None, description="Whether all groups that the other side removed channels from are ours too."
    )
    difference: str | None = Field(
        default=None, description="Groups that only one side found, or why none are compared."
    )
    shares: dict[str, Share] = {}
    failure: Failure | None = Field(default=None, description="What ended the work on the whole model.")
    now: tuple[str, str | None] | None = Field(default=None, description="Stage and share that are being worked on.")

    def failures(self) -> dict[str, Failure | None]:
        """Share -> what went wrong with it, or with the model."""
        names = [share_name(share) for share in self.request.shares]
        return {name: self.failure or (self.shares[name].failure if name in self.shares else None) for name in names}


def share_name(share: float) -> str:
    """The key of a share in a row."""
    return f"{share:g}"


def write_row(path: Path, row: Row) -> None:
    """Write in one atomic step, so that a kill leaves a whole row."""
    write_text(path, row.model_dump_json(indent=1) + "\n")


def read_row(path: Path) -> Row | None:
    """The row in a file; None where there is none that can be read, an older form for one."""
    try:
        return Row.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
