"""What the stages of a run work on, and the stages that train; those that deploy stand in `deploy.deploying`.

Each is a function that can be called alone.

A stage reads what the stages before it wrote, writes its own files, and returns the rest as JSON values, which the
pipeline records. One that was killed is simply called again: a training goes on from its last epoch, everything else is
repeated. No stage takes a network from memory, so that a resumed run computes what an unbroken one does, to the bit.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from compress import checkpoint, models
from compress.data import Data
from compress.errors import InputError
from compress.files import write_json
from compress.pruner import Pruner
from compress.tasks import Task, task_named
from compress.training import History, TrainingConfig, evaluate, fit
from deploy.artefacts import artefact_name, targets
from deploy.precision import Precision
from deploy.recipe import Recipe
from deploy.run_directory import RunDirectory
from deploy.runtimes import Runtime, open_runtime
from deploy.serving import Serving

logger = logging.getLogger(__name__)

Variant = Literal["dense", "pruned"]
VARIANTS: Final[tuple[Variant, ...]] = ("dense", "pruned")
TRAININGS: Final = ("baseline", "prune", "finetune")

TRUST_ALL: Final = ("*",)
"""A recipe is the user's own word: what it names may be imported."""


@dataclass(frozen=True)
class Deployed:
    """One network in one precision, as it is verified and timed."""

    variant: Variant
    precision: Precision
    label: str
    """"pruned" in the first precision of the recipe, "pruned int8" in any other."""
    onnx: Path
    file: Path
    """What the runtime executes: the engine built from `onnx`, or `onnx` itself."""


@dataclass(frozen=True)
class Run:
    """What every stage works on; `recipe` is the resolved one."""

    recipe: Recipe
    data: Data
    directory: RunDirectory
    serving: Serving

    @property
    def task(self) -> Task:
        """What the network is trained for."""
        return task_named(self.recipe.task or self.data.task, trust=TRUST_ALL)

    @property
    def deployed(self) -> list[Deployed]:
        """Every network in every precision, the baseline first."""
        first = self.recipe.export.precision[0]
        found = []
        for precision in self.recipe.export.precision:
            (target,) = targets(precision, {self.serving.target})
            for variant in VARIANTS:
                label = variant if precision == first else f"{variant} {precision}"
                onnx = self.directory.artifacts / artefact_name(variant, precision, target)
                file = onnx.with_suffix(".plan") if self.serving.runtime == "tensorrt" else onnx
                found.append(Deployed(variant, precision, label, onnx, file))
        return found

    def open(self, deployed: Deployed) -> Runtime:
        """The runtime of this run on one of its files."""
        return open_runtime(deployed.file, device=self.serving.device, threads=self.recipe.measure.threads)

    def checkpoint(self, variant: Variant) -> Path:
        """Where the network lies."""
        return self.directory.baseline if variant == "dense" else self.directory.pruned

    def load(self, variant: Variant) -> nn.Module:
        """The network, from its checkpoint."""
        return checkpoint.load(self.checkpoint(variant), trust=TRUST_ALL)


def seeds(recipe: Recipe) -> dict[str, int]:
    """Seed of each training: no two trainings, of one run or of two, see their images in the same order."""
    return {stage: len(TRAININGS) * recipe.seed + index for index, stage in enumerate(TRAININGS)}


def build_model(recipe: Recipe) -> nn.Module:
    """The dense network; fresh weights are drawn from the recipe's seed."""
    arguments = dict(recipe.model.kwargs)
    if recipe.model.weights is not None:
        arguments["weights"] = recipe.model.weights
    torch.manual_seed(recipe.seed)
    return models.build(recipe.model.factory, trust=TRUST_ALL, **arguments)


def build_pruner(model: nn.Module, run: Run) -> Pruner:
    """The recipe's pruner for a dense network."""
    settings = run.recipe.prune
    return Pruner(
        model,
        torch.zeros(2, *run.data.image_shape),
        importance=settings.importance,
        budget=settings.budget.budget(),
        events=settings.events,
        interval=settings.interval,
        round_to=settings.round_to,
        min_channels=settings.min_channels,
        ignore=settings.ignore,
        protect=settings.protect,
        tie=settings.tie,
        attention=settings.attention,
        embedding=settings.embedding,
        part=settings.part,
        graph=settings.graph,
        momentum=settings.momentum,
    )


def sample_images(data: Data, *, at_least: int, at_most: int) -> Tensor:
    """Images of the test split in its order, (N, C, H, W) with at_least <= N <= at_most.

    Raises:
        InputError: the split is smaller, or gives something else than tensors.
    """
    batches: list[Tensor] = []
    found = 0
    for images, _ in data.test:
        if not isinstance(images, Tensor):
            raise InputError(
                f"The loaders of {data.name} give a {type(images).__name__} of images, but an exported file takes a "
                "tensor (N, C, H, W): train and prune such a network from Python, and export its backbone, as "
                "docs/tasks.md shows."
            )
        batches.append(images)
        found += len(images)
        if found >= at_most:
            break
    if found < at_least:
        raise InputError(
            f"The test split of {data.name} has {found} images, but {at_least} are needed: lower parity.samples, "
            "parity.batch_sizes or measure.batch_sizes."
        )
    return torch.cat(batches)[:at_most]


def baseline(run: Run) -> dict[str, Any]:
    """Train the dense network, or take its weights as they are; evaluate it and save it as `baseline/`."""
    model = build_model(run.recipe)
    history = History()
    if run.recipe.baseline is not None:
        history = _train(run, "baseline", model, run.recipe.baseline)
    return {"training": _epochs(history), "pytorch": _evaluate_and_save(run, "dense", model)}


def prune(run: Run) -> dict[str, Any]:
    """Remove channels while the network trains; write `pruning.json` and the network as it is before fine-tuning."""
    directory, settings = run.directory, run.recipe.prune
    model = run.load("dense")
    pruner = build_pruner(model, run)
    history = _train(run, "prune", model, settings.training, pruner=pruner)
    budget = {
        "quantity": pruner.budget.quantity,
        "requested_fraction": pruner.budget.kept,
        "achieved_fraction": pruner.kept,
        "dense_cost": pruner.dense_cost,
    }
    write_json(
        directory.pruning,
        {
            "importance": settings.importance,
            "budget": budget,
            "events": [event.as_dict() for event in pruner.history],
            "frozen": [{"layers": list(frozen.layers), "reason": frozen.reason} for frozen in pruner.graph.frozen],
            "operators_without_rule": pruner.graph.operators_without_rule,
        },
    )
    _save(run, directory.unrefined, model, {})
    events = [
        {
            "index": event.index,
            "minibatch": event.minibatches,
            "loss": event.loss,
            "cost": event.kept * pruner.dense_cost,
            "widths": event.widths,
        }
        for event in pruner.history
    ]
    return {"training": _epochs(history), "budget": budget, "events": events}


def finetune(run: Run) -> dict[str, Any]:
    """Train the pruned network back to accuracy, taught by the dense one; save it as `pruned/`."""
    model = checkpoint.load(run.directory.unrefined, trust=TRUST_ALL)
    history = _train(run, "finetune", model, run.recipe.finetune)
    return {"training": _epochs(history), "pytorch": _evaluate_and_save(run, "pruned", model)}


def _train(run: Run, stage: str, model: nn.Module, config: TrainingConfig, pruner: Pruner | None = None) -> History:
    """Train inside a stage; the dense network teaches where the settings ask for a teacher."""
    return fit(
        model,
        run.data.train,
        config,
        seed=seeds(run.recipe)[stage],
        pruner=pruner,
        teacher=run.load("dense") if config.distillation else None,
        test_loader=run.data.test,
        task=run.task,
        state_path=run.directory.training_state(stage),
        description=stage,
    )


def _evaluate_and_save(run: Run, variant: Variant, model: nn.Module) -> dict[str, Any]:
    evaluation = evaluate(model, run.data.test, task=run.task, description=f"{variant}: accuracy")
    metric, top1, samples = evaluation.metric, evaluation.top1, evaluation.samples
    logger.info("%s network: %s %.2f %% of %d test images", variant, metric, top1, samples)
    _save(run, run.checkpoint(variant), model, {"accuracy": asdict(evaluation)})
    return asdict(evaluation)


def _save(run: Run, directory: Path, model: nn.Module, provenance: Mapping[str, Any]) -> None:
    recipe, data = run.recipe, run.data
    checkpoint.save(
        model,
        directory,
        factory=recipe.model.factory,
        kwargs={**recipe.model.kwargs, "weights": recipe.model.weights},
        image_shape=data.image_shape,
        classes=data.classes,
        mean=data.mean,
        std=data.std,
        resize=data.resize,
        provenance={"recipe": recipe.name, "seed": recipe.seed, "data": recipe.data.source, **provenance},
    )


def percent_key(metric: str) -> str:
    """top-1 -> top1_percent, mean IoU -> mean_iou_percent."""
    return f"{metric.lower().replace('-', '').replace(' ', '_')}_percent"


def _epochs(history: History) -> list[dict[str, float | None]]:
    """One record per epoch; units in the keys."""
    return [
        {
            "epoch": number,
            "steps": epoch.steps,
            "loss": epoch.train_loss,
            "learning_rate": epoch.learning_rate,
            "seconds": epoch.seconds,
            **({percent_key(epoch.test.metric): epoch.test.top1} if epoch.test else {"top1_percent": None}),
            **{percent_key(name): value for name, value in (epoch.test.others if epoch.test else {}).items()},
            "test_loss": epoch.test.loss if epoch.test else None,
        }
        for number, epoch in enumerate(history.epochs, start=1)
    ]
