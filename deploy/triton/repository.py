"""The folder of one model: configuration, labels, warm-up sample, the artefact, and what builds an engine again."""

import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from compress.errors import InputError
from compress.files import failed_write, make_directory
from deploy.choosing import Choice, choose_artefact, describing_onnx
from deploy.onnx_file import read_metadata
from deploy.run_directory import RunDirectory
from deploy.triton import rebuild
from deploy.triton.batching import batching
from deploy.triton.config import (
    LABELS,
    instance_kind,
    model_config,
    protobuf,
    to_text,
    warmup_file,
    warmup_sample,
)

CONFIG: Final = "config.pbtxt"
VERSION: Final = "1"

MOST: Final = 65536
"""Images in a batch, and instances: beyond it there is a slip of the pen."""

_MARK: Final = "# Written by espalier triton, which replaces this folder when it is called again."


@dataclass(frozen=True)
class Repository:
    """What was written, and why it is so."""

    root: Path
    """The model repository, what `tritonserver --model-repository` takes."""
    model: Path
    """The model's folder in it."""
    files: tuple[str, ...]
    """All files of the model's folder, relative to it."""
    artefact: Path
    """The file that is served, where it was copied from."""
    reason: str
    """Why this one, as a clause."""
    platform: str
    instance_kind: str
    max_batch: int
    preferred_sizes: tuple[int, ...]
    max_queue_delay_us: int
    batching_reason: str
    rebuild_command: str | None
    """Builds the engine for the server's TensorRT; None for ONNX, which needs no building."""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}

    def sentences(self) -> list[str]:
        """The record for the terminal."""
        sizes = ", ".join(map(str, self.preferred_sizes)) or "none"
        lines = [
            f"{self.model}: {self.artefact.name}, {self.reason}",
            f"{self.platform}, {self.instance_kind}, batches up to {self.max_batch}",
            f"preferred batch sizes: {sizes}, queue delay {self.max_queue_delay_us} µs: {self.batching_reason}",
            f"serve it: tritonserver --model-repository={self.root}",
        ]
        if self.rebuild_command is not None:
            lines.append(f"build the engine for the server's TensorRT: {self.rebuild_command}")
        return lines


def write_repository(
    run: Path,
    destination: Path | None = None,
    *,
    name: str,
    max_batch: int,
    artefact: str | None = None,
    instances: int = 1,
) -> Repository:
    """Write `destination/name`, from which Triton serves an artefact of a run.

    A folder of that name that was written here before is replaced as a whole; one that was not is left alone.

    Args:
        run: a run directory.
        destination: the model repository, created where missing; None: `triton/` in the run directory.
        name: what clients call the model.
        max_batch: largest batch that the server runs.
        artefact: file name in the run's `artifacts/`; None takes the best, see `deploy.choosing.choose_artefact`.
        instances: copies of the model that the server runs side by side.

    Raises:
        MissingExtraError: Triton's client library is not installed.
        InputError: the name is unfit, the artefact was changed or does not take such batches, or the folder cannot be
            written.
        HarnessInputError: the run's results.json is damaged.
        WorkError: the disk is full.
    """
    protobuf()  # known before anything is copied
    _check(name, max_batch, instances)
    choice = choose_artefact(run, artefact=artefact)
    onnx = describing_onnx(choice.path)
    classes = read_metadata(onnx).classes
    if len(choice.entry.outputs[0].shape) > 2:  # Triton would take each pixel for a class
        classes = ()
    plan = batching(choice.timed.measurements if choice.timed else (), max_batch)
    config = model_config(
        choice, name=name, max_batch=max_batch, instances=instances, batching=plan, labelled=bool(classes)
    )
    root = RunDirectory(Path(run)).triton if destination is None else Path(destination)
    with _replacing(root / name) as folder:
        (folder / CONFIG).write_text(f"{_MARK}\n{to_text(config)}", encoding="utf-8")
        if classes:
            (folder / LABELS).write_text("".join(f"{_line(label)}\n" for label in classes), encoding="utf-8")
        (folder / "warmup").mkdir()
        for spec in choice.entry.inputs:
            (folder / "warmup" / warmup_file(spec)).write_bytes(warmup_sample(spec))
        _copy(choice.path, folder / VERSION, f"model{choice.path.suffix}")
        if choice.entry.kind == "plan":
            _add_rebuild(choice, onnx, folder / rebuild.FOLDER)
        files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return Repository(
        root=root,
        model=root / name,
        files=files,
        artefact=choice.path,
        reason=choice.reason,
        platform=config.platform,
        instance_kind=instance_kind(choice),
        max_batch=max_batch,
        preferred_sizes=plan.preferred_sizes,
        max_queue_delay_us=plan.max_queue_delay_us,
        batching_reason=plan.reason,
        rebuild_command=(
            f"sh {shlex.quote(str(root / name / rebuild.FOLDER / rebuild.SCRIPT))} YY.MM"
            if choice.entry.kind == "plan"
            else None
        ),
    )


def _check(name: str, max_batch: int, instances: int) -> None:
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name) is None:
        raise InputError(
            f"The model name {name!r} is the name of a folder and part of a URL: use letters, digits, _, . and -, "
            "and begin with a letter or digit."
        )
    for what, value in (("largest batch", max_batch), ("number of instances", instances)):
        if not 1 <= value <= MOST:
            raise InputError(f"The {what} is {value}: give at least 1 and at most {MOST}.")


def _add_rebuild(choice: Choice, onnx: Path, folder: Path) -> None:
    record = choice.entry.engine
    assert record is not None  # without it the configuration is refused
    _copy(onnx, folder, onnx.name)
    path = folder / rebuild.SCRIPT
    path.write_text(rebuild.script(choice.entry, record, onnx.name), encoding="utf-8")
    path.chmod(0o755)


def _copy(source: Path, folder: Path, name: str) -> None:
    """Copy an artefact; its weights, where they lie outside of it, keep their name, by which the file knows them."""
    folder.mkdir()
    shutil.copyfile(source, folder / name)
    weights = source.with_name(f"{source.name}.data")
    if weights.is_file():
        shutil.copyfile(weights, folder / weights.name)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder for the block to fill, which then takes the place of `target`.

    Raises:
        InputError: `target` is not ours, or cannot be written.
        WorkError: the disk is full.
    """
    if (target.exists() or target.is_symlink()) and not _is_ours(target):
        raise InputError(
            f"{target} exists and was not written by espalier triton: give another name, or another directory."
        )
    make_directory(target.parent)
    try:
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch) / "new"
            fresh.mkdir()
            yield fresh
            if target.exists():
                target.rename(Path(scratch) / "old")  # and goes with the scratch folder
            fresh.rename(target)
    except OSError as error:
        raise failed_write(target, error) from error


def _is_ours(target: Path) -> bool:
    try:
        with (target / CONFIG).open(encoding="utf-8", errors="replace") as lines:
            return lines.readline().rstrip("\n") == _MARK
    except OSError:
        return False


def _line(label: str) -> str:
    """A class name as one line of the label file."""
    return " ".join(label.split())
