"""The frame of the studies: resumption, the published files, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.harness import figures
from benchmarks.studies import __main__ as studies
from benchmarks.studies import linear_model
from benchmarks.studies.study import Cells, Finding, Options, options, publish

ROOT = Path(__file__).parents[2]


def published(options: Options, study: str = "schedule", agrees: tuple[bool | None, ...] = (True, False, None)) -> None:
    drawing, axes = figures.figure(1, 2)
    axes[0, 0].plot([1, 2], color=figures.colour(0), label="series")
    figures.legend(drawing, axes.flat, columns=1)
    publish(
        options,
        study=study,
        title="A title",
        question="A question?",
        findings=[Finding("a | b", "paper", f"measured {verdict}", verdict) for verdict in agrees],
        results={"numbers": [1, 2]},
        figures={"curve": drawing},
        notes=["A note."],
        seconds=12.4,
    )


def test_a_cell_is_computed_once_and_read_back_the_same(tmp_path):
    calls = []

    def compute() -> dict:
        calls.append(1)
        return {1: (2.5, None)}

    for _ in range(2):
        cells = Cells(Options(tmp_path, quick=False), "schedule", {"epochs": 3})
        assert cells.get("seed 0/first", compute) == {"1": [2.5, None]}
        assert cells.seconds > 0  # the first run's, when resumed
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("quick", "study", "settings"),
    [(False, "schedule", {"epochs": 4}), (True, "schedule", {"epochs": 3}), (False, "correlation", {"epochs": 3})],
)
def test_other_settings_compute_again(tmp_path, quick, study, settings):
    Cells(Options(tmp_path, quick=False), "schedule", {"epochs": 3}).get("a", lambda: "old")
    assert Cells(Options(tmp_path, quick), study, settings).get("a", lambda: "new") == "new"
    assert Cells(Options(tmp_path, quick=False), "schedule", {"epochs": 3}).get("a", lambda: "newer") == "old"


def test_a_cell_that_fails_or_is_not_json_leaves_no_file(tmp_path):
    cells = Cells(Options(tmp_path, quick=False), "schedule", {})
    with pytest.raises(ZeroDivisionError):
        cells.get("a", lambda: 1 / 0)
    with pytest.raises(ValueError, match="JSON compliant"):
        cells.get("a", lambda: float("nan"))
    assert cells.get("a", lambda: 1) == 1


def test_publish_writes_results_figures_and_page(tmp_path):
    published(Options(tmp_path, quick=True))
    document = json.loads((tmp_path / "schedule.json").read_text())
    assert (document["study"], document["quick"], document["seconds"]) == ("schedule", True, 12.4)
    assert document["results"] == {"numbers": [1, 2]}
    assert document["findings"][1] == {
        "claim": "a | b",
        "paper": "paper",
        "measured": "measured False",
        "agrees": False,
    }
    assert document["environment"]["python"]
    assert (tmp_path / "schedule-curve.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "schedule.md").read_text()
    assert f"python -m benchmarks.studies.schedule --out {tmp_path} --quick" in page
    assert "(schedule-curve.png)" in page
    assert "| claim | paper | measured | agrees |\n| --- | --- | --- | --- |\n" in page
    for measured, verdict in (("True", "yes"), ("False", "no"), ("None", "—")):
        assert f"| a \\| b | paper | measured {measured} | {verdict} |" in page


def test_figures_are_the_same_bytes_with_every_run(tmp_path):
    for name in ("one", "two"):
        published(Options(tmp_path / name, quick=False))
    first, second = ((tmp_path / name / "schedule-curve.png").read_bytes() for name in ("one", "two"))
    assert first == second


def test_an_unwritable_out_is_one_sentence_and_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        options("A study.", ["--out", str(tmp_path / "file" / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Cannot create the directory")
    assert error.count("\n") == 1


@pytest.mark.parametrize("main", [studies.main, linear_model.main])
def test_every_command_refuses_an_unwritable_out(tmp_path, capsys, monkeypatch, main):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "choose a directory you can write" in capsys.readouterr().err


def test_the_command_shows_no_traceback(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "benchmarks.studies", "--out", str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_a_failing_study_does_not_stop_the_others(tmp_path, monkeypatch, caplog):
    def broken(options: Options) -> None:
        raise RuntimeError("no | such thing\nsecond line")

    def load(name: str) -> SimpleNamespace:
        study = name.rpartition(".")[2]
        return SimpleNamespace(run=broken if study == "correlation" else lambda options: published(options, study))

    monkeypatch.setattr(studies, "import_module", load)
    assert studies.main(["--out", str(tmp_path), "--only", "schedule", "correlation"]) == 1
    assert "no | such thing" in caplog.text
    index = (tmp_path / "README.md").read_text()
    assert "| correlation | failed: RuntimeError: no \\| such thing | |" in index
    assert "| [A title](schedule.md) | 1 of 2, 1 not comparable | 12 |" in index
    assert "| linear_model | not run | |" in index


def test_all_well_is_code_0(tmp_path, monkeypatch):
    monkeypatch.setattr(
        studies, "import_module", lambda name: SimpleNamespace(run=lambda options: published(options, "schedule"))
    )
    assert studies.main(["--out", str(tmp_path), "--only", "schedule"]) == 0


def test_an_unknown_study_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        studies.main(["--out", str(tmp_path), "--only", "schedul"])
    assert stop.value.code == 2
    assert "schedule" in capsys.readouterr().err
