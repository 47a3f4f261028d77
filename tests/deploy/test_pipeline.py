"""The order of the stages, what is remembered between them, and what is checked before the first."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from compress.data import Data
from compress.errors import InputError, MissingExtraError, WorkError
from deploy import measuring, pipeline, preflight, stages
from deploy.documents import report
from deploy.measuring import output_widths
from deploy.pool import read_arrays, read_pool
from deploy.recipe import Recipe
from deploy.recipe_text import read_recipe
from deploy.run_directory import RunDirectory
from deploy.runtimes import TensorSpec
from deploy.serving import Serving
from deploy.stages import Run

ON_CPU = Serving(runtime="onnxruntime", device="cpu", reason="the tests say so")
LENET = ["model.factory=espalier:lenet3"]


def recipe(*changes: str) -> Recipe:
    return read_recipe(None, [*LENET, *changes])


def tiny_data(count: int = 40, shape: tuple[int, int, int] = (3, 16, 16), classes: int = 4) -> Data:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, *shape, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(count) % classes), batch_size=8)
    return Data("tiny", loader, loader, tuple("abcdefgh"[:classes]), shape)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


class TestStages:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Stages that only note their call; `parity` fails the first time."""
        calls: list[str] = []

        def stage(name: str) -> Callable[[Run], dict[str, Any]]:
            def call(run: Run) -> dict[str, Any]:
                calls.append(name)
                if name == "parity" and calls.count("parity") == 1:
                    raise WorkError("not equal")
                if name == "report":
                    run.directory.results.write_text("{}")
                return {"from": name, "serving": ON_CPU.model_dump()}

            return call

        monkeypatch.setattr(pipeline, "STAGES", {name: stage(name) for name in pipeline.STAGES})
        return calls

    def test_a_failed_run_goes_on_where_it_failed(self, calls: list[str], directory: RunDirectory) -> None:
        with pytest.raises(WorkError):
            pipeline.advance(recipe(), directory, "report")
        assert calls == ["baseline", "prune", "finetune", "export", "engine", "parity"]
        assert directory.finished_stages() == ["baseline", "prune", "finetune", "export", "engine"]
        outcome = directory.outcome("export")
        assert outcome is not None
        assert outcome["from"] == "export"
        assert outcome["seconds"] >= 0

        calls.clear()
        calls.append("parity")  # it has failed once
        pipeline.advance(recipe(), directory, "report")
        assert calls == ["parity", "parity", "measure", "report"]
        assert not directory.work.exists()

        calls.clear()
        pipeline.advance(recipe(), directory, "report")
        assert calls == []

    def test_pruning_alone_stops_after_fine_tuning(self, calls: list[str], directory: RunDirectory) -> None:
        pipeline.prune(recipe(), directory.root)
        pipeline.prune(recipe(), directory.root)
        assert calls == ["baseline", "prune", "finetune"]

    def test_a_kill_just_before_the_end_repeats_nothing(self, calls: list[str], directory: RunDirectory) -> None:
        pipeline.prune(recipe(), directory.root)
        directory.results.write_text("{}")  # written, and then killed before .work was removed
        calls.clear()
        pipeline.advance(recipe(), directory, "report")
        assert calls == []
        assert not directory.work.exists()

    def test_data_that_changed_since_are_noticed(
        self, calls: list[str], directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipeline.prune(recipe(), directory.root)
        monkeypatch.setattr(preflight, "open_data", lambda _: tiny_data(classes=6))
        with pytest.raises(InputError, match=r"changed since .* model\.kwargs\.num_classes is 6 and was 10"):
            pipeline.advance(recipe(), directory, "report")


class TestBeforehand:
    def test_onnx_runtime_is_asked_for_before_anything_else(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
        with pytest.raises(MissingExtraError, match=r"pip install 'espalier\[cpu\]'"):
            pipeline.run(recipe(), directory.root)
        assert not directory.root.exists()

    def test_what_writes_fp16_is_asked_for_before_anything_else(
        self, directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "modelopt" else find(name))
        with pytest.raises(MissingExtraError, match=r"Writing bf16 and fp16 needs .*'espalier\[quant\]'"):
            pipeline.run(recipe("export.precision=[fp32, fp16, bf16]"), directory.root)
        assert not directory.root.exists()

    def test_layers_to_exclude_are_looked_up_before_any_training(self, directory: RunDirectory) -> None:
        chosen = recipe("export.precision=[int8]", "export.exclude=[conv9]")
        data = tiny_data(count=80, shape=(1, 32, 32))
        with pytest.raises(InputError, match="conv9"):
            preflight.check(Run(preflight.fill_in(chosen, data), data, directory, ON_CPU))

    @pytest.mark.parametrize(
        ("factory", "expected"),
        [
            ("espalier:lenet3", {"num_classes": 4, "in_channels": 3, "image_size": 16}),
            ("espalier:resnet20", {"num_classes": 4, "in_channels": 3}),
            ("torchvision:resnet18", {"num_classes": 4}),
            ("torchvision:vit_b_16", {"num_classes": 4, "image_size": 16}),
            ("timm:resnet18", {"num_classes": 4, "in_chans": 3}),
            ("compress.models:resnet56", {"num_classes": 4, "in_channels": 3}),
        ],
    )
    def test_what_the_data_say_is_filled_in(self, factory: str, expected: dict[str, int]) -> None:
        filled = preflight.fill_in(recipe(f"model.factory={factory}"), tiny_data())
        assert filled.model.kwargs == expected

    def test_what_the_user_says_stays(self) -> None:
        filled = preflight.fill_in(recipe("model.kwargs.num_classes=9"), tiny_data())
        assert filled.model.kwargs["num_classes"] == 9

    def test_published_weights_of_other_classes_are_not_trusted(self, directory: RunDirectory) -> None:
        asked = recipe("baseline=null", "model.factory=torchvision:resnet18", "model.weights=DEFAULT")
        data = tiny_data(count=64)
        filled = preflight.fill_in(asked, data)
        assert "num_classes" not in filled.model.kwargs
        with pytest.raises(InputError, match="are for 1000 classes and tiny has 4"):
            preflight.check(Run(filled, data, directory, ON_CPU))

    def test_too_few_test_images(self, directory: RunDirectory) -> None:
        data = tiny_data(count=40)
        with pytest.raises(InputError, match="has 40 images, but 64 are needed"):
            preflight.check(Run(preflight.fill_in(recipe(), data), data, directory, ON_CPU))

    def test_every_training_has_a_seed_of_its_own(self) -> None:
        drawn = [seed for number in (0, 1, 2) for seed in stages.seeds(recipe(f"seed={number}")).values()]
        assert len(set(drawn)) == len(drawn) == 9

    def test_test_images_come_in_order(self) -> None:
        data = tiny_data(count=20)
        images = stages.sample_images(data, at_least=3, at_most=11)
        assert torch.equal(images, data.test.dataset.tensors[0][:11])  # type: ignore[attr-defined]
        assert len(stages.sample_images(data, at_least=3, at_most=100)) == 20


class TestRunDirectory:
    def test_one_process_at_a_time(self, directory: RunDirectory) -> None:
        directory.recipe.parent.mkdir()
        directory.recipe.write_text("")
        with directory.locked():
            with pytest.raises(InputError, match="Another process is running in"), directory.locked():
                pass
            assert (directory.work / "lock").exists()  # still the first one's
        with directory.locked():
            pass

    def test_nothing_is_left_where_nothing_was_begun(self, directory: RunDirectory) -> None:
        with pytest.raises(WorkError), directory.locked():
            raise WorkError("no data")
        assert not directory.root.exists()

    def test_a_damaged_marker_is_named(self, directory: RunDirectory) -> None:
        directory.finish("baseline", {})
        directory.marker("baseline").write_text("{")
        with pytest.raises(InputError, match=r"baseline\.json is damaged .* delete it to repeat the stage"):
            directory.outcome("baseline")

    def test_finishing_drops_the_training_state(self, directory: RunDirectory) -> None:
        directory.work.mkdir(parents=True)
        directory.training_state("prune").write_bytes(b"state")
        directory.finish("prune", {"seconds": 1.5})
        assert directory.outcome("prune") == {"seconds": 1.5}
        assert not directory.training_state("prune").exists()

    def test_leftovers_of_kills_go_and_the_users_files_stay(self, directory: RunDirectory) -> None:
        gone = [".results.json.ab12.json", "baseline/.model.safetensors.x1.safetensors", ".work/unrefined/a", ".work/b"]
        kept = [".gitignore", "notes.txt", "baseline/model.safetensors", ".work/lock"]
        for name in gone + kept:
            (directory.root / name).parent.mkdir(parents=True, exist_ok=True)
            (directory.root / name).write_text("")
        (directory.artifacts / ".dense.fp32.onnx.scratch").mkdir(parents=True)
        directory.tidy()
        left = {os.path.relpath(path, directory.root) for path in directory.root.rglob("*") if path.is_file()}
        assert left == set(kept)
        assert list(directory.artifacts.iterdir()) == []


class TestMeasuring:
    def test_a_small_test_split_fills_the_pool_again_and_again(
        self, directory: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(measuring, "last_level_cache_bytes", lambda: 16 * 3 * 16 * 16 * 4)  # of 16 images
        run = Run(recipe("measure.batch_sizes=[1, 64]"), tiny_data(40), directory, ON_CPU)
        measuring._write_pool(run, tmp_path)
        (images,) = read_arrays(tmp_path)
        assert images.shape == (64, 3, 16, 16)  # whole batches of the largest size, twice the cache at the least
        assert (images[40:] == images[:24]).all()
        assert len(read_pool(tmp_path, [TensorSpec("x", "float32", ("batch", 3, 16, 16))], 64)) == 1

    def test_output_widths(self) -> None:
        model = stages.build_model(recipe("model.kwargs={in_channels: 1}"))
        assert output_widths(model) == {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84, "fc3": 10}


def test_a_report_needs_all_stages(directory: RunDirectory) -> None:
    directory.finish("baseline", {})
    with pytest.raises(WorkError, match="the stage prune is not finished"):
        report(Run(recipe(), tiny_data(), directory, ON_CPU))
