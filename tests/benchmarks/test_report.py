"""The report page: self-contained, escaped, without empty plots."""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from benchmarks.harness.report import compared, headline, report_html
from benchmarks.harness.report_layers import layer_pairs
from benchmarks.harness.report_method import conditions_line, flat, notes
from benchmarks.harness.report_names import display_names
from benchmarks.harness.report_words import macs_of
from tests.benchmarks import made_results as made

VOID = {"meta", "br", "path", "use", "rect", "link"}


class Page(HTMLParser):
    """Collects ids, references and the visible text; fails on a tag that is closed in the wrong place."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.references: set[str] = set()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self.collect(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.collect(attrs)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def collect(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            if name in {"href", "xlink:href", "src"}:
                self.references.add(value)
            self.references |= set(re.findall(r"url\(([^)]*)\)", value or ""))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="session")
def page(results) -> str:
    return report_html(results)


@pytest.fixture(scope="session")
def bench_page(bench_results) -> str:
    return report_html(bench_results)


@pytest.mark.parametrize("fixture", ["page", "bench_page"])
def test_nothing_outside_the_page_is_needed(request, fixture):
    page = request.getfixturevalue(fixture)
    parsed = Page(page)
    assert "http" not in page
    assert not parsed.tags["script"]
    assert not parsed.tags["link"]
    assert "@import" not in page
    assert all(reference.startswith("#") for reference in parsed.references)


@pytest.mark.parametrize(("fixture", "figures"), [("page", 13), ("bench_page", 3)])
def test_ids_are_unique_across_figures_and_every_reference_has_its_target(request, fixture, figures):
    parsed = Page(request.getfixturevalue(fixture))
    assert max(parsed.ids.values()) == 1
    assert {reference.removeprefix("#") for reference in parsed.references} <= set(parsed.ids)
    assert parsed.tags["svg"] == figures


@pytest.mark.parametrize("fixture", ["page", "bench_page"])
def test_no_figure_is_empty_or_has_a_colour_of_its_own(request, fixture):
    for drawing in re.findall(r"<svg.*?</svg>", request.getfixturevalue(fixture), re.DOTALL):
        assert drawing.count("<text") >= 5
        assert "var(--" in drawing
        assert re.search(r'aria-label="[^"]{20,}"', drawing)
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) <= {"#ffffff"}  # what matplotlib clips with


def test_the_same_document_gives_the_same_page(results, page):
    assert report_html(results) == page


def test_the_headline_states_the_measured_facts(results):
    sentence = headline(results, compared(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == "2.01× fewer MACs, 1.57× lower latency [1.56, 1.57] at batch 1, accuracy 99.2 → 98.9 %."


def test_the_headline_tells_what_another_precision_gains_over_the_same_baseline(results):
    dense, pruned = results.variants
    measurement = pruned.measurements[0]
    speedup = measurement.speedup.model_copy(update={"value": 3.0, "low": 2.9, "high": 3.1})
    quantised = pruned.model_copy(
        update={
            "name": "pruned int8",
            "artefact": pruned.artefact.model_copy(update={"precision": "int8"}),
            "measurements": [measurement.model_copy(update={"speedup": speedup})],
        }
    )
    document = results.model_copy(update={"variants": [dense, pruned, quantised]})
    sentence = headline(document, compared(document)).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == (
        "2.01× fewer MACs, 1.57× lower latency [1.56, 1.57] at batch 1, accuracy 99.2 → 98.9 %, "
        "in int8 3.00× lower latency [2.90, 3.10] at 98.9 %."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 0.8, "low": 0.75, "high": 0.9, "verdict": "slower"}, "1.25× higher latency [1.11, 1.33] at"),
        ({"value": 1.0, "low": 0.9, "high": 1.1, "verdict": "unclear"}, "no clear change of latency, 1.00× [0.90"),
        ({"value": 1.0, "low": 0.995, "high": 1.005, "verdict": "equivalent"}, "the same latency within 1 % at batch"),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(results, change, words):
    dense, pruned = results.variants
    measurement = pruned.measurements[0]
    speedup = measurement.speedup.model_copy(update=change)
    worse = pruned.model_copy(update={"measurements": [measurement.model_copy(update={"speedup": speedup})]})
    document = results.model_copy(update={"variants": [dense, worse]})
    assert words in headline(document, compared(document)).replace("\N{NO-BREAK SPACE}", " ")


def test_the_reason_for_the_runtime_is_given_where_it_is_known(results, page):
    assert "Runtime:" not in Page(page).text
    told = results.model_copy(update={"provenance": {"runtime": "TensorRT on the GPU, because <both> are present"}})
    assert "Runtime: TensorRT on the GPU, because <both> are present." in Page(report_html(told)).text


def test_the_headline_of_a_bench_tells_of_each_file_what_it_does(bench_results):
    sentence = headline(bench_results, compared(bench_results)).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == (
        "Against dense.fp16.onnx at batch 1: pruned.fp16.plan 2.10× lower latency [2.08, 2.12]; pruned.int8.gpu.plan "
        "2.67× lower latency [2.66, 2.69]; resnet50-from-somewhere-else-with-a-long-name.onnx the same latency within "
        "1 %. my_package.models:compiled_resnet failed."
    )


def test_the_headline_of_two_files_and_of_one(bench_results):
    first, second, *_ = bench_results.variants
    two = bench_results.model_copy(update={"variants": [first, second]})
    sentence = headline(two, compared(two)).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == (
        "pruned.fp16.plan against dense.fp16.onnx: 2.10× lower latency [2.08, 2.12] at batch 1, 1.63× lower latency "
        "[1.62, 1.64] at batch 8."
    )
    one = bench_results.model_copy(update={"variants": [first]})
    assert headline(one, []).replace("\N{NO-BREAK SPACE}", " ").startswith("dense.fp16.onnx: 2.12 ms [2.10, 2.13] at")
    text = Page(report_html(one)).text
    assert "One variant was timed and no other" in text


def test_a_dead_baseline_leaves_no_ratio_and_the_page_says_so(bench_results):
    first, *others = bench_results.variants[:3]
    dead = first.model_copy(update={"measurements": [], "server": None, "failure": "Variant 'x' failed: no memory"})
    alive = [
        other.model_copy(
            update={"measurements": [m.model_copy(update={"speedup": None, "again": None}) for m in other.measurements]}
        )
        for other in others
    ]
    text = Page(report_html(bench_results.model_copy(update={"variants": [dead, *alive]}))).text
    assert "3 variants timed, none against a baseline. dense.fp16.onnx failed." in text
    assert "the baseline failed" in text
    assert "a ratio needs both" in text
    assert "how small a difference could be noise is not known" in text


def test_every_number_of_the_tables_stands_on_the_page(page):
    text = Page(page).text
    for piece in ("272.5 k", "20.28 M", "[97.2, 99.6]", "0.391", "[0.390, 0.393]", "1.94× faster", "16 → 8"):
        assert piece in text
    assert "AMD EPYC 7763" in text
    assert "CPUExecutionProvider" in text


def test_the_page_says_what_the_baseline_differs_from_itself(page):
    text = Page(page).text
    assert "The baseline differs from itself by up to 0.66 % at batch 1 and 0.71 % at batch 32; no smaller" in text
    assert "10 interleaved rounds in 3 processes of each variant, ended by the precision asked for" in text


def test_a_percentile_that_the_samples_do_not_carry_says_how_many_it_needs(page):
    text = Page(page).text
    assert re.search(r"0\.657 \[0\.6\d\d, 0\.6\d\d\]", text)  # p99 at batch 1
    assert "n/a 500 of 662 samples" in text  # at batch 32


@pytest.mark.parametrize(
    "words",
    [
        "1,226 1,422 misses the limit",  # the server's highest rate
        "dense: Of the time budget of 20 s there were 0.4 s left",
        "knee: batch 16, 2 lanes: 7,819/s at 4.09 ms",
        "1 Out of memory.",  # of the sweep
        "30 %",  # of the roofline
        "torch.mm of 1024 x 1024",
        "pruned against dense batch 1, the slowest 20 of 23 layers: 92 % of the time",
        "/layer1/layer1.2/conv1/Conv",
        "pruned takes 0.400 ms, dense 0.600 ms. With 50 % of the multiply-adds one would expect 0.300 ms.",
        "less well +0.120 ms layers as fast as expected, or faster −0.0200 ms measured 0.400 ms",
        "0.120 ms : 14 layers took longer than their work says. Their kernels use the machine less well. Give the",
        "layer1.0.conv1, layer1.1.conv1, layer2.0.conv1 and 2 more",
        "0.212 0.198 to 0.224",  # load
        "104.4 MB 61.00 MB before",
        "other processes used up to 2 % of a core, the hypervisor took up to 0.2 % and the hardware was held back in 4",
        "1 of 11 cpu: quota (1)",
    ],
)
def test_what_else_was_measured_stands_on_the_page(page, words):
    assert words in Page(page).text


@pytest.mark.parametrize(
    "words",
    [
        "A variant failed my_package.models:compiled_resnet : The process ended with signal 11 (segmentation fault) at",
        "So it has no figures; those of the others stand.",
        "1.00× equivalent",
        "TensorRT 10.16.1.11, NVIDIA H200, int8",
        "to the device, ms",  # the stages
        "1,980 1,755 to 1,980",  # clocks of the GPU
        "sw_power_cap (2)",
        "Inputs: random, standard normal; 64 samples of 602112 bytes.",
        "espalier bench times files and does not know the labels",  # from the document
        "No numbers of lanes were given; espalier bench does it with --streams 1,2,4.",  # the page's own
        "Nothing was pruned.",
    ],
)
def test_what_a_bench_measured_stands_on_the_page(bench_page, words):
    assert words in Page(bench_page).text


def test_columns_without_any_figure_are_left_out(bench_page):
    text = Page(bench_page).text
    assert "parameters" not in text
    assert "top-1 accuracy" not in text


def test_a_section_that_was_not_measured_says_why(results):
    bare = [
        variant.model_copy(
            update={
                "measurements": [],
                "accuracy": None,
                "parity": None,
                "server": None,
                "throughput": None,
                "rooflines": [],
            }
        )
        for variant in results.variants
    ]
    left = {"pruning": None, "explanations": [], "environment": {}}
    document = results.model_copy(update={"variants": bare} | left)
    parsed = Page(report_html(document))
    assert not parsed.tags["svg"]
    for reason in (
        "2 variants recorded, none timed.",
        "Accuracy against latency No variant was timed.",
        "no latency to set beside the MACs",
        "espalier bench does it with --scenario Server --limit 20",
        "espalier bench does it with --streams 1,2,4",
        "espalier bench does it with --explain",
        "Nothing was pruned.",
        "parity was not measured",
        "Not recorded in this document.",
    ):
        assert reason in parsed.text


def test_timed_without_accuracy_or_baseline_says_why(results):
    dense = results.variants[0].model_copy(update={"accuracy": None})
    text = Page(report_html(results.model_copy(update={"variants": [dense]}))).text
    assert "The accuracy of the timed files was not measured" in text
    apart = [
        variant.model_copy(
            update={"measurements": [m.model_copy(update={"speedup": None}) for m in variant.measurements]}
        )
        for variant in results.variants
    ]
    text = Page(report_html(results.model_copy(update={"variants": apart}))).text
    assert "No variant was timed against a baseline" in text


def test_names_from_outside_are_escaped(results):
    dense, pruned = results.variants
    hostile = pruned.model_copy(update={"name": '"><script>alert(1)</script>'})
    page = report_html(results.model_copy(update={"variants": [dense, hostile]}))
    assert not Page(page).tags["script"]


def test_the_environment_is_told_in_few_words():
    pairs = flat(
        {
            "cpu": {"model": "EPYC", "quota_cores": None, "caches": [{"level": 1, "size_bytes": 49152, "type": None}]},
            "memory": {"total_bytes": 25_276_510_208, "limit_bytes": None},
            "threads": {"OMP_NUM_THREADS": "1", "affinity": [0, 1]},
            "gpus": [],
            "dirty": False,
        }
    )
    assert pairs == [
        ("cpu · model", "EPYC"),
        ("cpu · caches", "level 1, size 49.15 kB"),
        ("memory · total", "25.28 GB"),
        ("threads · OMP_NUM_THREADS", "1"),
        ("threads · affinity", "0, 1"),
        ("gpus", "none"),
        ("dirty", "no"),
        ("not known", "cpu · quota cores, memory · limit"),
    ]


def test_a_machine_that_does_not_tell_is_not_called_undisturbed(results):
    seen = made.conditions()
    mute = seen.model_copy(
        update={"throttled_slots": 0, "throttle_reasons": {}, "quota_periods_throttled": None, "steal_percent": None}
    )

    def with_conditions(conditions):
        variants = [
            variant.model_copy(
                update={"measurements": [m.model_copy(update={"conditions": conditions}) for m in variant.measurements]}
            )
            for variant in results.variants
        ]
        return conditions_line(results.model_copy(update={"variants": variants}))

    assert "this machine does not tell whether it held the hardware back" in with_conditions(mute)
    assert "nothing held the hardware back" in with_conditions(mute.model_copy(update={"cpu_throttle_events": 0}))
    assert with_conditions(None) == ""


def test_a_probe_of_few_independent_queries_is_told(results):
    dense = results.variants[0]
    points = [point.model_copy(update={"effective_queries": 24.2}) for point in dense.server.points]
    short = dense.model_copy(update={"server": dense.server.model_copy(update={"points": points})})
    assert len(notes(results)["server"]) == 2
    told = notes(results.model_copy(update={"variants": [short]}))["server"]
    assert "2,400 of them tell as much as 24 independent ones. Below 662 the interval of p99 is too narrow" in told[1]


def test_macs_come_from_the_limit_where_the_document_has_none(results):
    dense = results.variants[0].model_copy(update={"macs": None})
    assert macs_of(dense) is None  # its limit leaves an operator out
    rooflines = [roofline.model_copy(update={"uncounted": []}) for roofline in dense.rooflines]
    assert macs_of(dense.model_copy(update={"rooflines": rooflines})) == rooflines[1].macs // 32


def test_hostile_names_reach_no_figure_unescaped(bench_results):
    first, second, *_ = bench_results.variants
    hostile = second.model_copy(update={"name": '"><script>$\\frac{1}{0}$</script>\n&'})
    page = report_html(bench_results.model_copy(update={"variants": [first, hostile]}))
    parsed = Page(page)
    assert not parsed.tags["script"]
    assert parsed.tags["svg"] == 3


def test_files_of_one_name_are_told_apart_by_their_folders(bench_results):
    first, second, *_ = bench_results.variants
    names = ["runs/a/model.onnx@onnxruntime", "runs/b/model.onnx"]
    document = bench_results.model_copy(
        update={
            "variants": [
                variant.model_copy(update={"name": name}) for variant, name in zip((first, second), names, strict=True)
            ]
        }
    )
    assert display_names(document) == ["a/model.onnx", "b/model.onnx"]
    same = [variant.model_copy(update={"name": "model.onnx"}) for variant in (first, second)]
    assert display_names(document.model_copy(update={"variants": same})) == [
        "model.onnx ONNX Runtime",
        "model.onnx TensorRT",
    ]


def test_figures_of_layers_pair_the_names_that_match_and_keep_the_others(results):
    before, after = (made.roofline(1, 1.0, width=16, first=first) for first in ("stem", "conv1"))
    pairs = {pair.name: pair for pair in layer_pairs(before, after)}
    assert len(pairs) == 24
    assert pairs["stem"].variant_ms is None
    assert pairs["stem"].note == "not in the variant"
    assert pairs["conv1"].baseline_ms is None
    both = pairs["/layer1/layer1.0/conv2/Conv"]
    assert both.baseline_ms is not None
    assert both.variant_ms is not None
    assert both.variant_limit_ms is not None
    twice = after.model_copy(update={"layers": [after.layers[0], after.layers[0]]})
    assert [pair.name for pair in layer_pairs(None, twice)] == ["conv1", "conv1 (2)"]
