"""The report page: self-contained, escaped, without empty plots; and that a browser opens it."""

import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser

import pytest
from PIL import Image

from benchmarks.harness.report import compared, headline, report_html

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


def test_nothing_outside_the_page_is_needed(page):
    parsed = Page(page)
    assert "http" not in page
    assert not parsed.tags["script"]
    assert not parsed.tags["link"]
    assert not parsed.tags["img"]
    assert "@import" not in page
    assert all(reference.startswith("#") for reference in parsed.references)


def test_ids_are_unique_across_figures_and_every_reference_has_its_target(page):
    parsed = Page(page)
    assert max(parsed.ids.values()) == 1
    assert {reference.removeprefix("#") for reference in parsed.references} <= set(parsed.ids)
    assert parsed.tags["svg"] == 5  # two trade-offs, one of ratios, loss and cost


def test_the_same_document_gives_the_same_page(results, page):
    assert report_html(results) == page


def test_the_headline_states_the_measured_facts(results):
    sentence = headline(results, compared(results)).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence == "2.01× fewer MACs, 1.56× lower latency [1.55, 1.58] at batch 1, accuracy 99.2 → 98.9 %."


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
        "2.01× fewer MACs, 1.56× lower latency [1.55, 1.58] at batch 1, accuracy 99.2 → 98.9 %, "
        "in int8 3.00× lower latency [2.90, 3.10] at 98.9 %."
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 0.8, "low": 0.75, "high": 0.9, "verdict": "slower"}, "1.25× higher latency [1.11, 1.33] at"),
        ({"value": 1.0, "low": 0.9, "high": 1.1, "verdict": "unclear"}, "no clear change of latency, 1.00× [0.90"),
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


def test_every_number_of_the_table_stands_on_the_page(page):
    text = Page(page).text
    for piece in ("272.5 k", "20.28 M", "[97.2, 99.6]", "0.391", "[0.390, 0.393]", "1.94× faster", "16 → 8"):
        assert piece in text
    assert "AMD EPYC 7763" in text
    assert "CPUExecutionProvider" in text


def test_a_section_that_was_not_measured_says_why(results):
    bare = [
        variant.model_copy(update={"measurements": [], "accuracy": None, "parity": None})
        for variant in results.variants
    ]
    document = results.model_copy(update={"variants": bare, "pruning": None, "environment": {}})
    parsed = Page(report_html(document))
    assert not parsed.tags["svg"]
    for reason in (
        "2 variants recorded, none timed.",
        "Not shown: no variant was timed.",
        "no latency to set beside the MACs",
        "this run pruned nothing",
        "parity was not measured",
        "Not recorded in this document.",
    ):
        assert reason in parsed.text


def test_timed_without_accuracy_or_baseline_says_why(results):
    dense = results.variants[0].model_copy(update={"accuracy": None})
    text = Page(report_html(results.model_copy(update={"variants": [dense]}))).text
    assert "the accuracy of the timed files was not measured" in text
    assert "no variant was timed against a baseline" in text


def test_names_from_outside_are_escaped(results):
    dense, pruned = results.variants
    hostile = pruned.model_copy(update={"name": '"><script>alert(1)</script>'})
    page = report_html(results.model_copy(update={"variants": [dense, hostile]}))
    assert not Page(page).tags["script"]


@pytest.fixture(scope="session")
def chromium() -> list[str]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
    return [binary, *flags, *quiet]


def test_a_browser_shows_it(page, chromium, tmp_path):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    command = [*chromium, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    command += ["--window-size=1280,2000", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1280, 2000)
        assert len(image.convert("RGB").getcolors(1 << 22)) > 50  # text and figures, not a blank page


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, chromium, tmp_path, width):
    """Measured in a frame: headless Chromium opens no window as narrow as a phone."""
    probe = """<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" srcdoc="PAGE"></iframe><p></p>
    <script>frame.onload = () => {
      const inner = frame.contentDocument;
      const boxes = [inner.documentElement, ...inner.querySelectorAll(".results")];
      document.querySelector("p").textContent = boxes.map(box => box.scrollWidth - box.clientWidth).join(" ");
    }</script>"""
    probe = probe.replace("WIDTH", str(width)).replace("PAGE", escape(page))
    (tmp_path / "probe.html").write_text(f"<!doctype html>{probe}", encoding="utf-8")
    command = [*chromium, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    command += ["--virtual-time-budget=5000", (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert re.search(r"<p>([^<]*)</p>", dom.rpartition("</iframe>")[2])[1] == "0 0"
