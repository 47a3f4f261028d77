"""What docs/tasks.md says is true: its recipe runs to the report on a small folder, its code prunes a detector."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

import compress
import deploy
from benchmarks.harness.results import load
from compress import checkpoint
from compress.models.factories import FACTORIES
from deploy.onnx_file import read_metadata
from tests.e2e.made_networks import boxes, detector
from tests.e2e.options import QUICKLY

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
TEXT = PAGE.read_text(encoding="utf-8")
RECIPE = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)[0]
DETECTION, TASK = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)

SMALL = """\
model: {factory: "tests.e2e.made_networks:net"}
baseline: {epochs: 4, learning_rate: 0.2}
prune: {events: 2, interval: 2}
finetune: {epochs: 1, learning_rate: 0.05}
export: {precision: [fp32, int8], samples: 8}
parity: {batch_sizes: [1, 3], samples: 8}
measure: {batch_sizes: [1], rounds: 2, processes: 1, seconds_per_round: 0, queries_per_round: 3, time_limit_s: 1, \
layers: false}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares on a dark ground, as images and masks; the upper two rows have no class."""
    root = tmp_path_factory.mktemp("parts")
    random = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((40, 48), np.uint8)
            top, left = random.integers(4, 16, 2)
            mask[top : top + 20, left : left + 24] = 1
            pixels = random.integers(0, 60, (40, 48, 3), np.uint8) + 180 * mask[:, :, None]
            Image.fromarray(pixels).save(root / split / "images" / f"{index}.jpg")
            mask[:2] = 255
            Image.fromarray(mask).save(root / split / "masks" / f"{index}.png")
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The page's recipe with a network and numbers that take seconds."""
    values = yaml.safe_load(RECIPE)
    for section, settings in yaml.safe_load(SMALL).items():
        values[section] = {**values.get(section, {}), **settings}
    values["data"] |= {"source": f"segmentation:{folder}", "batch_size": 4, "image_size": 32, "augment": False}
    return {**values, **changes}


@pytest.fixture(scope="module")
def finished(folder: Path, invoke: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("segmentation")
    (place / "segmentation.yaml").write_text(yaml.safe_dump(recipe(folder)))
    done = invoke("run", place / "segmentation.yaml", "--out", place / "run")
    assert done.exit_code == 0, done.stderr
    assert "pixel accuracy" in done.stdout
    assert "mean IoU" in done.stdout
    return place / "run"


class TestSegmentation:
    def test_the_figures_are_those_of_pixels(self, finished: Path) -> None:
        results = load(finished / "results.json")
        assert [variant.name for variant in results.variants] == ["dense", "pruned", "dense int8", "pruned int8"]
        for variant in results.variants:
            assert variant.accuracy is not None
            assert variant.accuracy.metric == "pixel accuracy"
            assert variant.accuracy.top5_percent is None
            assert variant.accuracy.top1_percent.value > 90  # the ground alone is 70 %
            assert variant.accuracy.others_percent["mean IoU"] > 75
            assert variant.accuracy.top1_percent.samples == 8
        dense, pruned = results.variants[:2]
        assert dense.macs is not None
        assert pruned.macs is not None
        assert pruned.macs <= 0.5 * dense.macs
        assert pruned.parity is not None
        assert pruned.parity["max_relative_error"] < 1e-4
        assert {"pixel_accuracy_percent", "mean_iou_percent"} <= results.training["baseline"][-1].keys()

    def test_nothing_calls_them_otherwise(self, finished: Path) -> None:
        page = (finished / "report.html").read_text()
        assert "Pixel accuracy" in page
        assert "Mean IoU" in page
        assert not re.search(r"top-1|top-?5|accuracy of images", page, flags=re.IGNORECASE)
        table = (finished / "results.csv").read_text()
        assert "pixel accuracy" in table
        assert "mean IoU=" in table
        assert (
            json.loads((finished / "pruned" / "architecture.json").read_text())["provenance"]["accuracy"]["top5"]
            is None
        )

    def test_the_file_gives_the_scores_alone(self, finished: Path) -> None:
        model = onnx.load(str(finished / "artifacts" / "pruned.fp32.onnx"))
        (output,) = model.graph.output
        sizes = [dimension.dim_param or dimension.dim_value for dimension in output.type.tensor_type.shape.dim]
        assert (output.name, sizes) == ("logits", ["batch", 2, 32, 32])
        assert not [tensor.name for tensor in model.graph.initializer if "aux" in tensor.name]

    def test_commands_say_pixel_accuracy(self, finished: Path, folder: Path, invoke: Callable[..., Any]) -> None:
        file = finished / "artifacts" / "pruned.fp32.onnx"
        done = invoke(
            "compare", finished / "pruned", file, "--data", f"segmentation:{folder}", "--samples", 8, "--trust", "tests"
        )
        assert done.exit_code == 0, done.stderr
        assert "pixel accuracy" in done.stdout
        assert "pixel accuracy" in invoke("inspect", finished / "pruned").stdout

    def test_prediction(self, finished: Path, folder: Path) -> None:
        with deploy.load(finished) as predictor:
            found = predictor.predict(Image.open(folder / "val" / "images" / "0.jpg"))
        assert found.probabilities.shape == (1, 2, 32, 32)
        mask = Image.open(folder / "val" / "masks" / "0.png").resize((32, 32), Image.Resampling.NEAREST)
        classes = np.asarray(mask)
        assert (found.indices[0] == classes)[classes != 255].mean() > 0.85
        with pytest.raises(compress.InputError, match="classifies pixels, not whole images"):
            _ = found.classes

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"prune": {"budget": {"macs": 0.5}, "importance": "taylor-logits"}}, "prune.importance is taylor-logits"),
            (
                {"task": "classification"},
                "labels have the shape 4x32x32 for 4 images but must be one class index per image",
            ),
            ({"task": "segmentatoin"}, "did you mean 'segmentation'"),
            ({"model": {"factory": "espalier:resnet20"}}, "choose a segmentation network"),
        ],
    )
    def test_what_does_not_fit_is_said_before_training(
        self, changes: dict[str, Any], message: str, folder: Path, tmp_path: Path, invoke: Callable[..., Any]
    ) -> None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, **changes)))
        done = invoke("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())


class TestDetection:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A detector that takes a second in place of ssdlite."""
        monkeypatch.setitem(FACTORIES, "torchvision", lambda _name, kwargs: detector(**kwargs))
        monkeypatch.chdir(tmp_path)

    def test_code_and_commands_of_the_page(self, invoke: Callable[..., Any]) -> None:
        torch.manual_seed(0)
        loader = DataLoader(boxes(8), batch_size=4, collate_fn=lambda pairs: tuple(map(list, zip(*pairs, strict=True))))
        names: dict[str, Any] = {"loader": loader, "print": lambda found: names.update(found=found)}
        exec(DETECTION.replace("320, 320", "64, 64").replace("parameters=0.7", "channels=0.7"), names)
        pruner, model = names["pruner"], names["model"].eval()
        assert pruner.kept <= 0.7
        assert all(name.startswith("backbone.") for name in pruner.graph.groups)
        images = [image for image, _ in boxes(2)]
        again = compress.load("pruned")
        with torch.no_grad():
            for ours, theirs in zip(model(images), again(images), strict=True):
                assert all(torch.equal(ours[key], theirs[key]) for key in ours)

        whole = invoke("export", "pruned")
        assert whole.exit_code == 2
        assert "FCOS cannot be exported to ONNX: it returns a list of what it detects" in " ".join(whole.stderr.split())
        for command in re.findall(r"^espalier (export|bench) (.*?)(?:#.*)?$", TEXT, flags=re.MULTILINE):
            done = invoke(command[0], *command[1].split(), *(QUICKLY if command[0] == "bench" else ()))
            assert done.exit_code == 0, done.stderr
        file = Path("artifacts/pruned.backbone.fp32.onnx")
        assert read_metadata(file).checkpoint_sha256 == checkpoint.Architecture.read(Path("pruned")).sha256
        assert [output.name for output in onnx.load(str(file)).graph.output] == ["backbone"]

        exec(TASK, names)
        assert (names["found"].metric, names["found"].samples) == ("boxes found", 8)
