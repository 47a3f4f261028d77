"""The frame that the studies share: options, results kept piece by piece, and the page that is published.

A study writes into one directory OUT:

    OUT/cells/STUDY-KEY-DIGEST.json   one piece of its results, kept so that a killed study resumes
    OUT/STUDY.json                    all results with their environment
    OUT/STUDY-FIGURE.png              its figures
    OUT/STUDY.md                      the page: what the paper says, what was measured
"""

import argparse
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from benchmarks.harness.environment import environment
from compress.errors import InputError
from compress.files import make_directory, replacing, write_json, write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Where a study writes, and whether it runs small (`quick`: under a minute, to see that it works)."""

    out: Path
    quick: bool


@dataclass(frozen=True)
class Finding:
    """One row "what the paper says, what we measured"; `agrees` is None where the two cannot be compared."""

    claim: str
    paper: str
    measured: str
    agrees: bool | None


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """The options that every study has; `doc` is the study's module docstring, whose first line is shown."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for results; a killed study resumes there")
    parser.add_argument("--quick", action="store_true", help="smaller and rougher, under a minute")
    return parser


def options(doc: str, argv: Sequence[str] | None = None) -> Options:
    """Read the command line and make OUT ready; ends the process with code 2 and one sentence where it cannot be."""
    parsed = argument_parser(doc).parse_args(argv)
    return ready(parsed.out, parsed.quick)


def ready(out: Path, quick: bool) -> Options:
    """Create OUT and start logging to stderr; ends the process with code 2 and one sentence if OUT is not writable."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        for directory in (out, out / "cells"):
            make_directory(directory)
            _prove_writable(directory)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from error
    return Options(out, quick)


class Cells:
    """Results of the pieces of a study, each kept in OUT/cells as soon as it is there, so that a killed study resumes.

    A file's name carries a digest of the settings, so that a piece computed under other settings is not reused. Code
    is not part of it: after a change of a study's code, start in an empty OUT. `seconds` is what the pieces asked for
    so far took to compute, those reused from an earlier run included.

    Args:
        settings: All that a piece depends on besides its key and the code; JSON values.
    """

    def __init__(self, options: Options, study: str, settings: Mapping[str, Any]) -> None:
        self._directory = options.out / "cells"
        self._study = study
        self._settings = {**settings, "quick": options.quick}
        text = json.dumps(self._settings, sort_keys=True, allow_nan=False)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.seconds = 0.0

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of piece `key`: from its file, or else computed and written there."""
        path = self._directory / f"{self._study}-{quote(key, safe='=,+ ')}-{self._digest}.json"
        if path.exists():
            cell = json.loads(path.read_text(encoding="utf-8"))
            logger.info("%s %s: reused from %s", self._study, key, path)
        else:
            logger.info("%s %s: computing", self._study, key)
            start = time.perf_counter()
            value = compute()
            seconds = time.perf_counter() - start
            cell = {"key": key, "settings": self._settings, "seconds": seconds, "value": value}
            write_json(path, cell)
            # What JSON changes (tuples, integer keys) must be the same in the first run as in a resumed one.
            cell = json.loads(json.dumps(cell))
            logger.info("%s %s: took %.1f s", self._study, key, seconds)
        self.seconds += cell["seconds"]
        return cell["value"]


def publish(
    options: Options,
    *,
    study: str,
    title: str,
    question: str,
    findings: Sequence[Finding],
    results: Mapping[str, Any],
    figures: Mapping[str, Figure],
    notes: Sequence[str] = (),
    seconds: float,
) -> None:
    """Write OUT/STUDY.json, OUT/STUDY-NAME.png for every figure, and OUT/STUDY.md, which shows them.

    Args:
        study: Name of the module, which is also that of the files.
        results: All that the figures and findings rest on; JSON values without NaN and infinity.
        notes: What a reader must know to judge the findings, one paragraph each.
        seconds: What the study took to compute, resumed pieces included.
    """
    machine = environment(Path(__file__).parent)
    document = {
        "study": study,
        "quick": options.quick,
        "seconds": seconds,
        "environment": machine,
        "findings": [asdict(finding) for finding in findings],
        "results": results,
    }
    # On one line: tens of thousands of numbers, for programs.
    write_text(options.out / f"{study}.json", json.dumps(document, allow_nan=False) + "\n")
    for name, figure in figures.items():
        with replacing(options.out / f"{study}-{name}.png") as temporary:
            figure.savefig(temporary, dpi=150, metadata={"Software": None})  # the same bytes with every run
    command = f"python -m benchmarks.studies.{study} --out {shlex.quote(str(options.out))}"
    parts = [
        f"# {title}",
        question,
        f"```\n{command}{' --quick' if options.quick else ''}\n```",
        "**Quick mode**: small and rough; it shows that the study runs, its figures are not for quoting."
        if options.quick
        else "",
        *(f"![{title}: {name}]({study}-{name}.png)" for name in figures),
        _table(findings),
        *notes,
        f"{_machine_line(machine)}. Took {seconds:.0f} s. All numbers: [{study}.json]({study}.json).",
    ]
    write_text(options.out / f"{study}.md", "\n\n".join(part for part in parts if part) + "\n")
    logger.info("%s: wrote %s", study, options.out / f"{study}.md")


def _table(findings: Sequence[Finding]) -> str:
    verdicts = {True: "yes", False: "no", None: "—"}
    rows = [("claim", "paper", "measured", "agrees"), ("---",) * 4]
    rows += [(row.claim, row.paper, row.measured, verdicts[row.agrees]) for row in findings]
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _machine_line(machine: Mapping[str, Any]) -> str:
    cpu, git = machine["cpu"], machine["git"]
    parts = [
        f"Measured on {cpu['model'] or 'an unknown CPU'}",
        f"{len(cpu['affinity'])} cores",
        f"{machine['threads']['torch_intra_op']} threads",
        *(gpu["name"] for gpu in machine["gpus"]),
        f"Python {machine['python']}",
        *(f"{name} {machine['libraries'][name]}" for name in ("torch", "numpy") if name in machine["libraries"]),
    ]
    if git and git["commit"]:
        parts.append(f"commit {git['commit'][:12]}{' with local changes' if git['dirty'] else ''}")
    return ", ".join(parts)


def _prove_writable(directory: Path) -> None:
    try:
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"Cannot write into {directory}: {error.strerror}; choose a directory you can write."
        ) from error
