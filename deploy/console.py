"""What the command line says and how it ends: logs and errors on stderr, results on stdout, exit codes 0, 1, 2, 130."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType

DONE, WORK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

TABLE_WIDTH = 110
"""Columns of a table that goes into a file or a pipe."""

OURS = ("compress", "deploy", "benchmarks")
"""Packages whose progress is logged; others speak only with --debug."""


@contextmanager
def command(*, debug: bool, advice: str = "") -> Iterator[None]:
    """Run a command's work: its log goes to stderr, and an error on purpose becomes one sentence and an exit code.

    Args:
        debug: log everything and show tracebacks.
        advice: what to do after an interruption.
    """
    try:
        with _log_on_stderr(debug):
            yield
    except KeyboardInterrupt:
        say(f"interrupted{': ' if advice else ''}{advice}")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if debug:
            traceback.print_exception(error)
        for sentence in _sentences(error):
            say(f"error: {sentence}")
        raise typer.Exit(code) from None


def say(text: str) -> None:
    """One line on stderr, whatever the width of the terminal."""
    Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False).print(text)


def show(*renderables: RenderableType) -> None:
    """Tables and sentences on stdout."""
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, markup=False, emoji=False, highlight=False)
    for renderable in renderables:
        console.print(renderable)


def emit(document: Any) -> None:
    """A JSON document on stdout; text is taken to be JSON already."""
    sys.stdout.write(document if isinstance(document, str) else json.dumps(document, indent=2, allow_nan=False) + "\n")


class _StderrHandler(logging.Handler):
    """Writes above a progress bar instead of through it, as rich knows where the bar is."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


@contextmanager
def _log_on_stderr(debug: bool) -> Iterator[None]:
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    handler.setLevel(logging.DEBUG if debug else logging.INFO)
    loggers = [logging.getLogger(name) for name in OURS] if not debug else [logging.getLogger()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(handler.level)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _sentences(error: Exception) -> list[str]:
    from compress.files import is_full_disk

    if is_full_disk(error):  # nobody's bug wherever it is met, in a scratch folder for one
        return [f"Writing failed: {error}; free some space, in the folder for temporary files too, and try again."]
    return str(error).splitlines()


def _exit_code(error: Exception) -> int | None:
    """The exit code of an error raised on purpose; None for a bug, which shows its traceback."""
    # Imported here, as they bring torch: the command answers --help and usage errors without.
    from benchmarks.harness.errors import HarnessError, HarnessInputError
    from compress.errors import InputError, WorkError
    from compress.files import is_full_disk

    if isinstance(error, InputError | HarnessInputError):
        return BAD_INPUT
    if isinstance(error, WorkError | HarnessError) or is_full_disk(error):
        return WORK_FAILED
    return None
