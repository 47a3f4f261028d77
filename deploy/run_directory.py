"""The run directory: where everything of a run lies, and what of it is finished.

`.work/` is private and goes when the run is complete. It holds one JSON file per finished stage, written after all that
the stage writes elsewhere, so that a kill at any moment leaves a stage either finished or to be done again; the state
of a training within a stage; and the lock.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.files import make_directory, write_json, write_text
from deploy.recipe import Recipe
from deploy.recipe_text import difference, dump, read_recipe


@dataclass(frozen=True)
class RunDirectory:
    """Paths and progress of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def baseline(self) -> Path:
        """Checkpoint of the dense network."""
        return self.root / "baseline"

    @property
    def pruned(self) -> Path:
        """Checkpoint of the pruned and fine-tuned network."""
        return self.root / "pruned"

    @property
    def unrefined(self) -> Path:
        """Checkpoint of the pruned network before fine-tuning."""
        return self.work / "unrefined"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def triton(self) -> Path:
        """A Triton model repository."""
        return self.root / "triton"

    @property
    def pruning(self) -> Path:
        """The pruning events with every score."""
        return self.root / "pruning.json"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def results_csv(self) -> Path:
        return self.root / "results.csv"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def work(self) -> Path:
        return self.root / ".work"

    @property
    def complete(self) -> bool:
        """Whether the run has its results, which are written last."""
        return self.results.is_file()

    def marker(self, stage: str) -> Path:
        """The file that says that the stage is finished, and what came out."""
        return self.work / f"{stage}.json"

    def training_state(self, stage: str) -> Path:
        """Where a training inside the stage keeps what it needs to go on."""
        return self.work / f"{stage}.state"

    def outcome(self, stage: str) -> dict[str, Any] | None:
        """What `finish` recorded for the stage; None while it is not finished."""
        try:
            outcome: dict[str, Any] = json.loads(self.marker(stage).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.marker(stage)} is damaged ({error}): delete it to repeat the stage.") from error
        return outcome

    def finished_stages(self) -> list[str]:
        """Stages of an unfinished run that are done, in the order in which they were."""
        markers = [path for path in self.work.glob("*.json") if not path.name.startswith(".")]
        return [path.stem for path in sorted(markers, key=lambda path: path.stat().st_mtime_ns)]

    def finish(self, stage: str, outcome: dict[str, Any]) -> None:
        """Record the stage as finished and drop its training state."""
        write_json(self.marker(stage), outcome)
        self.training_state(stage).unlink(missing_ok=True)

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to mix two runs.

        Raises:
            InputError: the directory holds a run of another recipe (names the first key that differs), or files and
                no run.
        """
        if self.recipe.exists():
            differs = difference(recipe, read_recipe(self.recipe))
            if differs:
                raise InputError(
                    f"{self.root} holds a run of another recipe: {differs}; choose another directory with --out."
                )
        elif self.root.is_dir() and any(not path.name.startswith(".") for path in self.root.iterdir()):
            raise InputError(
                f"{self.root} holds files but no recipe.yaml, so it is no run directory: choose another with --out."
            )

    def record_recipe(self, recipe: Recipe, comment: str) -> None:
        """Write the resolved recipe, unless it stands there already."""
        if not self.recipe.exists():
            write_text(self.recipe, dump(recipe, comment))

    def tidy(self) -> None:
        """Remove what only an unfinished run needs, and what kills left half-written beside its files."""
        written = (self.recipe, self.pruning, self.results, self.results_csv, self.report)
        leftovers = [path for file in written for path in self.root.glob(f".{file.name}.*")]
        leftovers += [path for folder in (self.baseline, self.pruned, self.artifacts) for path in folder.glob(".*")]
        leftovers += [path for path in self.work.glob("*") if path.name != "lock"]
        for path in leftovers:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the directory, which is created where missing.

        A directory in which nothing was begun is removed again.

        Raises:
            InputError: it cannot be written, or another process is at work in it.
        """
        make_directory(self.work)
        lock = self.work / "lock"
        handle = _open_lock(lock, self.root)
        try:
            yield
        finally:
            if self.complete or not self.recipe.exists():
                lock.unlink(missing_ok=True)
                with suppress(OSError):  # not empty
                    self.work.rmdir()
                    self.root.rmdir()
            os.close(handle)


def _open_lock(lock: Path, root: Path) -> int:
    """File descriptor that holds the lock; the kernel frees it however the process ends."""
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"Cannot write in {root}: {error.strerror}; choose another directory.") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise InputError(
                f"Another process is running in {root}: wait for it, or choose another directory with --out."
            ) from error
        except OSError as error:
            os.close(handle)
            raise InputError(f"Cannot lock {lock}: {error.strerror}; choose a directory on another disk.") from error
        # Between opening and locking, a finished run may have removed the file: then lock the new one.
        with suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)
