"""The results document, its schema and its CSV."""

import csv
import io
import json
from pathlib import Path

import pytest
from pydantic import ValidationError

import benchmarks.harness.results as module
from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.results import Accuracy, csv_text, load, rows


def test_the_shipped_schema_is_that_of_the_models():
    shipped = json.loads((Path(module.__file__).parent / "results.schema.json").read_text(encoding="utf-8"))
    assert shipped == module.schema(), "write benchmarks.harness.results.schema() to results.schema.json again"
    assert shipped["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert shipped["additionalProperties"] is False


def test_a_document_survives_writing_and_reading(results, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(results.to_json(), encoding="utf-8")
    assert load(path) == results
    assert json.loads(path.read_text()) == results.model_dump(mode="json")


def test_raw_samples_of_a_round_stand_on_one_line(results):
    measurement = results.variants[0].measurements[0]
    assert len(measurement.samples_ms) == 10
    joined = ",".join(map(str, measurement.samples_ms[0]))
    assert f"[{joined}]" in results.to_json()


def test_writing_leaves_strings_alone(results):
    awkward = results.model_copy(update={"provenance": {"note": "[\n 1, 2\n]", "list": "[ 3, 4 ]"}})
    assert json.loads(awkward.to_json())["provenance"] == {"note": "[\n 1, 2\n]", "list": "[ 3, 4 ]"}


def test_one_tidy_row_per_variant_batch_and_scenario(results):
    table = rows(results)
    keys = [(row["variant"], row["batch_size"], row["scenario"], row["lanes"]) for row in table]
    of_one = [(1, "SingleStream", 1), (32, "Offline", 1), (1, "Server", 1)]
    of_one += [(size, "Throughput", lanes) for size in (1, 4, 16, 32) for lanes in (1, 2)]
    assert keys == [(name, *key) for name in ("dense", "pruned") for key in of_one]
    pruned = results.variants[1]
    last = next(row for row in table if row["variant"] == "pruned" and row["scenario"] == "Offline")
    assert last["latency_median_ms"] == pruned.measurements[1].latency.median_ms.value
    assert last["speedup_low"] <= last["speedup"] <= last["speedup_high"]
    assert (last["baseline"], last["verdict"]) == ("dense", "faster")
    assert last["macs"] == 20_284_416
    assert last["top1_percent"] == 98.9
    assert last["top1_percent_samples"] == 360


def test_rows_hold_what_surrounds_the_latency(results):
    first = rows(results)[0]
    measurement = results.variants[0].measurements[0]
    assert (first["again_low"], first["again_high"]) == (measurement.again.low, measurement.again.high)
    assert first["latency_p99_ms"] == measurement.latency.p99_ms.value
    assert first["latency_p999_ms"] is None
    assert first["load_s"] == 0.212
    assert first["first_ms"] == sorted(measurement.phases.first_ms)[1]
    assert first["host_peak_bytes"] == 104_400_000
    assert first["roofline_reached"] == results.variants[0].rooflines[0].reached
    assert (first["rounds"], first["processes"], first["reruns"]) == (10, 3, 1)
    assert first["failure"] is None
    assert first["compute_ms"] is None


def test_the_rows_of_load_and_throughput(results):
    dense = [row for row in rows(results) if row["variant"] == "dense"]
    server = next(row for row in dense if row["scenario"] == "Server")
    found = results.variants[0].server
    assert (server["rate_per_s"], server["failing_per_s"]) == (found.rate_per_s, found.failing_per_s)
    assert server["limit_ms"] == 5.0
    best = next(point for point in found.points if point.valid and point.rate_per_s == found.rate_per_s)
    assert server["latency_p99_ms"] == best.p99_ms.value <= server["limit_ms"]
    assert server["load_s"] is None
    assert server["throughput_per_s"] is None
    knees = [(row["batch_size"], row["lanes"]) for row in dense if row["knee"]]
    assert knees == [(16, 2)]
    saturated = [row for row in dense if row["scenario"] == "Throughput"]
    assert saturated[0]["throughput_per_s"] == results.variants[0].throughput.points[0].throughput_per_s.value


def test_a_variant_that_failed_has_a_row_with_its_reason(bench_results):
    table = rows(bench_results)
    last = table[-1]
    assert last["variant"] == "my_package.models:compiled_resnet"
    assert "segmentation fault" in last["failure"]
    assert last["latency_median_ms"] is None
    assert last["scenario"] is None
    assert table[0]["h2d_ms"] > 0
    assert table[0]["device_bytes"] == 612_000_000
    assert len({tuple(row) for row in table}) == 1  # the same columns in all rows


def test_csv_reads_back_and_absent_figures_are_empty(results):
    bare = {"server": None, "throughput": None, "rooflines": []}
    timed = results.variants[0].model_copy(update=bare)
    untimed = results.variants[1].model_copy(update=bare | {"measurements": [], "accuracy": None})
    text = csv_text(results.model_copy(update={"variants": [timed, untimed]}))
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["variant"] for row in read] == ["dense", "dense", "pruned"]
    assert float(read[0]["latency_median_ms"]) == pytest.approx(0.612, rel=0.02)
    assert read[0]["speedup"] == ""
    assert read[2]["latency_median_ms"] == read[2]["top1_percent"] == read[2]["batch_size"] == ""


def test_accuracy_carries_its_interval_and_samples():
    accuracy = Accuracy.of(top1_percent=80.0, top5_percent=None, loss=None, samples=10)
    assert accuracy.top1_percent.samples == 10
    assert accuracy.top1_percent.low == pytest.approx(49.02, abs=0.01)


def test_the_baseline_is_the_one_most_like_the_variant(results):
    dense, pruned = results.variants
    speedup = pruned.measurements[0].speedup
    elsewhere = dense.model_copy(update={"runtime": dense.runtime.model_copy(update={"name": "PyTorch"}), "macs": 1})
    half = dense.model_copy(update={"artefact": dense.artefact.model_copy(update={"precision": "fp16"}), "macs": 2})
    document = results.model_copy(update={"variants": [elsewhere, half, dense, pruned]})
    assert document.baseline_of(pruned, speedup) is dense
    assert results.model_copy(update={"variants": [elsewhere, half]}).baseline_of(pruned, speedup) is half


def test_the_baseline_may_run_on_another_runtime(results):
    dense, pruned = results.variants
    elsewhere = pruned.model_copy(update={"runtime": pruned.runtime.model_copy(update={"name": "TensorRT"})})
    assert results.baseline_of(elsewhere, pruned.measurements[0].speedup) is dense
    nobody = pruned.measurements[0].speedup.model_copy(update={"baseline": "nobody"})
    assert results.baseline_of(pruned, nobody) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": "espalier-results/9"}, "schema_version"),
        ({"variants": []}, "variants"),
        ({"surprise": 1}, "surprise"),
        ({"created": "2026-03-14T09:26:53"}, "created"),
    ],
)
def test_a_document_of_another_form_is_refused_with_the_place(results, tmp_path, change, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results.model_dump(mode="json") | change))
    with pytest.raises(HarnessInputError, match=message):
        load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_file_is_the_users_mistake(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(HarnessInputError, match=r"results\.json is no"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HarnessInputError, match=r"Cannot read .*nothing\.json: No such file"):
        load(tmp_path / "nothing.json")


def test_the_same_variant_twice_is_refused(results):
    variant = results.variants[0].model_dump()
    with pytest.raises(ValidationError, match="dense / ONNX Runtime / CPU / fp32 appears twice"):
        type(results).model_validate(results.model_dump() | {"variants": [variant, variant]})


def test_nan_is_no_result(results):
    with pytest.raises(ValidationError, match="finite"):
        Accuracy(top1_percent=results.variants[0].accuracy.top1_percent, top5_percent=None, loss=float("nan"))
