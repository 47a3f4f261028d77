"""What docs/deployment.md says is true: its options exist, its files are those written, its code runs."""

import re
from pathlib import Path
from typing import Any

import numpy as np

import deploy
from deploy.artefacts import artefact_name
from deploy.precision import PRECISIONS, TARGETS
from deploy.runtimes import RUNTIMES
from deploy.tolerance import TOLERANCES

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_command_and_option_exists(invoke: Any) -> None:
    commands = re.findall(r"^espalier (\w+)(.*)$", TEXT, flags=re.MULTILINE)
    commands += re.findall(r"`espalier (\w+)([^`]*)`", TEXT)
    assert {name for name, _ in commands} >= {"export", "engine", "bench", "triton", "run"}
    for name, rest in commands:
        help_text = invoke(name, "--help").stdout
        for option in re.findall(r"--[\w-]+", rest):
            assert option in help_text, (name, option)


def test_every_file_name_is_one_that_is_written() -> None:
    for precision in PRECISIONS:
        for target in TARGETS[precision]:
            assert f"`{artefact_name('NAME', precision, target)}`" in TEXT


def test_every_runtime_and_option_is_listed() -> None:
    for name, kind in RUNTIMES.items():
        (row,) = re.findall(rf"^\| `{name}`.*$", TEXT, flags=re.MULTILINE)
        for option in kind.options:
            assert option in row


def test_the_bounds_are_those_of_the_code() -> None:
    assert f"{TOLERANCES['fp32'].max_relative_error:.0e}".replace("e-03", "e-3") in TEXT
    half = [100 * TOLERANCES[name].max_relative_error for name in ("fp16", "bf16")]  # type: ignore[operator,index]
    assert f"{half[0]:.1f} %, {half[1]:.1f} %" in TEXT
    quantised = [TOLERANCES[name].sqnr_db for name in ("int8", "fp8")]  # type: ignore[index]
    assert f"at least {quantised[0]:.0f} dB, {quantised[1]} dB" in TEXT


def test_the_python_lines_run(run_directory: Path, capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    images = np.zeros((2, 32, 32), dtype=np.uint8)
    exec(code.replace("runs/digits", str(run_directory)), {"images": images})
    assert capsys.readouterr().out.startswith("('")


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
    assert deploy.load is not None
