"""What things are called wherever a person reads them: on the page, in figures and in the terminal."""

import re
from collections.abc import Sequence

from benchmarks.harness import numerals
from benchmarks.harness.ratios import spread_of
from benchmarks.harness.results import Results, VariantResult
from benchmarks.harness.statistics import Speedup

QUANTITY_NAMES = {"macs": "MACs"}

UNSTATED = ("", "not stated", "not known")
"""Precisions and versions that say nothing, so that nothing is shown."""


def display_names(results: Results) -> list[str]:
    """A short name for each variant, all different: without the folders and, where they differ, with the precision.

    A variant is called as its file is; a folder, or the runtime after the @, only where two would be called the same.
    """
    names = [_printable(variant.name) for variant in results.variants]
    files = [re.sub(r"(?<=.)@[^@./]+$", "", name) for name in names]
    if len(set(files)) == len(files):
        names = files
    parts = [name.split("/") for name in names]
    for length in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-length:]) for part in parts]
        if len(set(short)) == len(set(names)):
            break
    precisions = {variant.artefact.precision for variant in results.variants}
    if len(precisions) > 1:
        short = [_with_precision(name, variant) for name, variant in zip(short, results.variants, strict=True)]
    for pick in (_runtime_name, _device, _precision):
        twice = {name for name in short if short.count(name) > 1}
        short = [
            f"{name} {pick(variant)}" if name in twice else name
            for name, variant in zip(short, results.variants, strict=True)
        ]
    return short


def place_of(variant: VariantResult) -> str:
    """What executed a variant: 'ONNX Runtime 1.31.1, CPU, fp32', without what is not known."""
    runtime = variant.runtime
    version = "" if runtime.version in UNSTATED else f" {runtime.version}"
    precision = "" if variant.artefact.precision in UNSTATED else variant.artefact.precision
    return ", ".join(part for part in (f"{runtime.name}{version}", runtime.device, precision) if part)


def baseline_name(results: Results) -> str:
    """The variant that is 1.0: the one that the ratios name, else the first."""
    named = (m.speedup.baseline for variant in results.variants for m in variant.measurements if m.speedup)
    return next(named, results.variants[0].name)


def metric_of(results: Results) -> str:
    """What the accuracies are: top-1, pixel accuracy, or simply accuracy where they are not all the same."""
    metrics = {variant.accuracy.metric for variant in results.variants if variant.accuracy} or {"top-1"}
    return metrics.pop() if len(metrics) == 1 else "accuracy"


def accuracy_name(metric: str) -> str:
    """The metric as the words of a sentence: top-1 accuracy, pixel accuracy."""
    return f"{metric} accuracy" if metric == "top-1" else metric


def further_metrics(results: Results) -> list[str]:
    """Figures beside the accuracy that some variant has, such as mean IoU."""
    found = (name for variant in results.variants if variant.accuracy for name in variant.accuracy.others_percent)
    return list(dict.fromkeys(found))


def series_of(results: Results) -> dict[int, int]:
    """id of a variant -> its colour and marker; the baseline has the first."""
    baseline = baseline_name(results)
    ordered = sorted(results.variants, key=lambda variant: variant.name != baseline)
    return {id(variant): index for index, variant in enumerate(ordered)}


def names_of(results: Results) -> dict[int, str]:
    """id of a variant -> its short name."""
    return dict(zip(map(id, results.variants), display_names(results), strict=True))


def slugs_of(results: Results) -> dict[int, str]:
    """id of a variant -> its part of a file's name, all different."""
    found: dict[int, str] = {}
    for index, (name, variant) in enumerate(zip(display_names(results), results.variants, strict=True)):
        own = slug(name)
        found[id(variant)] = f"{own}_{index + 1}" if own in found.values() else own
    return found


def slug(name: str) -> str:
    """A name as part of a file's name: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "variant"


def spreads(results: Results) -> dict[int, Speedup]:
    """Batch size -> the baseline against itself, where that was measured."""
    return {m.batch_size: m.again for variant in results.variants for m in variant.measurements if m.again is not None}


def samples_named(results: Results) -> str:
    """What is counted per second: images in a run, samples of whatever a file takes elsewhere."""
    return "images" if any(variant.kind for variant in results.variants) else "samples"


def spread_percent(spread: float) -> str:
    """How far a ratio lies from 1, with two digits: 1.0123 -> '1.2 %'."""
    return f"{numerals.significant(100 * (spread - 1), 2)} %"


def spread_words(found: dict[int, Speedup]) -> str:
    """'0.4 % at batch 1 and 0.3 % at batch 32'."""
    return listed([f"{spread_percent(spread_of(again))} at batch {size}" for size, again in sorted(found.items())])


def listed(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def counted(number: int, what: str) -> str:
    """'1 round', '2 rounds', '3 processes', '4 queries'."""
    plural = f"{what}es" if what.endswith("s") else f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def between(numbers: Sequence[int]) -> str:
    """'12', or '10 to 14' where they differ."""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop, on one line; a command is written as it is typed."""
    text = _printable(text)
    begin = text[:1] if text.startswith("espalier ") else text[:1].upper()
    return f"{begin}{text[1:]}" + ("" if text.endswith((".", "!", "?")) else ".") if text else text


def reason_of(failure: str) -> str:
    """A failure's message without the name of the variant, which stands beside it."""
    return re.sub(r"^.*?'[^']*' failed while it was measured: ", "", _printable(failure))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _with_precision(name: str, variant: VariantResult) -> str:
    precision = variant.artefact.precision
    return name if precision in name or precision in UNSTATED else f"{name} {precision}"


def _runtime_name(variant: VariantResult) -> str:
    return variant.runtime.name


def _device(variant: VariantResult) -> str:
    return variant.runtime.device


def _precision(variant: VariantResult) -> str:
    return variant.artefact.precision
