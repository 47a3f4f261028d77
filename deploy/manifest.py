"""`manifest.json`: the artefacts of a folder with their SHA-256, and the check that they are unchanged."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError

from compress.errors import InputError
from compress.files import sha256, write_text
from deploy.runtimes.base import TensorSpec

FILE_NAME = "manifest.json"

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


class Entry(File):
    """One artefact."""

    kind: Literal["onnx", "plan"]
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    checkpoint_sha256: str
    """Digest of the checkpoint that it came from; empty if it came from none."""
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
    precision: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    checkpoint_digest: str = "",
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
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        checkpoint_sha256=checkpoint_digest,
        weights=_describe(directory, external) if (directory / external).is_file() else None,
        tool_versions=tool_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kept = read(directory).entries if (directory / FILE_NAME).exists() else ()
    manifest = Manifest(entries=(*(other for other in kept if other.file != file), entry))
    write_text(directory / FILE_NAME, manifest.model_dump_json(indent=2) + "\n")
    return entry


def read(directory: Path) -> Manifest:
    """Read the manifest of a folder; the files themselves are not looked at, see `verify`.

    Raises:
        InputError: it is missing, damaged, or of another version.
    """
    path = Path(directory) / FILE_NAME
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
        for recorded in (entry, entry.weights):
            if recorded is None:
                continue
            path = Path(directory) / recorded.file
            found = _describe(Path(directory), recorded.file)
            if found.size_bytes != recorded.size_bytes:
                raise InputError(
                    f"{path} has {found.size_bytes} bytes, but the manifest records {recorded.size_bytes}: "
                    "it was cut off or replaced; export it again."
                )
            if found.sha256 != recorded.sha256:
                raise InputError(
                    f"{path} is not the file that the manifest records: its SHA-256 is {found.sha256[:12]}…, "
                    f"not {recorded.sha256[:12]}…; export it again."
                )
    return manifest


def _describe(directory: Path, file: str) -> File:
    path = directory / file
    try:
        return File(file=file, sha256=sha256(path), size_bytes=path.stat().st_size)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; export it again.") from error


def tool_versions() -> dict[str, str]:
    """Versions of Espalier and of the libraries that write artefacts."""
    versions = {}
    for tool in ("espalier", "torch", "onnx", "onnxscript"):
        try:
            versions[tool] = version(tool)
        except PackageNotFoundError:  # espalier, where it runs from a source tree that was never installed
            versions[tool] = "unknown"
    return versions
