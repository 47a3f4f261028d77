"""What can be timed, as a user names it: files, checkpoints, Python functions, and the runtime that executes each."""

import hashlib
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.harness.results import Artefact
from benchmarks.harness.subject import Candidate
from compress.checkpoint import Architecture
from compress.errors import InputError
from compress.files import sha256
from deploy.engine import SUFFIX as PLAN
from deploy.metadata import decode
from deploy.onnx_file import SUFFIX as ONNX
from deploy.onnx_file import external_name, onnx_specs, read_onnx
from deploy.runtimes import RUNTIMES, check_device
from deploy.subjects import open_artefact, open_callable
from deploy.tensor_spec import TensorSpec
from deploy.trust import trusted_plan

Kind = Literal["onnx", "plan", "checkpoint", "function"]
SUFFIXES: Mapping[Kind, str | None] = {"onnx": ONNX, "plan": PLAN, "checkpoint": None}


@dataclass(frozen=True)
class Target:
    """One thing to time."""

    name: str
    """As the user wrote it."""
    kind: Kind
    place: str
    """Path of the file or folder, or package.module:function."""
    runtime: str | None
    """NAME or NAME:option=value; None for the runtime that executes such files by default."""
    inputs: tuple[TensorSpec, ...] | None
    """None where it does not say what it takes: a function."""
    artefact: Artefact


@dataclass(frozen=True)
class Opening:
    """How targets are opened; the same for all."""

    device: str = "cpu"
    threads: int | None = None
    trusted_manifest: Path | None = None
    trust: tuple[str, ...] = ()

    @property
    def number_of_threads(self) -> int:
        """Those given, else as many as PyTorch uses; asked here, as most runtimes do without PyTorch."""
        return self.threads if self.threads is not None else torch.get_num_threads()

    def candidate(self, target: Target, *, pool: Path, batch_size: int) -> Candidate:
        """The target, to be opened in a process of its own."""
        if target.kind == "function":
            arguments: dict[str, Any] = {
                "target": target.place,
                "pool": str(pool),
                "batch_size": batch_size,
                "search": str(Path.cwd()),
            }
            return Candidate(target.name, open_callable, arguments, batch_size)
        arguments = {
            "artefact": target.place,
            "pool": str(pool),
            "batch_size": batch_size,
            "device": self.device,
            "threads": self.number_of_threads,
            "runtime": target.runtime,
            "trusted_manifest": str(self.trusted_manifest) if target.kind == "plan" and self.trusted_manifest else None,
            "trust": self.trust,
        }
        return Candidate(target.name, open_artefact, arguments, batch_size)


def read_targets(texts: Sequence[str], runtimes: Collection[str], opening: Opening) -> list[Target]:
    """Each target with its runtime; what no runtime can open is refused before anything is timed.

    Args:
        texts: PATH, PATH@RUNTIME or package.module:function.
        runtimes: NAME or NAME:option=value, each for the targets of its kind that name none themselves.

    Raises:
        InputError: a target is missing, unreadable or not trusted, appears twice, or takes other inputs than the
            others; or a runtime is unknown or executes none of them.
    """
    check_device(opening.device)
    chosen = _by_suffix(runtimes)
    targets = [_read(text, chosen, opening) for text in texts]
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise InputError("The same file is given twice: the first is timed against itself anyway; give each once.")
    used = {target.runtime for target in targets}
    for text in chosen.values():
        if text not in used:
            raise InputError(f"--runtime {text} executes none of the artefacts given: leave it out.")
    if opening.trusted_manifest is not None and all(target.kind != "plan" for target in targets):
        raise InputError(f"--trust-manifest vouches for TensorRT engines, and no {PLAN} file is given: leave it out.")
    return targets


def common_inputs(
    targets: Sequence[Target], shapes: Mapping[str, Sequence[int]], batch_sizes: Sequence[int]
) -> tuple[TensorSpec, ...]:
    """The inputs that all targets take, named as the first one names them, all sizes known but the batch.

    Inputs of two targets correspond by position: exporters name them as they like.

    Args:
        shapes: Input name -> sizes without the batch, where a file leaves them open.

    Raises:
        InputError: the targets take different inputs, no target says what it takes, a size is not known, or a fixed
            batch is not the one asked for.
    """
    known = [target for target in targets if target.inputs is not None]
    if not known and not shapes:
        raise InputError(
            f"{targets[0].name} is a function, which does not say what it takes: give --shape NAME=3,224,224 (without "
            "the batch), or a file to time it against."
        )
    if not known:
        return tuple(TensorSpec(name, "float32", ("batch", *sizes)) for name, sizes in shapes.items())
    for target in known:
        for spec in target.inputs or ():
            size = spec.shape[0] if spec.shape else None
            if isinstance(size, int) and set(batch_sizes) != {size}:
                raise InputError(
                    f"{target.name} takes {spec}, a batch of {size} and no other, but --batch asks for "
                    f"{', '.join(map(str, batch_sizes))}: give --batch {size}, or export it with a dynamic batch."
                )
    resolved = {target.name: _resolved(target, shapes) for target in known}
    (first, wanted), *others = resolved.items()
    for other, specs in others:
        if [(spec.shape[1:], _family(spec)) for spec in specs] != [(spec.shape[1:], _family(spec)) for spec in wanted]:
            raise InputError(
                f"{first} takes {'; '.join(map(str, wanted))} and {other} takes {'; '.join(map(str, specs))}: give "
                "files of one input size."
            )
    if not wanted:
        raise InputError(f"{first} takes no inputs: there is nothing to ask of it.")
    unknown = sorted(set(shapes) - {spec.name for spec in wanted})
    if unknown:
        raise InputError(
            f"--shape names {', '.join(unknown)}, but {first} takes {'; '.join(map(str, wanted))}: name its inputs."
        )
    return wanted


def read_shapes(texts: Collection[str]) -> dict[str, tuple[int, ...]]:
    """`NAME=3,224,224` -> sizes without the batch.

    Raises:
        InputError: a text has another form, or a size is not positive.
    """
    shapes = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        try:
            shapes[name] = tuple(int(size) for size in sizes.split(","))
        except ValueError:
            shapes[name] = ()
        if not name or not shapes[name] or min(shapes[name]) < 1:
            raise InputError(f"--shape is {text!r}, but has the form NAME=3,224,224: the sizes without the batch.")
    return shapes


def _read(text: str, chosen: Mapping[str | None, str], opening: Opening) -> Target:
    place, _, named = text.rpartition("@")
    if not place or named.partition(":")[0] not in RUNTIMES:
        place, named = text, ""
    path = Path(place)
    if path.is_dir():
        about = Architecture.read(path)
        spec = TensorSpec("images", "float32", ("batch", *about.image_shape))
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        artefact = Artefact(path=place, sha256=about.sha256, size_bytes=size, precision="fp32")
        return Target(text, "checkpoint", place, named or chosen.get(None), (spec,), artefact)
    if path.suffix == PLAN:
        if not path.is_file():
            raise InputError(f"{path} does not exist or is not a file; export it first.")
        if opening.device.partition(":")[0] != "cuda":
            raise InputError(
                f"{path} is a TensorRT engine, which runs on the NVIDIA GPU that it was built for, but the device "
                f"asked for is {opening.device}; choose device cuda, or the ONNX file that the engine was built from."
            )
        _, entry = trusted_plan(path, trusted_manifest=opening.trusted_manifest)
        artefact = Artefact(path=place, sha256=entry.sha256, size_bytes=entry.size_bytes, precision=entry.precision)
        return Target(text, "plan", place, named or chosen.get(PLAN), entry.inputs, artefact)
    if path.suffix == ONNX:
        return _onnx(text, path, named or chosen.get(ONNX))
    module, _, function = place.partition(":")
    if module and function.isidentifier() and not path.exists():
        return _function(text, module, named)
    if not path.exists():
        raise InputError(f"{path} does not exist or is not a file; export it first.")
    raise InputError(
        f"{path} has the suffix {path.suffix or 'nothing'}, which no runtime executes; give one of {ONNX}, {PLAN}, a "
        "checkpoint directory or package.module:function."
    )


def _onnx(text: str, path: Path, runtime: str | None) -> Target:
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; export it first.")
    model = read_onnx(path)
    about = decode(model.metadata_props, str(path))
    artefact = Artefact(
        path=str(path),
        **_fingerprint(path),
        precision="not stated" if about is None else about.precision,
    )
    return Target(text, "onnx", str(path), runtime, onnx_specs(model, path)[0], artefact)


def _fingerprint(path: Path) -> dict[str, Any]:
    """SHA-256 and size of an ONNX file; with weights in a file beside it, of both together."""
    weights = path.parent / external_name(path)
    if not weights.is_file():
        return {"sha256": sha256(path), "size_bytes": path.stat().st_size}
    both = hashlib.sha256(f"{sha256(path)} {sha256(weights)}".encode()).hexdigest()
    return {"sha256": both, "size_bytes": path.stat().st_size + weights.stat().st_size}


def _function(text: str, module: str, runtime: str) -> Target:
    if runtime:
        raise InputError(f"{text}: a function runs by itself, not in {runtime}; leave out @{runtime}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        found = None
    finally:
        sys.path.pop(0)
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise InputError(
            f"{text} does not exist as a file, and there is no Python module {module}; give an ONNX file, a plan, a "
            "checkpoint directory or package.module:function."
        )
    source = Path(found.origin)
    artefact = Artefact(path=text, sha256=sha256(source), size_bytes=source.stat().st_size, precision="not stated")
    return Target(text, "function", text, None, None, artefact)


def _by_suffix(texts: Collection[str]) -> dict[str | None, str]:
    """Each runtime that was asked for, under the suffix of the files that it executes."""
    chosen: dict[str | None, str] = {}
    for text in texts:
        name = text.partition(":")[0]
        if name not in RUNTIMES:
            raise InputError(f"There is no runtime {name!r}; choose one of {', '.join(RUNTIMES)}.")
        suffix = RUNTIMES[name].suffix
        if suffix in chosen:
            raise InputError(f"--runtime {chosen[suffix]} and --runtime {text} are for the same files: give one.")
        chosen[suffix] = text
    return chosen


def _resolved(target: Target, shapes: Mapping[str, Sequence[int]]) -> tuple[TensorSpec, ...]:
    """The inputs of a target with every size known but the batch."""
    found = []
    for spec in target.inputs or ():
        given = shapes.get(spec.name)
        sizes = tuple(given) if given is not None else spec.shape[1:]
        open_sizes = [size for size in sizes if not isinstance(size, int)]
        if not spec.shape:
            raise InputError(
                f"{target.name} takes {spec}, which has no axis for samples: it cannot be timed in batches."
            )
        if open_sizes:
            raise InputError(
                f"{target.name} takes {spec}, which leaves sizes open: give them, without the batch, as "
                f"--shape {spec.name}=3,224,224."
            )
        if given is not None and not _agree(given, spec.shape[1:]):
            raise InputError(
                f"--shape gives {spec.name} {tuple(given)}, but {target.name} takes {spec}: make them fit."
            )
        found.append(TensorSpec(spec.name, spec.dtype, ("batch", *sizes)))
    return tuple(found)


def _agree(given: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether sizes fit where the file has fixed them."""
    return len(given) == len(wanted) and all(
        not isinstance(size, int) or size == own for own, size in zip(given, wanted, strict=True)
    )


def _family(spec: TensorSpec) -> str:
    """Types between which inputs may be converted: those of one family."""
    if spec.dtype in ("float64", "float32", "float16", "bfloat16"):
        return "float"
    return np.dtype(spec.dtype).kind
