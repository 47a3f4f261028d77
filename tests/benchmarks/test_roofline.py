from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.peaks import Peak
from benchmarks.harness.roofline import Limit, RooflineResult, TimedLayer, Work, floor_ms, limit, peak_of, reached


def peak(dtype: str, macs_per_s: float | None) -> Peak:
    return Peak(
        dtype=dtype,
        device="cpu",
        threads=2,
        macs_per_s=macs_per_s,
        bytes_per_s=1e10,
        how="by hand",
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


PEAKS = {"float32": peak("float32", 1e11), "int8": peak("int8", 4e11)}


@pytest.mark.parametrize(
    ("work", "ms", "bound"),
    [
        (Work(10**8, 10**6), 1.0, "compute"),  # 1 ms of multiply-adds, 0.1 ms of bytes
        (Work(10**8, 10**8), 10.0, "memory"),
        (Work(10**8, 10**7), 1.0, "compute"),  # at the ridge
        (Work(0, 10**7), 1.0, "memory"),
        (Work(0, 0), 0.0, "memory"),
    ],
)
def test_the_limit_is_the_larger_of_both(work: Work, ms: float, bound: str) -> None:
    assert limit(work, PEAKS["float32"]) == Limit(pytest.approx(ms), bound)  # type: ignore[arg-type]


def test_a_faster_type_moves_the_limit_to_memory() -> None:
    work = Work(10**8, 5 * 10**6)
    assert limit(work, PEAKS["float32"]).bound == "compute"
    assert limit(work, PEAKS["int8"]) == Limit(pytest.approx(0.5), "memory")  # type: ignore[arg-type]


def test_a_fraction_above_one_is_not_clipped() -> None:
    assert reached(Limit(2.0, "memory"), 4.0) == 0.5
    assert reached(Limit(2.0, "memory"), 1.0) == 2.0
    with pytest.raises(HarnessInputError, match="0 ms reaches no fraction"):
        reached(Limit(2.0, "memory"), 0)


def test_a_type_without_a_peak_has_a_limit_only_where_nothing_is_multiplied() -> None:
    nothing = peak("float8", None)
    assert limit(Work(0, 10**7), nothing).ms == pytest.approx(1)
    with pytest.raises(HarnessInputError, match="no limit for multiply-adds in float8"):
        limit(Work(1, 0), nothing)


def test_types_that_are_only_moved_take_any_peak() -> None:
    assert peak_of("int64", PEAKS) is PEAKS["float32"]
    with pytest.raises(HarnessInputError, match="no measured peak for float16"):
        peak_of("float16", PEAKS)


NETWORK = [
    TimedLayer("conv", "Conv", Work(10**8, 10**6), "float32"),  # 1 ms, compute
    TimedLayer("quantised", "Conv", Work(10**8, 5 * 10**6), "int8"),  # 0.25 ms of arithmetic, 0.5 ms of bytes
    TimedLayer("pool", "MaxPool", Work(0, 5 * 10**6), "float32"),  # 0.5 ms, memory
]


def test_the_floor_takes_all_arithmetic_and_only_what_must_enter_and_leave() -> None:
    assert floor_ms(NETWORK, 10**6, PEAKS) == pytest.approx(1.25)
    assert floor_ms(NETWORK, 10**8, PEAKS) == pytest.approx(10)


def test_a_network_is_the_sum_of_its_layers() -> None:
    timed = [TimedLayer("conv", "FusedConv", Work(10**8, 10**6), "float32", 4.0)]
    result = RooflineResult.of(
        batch_size=8, network=NETWORK, network_bytes=10**6, measured_ms=8.0, peaks=PEAKS, timed=timed
    )
    assert result.limit_ms == pytest.approx(2)
    assert result.floor_ms == pytest.approx(1.25)
    assert result.reached == pytest.approx(0.25)
    assert result.compute_bound_share == pytest.approx(0.5)
    assert (result.macs, result.bytes) == (2 * 10**8, 11 * 10**6)
    assert [peak.dtype for peak in result.peaks] == ["float32", "int8"]
    (layer,) = result.layers
    assert (layer.kind, layer.measured_ms, layer.reached) == ("FusedConv", 4.0, pytest.approx(0.25))
    assert RooflineResult.model_validate_json(result.model_dump_json()) == result


def test_without_layer_times_the_layers_of_the_file_are_listed() -> None:
    result = RooflineResult.of(batch_size=1, network=NETWORK, network_bytes=1, measured_ms=1.0, peaks=PEAKS)
    assert [(layer.name, layer.bound, layer.reached) for layer in result.layers] == [
        ("conv", "compute", None),
        ("quantised", "memory", None),
        ("pool", "memory", None),
    ]
    assert result.reached == pytest.approx(2)


def test_the_records_refuse_what_is_no_figure() -> None:
    result = RooflineResult.of(batch_size=1, network=NETWORK, network_bytes=1, measured_ms=1.0, peaks=PEAKS)
    for wrong in ({"limit_ms": float("nan")}, {"more": 1}, {"batch_size": 0}):
        with pytest.raises(ValidationError):
            RooflineResult.model_validate(result.model_dump() | wrong)
    with pytest.raises(HarnessInputError, match="measure it"):
        RooflineResult.of(batch_size=1, network=NETWORK, network_bytes=1, measured_ms=0, peaks=PEAKS)
