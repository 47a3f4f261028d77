"""The tests that need a GPU, in a process of their own and within a share of the time."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

MARKED = "gpu or tensorrt"

_OUTCOME = re.compile(r"^\S+::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_CLOSING = re.compile(r"^=+ (.*\bin [\d.]+s\b.*?) =+$")


class TestRun:
    """pytest at work from the moment that this is made; `outcome` waits for it."""

    __test__ = False

    def __init__(self, paths: Sequence[str], root: Path, marked: str = MARKED) -> None:
        """
        Args:
            root: where pytest runs, and what the paths are relative to.
        """
        # A test file that cannot be imported here must not keep the others from running.
        options = ["-v", "-ra", "--tb=short", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        self._arguments = ["-m", marked, *options, *paths]
        self._output = TemporaryFile()  # noqa: SIM115 - closed with the outcome
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *self._arguments],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"COLUMNS": "300"},  # so that no name or reason is cut
        )

    def outcome(self, seconds: float) -> dict[str, Any]:
        """Wait at most so long; tests that are not over by then are not counted.

        Returns:
            closing: pytest's closing line, or what had been seen when the time was over.
            failed, skipped: pytest's own lines.
            complete: whether all tests ran; exit_code is None otherwise.
        """
        complete = True
        try:
            self._process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            complete = False
        self.stop()
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        self._output.close()
        return {
            "command": "pytest " + " ".join(f'"{word}"' if " " in word else word for word in self._arguments),
            "complete": complete,
            "exit_code": self._process.returncode if complete else None,
            **read_report(lines),
        }

    def stop(self) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def read_report(lines: Sequence[str]) -> dict[str, Any]:
    """What the lines of a verbose run tell; see `TestRun.outcome`."""
    closing = next((found[1] for line in reversed(lines) if (found := _CLOSING.match(line))), None)
    outcomes = [found[1] for line in lines if (found := _OUTCOME.match(line))]
    if closing is None:
        seen = ", ".join(f"{count} {word.lower()}" for word, count in sorted(Counter(outcomes).items()))
        closing = f"not finished: {seen or 'no test was over'}"
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    if not failed:  # the summary was not reached
        failed = [line.partition(" ")[0] for line in lines if re.match(r"^\S+::.* (FAILED|ERROR)\b", line)]
    return {
        "closing": closing,
        "failed": failed,
        "skipped": [line for line in lines if line.startswith("SKIPPED [")],
    }
