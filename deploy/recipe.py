"""The recipe of a run: every choice there is, with its default, its meaning and its unit.

A recipe is read from YAML by `deploy.recipe_text`, which also puts its errors into words.
"""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.budget import Budget
from compress.training import Distillation, TrainingConfig
from deploy.engine_settings import BuilderSettings
from deploy.precision.settings import ExportSettings

RECIPE_VERSION = 1


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The dense network."""

    factory: str = Field(
        description="torchvision:NAME, espalier:NAME, timm:NAME or package.module:function", pattern=".:."
    )
    weights: str | None = Field(
        None, description="name of torchvision's published weights, or a .safetensors, .pth or .pt file"
    )
    kwargs: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the factory; what the data say is filled in"
    )

    @field_validator("kwargs")
    @classmethod
    def _no_weights(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        if "weights" in kwargs:
            raise ValueError("weights stand in model.weights; move them there")
        return kwargs


class DataSection(Section):
    """The labelled images."""

    source: str = Field(
        description="digits, glyphs, cifar10:/path, cifar100:/path, imagefolder:/path, segmentation:/path or "
        "package.module:function",
        min_length=1,
    )
    batch_size: int = Field(64, ge=1, description="images per minibatch of training")
    image_size: int | None = Field(None, ge=1, description="side in pixels; null takes the source's own")
    workers: int = Field(0, ge=0, description="processes that decode images, for imagefolder and segmentation")
    augment: bool = Field(True, description="whether training images are changed at random")


class BaselineTraining(TrainingConfig):
    """How the dense network is trained; it has no teacher."""

    distillation: None = Field(None, exclude=True)


class PruningTraining(TrainingConfig):
    """How the network trains while it is pruned; events times interval decide the length."""

    epochs: int = Field(0, exclude=True)
    schedule: Literal["constant"] = Field("constant", description="no other schedule knows its length here")

    @field_validator("epochs")
    @classmethod
    def _decided_by_events(cls, _: int) -> int:
        raise ValueError("pruning ends after prune.events x prune.interval minibatches; leave epochs out")


class FinetuneTraining(TrainingConfig):
    """How the pruned network is trained back; the dense one teaches it unless distillation is null."""

    distillation: Distillation | None = Field(
        default_factory=Distillation, description="learning from the dense network; null: labels alone"
    )


class BudgetSection(Section):
    """What is kept of the dense network; exactly one of the three."""

    macs: float | None = Field(None, gt=0, le=1, description="fraction of the multiply-adds kept, in (0, 1]")
    parameters: float | None = Field(None, gt=0, le=1, description="fraction of the parameters kept, in (0, 1]")
    channels: float | None = Field(None, gt=0, le=1, description="fraction of the channels kept, in (0, 1]")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of macs, parameters and channels, not {' and '.join(given) or 'none'}; "
                "set the others to null"
            )
        return self

    def budget(self) -> Budget:
        """The same for `compress`."""
        return Budget(macs=self.macs, parameters=self.parameters, channels=self.channels)


class PruneSection(Section):
    """Which channels go, when, and how the network trains meanwhile."""

    importance: str = Field("taylor", description="criterion that ranks the channels, NAME or NAME:option=value")
    budget: BudgetSection = Field(description="what is kept")
    events: int = Field(10, ge=1, description="pruning events until the budget is reached")
    interval: int = Field(10, ge=1, description="minibatches before each event")
    round_to: int = Field(8, ge=1, description="widths become multiples of this")
    min_channels: int = Field(8, ge=1, description="no layer becomes narrower")
    ignore: tuple[str, ...] = Field((), description="modules whose output channels stay")
    protect: tuple[str, ...] = Field((), description="modules none of whose tensors is cut")
    tie: tuple[tuple[str, str], ...] = Field((), description="pairs of layers whose output channels go together")
    attention: Literal["heads", "widths", "keep"] = Field(
        "heads", description="of attention go whole heads, the width of all heads of a layer, or nothing"
    )
    embedding: bool = Field(False, description="whether channels may go that a normalisation mixes with others")
    part: str | None = Field(None, description="submodule that alone is pruned; it takes the images; null: all")
    graph: Literal["export", "torch-pruning"] = Field("export", description="what finds the channel groups")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the average of scores over events")
    training: PruningTraining = Field(default_factory=PruningTraining, description="between the events")


class EngineSection(Section):
    """How TensorRT builds engines, where a GPU and TensorRT are present."""

    optimization_level: int = Field(3, ge=0, le=5, description="0 builds fastest, 5 searches longest for fast kernels")
    workspace_bytes: int | None = Field(None, ge=1, description="most GPU memory for one layer; null: all there is")
    tf32: bool = Field(False, description="whether fp32 layers may round their inputs to 10 bits of mantissa")

    def settings(self) -> BuilderSettings:
        """The same for the builder."""
        return BuilderSettings(**self.model_dump())


class ParitySection(Section):
    """How the files are held against PyTorch."""

    tolerance: float = Field(
        1e-3, gt=0, description="of fp32: largest |difference| of logits, as a share of the largest |logit|"
    )
    batch_sizes: tuple[int, ...] = Field((1, 3, 8), min_length=1, description="images per inference")
    samples: int = Field(64, ge=1, description="test images compared")

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes holds {min(self.batch_sizes)}, but a batch has at least 1 image")
        if max(self.batch_sizes) > self.samples:
            raise ValueError(f"samples ({self.samples}) must be at least the largest of batch_sizes")
        return self


class MeasureSection(Section):
    """How the files are timed."""

    batch_sizes: tuple[int, ...] = Field((1, 32), min_length=1, description="images per query")
    rounds: int = Field(10, ge=2, description="interleaved rounds at least; every variant runs once in each")
    processes: int = Field(3, ge=1, description="fresh processes of each variant over which the rounds are spread")
    seconds_per_round: float = Field(1.0, ge=0, description="each variant runs at least that long in a round")
    queries_per_round: int = Field(50, ge=1, description="and at least that many queries")
    time_limit_s: float = Field(
        120.0, gt=0, description="for each batch size; rounds go on until all ratios are known to 0.5 %, or until then"
    )
    layers: bool = Field(True, description="whether layers are timed too, to say where the time went")
    threads: int | None = Field(None, ge=1, description="CPU threads of one inference; null takes PyTorch's number")

    @field_validator("batch_sizes")
    @classmethod
    def _distinct(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError("batch sizes must be positive and different from each other")
        return sizes


class Recipe(Section):
    """One run from a dense network to measured artefacts."""

    version: Literal[1] = Field(1, description="of the recipe's format")
    name: str = Field(
        description="letters, digits, . _ -; the run's directory is runs/NAME", pattern=r"^[A-Za-z0-9][\w.-]*$"
    )
    seed: int = Field(0, ge=0, le=2**31, description="of weights, order of images, augmentation and measuring")
    model: ModelSection = Field(description="the dense network")
    data: DataSection = Field(description="the labelled images")
    task: str | None = Field(
        None,
        min_length=1,
        description="classification, segmentation or package.module:object; null: what the data source says",
    )
    baseline: BaselineTraining | None = Field(
        None, description="training of the dense network; null trusts its weights"
    )
    prune: PruneSection = Field(description="removal of channels")
    finetune: FinetuneTraining = Field(default_factory=FinetuneTraining, description="training after pruning")
    export: ExportSettings = Field(default_factory=ExportSettings, description="deployable files")
    engine: EngineSection = Field(default_factory=EngineSection, description="TensorRT engines, where TensorRT is used")
    parity: ParitySection = Field(default_factory=ParitySection, description="the files against PyTorch")
    measure: MeasureSection = Field(default_factory=MeasureSection, description="the files against the clock")

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        prefix = self.model.factory.partition(":")[0]
        if self.baseline is None and self.model.weights is None and prefix in ("espalier", "torchvision"):
            raise ValueError(
                "baseline is null, which trusts the model's weights, but model.weights names none; "
                "give model.weights, or settings of a training under baseline"
            )
        return self

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as YAML and JSON hold it."""
        return self.model_dump(mode="json")
