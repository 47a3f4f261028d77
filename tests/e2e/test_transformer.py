"""A vision transformer through the whole workflow: heads and hidden channels go, attributes follow, files agree."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import compress

RECIPE = """\
name: transformer
model: {factory: "tests.e2e.made_networks:transformer"}
data: {batch_size: 8, image_size: 32, augment: false}
baseline: {epochs: 2, learning_rate: 0.05}
prune: {budget: {macs: 0.5}, events: 2, interval: 2, round_to: 4, min_channels: 4, embedding: true}
finetune: {epochs: 1, learning_rate: 0.01}
export: {precision: [fp32]}
parity: {batch_sizes: [1, 3], samples: 8}
measure: {batch_sizes: [1], rounds: 2, processes: 1, seconds_per_round: 0, queries_per_round: 3, time_limit_s: 1, \
layers: false}
"""


@pytest.fixture(scope="module")
def run(invoke: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("transformer")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            folder = place / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    recipe = yaml.safe_load(RECIPE)
    recipe["data"]["source"] = f"imagefolder:{place / 'images'}"
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = invoke("run", place / "recipe.yaml", "--out", place / "run")
    assert done.exit_code == 0, done.stderr
    return place / "run"


def test_the_pruned_network_is_smaller_and_loads_with_its_attributes(run: Path) -> None:
    dense = compress.load(run / "baseline", trust=["tests"])
    pruned = compress.load(run / "pruned", trust=["tests"])
    assert sum(p.numel() for p in pruned.parameters()) < 0.7 * sum(p.numel() for p in dense.parameters())
    assert pruned.hidden_dim == pruned.conv_proj.out_channels <= dense.hidden_dim
    results = json.loads((run / "results.json").read_text())
    variants = {variant["name"]: variant for variant in results["variants"]}
    assert variants["pruned"]["macs"] <= 0.5 * variants["dense"]["macs"]
    assert (run / "report.html").stat().st_size > 10_000


def test_its_groups_can_be_looked_at(run: Path, invoke: Callable[..., Any]) -> None:
    shown = invoke("inspect", run / "pruned", "--groups", "--trust", "tests", "--json")
    assert shown.exit_code == 0, shown.stderr
    groups = json.loads(shown.stdout)["groups"]
    assert any("self_attention" in group["name"] for group in groups)
