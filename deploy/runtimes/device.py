"""Devices by their names, told apart without PyTorch where that can be done."""

import re
from dataclasses import dataclass

from compress.errors import InputError


@dataclass(frozen=True)
class Device:
    """Where a network runs."""

    type: str
    """cpu, cuda, or another kind that PyTorch knows."""
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def parse_device(text: str) -> Device:
    """The device of that name; PyTorch, which takes a second to import, is asked only for kinds other than these two.

    Raises:
        InputError: there is none.
    """
    if usual := re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text, re.ASCII):
        kind, index = usual.groups()
        return Device(kind, None if index is None else int(index))
    import torch

    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise InputError(f'There is no device "{text}"; give "cpu", "cuda" or "cuda:N".') from error
    return Device(device.type, device.index)


def check_device(device: str) -> None:
    """
    Raises:
        InputError: there is no such device, or PyTorch finds no GPU.
    """
    if parse_device(device).type != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"Device {device} was asked for, but PyTorch finds no CUDA GPU; choose cpu, or check the driver "
            "with espalier doctor."
        )
