"""From a checkpoint to something that serves, and the whole way from a recipe.

    results = deploy.run(deploy.read_recipe(Path("recipe.yaml")), Path("runs/mine"))

The names are imported on first use, so that the command answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploy.artefacts import export_checkpoint as export_checkpoint
    from deploy.correlating import correlate as correlate
    from deploy.export import export_onnx as export_onnx
    from deploy.inspection import inspect as inspect
    from deploy.parity import check_parity as check_parity
    from deploy.pipeline import prune as prune
    from deploy.pipeline import run as run
    from deploy.predictor import Predictor as Predictor
    from deploy.predictor import load as load
    from deploy.recipe import Recipe as Recipe
    from deploy.recipe_text import read_recipe as read_recipe
    from deploy.runtimes import open_runtime as open_runtime

_HOMES = {
    "Predictor": "deploy.predictor",
    "Recipe": "deploy.recipe",
    "check_parity": "deploy.parity",
    "correlate": "deploy.correlating",
    "export_checkpoint": "deploy.artefacts",
    "export_onnx": "deploy.export",
    "inspect": "deploy.inspection",
    "load": "deploy.predictor",
    "open_runtime": "deploy.runtimes",
    "prune": "deploy.pipeline",
    "read_recipe": "deploy.recipe_text",
    "run": "deploy.pipeline",
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
