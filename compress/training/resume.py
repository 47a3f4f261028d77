"""The state of a training on disk, from which a killed run goes on as if nothing had happened.

File format: one `torch.save` archive of plain values and tensors, read back with `weights_only=True`, with
the keys `format` (1), `fingerprint` (what the training was asked to do), `history` (one entry per finished
epoch), `model`, `optimizer`, `scaler` and `pruner` (state dictionaries; the last two may be None). Random
number generators need no record: they are seeded anew from (seed, epoch) at the start of every epoch.
"""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.errors import InputError
from compress.files import replacing

FORMAT = 1


def structure_digest(model: nn.Module) -> str:
    """Hash of the names and shapes of parameters and buffers: equal for networks of one structure."""
    shapes = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def save_state(path: Path, fingerprint: dict[str, Any], parts: dict[str, Any]) -> None:
    """Write the state in one atomic step, over an older one."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "fingerprint": fingerprint, **parts}, temporary)


def load_state(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state that `save_state` wrote for the same fingerprint; None where there is no file.

    Raises:
        InputError: the file is damaged, or belongs to another training; the message says in what they differ.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The training state {path} cannot be read, so it is damaged: delete it to train from the start."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(
            f"{path} is not a training state of this version: delete it, or choose another output directory."
        )
    stored = state["fingerprint"]
    differences = [
        f"{key} was {stored.get(key)!r} and is now {fingerprint.get(key)!r}"
        for key in sorted(stored.keys() | fingerprint.keys())
        if stored.get(key) != fingerprint.get(key)
    ]
    if differences:
        raise InputError(
            f"The training state {path} belongs to another training ({'; '.join(differences)}): restore the "
            "old settings to go on with it, or delete it to train from the start."
        )
    return state
