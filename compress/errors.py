"""What can go wrong, told apart by whose move it is.

The command line turns `InputError` into exit code 2 and `WorkError` into exit code 1, each printed as one sentence.
Any other exception is a bug of ours and shows its traceback.
"""


class EspalierError(Exception):
    """Base of all errors that Espalier raises on purpose; the message states the fact, the cause and the fix."""


class InputError(EspalierError):
    """The user's input cannot be used: a wrong recipe key, path, file, model, budget or option."""


class WorkError(EspalierError):
    """The input was fine and the work failed: scores not finite, parity out of tolerance, a runtime that died."""


class MissingExtraError(InputError):
    """An optional library is not installed; names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        self._arguments = (library, extra, purpose)
        super().__init__(f"{purpose} needs {library}, which is not installed: run pip install 'espalier[{extra}]'.")

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str, str]]:
        return MissingExtraError, self._arguments  # as every error it may come from another process


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, without its full stop; its type where none does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
