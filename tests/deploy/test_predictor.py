"""Predictions against pre-processing by hand and PyTorch's own softmax."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from made_runs import CLASSES, MadeRun, onnx_bytes
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

import deploy
from compress.data.image_folder import MEAN, STD, open_folder
from compress.errors import InputError, MissingExtraError, WorkError
from deploy import manifest
from deploy.engine import build_engine
from deploy.engine_settings import BatchRange
from deploy.export import export_onnx
from deploy.images import prepare, split_images
from deploy.metadata import Metadata
from deploy.predictor import Prediction, Predictor, load
from deploy.runtimes import Lane, Runtime, TensorSpec, open_runtime

NAMES = ("cat", "dog", "fox", "hen", "owl")
SIDE, RESIZED = 16, 20


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.linear = nn.Linear(4 * 7 * 7, len(NAMES))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.conv(images).relu().flatten(1))


@pytest.fixture(scope="module")
def net() -> TinyNet:
    return TinyNet().eval()


@pytest.fixture(scope="module")
def exported(net: TinyNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "tiny.fp32.onnx"
    return export_onnx(
        net, path, image_shape=(3, SIDE, SIDE), classes=NAMES, mean=MEAN, std=STD, resize=RESIZED, checkpoint_digest=""
    )


@pytest.fixture
def colours() -> np.ndarray:
    """(N, H, W, C) of the recorded size."""
    return np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE, 3), np.uint8)


def about(**fields: Any) -> Metadata:
    known: dict[str, Any] = {
        "version": "0",
        "torch_version": "0",
        "image_shape": (3, SIDE, SIDE),
        "classes": NAMES,
        "mean": MEAN,
        "std": STD,
        "checkpoint_sha256": "",
        "other": {},
    }
    return Metadata.model_validate(known | fields)


def normalised(images: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1]."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


class Echo(Runtime):
    """Gives the first pixels of each image as logits; keeps the batches."""

    outputs = (TensorSpec("logits", "float32", ("batch", 3)),)

    def __init__(self, dtype: str = "float32") -> None:
        self.inputs = (TensorSpec("images", dtype, ("batch", 1, 2, 2)),)
        self.batches: list[np.ndarray] = []

    def description(self) -> dict[str, Any]:
        return {}

    def _run(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batches.append(batch["images"])
        return {"logits": batch["images"].reshape(-1, 4)[:, :3]}

    def _lane(self, prepared: object) -> Lane:
        raise NotImplementedError


class TestAgainstPyTorch:
    def test_names_and_probabilities(self, exported: Path, net: TinyNet, colours: np.ndarray) -> None:
        with deploy.load(exported, threads=1) as predictor:
            assert isinstance(predictor, deploy.Predictor)
            found = predictor.predict(colours)
        images = torch.from_numpy(colours).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            expected = net(normalised(images)).softmax(dim=1)
        assert found.probabilities.dtype == np.float32
        assert found.probabilities.shape == (7, 5)
        np.testing.assert_allclose(found.probabilities, expected.numpy(), atol=1e-6)
        assert found.classes == tuple(NAMES[index] for index in expected.argmax(dim=1))
        best, second = found.top(2)[3]
        values, indices = expected[3].topk(2)
        assert (best[0], second[0]) == tuple(NAMES[index] for index in indices)
        assert best[1] == pytest.approx(values[0].item(), abs=1e-6)

    def test_every_way_to_give_the_same_images(self, exported: Path, colours: np.ndarray) -> None:
        tensor = torch.from_numpy(colours).permute(0, 3, 1, 2)
        with load(exported, threads=1) as predictor:
            expected = predictor.predict(colours).probabilities
            for same in (
                colours.astype(np.float32) / 255,
                colours.astype(np.float64) / 255,
                np.asfortranarray(colours),
                tensor,
                tensor.float() / 255,
                list(colours),
                tuple(tensor),
                [Image.fromarray(image) for image in colours],
                [colours[0], tensor[1], Image.fromarray(colours[2]), *(tensor[3:].float() / 255)],
            ):
                np.testing.assert_allclose(predictor.predict(same).probabilities, expected, atol=1e-6)
            for single in (colours[4], tensor[4], Image.fromarray(colours[4]), colours[4:5]):
                np.testing.assert_allclose(predictor.predict(single).probabilities, expected[4:5], atol=1e-6)

    def test_image_files_are_treated_as_in_the_test_split(self, tmp_path: Path) -> None:
        """The same bytes as from `compress.data` (1/255 apart would be 0.017), for larger and for smaller images."""
        generator = np.random.default_rng(2)
        files = []
        for split in ("train", "val"):
            for label, size in (("a", (31, 45)), ("b", (12, 9))):
                path = tmp_path / split / label / "1.png"
                path.parent.mkdir(parents=True)
                Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(path)
                files.append(path)
        _, test = open_folder(tmp_path, image_size=SIDE, augment=False)
        recorded = about(resize=round(SIDE * 256 / 224))
        for index, path in enumerate(files[2:]):
            pixels = np.array(Image.open(path))
            for image in (pixels, torch.from_numpy(pixels).permute(2, 0, 1), Image.open(path)):
                (found,) = split_images(image, 3)
                torch.testing.assert_close(prepare(found, recorded), test[index][0], rtol=0, atol=1e-6)

    def test_grey_images_for_a_network_of_colours(self, exported: Path) -> None:
        grey = np.random.default_rng(3).integers(0, 256, (4, SIDE, SIDE), np.uint8)
        with load(exported, threads=1) as predictor:
            expected = predictor.predict(np.repeat(grey[..., None], 3, axis=3)).probabilities
            for same in (grey, grey[..., None], list(grey), [Image.fromarray(image) for image in grey]):
                np.testing.assert_allclose(predictor.predict(same).probabilities, expected, atol=1e-6)
            np.testing.assert_allclose(predictor.predict(grey[0]).probabilities, expected[:1], atol=1e-6)

    def test_a_list_of_different_sizes(self, exported: Path, net: TinyNet) -> None:
        generator = np.random.default_rng(4)
        images = [generator.random((*size, 3)).astype(np.float32) for size in ((16, 16), (40, 30), (20, 64), (5, 7))]
        transform = v2.Compose([v2.Resize(RESIZED, antialias=True), v2.CenterCrop(SIDE)])
        expected = []
        for image in images:
            tensor = torch.from_numpy(image).permute(2, 0, 1)
            tensor = tensor if tensor.shape[1:] == (SIDE, SIDE) else transform(tensor)
            with torch.no_grad():
                expected.append(net(normalised(tensor[None])).softmax(dim=1))
        with load(exported, threads=1) as predictor:
            found = predictor.predict(images)
            np.testing.assert_allclose(found.probabilities, torch.cat(expected).numpy(), atol=1e-5)


class TestPreparation:
    def test_by_hand(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(onnx_bytes())
        with load(path, threads=1) as predictor:
            # The last pixel is taken from the other three; (x - 0.5) / 0.25 maps 0, 255 to -2, 2.
            found = predictor.predict(np.array([[255, 0], [0, 0]], np.uint8))
        logits = np.array([2.0 + 2.0, -2.0 + 2.0, -2.0 + 2.0])
        np.testing.assert_allclose(found.probabilities[0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-6)
        assert found.classes == (CLASSES[0],)

    def test_without_resize_the_whole_image_is_stretched(self) -> None:
        image = np.random.default_rng(5).integers(0, 256, (33, 50, 3), np.uint8)
        (found,) = split_images(image, 3)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        expected = functional.interpolate(pixels, [SIDE, SIDE], mode="bilinear", antialias=True)
        assert torch.equal(prepare(found, about()), normalised(expected)[0])

    def test_without_mean_nothing_is_normalised(self) -> None:
        image = torch.rand(3, SIDE, SIDE)
        assert torch.equal(prepare(image, about(mean=(), std=())), image)

    @pytest.mark.parametrize("resize", [None, RESIZED])
    def test_an_image_of_the_recorded_size_is_not_resized(self, resize: int | None) -> None:
        image = torch.rand(3, SIDE, SIDE)
        assert torch.equal(prepare(image, about(resize=resize)), normalised(image[None])[0])

    def test_unusual_numbers_of_channels(self) -> None:
        assert split_images(np.zeros((4, 5, 6), np.uint8), 6)[0].shape == (6, 4, 5)
        found = prepare(torch.rand(6, 40, 30), about(image_shape=(6, SIDE, SIDE), mean=(), std=(), resize=RESIZED))
        assert found.shape == (6, SIDE, SIDE)

    def test_grey_arrays_for_a_grey_network(self) -> None:
        for images, count in ((np.zeros((8, 9)), 1), (np.zeros((8, 9, 1)), 1), (np.zeros((5, 8, 9)), 5)):
            assert [tuple(image.shape) for image in split_images(images, 1)] == [(1, 8, 9)] * count


class TestBatches:
    def test_split_at_the_largest_batch(self) -> None:
        runtime = Echo()
        recorded = about(image_shape=(1, 2, 2), classes=(), mean=(), std=())
        images = np.linspace(0, 1, 7 * 4, dtype=np.float32).reshape(7, 2, 2)
        found = Predictor(Path("x.plan"), recorded, runtime, largest_batch=3).predict(images)
        assert [len(batch) for batch in runtime.batches] == [3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(runtime.batches)[:, 0], images)
        np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-6)
        assert found.names == ("0", "1", "2")
        assert found.classes == ("2",) * 7

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_inputs_of_half_precision(self, dtype: str) -> None:
        runtime = Echo(dtype)
        recorded = about(image_shape=(1, 2, 2), classes=(), mean=(), std=())
        found = Predictor(Path("x.onnx"), recorded, runtime).predict(np.ones((2, 2, 2)))
        assert runtime.batches[0].dtype == dtype
        assert found.probabilities.dtype == np.float32

    def test_a_file_of_half_precision(self, tmp_path: Path) -> None:
        images = np.random.default_rng(6).integers(0, 256, (5, 2, 2), np.uint8)
        found = {}
        for dtype in ("float", "float16"):
            path = tmp_path / f"{dtype}.onnx"
            path.write_bytes(onnx_bytes(dtype))
            with load(path, threads=1) as predictor:
                found[dtype] = predictor.predict(images).probabilities
        np.testing.assert_allclose(found["float16"], found["float"], atol=2e-3)

    def test_names_that_do_not_fit(self) -> None:
        predictor = Predictor(Path("x.onnx"), about(image_shape=(1, 2, 2), mean=(), std=()), Echo())
        with pytest.raises(WorkError, match=r"names 5 classes but gives 3 outputs"):
            predictor.predict(np.ones((2, 2)))


class TestTop:
    prediction = Prediction(("a", "b", "c"), np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], np.float32))

    def test_order(self) -> None:
        assert [[name for name, _ in best] for best in self.prediction.top(3)] == [["b", "c", "a"], ["a", "c", "b"]]
        assert self.prediction.top(1)[0] == [("b", 0.5)]
        assert self.prediction.classes == ("b", "a")

    @pytest.mark.parametrize("k", [0, 4])
    def test_as_many_as_there_are(self, k: int) -> None:
        with pytest.raises(InputError, match="give 1 to 3"):
            self.prediction.top(k)


class TestRuns:
    @pytest.fixture
    def run(self, tmp_path: Path) -> MadeRun:
        return MadeRun(tmp_path / "run")

    def test_the_best_file_for_the_device(self, run: MadeRun) -> None:
        run.time(run.add_onnx("pruned.fp32.onnx"), {1: 10.0})
        half = run.add_onnx("pruned.fp16.onnx", precision="fp16", dtype="float16")
        run.time(half, {1: 20.0})
        run.add_plan(half)
        with load(run.root, threads=1) as predictor:
            assert predictor.artefact == run.artifacts / "pruned.fp16.onnx"
            assert predictor.predict(np.zeros((2, 2), np.uint8)).names == CLASSES
        with load(run.root, threads=1, artefact="pruned.fp32.onnx") as predictor:
            assert predictor.artefact == run.artifacts / "pruned.fp32.onnx"

    def test_a_changed_file(self, run: MadeRun) -> None:
        run.add_onnx("pruned.fp32.onnx")
        with (run.artifacts / "pruned.fp32.onnx").open("ab") as file:
            file.write(b" ")
        with pytest.raises(InputError, match="cut off or replaced"):
            load(run.root)

    def test_an_engine_is_described_by_its_source_and_bounded_by_its_profile(
        self, run: MadeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"), batch=(1, 2, 3))
        opened: list[Any] = []

        def open_echo(path: Path, **options: Any) -> Runtime:
            opened.append((path, options))
            runtime = Echo()
            runtime.largest_batch = 3
            return runtime

        monkeypatch.setattr("deploy.predictor.open_runtime", open_echo)
        plan = run.artifacts / "pruned.fp16.plan"
        for path in (run.root, plan):
            predictor = load(path, device="cuda:0")
            assert predictor.artefact == plan
            assert predictor.largest_batch == 3
            assert predictor.about.classes == CLASSES
        trusted = run.root / "trusted.json"
        trusted.write_bytes((run.artifacts / manifest.FILE_NAME).read_bytes())
        (run.artifacts / manifest.FILE_NAME).unlink()
        assert load(plan, device="cuda:0", trusted_manifest=trusted).largest_batch == 3
        assert [options["trusted_manifest"] for _, options in opened] == [None, None, trusted]

    def test_an_engine_and_its_source_agree(
        self,
        tensorrt: ModuleType,
        run: MadeRun,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        onnx_file = run.artifacts / run.add_onnx("pruned.fp32.onnx").file
        build_engine(onnx_file, onnx_file.with_suffix(".plan"), batch=BatchRange(minimum=1, optimum=2, maximum=3))
        images = np.random.default_rng(7).integers(0, 256, (7, 2, 2), np.uint8)
        with load(run.root, device="cuda") as engine, load(run.root, threads=1) as source:
            assert (engine.artefact.suffix, engine.largest_batch) == (".plan", 3)
            found, expected = engine.predict(images), source.predict(images)
        assert found.classes == expected.classes
        np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)

    def test_the_runtime_decides_the_kind_of_file(self, run: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"))
        monkeypatch.setattr("deploy.predictor.open_runtime", lambda path, **_: Echo())
        found = load(run.root, device="cuda", runtime="onnxruntime:provider=cuda")
        assert found.artefact == run.artifacts / "pruned.fp16.onnx"

    def test_a_runtime_is_closed_when_its_file_is_of_no_use(
        self, run: MadeRun, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run.add_plan(run.add_onnx("pruned.fp16.onnx", precision="fp16"))
        (run.artifacts / "pruned.fp16.onnx").unlink()
        runtime = Echo()
        monkeypatch.setattr("deploy.predictor.open_runtime", lambda path, **_: runtime)
        with pytest.raises(InputError, match="does not lie unchanged"):
            load(run.root, device="cuda")
        with pytest.raises(InputError, match="closed"):
            runtime.run({})

    def test_closing(self, tmp_path: Path) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(onnx_bytes())
        with load(path, threads=1) as predictor:
            pass
        with pytest.raises(InputError, match="closed"):
            predictor.predict(np.zeros((2, 2), np.uint8))

    def test_a_file_of_another_tool(self, tmp_path: Path) -> None:
        import onnx

        model = onnx.load_from_string(onnx_bytes())
        del model.metadata_props[:]
        onnx.save(model, tmp_path / "net.onnx")
        with pytest.raises(InputError, match="lacks Espalier's description of the model"):
            load(tmp_path / "net.onnx")

    def test_neither_run_nor_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            load(tmp_path / "none.onnx")
        with pytest.raises(InputError, match="is no run directory with artefacts"):
            load(tmp_path)
        with pytest.raises(InputError, match="no artefact of it can be named"):
            load(tmp_path / "net.onnx", artefact="other.onnx")

    def test_the_library_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(onnx_bytes())
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(MissingExtraError, match=r"espalier\[cpu\]"):
            load(path)


@pytest.mark.parametrize(
    ("images", "channels", "message"),
    [
        (np.full((4, 4, 3), 255.0), 3, r"must lie in \[0, 1\], and these lie in \[255, 255\]: divide by 255"),
        (np.full((4, 4, 3), -0.5, np.float32), 3, r"must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), 3, r"must lie in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), 3, "The pixels are int64: give uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), 3, "The pixels are torch.bool"),
        (np.zeros((4, 4, 4), np.uint8), 3, r"have 4 channels and the network takes 3: .* \(N, H, W, C\) in NumPy"),
        (np.zeros((2, 3, 8, 8), np.uint8), 3, r"have 8 channels .* \(N, H, W, C\) in NumPy"),
        (torch.zeros(8, 8, 3), 3, r"have 8 channels .* \(C, H, W\) or \(N, C, H, W\) in torch"),
        (np.zeros((8, 8, 3), np.uint8), 1, "have 3 channels and the network takes 1"),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), 3, r"have shape \(1, 1, 8, 8, 3\)"),
        (np.zeros(8, np.uint8), 3, r"have shape \(8,\)"),
        ([np.zeros((2, 8, 8, 3), np.uint8)], 3, "each must be a single image"),
        ([], 3, "There is no image"),
        (np.zeros((0, 8, 8, 3), np.uint8), 3, "There is no image"),
        (np.zeros((0, 8, 3), np.uint8), 3, "An image has no pixels"),
        ("cat.png", 3, "A str is no image"),
        ([[1, 2], [3, 4]], 3, "A list is no image"),
        (Image.new("I;16", (8, 8)), 3, "has mode I;16: scale it to 8 bits"),
        (Image.new("RGB", (8, 8)), 5, "takes 5 channels"),
    ],
)
def test_bad_images(images: Any, channels: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_images(images, channels)


@pytest.mark.parametrize("make", [np.ones, torch.ones])
def test_rounding_above_one_is_no_error(make: Callable[..., Any]) -> None:
    (image,) = split_images(make((3, 3, 3)) * (1 + 1e-6), 3)
    assert image.shape == (3, 3, 3)


def test_the_runtime_is_the_projects_own(exported: Path) -> None:
    with load(exported, threads=1) as predictor, open_runtime(exported, threads=1) as runtime:
        assert predictor.runtime.inputs == runtime.inputs
