"""The terminal's table."""

import io
import re

import pytest
from rich.console import Console

from benchmarks.harness import numerals
from benchmarks.harness.statistics import Estimate
from benchmarks.harness.tables import short_reason, summary


def printed(results, width: int = 110) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(summary(results))
    return text.getvalue()


def test_one_row_per_variant_and_batch_within_110_columns(results):
    text = printed(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].strip() == "ONNX Runtime 1.31.1 · CPU · fp32"
    pruned = next(line for line in lines if line.startswith("pruned"))
    for piece in ("131.9 k", "20.28 M", "98.9 %", " 1 ", "0.391 [0.390, 0.393]", "1.57× [1.56, 1.57]"):
        assert piece in pruned
    assert "…" not in text
    assert text.count("baseline ") + text.count("baseline\n") == 3  # two rows and the caption
    assert "10 interleaved rounds in 3 processes of each variant" in text


def test_the_caption_says_what_ended_it_and_what_no_claim_is_smaller_than(results):
    text = " ".join(printed(results).split())
    assert "ended by the precision asked for." in text
    assert "The baseline differs from itself by up to 0.66 % at batch 1 and 0.71 % at batch 32; no smaller" in text


@pytest.mark.parametrize("fixture", ["results", "bench_results"])
@pytest.mark.parametrize("width", [80, 100, 110])
def test_no_terminal_cuts_a_figure_off(request, fixture, width):
    document = request.getfixturevalue(fixture)
    text = printed(document, width)
    assert max(map(len, text.splitlines())) <= width
    for variant in document.variants:
        for measurement in variant.measurements:
            middle = measurement.latency.median_ms
            assert re.search(rf" {re.escape(numerals.value(middle))}[ \n]", text)
            assert numerals.interval(middle) in text
            if measurement.speedup:
                assert numerals.ratio_interval(measurement.speedup) in text
    assert "612.0 MB" in text or fixture == "results"  # the last column of the widest table


def test_a_narrow_terminal_goes_without_columns_before_it_cuts_one(results):
    dense, pruned = results.variants
    names = {"dense at full precision": dense, "pruned at full precision": pruned}
    wordy = [variant.model_copy(update={"name": name}) for name, variant in names.items()]
    text = printed(results.model_copy(update={"variants": wordy}), 80)
    header = text.splitlines()[1]
    assert "p99" not in header
    assert "params" not in header
    assert header.rstrip().endswith("speedup")
    assert "[1.93, 1.95]" in text


def test_precisions_are_told_apart(results):
    dense, pruned = results.variants
    half = pruned.model_copy(update={"artefact": pruned.artefact.model_copy(update={"precision": "fp16"})})
    text = printed(results.model_copy(update={"variants": [dense, half]}))
    assert text.count("ONNX Runtime 1.31.1 · CPU · fp32, fp16") == 1
    assert "dense fp32" in text
    assert "pruned fp16" in text


def test_runtimes_that_differ_stand_below_the_names(bench_results):
    lines = printed(bench_results).splitlines()
    assert lines[0].strip() == "NVIDIA H200"
    first = [line.split("  ")[0] for line in lines]
    below = {name: first[index + 1] for index, name in reversed(list(enumerate(first[:-1])))}
    assert below["dense.fp16.onnx"] == "ONNX Runtime 1.31.1, fp16"
    assert below["pruned.int8.gpu.plan"] == "TensorRT 10.16.1.11, int8"


def test_columns_that_no_variant_has_are_left_out(bench_results):
    text = printed(bench_results)
    header = text.splitlines()[1]
    assert header.split() == ["variant", "batch", "latency", "ms", "samples/s", "speedup"]
    assert "No p99: it needs 662 samples" in text


def test_a_variant_that_failed_has_a_row_and_its_reason(bench_results):
    text = printed(bench_results)
    row = next(line for line in text.splitlines() if line.startswith("my_package.models:compiled_resnet"))
    assert "failed: the process" in row
    assert "my_package.models:compiled_resnet failed: The process ended with signal 11 (segmentation fault)" in text


@pytest.mark.parametrize(
    ("failure", "short"),
    [
        ("Variant 'a' failed while it was measured: CUDA out of memory. Tried to allocate", "CUDA out of memory"),
        ("No kernel image for this GPU; build it again.", "No kernel image for this GPU"),
        ("word " * 40, "word word word word word word word word word word word …"),
    ],
)
def test_a_short_reason(failure, short):
    assert short_reason(failure) == short


def test_verdicts_are_marked(results, bench_results):
    assert "1.00× [0.99, 1.00] =" in printed(bench_results)
    assert "= the same within 1 %" in printed(bench_results)
    variant = results.variants[1]
    measurement = variant.measurements[0]
    speedup = measurement.speedup.model_copy(update={"low": 0.9, "verdict": "unclear"})
    unclear = variant.model_copy(update={"measurements": [measurement.model_copy(update={"speedup": speedup})]})
    text = printed(results.model_copy(update={"variants": [results.variants[0], unclear]}))
    assert "[0.90, 1.57] ?" in text
    assert "no claim" in text


def test_what_else_was_measured_follows(results, bench_results):
    text = printed(results)
    for words in (
        "Server\n",
        "dense           5      1,226     4.8  75.0 %  time budget over",
        "Throughput\n",
        "7,819 (batch 16, lanes: 2)      4.09",
        "From start to hot\n",
        "dense        1   0.212      2.48   0.612      0.802   104.4 MB",
        "Share of the machine's limit\n",
        "dense        1     0.183        0.612     30 %   compute",
    ):
        assert words in re.sub(r" +\n", "\n", text)
    text = printed(bench_results)
    assert "Throughput" not in text
    assert "machine's limit" not in text


def test_not_timed_is_said(results):
    bare = [
        v.model_copy(update={"measurements": [], "accuracy": None, "server": None, "throughput": None, "rooflines": []})
        for v in results.variants
    ]
    text = printed(results.model_copy(update={"variants": bare}))
    assert text.count("not timed") == 2
    assert "interleaved" not in text


def test_figures_carry_as_many_digits_as_their_interval_supports():
    def estimate(value, low, high):
        return Estimate(value=value, low=low, high=high, samples=9)

    assert numerals.value(estimate(0.51234, 0.508, 0.517)) == "0.512"
    assert numerals.interval(estimate(14.8571, 14.806, 14.913)) == "[14.81, 14.91]"
    assert numerals.value(estimate(1633.2, 1600, 1650)) == "1,633"
    assert numerals.value(estimate(2.0, 2.0, 2.0)) == "2.00"
    assert numerals.compact(272_474) == "272.5 k"
    assert numerals.compact(4_089_284_608) == "4.089 G"
    assert numerals.compact(999) == "999"
    assert numerals.size(999) == "999 B"
    assert numerals.size(1_110_896) == "1.111 MB"
