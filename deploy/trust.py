"""Which TensorRT plans may be executed: a plan is machine code, and deserialising it runs it.

A plan is trusted when this user built it on this machine, which a file in the user's state directory remembers, or when
the user names a manifest that lists it. A manifest that merely lies beside the plan proves that nothing was damaged on
the way; it could come from the same stranger as the plan.
"""

import hashlib
import os
from pathlib import Path

from compress.errors import InputError
from compress.files import make_directory, write_text
from deploy import manifest


def trust_plan(digest: str) -> None:
    """Remember a plan that was built here, by its SHA-256.

    Raises:
        InputError: the state directory cannot be written.
    """
    path = _store()
    make_directory(path.parent)
    known = _built_here()
    if digest not in known:
        write_text(path, "".join(f"{item}\n" for item in (*sorted(known), digest)))


def trusted_plan(path: Path, *, trusted_manifest: Path | None = None) -> tuple[bytes, manifest.Entry]:
    """The bytes of a plan that may be deserialised, and its entry. What was hashed is what is returned.

    Args:
        trusted_manifest: a manifest that the user trusts; None looks into the one beside the plan, and requires that
            the plan was built here.

    Raises:
        InputError: the plan or the manifest cannot be read, the manifest does not list the plan, a byte was changed,
            or nobody vouches for the plan.
    """
    path = Path(path)
    listed = trusted_manifest if trusted_manifest is not None else path.parent / manifest.FILE_NAME
    entry = manifest.read_file(listed).entry(path.name)
    if entry is None or entry.kind != "plan":
        raise InputError(f"{path} does not stand in {listed} as a plan, so it is not executed: build it again.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; build it again with espalier engine.") from error
    found = manifest.File(file=path.name, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    manifest.require_unchanged(path, entry, found)
    if trusted_manifest is None and entry.sha256 not in _built_here():
        raise InputError(
            f"{path} was not built by you on this machine, and a plan is machine code: build it here with espalier "
            f"engine, or name the manifest that you trust with --trust-manifest {listed}."
        )
    return content, entry


def _built_here() -> set[str]:
    try:
        return set(_store().read_text(encoding="utf-8").split())
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"Cannot read {_store()}: {error.strerror}; mend its permissions.") from error


def _store() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "espalier" / "plans.sha256"
