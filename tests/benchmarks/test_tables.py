"""The terminal's table."""

import io

from rich.console import Console

from benchmarks.harness import numerals
from benchmarks.harness.statistics import Estimate
from benchmarks.harness.tables import summary


def printed(results, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(summary(results))
    return text.getvalue()


def test_one_row_per_variant_and_batch_within_100_columns(results):
    text = printed(results)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    pruned = next(line for line in lines if line.lstrip().startswith("pruned"))
    for piece in ("131.9 k", "20.28 M", "98.9 %", " 1 ", "0.391 [0.390, 0.393]", "1.56×"):
        assert piece in pruned
    assert "…" not in text
    assert text.count("baseline") == 2
    assert "10 interleaved rounds" in text


def test_precisions_of_one_runtime_share_a_table_and_are_told_apart(results):
    dense, pruned = results.variants
    half = pruned.model_copy(update={"artefact": pruned.artefact.model_copy(update={"precision": "fp16"})})
    text = printed(results.model_copy(update={"variants": [dense, half]}))
    assert text.count("ONNX Runtime 1.31.1 · CPU · fp32, fp16") == 1
    assert "dense fp32" in text
    assert "pruned fp16" in text


def test_another_device_gets_a_table_of_its_own(results):
    dense, pruned = results.variants
    elsewhere = pruned.model_copy(update={"runtime": pruned.runtime.model_copy(update={"device": "cuda:0"})})
    text = printed(results.model_copy(update={"variants": [dense, elsewhere]}))
    assert text.count("ONNX Runtime 1.31.1 · ") == 2


def test_an_unclear_speedup_is_marked(results):
    variant = results.variants[1]
    measurement = variant.measurements[0]
    speedup = measurement.speedup.model_copy(update={"low": 0.9, "verdict": "unclear"})
    unclear = variant.model_copy(update={"measurements": [measurement.model_copy(update={"speedup": speedup})]})
    text = printed(results.model_copy(update={"variants": [results.variants[0], unclear]}))
    assert "[0.90, 1.58] ?" in text
    assert "no claim" in text


def test_not_timed_is_said(results):
    bare = [v.model_copy(update={"measurements": [], "accuracy": None}) for v in results.variants]
    text = printed(results.model_copy(update={"variants": bare}))
    assert text.count("not timed") == 2
    assert "n/a" in text


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
