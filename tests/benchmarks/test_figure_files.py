"""The report's figures as files."""

import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.figure_files import write_figures

NAMES = (
    "speedup_batch1 speedup_batch32 macs_latency accuracy_latency_batch1 accuracy_latency_batch32 latency_load "
    "throughput_dense throughput_pruned time_went_pruned_batch1 layers_pruned_batch1 layers_pruned_batch32 "
    "channel_widths event_loss event_cost"
)


def test_every_figure_of_the_page_is_written_twice_under_a_stable_name(results, tmp_path):
    written = write_figures(results, tmp_path / "new" / "figures")
    assert [path.name for path in written] == [f"{name}.{kind}" for name in NAMES.split() for kind in ("svg", "png")]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.size[0] > 1000
                assert image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
                assert len(image.convert("RGB").getcolors(1 << 20)) > 20
        else:
            text = path.read_text(encoding="utf-8")
            assert ElementTree.fromstring(text).tag.endswith("svg")
            assert "var(--" not in text
            assert "#1000" not in text  # no stand-in is left
    title = (tmp_path / "new" / "figures" / "speedup_batch1.svg").read_text(encoding="utf-8")
    assert re.search(r">Speedup: Batch 1<", title)


def test_writing_again_gives_the_same_files(bench_results, tmp_path):
    first = {path.name: path.read_bytes() for path in write_figures(bench_results, tmp_path)}
    assert {path.name: path.read_bytes() for path in write_figures(bench_results, tmp_path)} == first
    assert sorted(first) == sorted(path.name for path in tmp_path.iterdir())


def test_a_document_without_figures_writes_none(bench_results, tmp_path):
    bare = bench_results.variants[0].model_copy(update={"measurements": [], "server": None})
    assert write_figures(bench_results.model_copy(update={"variants": [bare]}), tmp_path) == []


def test_a_directory_that_cannot_be_written_is_the_users_mistake(bench_results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessInputError, match="give another directory"):
        write_figures(bench_results, tmp_path / "file")
