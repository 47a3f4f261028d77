"""The real command, a recipe that takes seconds, and one complete run of it that the tests share."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from benchmarks.harness import measure
from benchmarks.harness.session import LocalSession
from benchmarks.harness.subject import Candidate
from deploy import bench_load
from deploy.cli import app

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "deploy.cli"]

# Several epochs in every training, so that each has a state to go on from.
RECIPE = """\
version: 1
name: tiny
seed: 3
model:
  factory: espalier:lenet3
data:
  source: digits
  batch_size: 128
baseline:
  epochs: 3
  learning_rate: 0.05
prune:
  budget:
    macs: 0.5
  events: 3
  interval: 11
finetune:
  epochs: 3
  learning_rate: 0.02
export:
  precision: [fp32, int8]
  samples: 64
parity:
  batch_sizes: [1, 3]
  samples: 12
measure:
  batch_sizes: [1, 4]
  rounds: 3
  processes: 1
  seconds_per_round: 0.1
  queries_per_round: 5
  time_limit_s: 3
  layers: false
"""

Espalier = Callable[..., "subprocess.CompletedProcess[str]"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def espalier() -> Espalier:
    """Runs the command in a process of its own, as a user does."""

    def run(*arguments: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
        command = [*COMMAND, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), check=False)

    return run


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """Runs the command in this process: its output and exit code without the seconds that a new one takes to start."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def sessions_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are opened in this very process: a fake that stands in for a library is known to no other."""

    def open_here(candidate: Candidate) -> LocalSession:
        return LocalSession(candidate.name, lambda: candidate.open(**candidate.arguments), candidate.batch_size)

    for module in (measure, bench_load):
        monkeypatch.setattr(module, "RemoteSession", open_here)


@pytest.fixture
def started() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the command and lets it run; what is left at the end of the test is killed."""
    processes = []

    def start(*arguments: object) -> "subprocess.Popen[str]":
        command = [*COMMAND, *map(str, arguments)]
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=environment(),
                # A shell that runs the tests in the background has interrupts ignored, which children inherit.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def unbroken(
    espalier: Espalier, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> "subprocess.CompletedProcess[str]":
    """A run from beginning to end, its results on stdout; its directory is the last argument."""
    done = espalier("run", recipe_file, "--json", "--out", tmp_path_factory.mktemp("unbroken") / "run")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def run_directory(unbroken: "subprocess.CompletedProcess[str]") -> Path:
    """The directory of `unbroken`; not to be changed."""
    return Path(unbroken.args[-1])
