"""`espalier compare OLD.json NEW.json`, as a CI job calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.regression_records import Regression
from benchmarks.harness.results import Results
from tests.benchmarks.made_documents import CALM, document, latency, times, variant


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: str, results: Results) -> Path:
        path = tmp_path / name
        path.write_text(results.to_json(), encoding="utf-8")
        return path

    return write


@pytest.fixture
def old(write: Any) -> Path:
    return write("old.json", document(variant("dense", latency(CALM)), variant("pruned", latency(times(0.5)), top1=99)))


@pytest.fixture
def slower(write: Any) -> Path:
    pruned = variant("pruned", latency(times(0.55)), top1=98, sha="b")
    return write("slower.json", document(variant("dense", latency(CALM)), pruned))


def test_a_regression_fails_after_its_figures_were_shown(invoke: Any, old: Path, slower: Path) -> None:
    result = invoke("compare", old, slower, "--fail-on", "slower:2%")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "1 of 2 cells is slower by more than 2 %: pruned batch 1."
    assert max(map(len, result.stdout.splitlines())) <= 110
    assert result.stderr.startswith("error: pruned batch 1 is slower by 10.0 % [")
    both = invoke("compare", old, slower, "--fail-on", "slower:2%,accuracy:0.5")
    assert "error: pruned lost 1.00 points of top-1, more than the 0.5 allowed.\n" in both.stderr


def test_without_limits_only_failures_count(invoke: Any, old: Path, slower: Path, write: Any) -> None:
    assert invoke("compare", old, slower).exit_code == 0
    failed = write("failed.json", document(variant("dense", latency(CALM)), variant("pruned", failure="It crashed.")))
    result = invoke("compare", old, failed)
    assert result.exit_code == 1
    assert result.stderr == "error: pruned failed in NEW and did not fail in OLD: It crashed.\n"


def test_better_or_equal_passes(invoke: Any, old: Path, slower: Path) -> None:
    for first, second in ((slower, old), (old, old)):
        result = invoke("compare", first, second, "--fail-on", "slower:0%", "--fail-on", "accuracy:0")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "no cell is slower by more than 0 %."


def test_json_is_the_comparison(invoke: Any, old: Path, slower: Path) -> None:
    result = invoke("compare", old, slower, "--json", "--fail-on", "slower:2%")
    assert result.exit_code == 1
    regression = Regression.model_validate_json(result.stdout)
    assert [change.verdict for change in regression.cells] == ["slower", "equivalent"]


def test_bad_limits(invoke: Any, old: Path) -> None:
    result = invoke("compare", old, old, "--fail-on", "slower:2")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: --fail-on has 'slower:2' without a percent sign: write slower:2%.\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": "espalier-results/1"}', "is no document of espalier-results/2"),
        ("{", "is no document of espalier-results/2"),
        (None, "Cannot read"),
    ],
)
def test_documents_that_cannot_be_read(invoke: Any, old: Path, tmp_path: Path, text: str | None, words: str) -> None:
    bad = tmp_path / "bad.json"
    if text is not None:
        bad.write_text(text)
    for arguments in ((old, bad), (bad, old)):
        result = invoke("compare", *arguments)
        assert result.exit_code == 2
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_a_damaged_sample_is_no_crash(invoke: Any, old: Path, tmp_path: Path) -> None:
    content = json.loads(old.read_text())
    content["variants"][0]["measurements"][0]["samples_ms"] = [[1.0]]
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    result = invoke("compare", old, damaged)
    assert result.exit_code == 2
    assert "dense, fp32, ONNX Runtime, cpu, batch 1, SingleStream cannot be compared" in result.stderr


def test_nothing_in_common(invoke: Any, old: Path, write: Any) -> None:
    other = write("other.json", document(variant("another", latency(CALM, 8))))
    result = invoke("compare", old, other)
    assert result.exit_code == 2
    assert "There is nothing to compare: OLD has dense, fp32" in result.stderr
    assert "NEW has another, fp32, ONNX Runtime, cpu, batch 8, MultiStream" in result.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--data", "digits"),
        ("--samples", "64"),
        ("--device", "cpu"),
        ("--runtime", "onnxruntime"),
        ("--first-layer",),
        ("--trust-manifest", "manifest.json"),
        ("--trust", "module"),
    ],
)
def test_options_of_the_other_form(invoke: Any, old: Path, option: tuple[str, ...]) -> None:
    result = invoke("compare", old, old, *option)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option[0]} belongs to `espalier compare CHECKPOINT FILES`")


def test_the_form_with_a_checkpoint(invoke: Any, old: Path, tmp_path: Path) -> None:
    result = invoke("compare", tmp_path, "a.onnx", "--data", "digits", "--fail-on", "slower:2%")
    assert result.exit_code == 2
    assert "--fail-on belongs to `espalier compare OLD.json NEW.json`" in result.stderr
    result = invoke("compare", tmp_path, "a.onnx")
    assert result.exit_code == 2
    assert "--data is missing" in result.stderr
    for arguments in ((old, "a.onnx"), (tmp_path, old), (old, old, old)):
        result = invoke("compare", *arguments)
        assert result.exit_code == 2
        assert "give OLD.json NEW.json, or a checkpoint" in result.stderr
