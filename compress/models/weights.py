"""Trained weights from a file or from another model into a freshly built one, with every misfit named."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import InputError

SUFFIXES = (".safetensors", ".pth", ".pt")
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the state dict
_REPLICA = "module."  # what DataParallel and DistributedDataParallel put before every name


def load_weights(model: nn.Module, weights: str | Path) -> None:
    """Load a state dict from a .safetensors, .pth or .pt file into `model`; every tensor must have its place.

    A .pth file is read with `weights_only=True`: it holds tensors, bare or under "state_dict" or "model".

    Raises:
        InputError: the file is missing, unreadable, not a state dict, or does not fit; the model is then
            unchanged.
    """
    state = _read_state(Path(weights))
    own = model.state_dict()
    # Files from before torch 0.4.1 lack this counter, which plays no part in the output.
    missing = [key for key in own if key not in state and not key.endswith(".num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    misfits = [key for key in state if key in own and state[key].shape != own[key].shape]
    if misfits:
        _refuse_other_classes(model, weights, own, state, misfits)
    if missing or unknown or misfits:
        parts = [
            _listed("missing from the file", missing),
            _listed("unknown to the model", unknown),
            _listed("of another shape", [_shapes(key, own, state) for key in misfits]),
        ]
        raise InputError(
            f"The weights {weights} do not fit the model: {'; '.join(filter(None, parts))}. "
            "Build the model with the arguments that the weights were trained with."
        )
    model.load_state_dict(state, strict=False)


def transfer(model: nn.Module, state: Mapping[str, Tensor], *, classes: tuple[int, int], source: str) -> None:
    """Load `state`, of a network with `classes[0]` classes, into `model`, the same network with `classes[1]`.

    Tensors whose first dimension is the number of classes keep their fresh values and are named in a warning.

    Raises:
        InputError: something other than the number of classes differs; the model is then unchanged.
    """
    own = model.state_dict()
    misfits = [key for key in own if key in state and state[key].shape != own[key].shape]
    head = [
        key
        for key in misfits
        if (state[key].shape[0], own[key].shape[0]) == classes and state[key].shape[1:] == own[key].shape[1:]
    ]
    wrong = [key for key in own if key not in state or (key in misfits and key not in head)]
    if wrong:
        raise InputError(
            f"The weights {source} do not fit the model: {_listed('missing or of another shape', wrong)}. "
            "Build the model with the arguments that the weights were trained with."
        )
    model.load_state_dict({key: value for key, value in state.items() if key in own and key not in head}, strict=False)
    if head:
        logging.getLogger(__name__).warning(
            "The weights %s are for %d classes and the model has %d: %s start untrained.",
            source,
            *classes,
            ", ".join(head),
        )


def _read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped and with replica prefixes stripped."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"Cannot tell what the weights {path} are: give a file ending in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise InputError(f"The weights {path} do not exist: correct the path in `weights`.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"The weights {path} are not a plain state dict, and unpickling other objects could run code: "
            "save model.state_dict() instead."
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise InputError(f"Cannot read the weights {path}: the file is damaged ({error}); fetch it again.") from error
    for key in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"The weights {path} hold no state dict: save model.state_dict() to the file.")
    strangers = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise InputError(
            f"The weights {path} hold things that are not tensors ({_few(strangers)}): save model.state_dict() alone."
        )
    if all(str(key).startswith(_REPLICA) for key in content):
        return {str(key).removeprefix(_REPLICA): value for key, value in content.items()}
    return {str(key): value for key, value in content.items()}


def _refuse_other_classes(
    model: nn.Module,
    weights: str | Path,
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    misfits: list[str],
) -> None:
    """Raise the clearer error when all that differs is the width of the last layer, the classifier."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers or any(key not in (f"{layers[-1]}.weight", f"{layers[-1]}.bias") for key in misfits):
        return
    there, here = (tensors[misfits[0]].shape for tensors in (state, own))
    if there[1:] == here[1:]:
        raise InputError(
            f"The weights {weights} are for {there[0]} classes and the model has {here[0]} "
            f"({_shapes(misfits[0], own, state)}): set num_classes to {there[0]} "
            f"or give weights for {here[0]}."
        )


def _shapes(key: str, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    return f"{key} is {tuple(state[key].shape)} in the file and {tuple(own[key].shape)} in the model"


def _listed(what: str, keys: list[str]) -> str:
    return f"{what}: {_few(keys)}" if keys else ""


def _few(keys: list[str]) -> str:
    """The first three of a list and how many more there are."""
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
