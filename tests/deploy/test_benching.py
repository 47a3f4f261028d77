"""What `espalier bench` understands, and what it makes of targets that work and targets that die."""

import io
import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from benchmarks.harness.errors import HarnessError
from benchmarks.harness.results import Results, load
from benchmarks.harness.rounds import Plan
from benchmarks.harness.tables import summary
from compress.errors import InputError
from deploy import bench_inputs
from deploy.bench_settings import Settings, read_numbers, read_scenarios
from deploy.bench_targets import Opening, common_inputs, read_shapes, read_targets
from deploy.benching import bench, require_all, write
from deploy.pool import read_arrays
from deploy.tensor_spec import TensorSpec

FUNCTIONS = """\
import os, time

calls = 0

def steady(images):
    time.sleep(0.002)

def slow(images):
    time.sleep(0.004)

def dies(images):
    global calls
    calls += 1
    time.sleep(0.002)
    if calls == 12:
        print("the GPU fell off the bus")
        os._exit(4)

def raises(images):
    assert images.shape == (len(images), 3, 8, 8)
    raise OSError("device lost")
"""

PLAN = Plan(rounds=4, seconds=0.01, queries=3, warmup_s=0.0, time_budget_s=4, half_width=0.5, processes=2)


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timed_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)


def run(*names: str, **settings: object):
    opening = Opening(threads=1)
    targets = read_targets([f"timed_functions:{name}" for name in names], (), opening)
    return bench(targets, Settings(plan=PLAN, shapes=read_shapes(["x=3,8,8"]), **settings), opening)  # type: ignore[arg-type]


def text_of(results: Results) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(summary(results))
    return console.export_text()


@pytest.mark.parametrize("operator", ["Identity", "Relu"])
def test_files_without_arithmetic_or_without_work(tmp_path, operator):
    paths = []
    for name, kind in (("a", operator), ("b", "Conv")):
        value, result = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 1, 4, 4]) for n in "xy")
        weights = [helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 1, 1], [2.0])] if kind == "Conv" else []
        node = helper.make_node(kind, ["x", "w"] if weights else ["x"], ["y"])
        graph = helper.make_graph([node], "g", [value], [result], weights)
        opset = [helper.make_opsetid("", 17)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / f"{name}.onnx"))
        paths.append(str(tmp_path / f"{name}.onnx"))
    opening = Opening(threads=1)
    results = bench(read_targets(paths, (), opening), Settings(plan=PLAN, explain=True), opening)
    require_all(results)
    assert all(variant.measurements for variant in results.variants)
    assert "b.onnx" in text_of(results)
    write(results, tmp_path / "out")
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_sizes_that_a_file_leaves_open(tmp_path):
    value, result = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, "h", "w"]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(tmp_path / "open.onnx"))
    opening = Opening(threads=1)
    targets = read_targets([str(tmp_path / "open.onnx")], (), opening)
    results = bench(targets, Settings(plan=PLAN, shapes={"x": (3, 6, 10)}), opening)
    require_all(results)
    assert results.variants[0].runtime.proof["kernels_by_provider"]
    assert results.recipe["bench"]["shapes"] == {"x": [3, 6, 10]}


def test_numbers():
    assert read_numbers("1,8, 32,8", "--batch") == (1, 8, 32)
    assert read_numbers(None, "--batch") == ()
    for text in ("", "0", "1,x", "-1", "1.5"):
        with pytest.raises(InputError, match=r"--batch is .* but takes positive whole numbers"):
            read_numbers(text, "--batch")


@pytest.mark.parametrize(
    ("names", "batches", "limit", "expected"),
    [
        ((), (), None, (1,)),
        ((), (4, 1), None, (4, 1)),
        ((), (1,), 20.0, (1,)),
        (("SingleStream",), (), None, (1,)),
        (("MultiStream",), (), None, (8,)),
        (("Offline",), (), None, (32,)),
        (("Offline",), (16, 64), None, (16, 64)),
        (("SingleStream", "MultiStream", "Offline", "Server"), (128,), 20.0, (1, 8, 128)),
    ],
)
def test_scenarios(names, batches, limit, expected):
    assert read_scenarios(names, batches, limit) == expected


def test_functions_against_each_other(functions, tmp_path):
    results = run("steady", "slow")
    steady, slow = results.variants
    assert slow.measurements[0].speedup.value == pytest.approx(0.5, rel=0.2)
    assert steady.measurements[0].again.verdict in ("unclear", "equivalent")
    assert steady.runtime.name == "python"
    assert steady.measurements[0].phases.load_s
    assert set(steady.measurements[0].processes) == {0, 1}
    assert results.not_measured["server"].endswith("ask with --scenario Server --limit MS.")
    assert "random, standard normal" in results.provenance["inputs"]

    write(results, tmp_path / "out")
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"results.json", "results.csv", "report.html"} <= written
    assert any(name.endswith(".png") for name in written)
    assert load(tmp_path / "out" / "results.json") == results
    require_all(results)


def test_who_dies_leaves_the_others_figures_and_a_line_of_its_own(functions):
    results = run("steady", "dies", "slow")
    steady, dead, slow = results.variants
    assert "died while it was measured: its process ended with exit code 4; it last wrote: the GPU fell" in dead.failure
    assert dead.measurements == []
    assert dead.runtime.version == "not known"
    assert steady.failure is None
    assert slow.measurements[0].speedup.value == pytest.approx(0.5, rel=0.2)
    with pytest.raises(HarnessError, match=r"timed_functions:dies: .*exit code 4"):
        require_all(results)


def test_without_its_baseline_nothing_is_compared(functions):
    results = run("dies", "steady")
    assert results.variants[0].failure
    assert results.variants[1].measurements[0].speedup is None
    assert results.variants[1].measurements[0].latency.median_ms.value == pytest.approx(2, rel=0.5)


def test_when_nothing_can_be_measured_the_document_says_why(functions):
    results = run("raises")
    assert "OSError: device lost" in results.variants[0].failure
    assert "not timed" in text_of(results) or "failed" in text_of(results)
    with pytest.raises(HarnessError, match=r"timed_functions:raises: .*device lost"):
        require_all(results)


def test_server_and_sweep(functions):
    results = run("steady", "dies", limit_ms=30.0, lanes=(1, 2))
    steady, dead = results.variants
    assert steady.server.limit_ms == 30
    assert steady.server.points
    assert {(point.batch_size, point.lanes) for point in steady.throughput.points} == {(1, 1), (1, 2)}
    single, double = sorted(steady.throughput.points, key=lambda point: point.lanes)
    assert double.throughput_per_s.value > 1.5 * single.throughput_per_s.value  # it sleeps: two sleep as well as one
    assert (dead.server, dead.throughput) == (None, None)
    assert json.loads(results.to_json())["variants"][0]["server"]["seed"] == 0


def test_real_images_fill_the_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_inputs, "last_level_cache_bytes", lambda: 4 * 8 * 8 * 4 * 200)
    (tmp_path / "timed_functions.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    opening = Opening(threads=1)
    settings = Settings(shapes={"x": (1, 32, 32)}, data="digits")
    targets = read_targets(["timed_functions:steady"], (), opening)
    specs = common_inputs(targets, settings.shapes, (1,))
    said = bench_inputs.write_inputs(tmp_path / "pool", specs, settings, opening)
    (images,) = read_arrays(tmp_path / "pool")
    assert said.startswith("digits; 100 samples of 4096 bytes")
    assert images.shape == (100, 1, 32, 32)
    assert len({image.tobytes() for image in images}) > 90
    with pytest.raises(InputError, match="digits has images of"):
        bench_inputs.write_inputs(
            tmp_path / "pool", [TensorSpec("x", "float32", ("batch", 3, 9, 7))], settings, opening
        )
