"""Which models can be pruned: python -m benchmarks.coverage --models NAME,... --out DIR

Writes DIR/coverage.md and DIR/coverage.json. Every model works in a process of its own; its row is kept under DIR/rows
and not made again, unless what is asked of it changes or --again is given. A model that fails is a row with the reason.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.coverage.catalogue import SETS, chosen
from benchmarks.coverage.limits import worked
from benchmarks.coverage.rows import STAGES, Request, Row, read_row, write_row
from benchmarks.coverage.table import page, summary_lines
from benchmarks.harness.environment import environment
from compress.errors import InputError
from compress.files import make_directory, write_json, write_text

PEER = "torch-pruning"


def main(arguments: Sequence[str] | None = None) -> int:
    """Work through the models and write the table; 0 if all of them pass, 1 if one does not, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    try:
        requests = _requests(options)
        make_directory(options.out / "rows")
        rows = _work(requests, options)
        _write(options.out, shlex.join(sys.argv[1:] if arguments is None else arguments))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    ours = [row for row in rows if row.request.side != PEER]
    return int(any(failure is not None for row in ours for failure in row.failures().values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="quick", help=f"names, patterns or sets, by commas: {', '.join(SETS)}")
    parser.add_argument("--ratio", type=_shares, default=(0.3, 0.6), help="shares of the channels, by commas")
    parser.add_argument("--out", type=Path, required=True, help="directory of the table and of its rows")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each model")
    parser.add_argument("--memory", type=float, default=14.0, help="GiB for each model")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--against", choices=[PEER], help="put this library to the same work")
    parser.add_argument("--attention", choices=["heads", "widths", "keep"], help="an option of compress.graph.trace")
    parser.add_argument("--embedding", action="store_true", help="an option of compress.graph.trace")
    parser.add_argument("--again", action="store_true", help="make rows again that are there")
    return parser


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not all(0 < share < 1 for share in shares):
        raise argparse.ArgumentTypeError("a share lies between 0 and 1")
    return shares


def _requests(options: argparse.Namespace) -> list[Request]:
    trace = {"attention": options.attention} if options.attention else {}
    trace |= {"embedding": True} if options.embedding else {}
    sides = ["espalier", *([PEER] if options.against else [])]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    return [
        Request(
            model=subject.model,
            size=subject.size,
            build=subject.build,
            part=subject.part,
            side=side,
            shares=options.ratio,
            until=options.until,
            trace=trace | ({"embedding": True} if subject.embedding else {}),
            threads=threads,
        )
        for subject in chosen(options.models.split(","))
        for side in sides
    ]


def _work(requests: Sequence[Request], options: argparse.Namespace) -> list[Row]:
    """The rows of the requests, new or kept."""

    def one(numbered: tuple[int, Request]) -> Row:
        number, request = numbered
        path = _path(options.out, request)
        kept = read_row(path)
        if kept is not None and kept.request == request and not options.again:
            return kept
        row = worked(request, timeout_s=options.timeout, memory_bytes=int(options.memory * 2**30))
        write_row(path, row)
        sys.stderr.write(f"{number} of {len(requests)}: {request.model}, {request.side}: {_verdict(row)}\n")
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        return list(pool.map(one, enumerate(requests, start=1)))


def _verdict(row: Row) -> str:
    failures = [failure for failure in row.failures().values() if failure is not None]
    return f"{failures[0].kind} in {failures[0].stage}: {failures[0].reason}" if failures else "passed"


def _path(out: Path, request: Request) -> Path:
    prefix = "" if request.side == "espalier" else f"{request.side}."
    return out / "rows" / f"{prefix}{request.model.replace(':', '.').replace('/', '.')}.json"


def _write(out: Path, command: str) -> None:
    """The table of all rows that are there, those of earlier runs too."""
    rows = [row for path in sorted((out / "rows").glob("*.json")) if (row := read_row(path)) is not None]
    ours = [row for row in rows if row.request.side == "espalier"]
    theirs = {row.request.model: row for row in rows if row.request.side == PEER}
    surroundings = environment()
    write_text(
        out / "coverage.md", page(ours, theirs, surroundings, f"python -m benchmarks.coverage {command}".rstrip())
    )
    write_json(
        out / "coverage.json",
        {"rows": [row.model_dump(mode="json") for row in rows], "environment": json.loads(json.dumps(surroundings))},
    )
    sys.stdout.write("\n".join(summary_lines(ours)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
