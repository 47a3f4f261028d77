"""From a recipe to measured artefacts: the stages in their order, each recorded when it is finished."""

import logging
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.results import Results, load
from compress.errors import InputError
from deploy import deploying, documents, measuring, preflight, serving, stages
from deploy.manifest import tool_versions
from deploy.recipe import Recipe
from deploy.recipe_text import difference, read_recipe
from deploy.run_directory import RunDirectory
from deploy.serving import Serving
from deploy.stages import Run

logger = logging.getLogger(__name__)

STAGES: Mapping[str, Callable[[Run], dict[str, Any]]] = {
    "baseline": stages.baseline,
    "prune": stages.prune,
    "finetune": stages.finetune,
    "export": deploying.export,
    "engine": deploying.engines,
    "parity": deploying.parity,
    "measure": measuring.time_artifacts,
    "report": documents.report,
}
LAST_TRAINING = "finetune"


def run(recipe: Recipe, out: Path) -> Results:
    """Do all that is not done yet, and return the results.

    Killed at any moment, the same call goes on where it was, and the networks become those of an unbroken run (to the
    bit on a CPU). A complete run is not repeated.

    Args:
        out: the run directory, created where missing.

    Raises:
        InputError: recipe, data, model or directory cannot be used; said before any training starts.
        WorkError, HarnessError: the work failed; what was finished stays.
    """
    directory = RunDirectory(out)
    advance(recipe, directory, "report")
    results = load(directory.results)
    if not (directory.report.exists() and directory.results_csv.exists()):
        documents.render(directory, results)
    return results


def prune(recipe: Recipe, out: Path) -> RunDirectory:
    """Do the trainings alone, up to the checkpoints `baseline/` and `pruned/`; `run` goes on from there.

    Raises:
        InputError, WorkError: as `run`.
    """
    directory = RunDirectory(out)
    advance(recipe, directory, LAST_TRAINING)
    return directory


def advance(recipe: Recipe, directory: RunDirectory, last: str) -> None:
    """Run the unfinished stages up to `last` under the directory's lock."""
    directory.check_recipe(recipe)
    if last != LAST_TRAINING and not directory.complete:
        preflight.require_libraries(recipe)
    if not directory.complete or directory.work.exists():
        with directory.locked():
            if not directory.complete:  # else another process has just finished it, or was killed right after
                _advance(recipe, directory, last)
                return
            directory.tidy()
    logger.info("%s is complete already; nothing was run", directory.root)


def _advance(recipe: Recipe, directory: RunDirectory, last: str) -> None:
    data = preflight.open_data(recipe)
    current = Run(preflight.fill_in(recipe, data), data, directory, _serving(recipe, directory))
    if directory.recipe.exists():
        _check_unchanged(current)
    if directory.outcome("prune") is None:
        preflight.check(current)
    directory.record_recipe(current.recipe, _comment())
    logger.info("runtime: %s", current.serving)
    for name, stage in STAGES.items():
        if directory.outcome(name) is None:
            logger.info("stage %s", name)
            started = time.perf_counter()
            outcome = stage(current)
            directory.finish(name, {**outcome, "seconds": time.perf_counter() - started})
        else:
            logger.info("stage %s was finished before", name)
        if name == last:
            break
    if directory.complete:
        directory.tidy()


def _serving(recipe: Recipe, directory: RunDirectory) -> Serving:
    """The runtime of the run: the one that its files were written for, once there are files."""
    exported = directory.outcome("export")
    chosen = Serving.model_validate(exported["serving"]) if exported else serving.choose()
    chosen.require(recipe.export.precision)
    return chosen


def _check_unchanged(current: Run) -> None:
    """The data may have changed since the run began, though the recipe has not."""
    differs = difference(current.recipe, read_recipe(current.directory.recipe))
    if differs:
        raise InputError(
            f"The data {current.recipe.data.source} changed since the run in {current.directory.root} began: "
            f"{differs}; choose another directory with --out."
        )


def _comment() -> str:
    """What stands above the recorded recipe: by which versions it was resolved."""
    versions = ", ".join(f"{tool} {version}" for tool, version in tool_versions().items())
    return (
        "The resolved recipe of this run; repeat it with: espalier run recipe.yaml --out ANOTHER_DIRECTORY\n"
        f"{versions}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
    )
