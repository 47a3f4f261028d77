"""What one training is: its settings, its optimizer, and the learning rate at every step."""

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import nn, optim

from compress.errors import InputError
from compress.training.distillation import Distillation


class TrainingConfig(BaseModel):
    """Settings of `compress.training.fit`.

    The recipe of Molchanov et al. 2019 (arXiv 1906.10771): prune with `schedule="constant"`,
    then fine-tune with `epochs=25, schedule="step", step_epochs=(10, 20), step_factor=0.1`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(
        25,
        ge=0,
        description="passes over the training data; while a pruner is at work it decides the end instead",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="update rule")
    learning_rate: float = Field(
        0.01,
        gt=0,
        allow_inf_nan=False,
        description="after warm-up, before any decay; per step, not per sample",
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd; adam and adamw keep betas (0.9, 0.999)")
    nesterov: bool = Field(False, description="Nesterov's momentum, sgd only")
    weight_decay: float = Field(
        1e-4,
        ge=0,
        allow_inf_nan=False,
        description="on all parameters, normalisation and biases included, as in the papers; adamw decouples",
    )
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="how the learning rate falls")
    step_epochs: tuple[float, ...] = Field((), description="epochs at which schedule 'step' multiplies by step_factor")
    step_factor: float = Field(0.1, gt=0, le=1, description="factor of every drop of schedule 'step'")
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="epochs over which the learning rate rises linearly from 0",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")
    distillation: Distillation | None = Field(None, description="learning from a teacher; none: labels alone")
    precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="mixed precision of the forward pass; 'no' computes in float32"
    )

    @field_validator("precision", mode="before")
    @classmethod
    def _yaml_no(cls, value: Any) -> Any:
        # YAML 1.1 reads a bare `no` as false.
        return "no" if value is False else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs optimizer: sgd with a momentum above 0")
        if (self.schedule == "step") != bool(self.step_epochs):
            raise ValueError("step_epochs and schedule: step go together; give both or neither")
        if any(not 0 < epoch < self.epochs for epoch in self.step_epochs):
            raise ValueError(f"every one of step_epochs must lie between 0 and epochs ({self.epochs})")
        if self.schedule != "constant" and self.epochs and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must be below epochs ({self.epochs})")
        return self


def learning_rate(config: TrainingConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of the optimizer step number `step`, counted from 0 over the whole training.

    Warm-up is linear and reaches the full rate at its last step (Goyal et al. 2017, arXiv 1706.02677, section
    2.2); cosine falls from there to 0 at the step that follows the last one (Loshchilov and Hutter 2017,
    arXiv 1608.03983, eq. 5).
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "cosine":
        done = (step - warmup) / (config.epochs * steps_per_epoch - warmup)
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    drops = sum(step >= round(epoch * steps_per_epoch) for epoch in config.step_epochs)
    return config.learning_rate * config.step_factor**drops


def build_optimizer(model: nn.Module, config: TrainingConfig) -> optim.Optimizer:
    """The optimizer of `config` over the parameters of `model` that require gradients.

    Raises:
        InputError: no parameter requires a gradient.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("No parameter of the model requires a gradient, so nothing can be trained: unfreeze some.")
    if config.optimizer == "sgd":
        return optim.SGD(
            parameters,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    adaptive = {"adam": optim.Adam, "adamw": optim.AdamW}[config.optimizer]
    return adaptive(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
