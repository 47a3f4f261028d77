"""The report's figures as files, for slides and papers."""

from pathlib import Path

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.report_figures import drawings
from benchmarks.harness.results import Results


def write_figures(results: Results, directory: Path) -> list[Path]:
    """Every figure of the report as SVG and PNG, on white; the directory is made where it is missing.

    Names are stable and tell what is drawn: `accuracy_latency_batch1.svg`. Files of these names are replaced.

    Returns:
        What was written, in the page's order; nothing if the document has nothing to draw.

    Raises:
        HarnessInputError: the directory cannot be written.
    """
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for section in drawings(results).values():
            for drawing in section:
                written += drawing.write(directory)
    except OSError as error:
        raise HarnessInputError(
            f"The figures cannot be written to {directory}: {error.strerror}; give another directory."
        ) from error
    return written
