import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import peaks
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.peaks import Peak, measured_peak


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "espalier" / "peaks.json"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was really measured, one entry for each measurement."""
    calls: list[str] = []

    def product(dtype: str, place: torch.device, threads: int) -> tuple[float, str]:
        calls.append(dtype)
        return 1e11 + len(calls), "product"

    def copy(place: torch.device) -> tuple[float, str]:
        calls.append("copy")
        return 4e10, "copy"

    monkeypatch.setattr(peaks, "_product", product)
    monkeypatch.setattr(peaks, "_copy", copy)
    monkeypatch.setattr(peaks, "_busy", lambda place: False)
    return calls


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SLICE_S", 0.0)
    monkeypatch.setattr(peaks, "COPY_S", 0.0)
    monkeypatch.setattr(peaks, "LONGEST_S", 0.01)
    monkeypatch.setattr(peaks, "COPY_BYTES", 1024**2)
    monkeypatch.setattr(peaks, "last_level_cache", lambda: 0)


def test_a_peak_is_measured_once(measured: list[str], cache: Path) -> None:
    first = measured_peak("float32", threads=1)
    assert measured_peak("float32", threads=1) == first
    assert measured == ["copy", "float32"]
    assert first.how == "product; copy"
    assert [entry["peak"]["dtype"] for entry in json.loads(cache.read_text())["peaks"]] == ["float32"]


def test_another_number_of_threads_is_another_machine(measured: list[str]) -> None:
    measured_peak("float32", threads=1)
    measured_peak("float32", threads=2)
    assert measured.count("float32") == 2


def test_types_share_one_pace_of_memory(measured: list[str]) -> None:
    assert measured_peak("int8", threads=1).bytes_per_s == measured_peak("float32", threads=1).bytes_per_s
    assert measured == ["copy", "int8", "float32"]


def test_refresh_measures_again_and_replaces(measured: list[str], cache: Path) -> None:
    first = measured_peak("float32", threads=1)
    second = measured_peak("float32", threads=1, refresh=True)
    assert second.macs_per_s != first.macs_per_s
    assert measured_peak("float32", threads=1) == second
    assert len(json.loads(cache.read_text())["peaks"]) == 1


def test_what_a_busy_machine_gave_is_measured_again_when_it_is_quiet(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peaks, "_busy", lambda place: True)
    disturbed = measured_peak("float32", threads=1)
    assert measured_peak("float32", threads=1) == disturbed  # no better now
    monkeypatch.setattr(peaks, "_busy", lambda place: False)
    monkeypatch.setattr(peaks, "_copy", lambda place: (3e10, "slower copy"))
    quiet = measured_peak("float32", threads=1)
    assert quiet.macs_per_s is not None
    assert disturbed.macs_per_s is not None
    assert quiet.macs_per_s > disturbed.macs_per_s
    assert (quiet.bytes_per_s, quiet.how) == (4e10, "product; copy")  # the faster figure of both
    assert measured_peak("float32", threads=1) == quiet


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '"peaks"',
        '{"version": 0, "peaks": []}',
        '{"version": 1}',
        '{"version": 1, "peaks": [1]}',
        '{"version": 1, "peaks": [{"machine": {}, "peak": {"dtype": "float32"}}]}',
        "\x00\xff",
    ],
)
def test_a_damaged_cache_is_measured_anew(text: str, measured: list[str], cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(text, encoding="latin-1")
    peak = measured_peak("float32", threads=1)
    assert measured_peak("float32", threads=1) == peak
    assert measured == ["copy", "float32"]


def test_a_cache_that_cannot_be_written_is_only_logged(
    measured: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "espalier").write_text("a file in the folder's place")
    with caplog.at_level(logging.WARNING):
        assert measured_peak("float32", threads=1).macs_per_s
    assert "cannot write" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"dtype": "float64"}, "No peak is measured in float64"),
        ({"threads": 0}, "0 threads"),
        ({"device": "tpu"}, 'no device "tpu"'),
        ({"device": "meta"}, "No peak is measured on meta"),
    ],
)
def test_impossible_peaks_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(HarnessInputError, match=problem):
        measured_peak(**{"dtype": "float32", "threads": 1} | arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_has_no_peak() -> None:
    with pytest.raises(HarnessInputError, match="no such GPU"):
        measured_peak("float16", device="cuda", threads=1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_real_measurements_are_plausible(dtype: str) -> None:
    before = torch.get_num_threads()
    peak = measured_peak(dtype, threads=1)
    assert torch.get_num_threads() == before
    assert peak.macs_per_s is not None
    assert 1e8 < peak.macs_per_s < 1e15
    assert 1e8 < peak.bytes_per_s < 1e14
    assert " of " in peak.how
    assert Peak.model_validate_json(peak.model_dump_json()) == peak


@pytest.mark.usefixtures("quick")
def test_a_type_that_nothing_multiplies_has_no_peak_and_says_why() -> None:
    peak = measured_peak("float8", threads=1)
    assert peak.macs_per_s is None
    assert "CPUs do not compute in float8" in peak.how
    assert peak.bytes_per_s > 0


def test_larger_products_are_left_out_where_they_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_best", lambda step, seconds, place: step())
    made: list[int] = []

    def make(size: int) -> Any:
        made.append(size)
        return lambda: 0.1 * (size / 512) ** 3

    from benchmarks.harness.products import Product

    found = list(peaks._rates(Product("slow", make), (256, 512, 1024, 2048), torch.device("cpu")))
    assert made == [256, 512]
    assert found[-1] == (512**3 / 0.1, "slow of 512 x 512")
