"""Models for the table: random weights, and nothing in them that hides an error."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from compress import models
from compress.errors import InputError


def built(model: str, build: dict[str, Any], part: str | None, seed: int) -> nn.Module:
    """The model, or its part.

    Raises:
        InputError: there is no such model or part.
    """
    torch.manual_seed(seed)
    prefix, _, name = model.partition(":")
    if prefix == "torchvision" and name not in torchvision.models.list_models(module=torchvision.models):
        try:
            whole = torchvision.models.get_model(name, weights=None, weights_backbone=None, **build)
        except ValueError as error:
            raise InputError(f"torchvision has no model {name!r}: correct --models.") from error
    else:
        whole = models.build(model, trust=[prefix], **build)  # whoever names code here wants it run
    if part is not None:
        whole = whole.get_submodule(part)
    return randomised(whole)


def randomised(model: nn.Module) -> nn.Module:
    """The same model with no tensor that would hide what is wrong with another.

    Statistics of 0 and 1, scales that are constant in a new network (a layer scale of 1e-6, a gain of 0) and biases of
    0 are drawn at random. Weights so small that a branch adds nothing to its shortcut (0.02 in many transformers) grow
    until their variance is 1/fan-in.
    """
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            mean.normal_(0, 0.1)
            variance.uniform_(0.5, 1.5)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1 and name.endswith("weight"):
                spread = float(parameter.std()) * float(parameter[0].numel()) ** 0.5
                if 0 < spread < 1:
                    parameter.div_(spread)
            first = parameter.flatten()[0]
            if not bool((parameter == first).all()) or (parameter.numel() == 1 and first != 0):
                continue
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


class OneOutput(nn.Module):
    """A network that returns one tensor: its only output, or all of them flattened, (N, values)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs = torch.utils._pytree.tree_leaves(self.network(images))
        if len(outputs) == 1:
            only: Tensor = outputs[0]
            return only
        return torch.cat([output.flatten(1) for output in outputs], dim=1)


@torch.no_grad()
def calibrated(model: nn.Module, batch: Tensor) -> nn.Module:
    """The same model with the statistics of `batch` in its batch normalisations, without which values explode."""
    momenta = {
        module: module.momentum for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if not momenta:
        return model.eval()
    for module in momenta:
        module.momentum = 1.0
    model.train()(batch)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model.eval()


def images(batch: int, size: int, seed: int) -> Tensor:
    """(batch, 3, size, size), normally distributed."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def own_bytes(model: nn.Module) -> int:
    """Size of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
