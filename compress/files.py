"""Writing files so that a kill at any moment leaves either the old file or the new one, never half of it."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from compress.errors import InputError, WorkError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds, the temporary file takes its place.

    The file is flushed to disk before the rename, so that after a power cut the name never points at nothing.

    Raises:
        InputError: the directory cannot be written.
        WorkError: writing failed, on a full disk for one; an older file of that name stays.
    """
    make_directory(path.parent)
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix, delete=False) as handle:
            temporary = Path(handle.name)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; choose a directory you can write.") from error
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise WorkError(f"Writing {path} failed: {error.strerror or error}; free some space and try again.") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no space left, or none that the user may fill."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def failed_write(path: Path, error: OSError) -> InputError | WorkError:
    """The error to raise for a write that failed: a full disk is nobody's mistake, everything else is the place."""
    reason = error.strerror or error
    if is_full_disk(error):
        return WorkError(f"Writing {path} failed: {reason}; free some space and try again.")
    return InputError(f"Cannot write {path}: {reason}; choose a directory you can write.")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 in one atomic step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one atomic step; NaN and infinity are refused, for they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_directory(path: Path) -> None:
    """Create `path` and its parents.

    Raises:
        InputError: it cannot be created, or a file stands in its place.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot create the directory {path}: {error.strerror}; choose a directory you can write."
        ) from error


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
