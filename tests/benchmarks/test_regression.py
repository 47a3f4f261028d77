"""Two results documents against each other: numbers worked out by hand, and what must hold for any two."""

import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.ratios import unpaired_ratio
from benchmarks.harness.regression import compare_results
from benchmarks.harness.regression_limits import judge, read_limits
from benchmarks.harness.regression_records import Regression
from benchmarks.harness.regression_table import summary
from tests.benchmarks.made_documents import (
    CALM,
    ENVIRONMENT,
    document,
    latency,
    server,
    throughput,
    times,
    variant,
)

round_medians = st.lists(st.floats(0.05, 50), min_size=2, max_size=7)
LIMIT = "slower:2%"


def judged(old, new, *limits):
    return judge(compare_results(old, new), read_limits(limits))


def printed(regression, width=80, *limits):
    text = io.StringIO()
    console = Console(file=text, width=width, markup=False, highlight=False)
    for part in summary(regression, judge(regression, read_limits(limits))):
        console.print(part)
    return text.getvalue()


def test_the_ratio_by_hand():
    # round medians 1 to 8 against 2: 4.5 / 2, and no resample lies beyond the extremes
    ratio = unpaired_ratio([[n, n, 99] for n in range(1, 9)], [[1, 3]] * 8, seed=0)
    assert ratio.value == 2.25
    assert 0.5 <= ratio.low < 1.5 < 3 < ratio.high <= 4
    assert ratio.samples == 8


def test_few_rounds_have_welchs_interval():
    # round medians 1, 2, 4 against 1, 1, 1: the logarithms differ by ln 2 ± t(2) ln 2 / √3, and t(2) is 4.3027
    ratio = unpaired_ratio([[1, 1], [1, 2, 3], [4]], [[1]] * 3, seed=0)
    assert (ratio.value, ratio.samples) == (2, 3)
    assert ratio.low == pytest.approx(2 * math.exp(-4.3027 * math.log(2) / math.sqrt(3)), rel=1e-4)
    assert ratio.high == pytest.approx(2 * math.exp(4.3027 * math.log(2) / math.sqrt(3)), rel=1e-4)
    exact = unpaired_ratio([[3]] * 3, [[2]] * 2, seed=0)
    assert (exact.value, exact.low, exact.high) == (1.5, pytest.approx(1.5), pytest.approx(1.5))


def test_each_side_is_drawn_on_its_own():
    # Paired by round both are 1 in every round; two runs that drift alike by chance are not known to be equal.
    drift = [[1 + 0.01 * index] for index in range(10)]
    other = [[1.0001 * (1 + 0.01 * index)] for index in range(10)]
    ratio = unpaired_ratio(drift, other, seed=0)
    assert ratio.low < 0.97
    assert ratio.high > 1.03


def test_processes_that_differ_widen_the_interval():
    rounds = [[value] for value in (1.0, 1.001, 0.999, 1.05, 1.051, 1.049, 1.1, 1.101, 1.099)]
    places = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    calm = [[1.0]] * 9
    apart = unpaired_ratio(rounds, calm, over_processes=places, seed=0)
    alike = unpaired_ratio(rounds, calm, seed=0)
    assert apart.low < alike.low
    assert apart.low == pytest.approx(1, abs=0.002)  # a resample of the first process alone
    assert apart.high == pytest.approx(1.1, abs=0.002)


def test_rounds_that_cannot_be_divided():
    with pytest.raises(HarnessInputError, match="at least 2 rounds"):
        unpaired_ratio([[1.0]], [[1.0], [1.0]], seed=0)
    with pytest.raises(HarnessInputError, match="no time"):
        unpaired_ratio([[1.0], [0.0]], [[1.0], [1.0]], seed=0)


@settings(max_examples=40, deadline=None)
@given(round_medians, round_medians)
def test_exchanging_the_documents_inverts_the_ratios(before, after):
    old = document(variant("net", latency(before), server=server(100, 102), throughput=throughput(times(900))))
    new = document(variant("net", latency(after), server=server(90, 91), throughput=throughput(times(950))))
    forth, back = compare_results(old, new), compare_results(new, old)
    ratios = {change.cell: change.ratio for change in back.cells}
    for change in forth.cells:
        there, again = change.ratio, ratios[change.cell]
        assert there.value == pytest.approx(1 / again.value, rel=1e-12)
        assert there.low == pytest.approx(1 / again.high, rel=1e-9)
        assert there.high == pytest.approx(1 / again.low, rel=1e-9)
    verdicts = {change.cell: change.verdict for change in back.cells}
    opposite = {"faster": "slower", "slower": "faster"}
    for change in forth.cells:
        if change.ratio.value not in (1 / 0.99, 0.99, 1.01, 1 / 1.01):
            equal = "equivalent" in (change.verdict, verdicts[change.cell])  # 1 % of 1 is not quite symmetric
            assert equal or opposite.get(change.verdict, "unclear") == verdicts[change.cell]


@settings(max_examples=25, deadline=None)
@given(st.lists(round_medians, min_size=1, max_size=3), st.floats(1, 5000))
def test_a_document_against_itself_is_equivalent(cells, rate):
    same = document(
        variant(
            "net",
            *(latency(medians, batch_size=index + 1) for index, medians in enumerate(cells)),
            server=server(rate, rate * 1.02),
            throughput=throughput(times(1000)),
            top1=98.0,
        )
    )
    judgement = judged(same, same, "slower:0%", "accuracy:0")
    regression = compare_results(same, same)
    assert {change.verdict for change in regression.cells} == {"equivalent"}
    assert {(change.ratio.low, change.ratio.high) for change in regression.cells} == {(1, 1)}
    assert judgement.problems() == []
    assert judgement.sentence() == "no cell is slower by more than 0 %."


def test_slower_by_ten_percent_is_a_regression():
    old = document(variant("dense", latency(CALM)), variant("pruned", latency(times(0.5)), sha="a"))
    new = document(variant("dense", latency(CALM)), variant("pruned", latency(times(0.55)), sha="b"))
    regression = compare_results(old, new)
    first, second = regression.cells
    assert (first.cell.variant, first.verdict, second.verdict) == ("pruned", "slower", "equivalent")
    assert (first.old, first.new) == (pytest.approx(0.5), pytest.approx(0.55))
    assert first.ratio.value == pytest.approx(1 / 1.1)
    assert (first.control, second.control) == (False, True)
    judgement = judge(regression, read_limits([LIMIT]))
    assert judgement.sentence() == "1 of 2 cells is slower by more than 2 %: pruned batch 1."
    (problem,) = judgement.problems()
    assert problem.startswith("pruned batch 1 is slower by 10.0 % [")
    assert judge(regression, read_limits(["slower:20%"])).problems() == []
    # Without a limit it is said, and nothing fails.
    plain = judge(regression, read_limits([]))
    assert plain.problems() == []
    assert plain.sentence() == "1 of 2 cells is slower: pruned batch 1."


def test_beyond_the_limit_by_the_estimate_alone_is_a_maybe():
    noisy = times(1.05, (0.9, 0.93, 0.96, 1, 1, 1.04, 1.07, 1.1))
    judgement = judged(document(variant("net", latency(CALM))), document(variant("net", latency(noisy))), LIMIT)
    assert judgement.slower == ()
    assert [change.verdict for change in judgement.maybe] == ["unclear"]
    assert judgement.problems() == []
    assert judgement.sentence() == "no cell is slower by more than 2 %; unclear, maybe: net batch 1."


@pytest.mark.parametrize("side", ["old", "new"])
def test_nothing_is_claimed_within_the_larger_spread_of_both(side):
    shaken = {"again": (1.0, 0.9, 1.05)}
    old = document(variant("net", latency(CALM, **(shaken if side == "old" else {}))))
    new = document(variant("net", latency(times(1.1), **(shaken if side == "new" else {}))))
    judgement = judged(old, new, LIMIT)
    (change,) = compare_results(old, new).cells
    assert change.spread == pytest.approx(1 / 0.9)
    assert change.verdict == "unclear"
    assert judgement.problems() == []
    assert len(judgement.maybe) == 1
    assert "net batch 1: the ratio is within the A/A spread of 1.111×, so no claim." in printed(
        compare_results(old, new)
    )


def test_a_cell_without_the_baseline_against_itself_says_so():
    (change,) = compare_results(
        document(variant("net", latency(CALM, again=None))), document(variant("net", latency(CALM)))
    ).cells
    assert change.note == "OLD did not measure the baseline against itself"
    assert change.spread == pytest.approx(1 / 0.998)


def test_a_control_that_moved_is_a_warning_and_says_by_how_much():
    old = document(variant("dense", latency(CALM)), variant("pruned", latency(CALM), sha="a"))
    new = document(variant("dense", latency(times(1.2))), variant("pruned", latency(times(1.2)), sha="b"))
    regression = compare_results(old, new)
    (warning,) = regression.warnings
    assert warning.startswith("dense, fp32, ONNX Runtime, cpu, batch 1, SingleStream is the same file")
    assert "slower: 0.833× [" in warning
    assert "The machine changed between the runs" in warning
    assert printed(regression).startswith("Warning: dense")


@pytest.mark.parametrize(
    "change",
    [{"sha": "f"}, {"version": "1.32.0"}, {"environment": ENVIRONMENT | {"system": {"kernel": "6.2.0"}}}],
)
def test_what_is_not_the_same_is_no_control(change):
    environment = change.pop("environment", None)
    old = document(variant("net", latency(CALM)))
    new = document(variant("net", latency(times(1.2)), **change), environment=environment)
    regression = compare_results(old, new)
    assert [cell.control for cell in regression.cells] == [False]
    assert regression.warnings == []
    assert "Control: none" in printed(regression)


def test_server_rates_are_compared_by_their_brackets():
    old = document(variant("net", latency(CALM), server=server(1000, 1020)))
    new = document(variant("net", latency(CALM), server=server(900, 910)))
    change = compare_results(old, new).cells[0]
    assert (change.cell.scenario, change.unit, change.verdict) == ("Server", "queries/s", "slower")
    assert change.ratio.value == pytest.approx(0.9)
    assert (change.ratio.low, change.ratio.high) == (pytest.approx(900 / 1020), pytest.approx(0.91))
    assert "net batch 1 Server" in judged(old, new, LIMIT).sentence()
    near = document(variant("net", latency(CALM), server=server(970, 985)))
    assert judged(old, near, LIMIT).sentence().endswith("unclear, maybe: net batch 1 Server.")


@pytest.mark.parametrize(
    ("new", "verdict", "note"),
    [
        (server(900, 910, limit_ms=5.0), "unclear", "the limit was 10 ms in OLD and is 5 ms in NEW"),
        (server(900, 910, lanes=2), "unclear", "lanes: 1 in OLD, 2 in NEW"),
        (server(None, 60, stopped_by="limit", reason="Even at 60/s."), "slower", "NEW found no rate that meets"),
        (
            server(None, 60, stopped_by="time", reason="No time."),
            "unclear",
            "NEW found no rate that meets the limit: No",
        ),
        (server(900, None, stopped_by="time"), "unclear", "NEW found no rate that misses the limit: time"),
    ],
)
def test_server_rates_that_have_no_ratio(new, verdict, note):
    old = document(variant("net", latency(CALM), server=server(1000, 1020)))
    regression = compare_results(old, document(variant("net", latency(CALM), server=new)))
    change = next(change for change in regression.cells if change.cell.scenario == "Server")
    assert (change.ratio, change.verdict) == (None, verdict)
    assert change.note.startswith(note)
    assert note in " ".join(printed(regression).split())
    lost = judge(regression, read_limits([LIMIT])).problems()
    assert len(lost) == (verdict == "slower")


def test_throughput_at_the_knee():
    old = document(variant("net", latency(CALM), throughput=throughput(times(3000))))
    new = document(variant("net", latency(CALM), throughput=throughput(times(2400), 64)))
    change = compare_results(old, new).cells[0]
    assert (change.cell.scenario, change.cell.batch_size, change.unit) == ("Throughput", None, "samples/s")
    assert (change.old, change.new, change.verdict) == (3000, 2400, "slower")
    assert change.ratio.value == pytest.approx(0.8)
    assert change.note == "the knee was at batch 32 on 2 lanes and is at batch 64 on 2 lanes"
    none = throughput(times(2400)).model_copy(update={"knee": None, "points": [], "reason": "Every point failed."})
    change = compare_results(old, document(variant("net", latency(CALM), throughput=none))).cells[0]
    assert (change.ratio, change.verdict, change.note) == (
        None,
        "unclear",
        "NEW has no throughput: Every point failed",
    )


def test_accuracy_and_size_of_a_variant():
    old = document(variant("net", latency(CALM), top1=99.2))
    new = document(variant("net", latency(CALM), top1=98.7, sha="b", macs=19_000_000, parameters=None))
    regression = compare_results(old, new)
    (change,) = regression.variants
    assert change.top1_points == pytest.approx(-0.5)
    assert change.new_top1_percent.low < 98.7 < change.new_top1_percent.high
    assert (change.macs.old, change.macs.new, change.parameters.new) == (20_284_416, 19_000_000, None)
    assert change.artefact_changed
    assert judge(regression, read_limits(["accuracy:0.5"])).problems() == []  # not more than half a point
    (problem,) = judge(regression, read_limits(["accuracy:0.4"])).problems()
    assert problem == "net lost 0.50 points of top-1, more than the 0.4 allowed."


def test_a_limit_on_accuracy_that_could_not_be_checked_is_said():
    old, new = document(variant("net", latency(CALM), top1=99.0)), document(variant("net", latency(CALM)))
    text = printed(compare_results(old, new), 110, "accuracy:0.5")
    assert "net has no accuracy in both, so the limit on accuracy was not checked." in text
    assert "top-1 only in OLD" in text


def test_failures_in_new_only_are_regressions():
    works = variant("a", latency(CALM))
    broken = variant("a", failure="It crashed.")
    assert judged(document(works), document(broken)).problems() == [
        "a failed in NEW and did not fail in OLD: It crashed."
    ]
    other = variant("b", latency(CALM))
    assert judged(document(broken, other), document(broken, other)).problems() == []
    assert judged(document(broken, other), document(works, other)).problems() == []
    assert judged(document(other), document(other, broken)).problems() != []
    text = printed(compare_results(document(broken, other), document(works, other)))
    assert "Failed in OLD: a: It crashed." in text
    assert "Only in NEW: a batch 1." in text


def test_a_point_of_the_throughput_that_fails_now():
    works = document(variant("net", latency(CALM), throughput=throughput(times(3000), 64)))
    fails = document(variant("net", latency(CALM), throughput=throughput(times(3000), 32, failed=[64, 128])))
    regression = compare_results(works, fails)
    assert [(item.what, item.regression) for item in regression.failures] == [
        ("batch 64 on 2 lanes", True),
        ("batch 128 on 2 lanes", False),  # OLD never tried it
    ]
    assert judge(regression, read_limits(["failed"])).problems() == [
        "net at batch 64 on 2 lanes failed in NEW and did not fail in OLD: out of memory."
    ]


def test_cells_of_one_document_are_listed():
    old = document(
        variant("net", latency(CALM), latency(CALM, 8), server=server(10, 11)), variant("gone", latency(CALM))
    )
    new = document(variant("net", latency(CALM), latency(CALM, 32)))
    regression = compare_results(old, new)
    assert [(cell.variant, cell.batch_size, cell.scenario) for cell in regression.only_old] == [
        ("gone", 1, "SingleStream"),
        ("net", 8, "MultiStream"),
        ("net", 1, "Server"),
    ]
    assert [cell.batch_size for cell in regression.only_new] == [32]
    assert "Only in OLD: gone batch 1, net batch 8, net batch 1 Server." in printed(regression)


def test_nothing_to_compare():
    with pytest.raises(HarnessInputError) as error:
        compare_results(document(variant("a", latency(CALM))), document(variant("b", latency(CALM, 8))))
    assert "OLD has a, fp32, ONNX Runtime, cpu, batch 1, SingleStream; NEW has b," in str(error.value)


def test_samples_that_cannot_be_compared_are_refused_with_their_cell():
    sound = variant("net", latency(CALM))
    damaged = latency(CALM).model_copy(update={"samples_ms": [[1.0], [0.0]], "processes": [0, 0]})
    with pytest.raises(HarnessInputError, match="net, fp32, ONNX Runtime, cpu, batch 1, SingleStream cannot be"):
        compare_results(document(sound), document(variant("net", damaged)))
    with pytest.raises(HarnessInputError, match="SingleStream twice"):
        compare_results(document(sound), document(variant("net", latency(CALM), latency(CALM))))


def test_another_device_is_compared_with_a_warning_first():
    old = document(variant("net", latency(CALM), device="cuda:0"))
    new = document(variant("net", latency(times(1.2)), device="cuda:1"))
    regression = compare_results(old, new)
    (change,) = regression.cells
    assert (change.cell.device, change.new_device, change.control) == ("cuda:0", "cuda:1", False)
    assert regression.warnings[0].startswith("net ran on cuda:0 in OLD and on cuda:1 in NEW")


def test_the_environment_is_listed_and_other_hardware_is_a_warning():
    changed = ENVIRONMENT | {
        "cpu": {"model": "Intel Xeon", "affinity": list(range(64)), "governor": None},
        "gpus": [{"name": "NVIDIA H200", "driver": "570.1"}],
        "libraries": {"torch": "2.15.0"},
    }
    old = document(variant("net", latency(CALM)))
    regression = compare_results(old, document(variant("net", latency(CALM)), environment=changed))
    assert [item.name for item in regression.environment] == [
        "CPU",
        "cores allowed",
        "governor",
        "onnxruntime",
        "GPU 0",
        "GPU 0 driver",
    ]
    assert [warning.partition(" was ")[0] for warning in regression.warnings] == ["CPU", "GPU 0"]
    text = " ".join(printed(regression).split())
    assert "governor performance → not recorded" in text
    assert "onnxruntime 1.31.1 → not recorded" in text
    for odd in ({}, {"cpu": 3, "gpus": {"a": 1}, "libraries": None, "threads": []}):
        compare_results(old, document(variant("net", latency(CALM)), environment=odd))


@pytest.mark.parametrize(
    ("texts", "slower", "accuracy"),
    [
        ([], None, None),
        (["failed"], None, None),
        (["slower:2%"], 0.02, None),
        (["slower:2.5 %, accuracy:0.5", "failed"], 0.025, 0.5),
        (["accuracy:0", "slower:0%"], 0, 0),
    ],
)
def test_limits(texts, slower, accuracy):
    limits = read_limits(texts)
    assert limits.slower == pytest.approx(slower)
    assert limits.accuracy == accuracy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slow:2%", "none of slower:PERCENT%"),
        ("", "none of slower:PERCENT%"),
        ("failed:1", "none of slower:PERCENT%"),
        ("slower", "without a percent sign"),
        ("slower:2", "without a percent sign"),
        ("slower:two%", "no number of at least 0"),
        ("slower:-1%", "no number of at least 0"),
        ("slower:nan%", "no number of at least 0"),
        ("slower:inf%", "no number of at least 0"),
        ("accuracy:1%", "points, as in accuracy:0.5"),
        ("slower:1%,slower:2%", "slower twice"),
    ],
)
def test_limits_that_cannot_be_read(text, words):
    with pytest.raises(HarnessInputError, match=words):
        read_limits([text])


@pytest.mark.parametrize("width", [80, 110])
def test_the_table_fits_and_the_worst_stands_first(width):
    names = ("resnet20", "resnet20-pruned-to-half-of-its-macs")
    cells = [latency(CALM), latency(times(25.123), 32)]
    old = document(*(variant(name, *cells, precision=p, top1=99.0) for name in names for p in ("fp32", "int8")))
    slow = [latency(times(1.234)), latency(times(20), 32)]
    new = document(*(variant(name, *slow, precision=p, top1=98.0) for name in names for p in ("fp32", "int8")))
    text = printed(compare_results(old, new), width, LIMIT)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert text.index("0.810× [") < text.index("1.256× [")
    sentence = " ".join(text[text.rindex("\n4 of 8") :].split())
    assert sentence.startswith("4 of 8 cells are slower by more than 2 %: resnet20 fp32 batch 1, ")


def test_the_document_survives_json():
    regression = compare_results(document(variant("net", latency(CALM))), document(variant("net", latency(times(2)))))
    assert Regression.model_validate_json(regression.model_dump_json()) == regression
    assert math.isclose(regression.cells[0].ratio.value, 0.5)
    with pytest.raises(ValueError, match="extra"):
        Regression.model_validate(regression.model_dump() | {"surprise": 1})
