"""`manifest.json`: the artefacts of a folder with their SHA-256, and the check that they are unchanged."""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError

from compress.errors import InputError
from compress.files import sha256, write_text
from deploy.metadata import Quantisation
from deploy.precision import Precision, Target
from deploy.tensor_spec import TensorSpec

FILE_NAME = "manifest.json"

OPTIONAL_TOOLS = ("onnxruntime", "onnxruntime-gpu", "nvidia-modelopt", "tensorrt")
"""Libraries that write artefacts of some kinds and need not be installed."""

# A plain name: an entry must not reach out of the manifest's folder.
FileName = Annotated[str, StringConstraints(pattern=r"^[^./\\\x00][^/\\\x00]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Strict):
    """One file of the manifest's folder."""

    file: FileName
    sha256: Sha256
    size_bytes: NonNegativeInt


class Profile(_Strict):
    """Shapes of one input that an engine takes: all between the first and the last, fastest at the middle one."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


class EngineRecord(_Strict):
    """Where a TensorRT engine runs and how it was built."""

    tensorrt_version: str
    gpu: str
    compute_capability: tuple[int, int]
    profiles: dict[str, Profile]
    """Input -> shapes; one optimisation profile."""
    settings: dict[str, Any]
    """The builder's settings, TF32 among them."""


class Entry(File):
    """One artefact."""

    kind: Literal["onnx", "plan"]
    precision: Precision
    target: Target = "any"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    checkpoint_sha256: str
    """Digest of the checkpoint that it came from; empty if it came from none."""
    source_sha256: str = ""
    """Digest of the ONNX file that an engine was built from."""
    quantisation: Quantisation | None = None
    engine: EngineRecord | None = None
    weights: File | None = None
    """The external data file of an ONNX file too large to hold its weights."""
    tool_versions: dict[str, str]
    """Library -> version that wrote the artefact."""
    created: str
    """ISO 8601, UTC."""


class Manifest(_Strict):
    """Content of `manifest.json`."""

    version: Literal[1] = 1
    entries: tuple[Entry, ...] = Field(default=())

    def entry(self, file: str) -> Entry | None:
        """The entry of that file name, if there is one."""
        return next((entry for entry in self.entries if entry.file == file), None)


def add(
    directory: Path,
    file: str,
    *,
    kind: Literal["onnx", "plan"],
    precision: Precision,
    target: Target = "any",
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    checkpoint_digest: str = "",
    source_digest: str = "",
    quantisation: Quantisation | None = None,
    engine: EngineRecord | None = None,
) -> Entry:
    """Enter `directory/file` as it is now, in place of an earlier entry of that name; return the entry.

    Raises:
        InputError: the file is missing, or the manifest in the folder is damaged.
    """
    directory = Path(directory)
    external = f"{file}.data"
    entry = Entry(
        **_describe(directory, file).model_dump(),
        kind=kind,
        precision=precision,
        target=target,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        checkpoint_sha256=checkpoint_digest,
        source_sha256=source_digest,
        quantisation=quantisation,
        engine=engine,
        weights=_describe(directory, external) if (directory / external).is_file() else None,
        tool_versions=tool_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with _locked(directory):
        kept = read(directory).entries if (directory / FILE_NAME).exists() else ()
        manifest = Manifest(entries=(*(other for other in kept if other.file != file), entry))
        write_text(directory / FILE_NAME, manifest.model_dump_json(indent=2) + "\n")
    return entry


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process at a time change the manifest; the lock is on the folder itself and leaves nothing behind."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def read(directory: Path) -> Manifest:
    """Read the manifest of a folder; the files themselves are not looked at, see `verify`.

    Raises:
        InputError: it is missing, damaged, or of another version.
    """
    return read_file(Path(directory) / FILE_NAME)


def read_file(path: Path) -> Manifest:
    """Read a manifest by its own path; otherwise as `read`."""
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; export the artefacts again.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"{path} is not a manifest of this version: {where}: {first['msg']}; export the artefacts again."
        ) from error


def verify(directory: Path) -> Manifest:
    """Read the manifest and compare the size and SHA-256 of every file in it.

    Raises:
        InputError: the manifest cannot be read, or a file is missing or changed; names the file.
    """
    manifest = read(directory)
    for entry in manifest.entries:
        _verify(Path(directory), entry)
    return manifest


def verify_file(path: Path) -> Entry:
    """The entry of a file in the manifest beside it, once the file is found to be what the entry records.

    Raises:
        InputError: the manifest cannot be read or has no entry for the file, or the file is missing or changed.
    """
    path = Path(path)
    entry = read(path.parent).entry(path.name)
    if entry is None:
        raise InputError(f"{path} does not stand in {path.parent / FILE_NAME}: export it again.")
    _verify(path.parent, entry)
    return entry


def require_unchanged(path: Path, entry: File, found: File) -> None:
    """Hold what lies at `path` against what the manifest records.

    Raises:
        InputError: size or SHA-256 differ.
    """
    if found.size_bytes != entry.size_bytes:
        raise InputError(
            f"{path} has {found.size_bytes} bytes, but the manifest records {entry.size_bytes}: "
            "it was cut off or replaced; export it again."
        )
    if found.sha256 != entry.sha256:
        raise InputError(
            f"{path} is not the file that the manifest records: its SHA-256 is {found.sha256[:12]}…, "
            f"not {entry.sha256[:12]}…; export it again."
        )


def _verify(directory: Path, entry: Entry) -> None:
    for recorded in (entry, entry.weights):
        if recorded is not None:
            require_unchanged(directory / recorded.file, recorded, _describe(directory, recorded.file))


def _describe(directory: Path, file: str) -> File:
    path = directory / file
    try:
        return File(file=file, sha256=sha256(path), size_bytes=path.stat().st_size)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; export it again.") from error


def tool_versions() -> dict[str, str]:
    """Versions of Espalier and of the libraries that write artefacts."""
    versions = {}
    for tool in ("espalier", "torch", "onnx", "onnxscript", *OPTIONAL_TOOLS):
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:
            if tool not in OPTIONAL_TOOLS:  # espalier, where it runs from a source tree that was never installed
                versions[tool] = "unknown"
    return versions
