"""Run the studies and write an index of their pages: python -m benchmarks.studies --out DIR [--quick] [--only NAME …]

A study that fails does not stop the others; the exit code is then 1.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from benchmarks.studies.study import Options, argument_parser, ready
from compress.errors import EspalierError, first_line
from compress.files import write_text

STUDIES = ("correlation", "oracle_curves", "schedule", "rank_boxplots", "linear_model", "scale_invariance")

logger = logging.getLogger(__package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the studies asked for, in their order; 0 if all succeeded, 1 if one failed."""
    parser = argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parsed = parser.parse_args(argv)
    options = ready(parsed.out, parsed.quick)
    failures = {}
    for name in (name for name in STUDIES if name in parsed.only):
        try:
            import_module(f"benchmarks.studies.{name}").run(options)
        except EspalierError as error:
            logger.error("%s failed: %s", name, error)
            failures[name] = first_line(error)
        except Exception as error:  # a bug in one study, which its traceback shows, must not cost the others
            logger.exception("%s failed", name)
            failures[name] = f"{type(error).__name__}: {first_line(error)}"
    write_text(options.out / "README.md", _index(options, failures))
    return 1 if failures else 0


def _index(options: Options, failures: Mapping[str, str]) -> str:
    """The page that lists every study: those of earlier runs into the same directory too."""
    lines = ["# Studies", "", "| study | findings that agree | seconds |", "| --- | --- | --- |"]
    for name in STUDIES:
        page = options.out / f"{name}.md"
        if name in failures:
            lines.append(f"| {name} | failed: {failures[name].replace('|', chr(92) + '|')} | |")
        elif not page.exists():
            lines.append(f"| {name} | not run | |")
        else:
            document = json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))
            verdicts = [finding["agrees"] for finding in document["findings"]]
            compared = [verdict for verdict in verdicts if verdict is not None]
            agreement = f"{sum(compared)} of {len(compared)}"
            if len(compared) < len(verdicts):
                agreement += f", {len(verdicts) - len(compared)} not comparable"
            title = page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            quick = " (quick mode)" if document["quick"] else ""
            lines.append(f"| [{title}]({name}.md){quick} | {agreement} | {document['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
