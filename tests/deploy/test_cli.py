"""The command line's own part: help, options, streams, exit codes. What the commands do is tested in tests/e2e."""

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from benchmarks.harness.errors import HarnessError, HarnessInputError
from compress.errors import InputError, WorkError
from deploy import pipeline
from deploy.cli import app
from deploy.cli_app import COMMANDS
from deploy.console import command


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", fail)


def test_every_command_has_help() -> None:
    assert {item.name or item.callback.__name__ for item in app.registered_commands if item.callback} == set(COMMANDS)
    for name in COMMANDS:
        assert invoke(name, "--help").exit_code == 0
    assert "[default: runs/NAME of the recipe]" in " ".join(invoke("run", "--help").stdout.replace("│", " ").split())


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, deploy.cli, compress, deploy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_dump_recipe() -> None:
    result = invoke("run", "--dump-recipe", "--set", "prune.events=4", "--set", "name=mine")
    assert result.exit_code == 0
    values = yaml.safe_load(result.stdout)
    assert (values["prune"]["events"], values["name"], values["version"]) == (4, "mine", 1)


def test_the_default_directory_carries_the_recipes_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(recipe: object, out: Path) -> None:
        seen.append(out)
        raise WorkError("enough")

    monkeypatch.setattr(pipeline, "run", run)
    invoke("run", "--set", "name=mine")
    invoke("run", "--out", "/elsewhere")
    assert seen == [Path("runs/mine"), Path("/elsewhere")]


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (InputError("The path is wrong."), 2, "error: The path is wrong.\n"),
        (InputError("a: one.\nb: two."), 2, "error: a: one.\nerror: b: two.\n"),
        (HarnessInputError("No variants."), 2, "error: No variants.\n"),
        (WorkError("It diverged."), 1, "error: It diverged.\n"),
        (HarnessError("It died."), 1, "error: It died.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
            1,
            "error: Writing failed: [Errno 28] No space left on device: '/tmp/x'; free some space, in the folder for "
            "temporary files too, and try again.\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: the same command goes on where it stopped.\n"),
    ],
)
def test_errors_become_sentences_and_exit_codes(
    error: BaseException, code: int, stderr: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error)
    result = invoke("run", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", stderr)


def test_debug_adds_the_traceback_and_keeps_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, InputError("The path is wrong."))
    result = invoke("run", "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("error: The path is wrong.\n")


def test_a_bug_of_ours_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ZeroDivisionError()
    failing(monkeypatch, error)
    assert invoke("run").exception is error


def test_logs_go_to_stderr_while_the_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("compress.training")
    with command(debug=False):
        logger.info("epoch 1, [red]loss[/red]")
        logging.getLogger("someone.else").info("chatter")
        logger.debug("detail")
    logger.info("after the command")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err[9:] == "epoch 1, [red]loss[/red]\n"  # after the time of day


def test_doctor_prints_json() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"python", "versions", "devices", "onnxruntime", "missing", "problems"}
