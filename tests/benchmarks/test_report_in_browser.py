"""The report page in a real browser: at two widths, light and dark, both kinds of documents."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest
from PIL import Image

from benchmarks.harness.report import report_html

WIDTHS = (1280, 390)

# Frames, since headless Chromium opens no window as narrow as a phone.
PROBE = """<!doctype html><script>
  let left = WIDTHS.length;
  const found = {};
  function probe(frame, width) {
    const inner = frame.contentDocument;
    const boxes = [inner.documentElement, ...inner.querySelectorAll(".scroll, .tile, dl, figure")];
    const drawings = [...inner.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
    found[width] = {
      wider: boxes.filter(box => box.scrollWidth > box.clientWidth).map(box => box.className || box.tagName),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").length,
      drawings: drawings.length,
      small: drawings.filter(box => box.width < 250 || box.height < 60).length,
    };
    if (--left === 0) document.querySelector("pre").textContent = JSON.stringify(found);
  }
</script><pre></pre>"""


@pytest.fixture(scope="session")
def chromium() -> list[str]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
    quiet = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
    return [binary, *flags, *quiet]


@pytest.mark.parametrize(("fixture", "drawings"), [("results", 13), ("bench_results", 3)])
def test_nothing_is_too_wide_or_empty_or_loaded_from_elsewhere(request, chromium, tmp_path, fixture, drawings):
    page = escape(report_html(request.getfixturevalue(fixture)))
    frames = [
        f'<iframe style="width: {width}px; height: 900px; border: 0" onload="probe(this, {width})" srcdoc="{page}">'
        "</iframe>"
        for width in WIDTHS
    ]
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTHS", json.dumps(WIDTHS)) + "".join(frames), encoding="utf-8")
    command = [*chromium, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--dump-dom"]
    command += ["--virtual-time-budget=5000", probe.as_uri()]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(unescape(re.search(r"<pre>([^<]*)</pre>", dom)[1]))
    expected = {"wider": [], "loaded": 0, "drawings": drawings, "small": 0}
    assert found == {str(width): expected for width in WIDTHS}


@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_a_browser_shows_it_in_the_colours_asked_for(bench_results, chromium, tmp_path, scheme, bright):
    (tmp_path / "report.html").write_text(report_html(bench_results), encoding="utf-8")
    command = [*chromium, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    if scheme == "dark":
        command.append("--blink-settings=preferredColorScheme=0")
    command += ["--window-size=1280,2000", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as image:
        assert image.size == (1280, 2000)
        colours = image.convert("RGB").getcolors(1 << 22)
    assert len(colours) > 50  # text and figures, not a blank page
    _, background = max(colours)
    assert (min(background) > 200) == bright
