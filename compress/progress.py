"""A progress bar on stderr where a person watches, nothing where a file or a pipe does."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """Handle of one running bar; `shown` tells whether anybody can see it."""

    def __init__(self, progress: Progress, description: str, total: int | None) -> None:
        self.shown = not progress.disable
        self._progress = progress
        self._task = progress.add_task(description, total=total, status="")

    def advance(self, status: str, steps: int = 1) -> None:
        """Count steps and replace the text at the end of the bar."""
        self._progress.update(self._task, advance=steps, status=status)

    def skip_to(self, completed: int) -> None:
        """Start from step `completed` of a resumed piece of work."""
        self._progress.update(self._task, completed=completed)


@contextmanager
def progress_bar(description: str, total: int | None, *, visible: bool = True) -> Iterator[Bar]:
    """Show a bar of `total` steps (None: not known) while the block runs, if stderr is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not (visible and console.is_terminal),
    ) as progress:
        yield Bar(progress, description, total)
