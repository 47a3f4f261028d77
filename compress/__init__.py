"""Structured pruning of vision networks: what to remove, and removing it.

    pruner = compress.Pruner(model, example_inputs, budget=compress.Budget(macs=0.5))
    ...                                   # a training loop that calls pruner.step(optimizer) after backward()
    compress.save(model, "pruned/", factory="torchvision:resnet50", image_shape=(3, 224, 224))
    model = compress.load("pruned/")

The names are imported on first use, so that `import compress` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.budget import Budget as Budget
    from compress.budget import CostModel as CostModel
    from compress.checkpoint import load as load
    from compress.checkpoint import save as save
    from compress.errors import EspalierError as EspalierError
    from compress.errors import InputError as InputError
    from compress.errors import WorkError as WorkError
    from compress.importance import Minibatch as Minibatch
    from compress.pruner import Event as Event
    from compress.pruner import Pruner as Pruner
    from compress.training import TrainingConfig as TrainingConfig
    from compress.training import evaluate as evaluate
    from compress.training.fit import fit as fit

_HOMES = {
    "Budget": "compress.budget",
    "CostModel": "compress.budget",
    "EspalierError": "compress.errors",
    "Event": "compress.pruner",
    "InputError": "compress.errors",
    "Minibatch": "compress.importance",
    "Pruner": "compress.pruner",
    "TrainingConfig": "compress.training",
    "WorkError": "compress.errors",
    "evaluate": "compress.training",
    "fit": "compress.training",
    "load": "compress.checkpoint",
    "save": "compress.checkpoint",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
