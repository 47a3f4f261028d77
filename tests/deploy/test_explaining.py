import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from benchmarks.harness.explanation import Explanation, Finding
from benchmarks.harness.peaks import Peak
from compress.errors import InputError
from deploy.explaining import Side, explain, layers
from deploy.explaining_findings import remedies
from deploy.explaining_views import tables
from deploy.layer_times import LayerTime
from deploy.work import LayerWork

PEAKS = {
    dtype: Peak(
        dtype=dtype,
        device="cpu",
        threads=1,
        macs_per_s=macs_per_s,
        bytes_per_s=1e10,
        how="by hand",
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    for dtype, macs_per_s in (("float32", 1e11), ("int8", 4e11))
}

Made = tuple[LayerTime, LayerWork | None]


def conv(
    name: str, ms: float, macs: int, *, widths: tuple[int, int] = (64, 64), moved: int = 1000, **more: Any
) -> Made:
    """A convolution that 10⁸ multiply-adds keep busy for 1 ms at the peak."""
    kernel, ran = more.pop("kernel", f"{name}_nchwc"), more.pop("ran", "float32")
    work = LayerWork(name, "Conv", name, macs, moved, *widths, **more)
    return LayerTime(kernel, "Conv", ms, 1, (name,), moved, ran), work


def plain(name: str, kind: str, ms: float, moved: int = 1000, *, added: bool = False) -> Made:
    time = LayerTime(name, kind, ms, 1, () if added else (name,), moved, "float32")
    return time, None if added else LayerWork(name, kind, "", 0, moved)


def side(name: str, made: Sequence[Made], latency_ms: float | None = None) -> Side:
    work = [item for _, item in made if item is not None]
    return Side(name, layers([time for time, _ in made], work, PEAKS), latency_ms)


def explained(before: Sequence[Made], after: Sequence[Made], *latencies: float, device: str = "cpu") -> Explanation:
    sides = [
        side(name, made, latency)
        for name, made, latency in zip(("dense", "pruned"), (before, after), latencies or (None, None), strict=True)
    ]
    found = explain(*sides, device=device, batch_size=8)
    assert found.variant_ms - found.expected_ms == pytest.approx(sum(item.ms for item in found.findings))
    return found


def finding(found: Explanation, cause: str) -> Finding:
    (item,) = [item for item in found.findings if item.cause == cause]
    return item


def test_half_the_work_in_half_the_time_has_nothing_to_explain() -> None:
    found = explained([conv("a", 4, 10**8)], [conv("a", 2, 5 * 10**7)])
    assert (found.expected_ms, found.macs_ratio, found.peak_ratio) == (2, 0.5, pytest.approx(1))
    assert [item.cause for item in found.findings] == ["gain"]
    assert remedies(found.findings) == []


def test_misaligned_widths() -> None:
    found = explained(
        [conv("a", 4, 10**8), conv("b", 4, 10**8)],
        [conv("a", 3, 5 * 10**7, widths=(64, 37), kernel="a"), conv("b", 2, 5 * 10**7, widths=(64, 32))],
    )
    item = finding(found, "misaligned")
    assert (item.ms, item.layers) == (pytest.approx(1), ["a"])
    assert "1 layer has widths that are no multiples of 8 (37): 4.00 ms became 3.00 ms, expected 2.00" in item.fact
    assert "17 % of their limit, in the baseline 25 %" in item.why
    assert "1 of them left ONNX Runtime's blocked layout" in item.why
    assert remedies(found.findings) == [("Prune with prune.round_to=8.", pytest.approx(1))]


def test_on_a_gpu_int8_wants_sixteen() -> None:
    before = [conv("a", 4, 10**8, dtype="int8", ran="int8", kernel="k")]
    after = [conv("a", 4, 5 * 10**7, widths=(64, 24), dtype="int8", ran="int8", kernel="k")]
    assert "multiples of 16 (24)" in finding(explained(before, after, device="cuda"), "misaligned").fact
    assert [item.cause for item in explained(before, after).findings] == ["kernel"]


def test_widths_that_pruning_did_not_change_are_not_to_blame() -> None:
    found = explained([conv("a", 4, 10**8, widths=(3, 64))], [conv("a", 3, 5 * 10**7, widths=(3, 32))])
    item = finding(found, "kernel")
    assert item.ms == pytest.approx(1)
    assert "1.00 ms in layers that read only a few channels" in item.why


def test_memory_does_not_get_faster() -> None:
    found = explained([conv("a", 4, 10**8, moved=10**7)], [conv("a", 4, 10**7, moved=10**7)])
    item = finding(found, "memory")  # the limit is 1 ms in both, by now of memory
    assert item.ms == pytest.approx(3.6)
    assert "bytes fell to 100 % only" in item.why
    assert found.rows[0].bound == "memory"


def test_a_kernel_near_its_fixed_price() -> None:
    floor = [plain(f"reshape{i}", "Reshape", 0.004, 0) for i in range(3)]
    found = explained([conv("a", 0.02, 10**6), *floor], [conv("a", 0.009, 10**5), *floor])
    item = finding(found, "launch")
    assert item.layers == ["a"]
    assert "about 4 µs" in item.why
    assert found.rows[0].bound == "launch"


def test_a_layer_that_runs_in_another_type_than_asked_for() -> None:
    found = explained([conv("a", 4, 10**8)], [conv("a", 4, 10**8, dtype="int8", ran="float32")])
    assert found.peak_ratio == pytest.approx(4)
    item = finding(found, "type")
    assert item.ms == pytest.approx(3)
    assert "ran in float32, though the file asks for int8" in item.fact


def test_kernels_that_only_one_of_them_has() -> None:
    before = [conv("a", 4, 10**8), plain("ReorderOutput", "ReorderOutput", 0.2, added=True)]
    after = [
        conv("a", 2, 5 * 10**7, kernel="a"),
        plain("x_QuantizeLinear", "QuantizeLinear", 0.5),
        plain("y_DequantizeLinear", "DequantizeLinear", 0.25),
        plain("ReorderInput", "ReorderInput", 0.3, added=True),
        plain("add", "Add", 0.4),
    ]
    found = explained(before, after)
    assert finding(found, "quantisation").ms == pytest.approx(0.75)
    assert "2 kernels only convert types: 1 QuantizeLinear 0.50 ms" in finding(found, "quantisation").fact
    assert finding(found, "layout").ms == pytest.approx(0.3 - 0.5 * 0.2)
    assert finding(found, "unfused").ms == pytest.approx(0.4)
    assert [ms for _, ms in remedies(found.findings)] == [pytest.approx(0.75), pytest.approx(0.6)]
    assert remedies(found.findings)[1][0] == "Prune with prune.round_to=8."
    assert [layer.name for layer in found.only_variant] == [time.name for time, _ in after[1:]]
    assert [layer.name for layer in found.only_baseline] == ["ReorderOutput"]


def test_kernels_that_are_gone_count_as_won() -> None:
    found = explained([conv("a", 4, 10**8), plain("add", "Add", 1)], [conv("a", 2, 5 * 10**7)])
    assert finding(found, "gain").ms == pytest.approx(-0.5)
    assert "1 kernels of the baseline are gone (1 Add 1.0 ms)" in finding(found, "gain").fact


def test_work_that_fell_in_layers_that_take_little_time() -> None:
    before = [conv("fast", 1, 10**8), conv("slow", 9, 10**8)]
    after = [conv("fast", 0.1, 10**7), conv("slow", 9, 10**8)]
    item = finding(explained(before, after), "uneven")
    assert item.ms == pytest.approx(9.1 - 5.5)
    assert item.layers == ["slow"]
    assert "latency budget" in item.fix


def test_time_outside_of_the_layers() -> None:
    found = explained([conv("a", 4, 10**8)], [conv("a", 2, 5 * 10**7)], 5.0, 3.0)
    assert (found.baseline_ms, found.variant_ms, found.expected_ms) == (5, 3, 2.5)
    assert finding(found, "outside").ms == pytest.approx(0.5)


def test_layers_match_by_module_then_by_operator_and_order() -> None:
    before = [conv("a", 4, 10**8), plain("node_add_25", "Add", 1), plain("node_mean", "ReduceMean", 1)]
    after = [conv("a", 2, 5 * 10**7), plain("node_mean", "ReduceMean", 1), plain("node_add_7", "QLinearAdd", 1)]
    found = explained(before, after)
    assert [(row.baseline.name, row.variant.name) for row in found.rows] == [
        ("a", "a"),
        ("node_add_25", "node_add_7"),
        ("node_mean", "node_mean"),
    ]
    assert found.only_baseline == found.only_variant == []


def test_kernels_of_one_node_are_one_layer() -> None:
    work = [LayerWork("swish", "HardSwish", "", 0, 1000)]
    times = [
        LayerTime("HardSigmoid_1", "HardSigmoid", 0.1, 1, ("swish",), 800),
        LayerTime("Mul_2", "Mul", 0.2, 1, ("swish",), 900),
    ]
    (layer,) = layers(times, work, PEAKS)
    assert (layer.name, layer.kind, layer.launches, layer.bytes) == ("swish", "HardSigmoid + Mul", 2, 1700)
    assert layer.ms == pytest.approx(0.3)


def test_two_calls_of_one_module_keep_names_of_their_own() -> None:
    times = [LayerTime(name, "Conv", 1, 1, (name,)) for name in ("n1", "n2")]
    work = [LayerWork(name, "Conv", "shared", 10, 10) for name in ("n1", "n2")]
    assert [layer.name for layer in layers(times, work, PEAKS)] == ["shared", "shared (2)"]


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(InputError, match="computes b, which is not in the file"):
        layers([LayerTime("k", "Conv", 1, 1, ("b",))], [LayerWork("a", "Conv", "", 1, 1)], PEAKS)
    with pytest.raises(InputError, match="pruned has no layer times"):
        explain(side("dense", [conv("a", 1, 1)]), side("pruned", []), device="cpu", batch_size=1)


def test_the_terminal_shows_the_bill_and_loses_no_layer() -> None:
    before = [conv("layer1.conv", 4, 10**8), plain("old", "Pad", 0.5)]
    after = [conv("layer1.conv", 3, 5 * 10**7, widths=(64, 37)), plain("cast", "Cast", 0.25, added=True)]
    found = explained(before, after)
    out = io.StringIO()
    console = Console(file=out, width=110)
    for renderable in tables(found):
        console.print(renderable)
    text = " ".join(out.getvalue().split())
    for expected in (
        "pruned takes 3.25 ms, dense 4.50 ms",
        "50 % of the multiply-adds",
        "expected from the arithmetic",
        "Prune with prune.round_to=8.",
        "64×64 → 64×37",
        "layer1.conv",
        "cast",
        "the runtime",
        "old",
    ):
        assert expected in text
    assert Explanation.model_validate_json(found.model_dump_json()) == found
