"""Where a network computes: device and processes through accelerate, memory layout by ourselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from compress.errors import InputError
from compress.modes import evaluation_mode

logger = logging.getLogger(__name__)


@contextmanager
def opened_accelerator(precision: str = "no") -> Iterator[Accelerator]:
    """An `Accelerator` of this mixed precision, whatever one was made before in this process.

    Accelerate keeps precision and gradient accumulation in process-wide state and refuses a second precision.
    That state is put aside for the length of the block, so that a caller's own `Accelerator` survives;
    devices and process group, kept elsewhere, are shared.

    Raises:
        InputError: fp16 without a GPU.
    """
    shared = (AcceleratorState._shared_state, GradientState._shared_state)
    saved = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        # Given as a plugin, for a number alone would be overruled by an environment variable.
        accelerator = Accelerator(
            mixed_precision=precision, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1)
        )
        if precision == "fp16" and accelerator.scaler is None:
            raise InputError("precision is fp16, which trains on a GPU only, and none was found: set bf16 or no.")
        yield accelerator
    finally:
        for state, before in zip(shared, saved, strict=True):
            state.clear()
            state.update(before)


@contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Hold `model` on `device` inside the block; give it back where it was, with ordinary strides.

    Parameters keep their identity throughout.
    """
    home = next((parameter.device for parameter in model.parameters()), device)
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
        set_layout(model, torch.contiguous_format)


def moved(batch: Any, device: torch.device) -> Any:
    """The tensors of a batch on the device: one tensor, or lists and dictionaries of them."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


def set_layout(model: nn.Module, layout: torch.memory_format) -> None:
    """Lay out every four-dimensional parameter and buffer in `layout`, with the strides of a fresh tensor.

    `Module.to` leaves the strides of a 1x1 filter as they are, for they fit both layouts; kernels are chosen
    by those strides, so the same weights would give other last bits after a reload.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.dim() == 4:
            tensor.data = torch.empty_like(tensor, memory_format=layout).copy_(tensor.detach())


@torch.no_grad()
def best_layout(model: nn.Module, images: Any) -> torch.memory_format:
    """Channels-last where the model can compute in it, else contiguous; leaves the model in that layout.

    Channels-last trains a ResNet-20 on 32x32 images a quarter faster on two CPU cores, and is what tensor
    cores read. A model that calls `view` on a feature map cannot compute in it.

    Args:
        images: (N, C, H, W), on the model's device; two of them are tried. Lists of images stay as they are.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        return torch.contiguous_format
    set_layout(model, torch.channels_last)
    try:
        with evaluation_mode(model), torch.random.fork_rng():
            model(images[:2].contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        logger.info("the model calls view() on a feature map: computing in the contiguous layout")
        set_layout(model, torch.contiguous_format)
        return torch.contiguous_format
    return torch.channels_last


def sharded(loader: DataLoader, accelerator: Accelerator, *, seed: int | None) -> DataLoader:
    """This process's share of the batches; the loader itself, untouched, where one process works alone.

    Args:
        seed: of the shuffling, which all processes must draw alike. None for evaluation, where no sample is
            repeated to make the shares even.

    Raises:
        InputError: several processes and something else than a `DataLoader`.
    """
    if accelerator.num_processes == 1:
        return loader
    if not isinstance(loader, DataLoader):
        raise InputError("Training in several processes needs a torch DataLoader: return one from data.source.")
    return prepare_data_loader(
        loader,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        even_batches=seed is not None,
        use_seedable_sampler=seed is not None,
        data_seed=seed,
        rng_types=[],
    )
