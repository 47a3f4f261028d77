"""From a checkpoint to files in every precision: names, metadata, manifest, refusals."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from compress import checkpoint, models
from compress.data import Data
from compress.errors import InputError
from deploy import manifest
from deploy.artefacts import Samples, artefact_name, calibration_samples, export_checkpoint, targets
from deploy.onnx_file import read_metadata
from deploy.precision.exclusion import Exclusion
from deploy.precision.settings import ExportSettings, read_settings, read_targets
from deploy.runtimes import open_runtime

SHAPE = (1, 16, 16)
NAMES = {
    "net.fp32.onnx": ("fp32", "any"),
    "net.fp16.onnx": ("fp16", "any"),
    "net.bf16.onnx": ("bf16", "any"),
    "net.int8.cpu.onnx": ("int8", "cpu"),
    "net.int8.gpu.onnx": ("int8", "gpu"),
    "net.fp8.gpu.onnx": ("fp8", "gpu"),
}


def loaded(count: int = 40, shape: tuple[int, int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> Data:
    images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    loader = DataLoader(TensorDataset(images, torch.arange(count) % 4), batch_size=8)
    return Data("tiny", loader, loader, tuple("abcd"), shape)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an untrained ResNet-20 for images of 16 x 16."""
    directory = tmp_path_factory.mktemp("checkpoint") / "net"
    torch.manual_seed(0)
    kwargs = {"num_classes": 4, "in_channels": 1}
    model = models.build("espalier:resnet20", **kwargs)
    checkpoint.save(
        model,
        directory,
        factory="espalier:resnet20",
        kwargs=kwargs,
        image_shape=SHAPE,
        classes=tuple("abcd"),
        mean=[0.5],
        std=[0.25],
        resize=18,
    )
    return directory


@pytest.fixture(scope="module")
def written(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of that network."""
    folder = tmp_path_factory.mktemp("artifacts")
    settings = ExportSettings(precision=("fp32", "fp16", "bf16", "int8", "fp8"), fp32_io=True)
    entries = export_checkpoint(
        network, folder, name="net", settings=settings, samples=calibration_samples(loaded(), 16)
    )
    assert [entry.file for entry in entries] == list(NAMES)
    return folder


def test_every_file_says_what_it_is(written: Path, network: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == sorted([*NAMES, "manifest.json"])
    listed = manifest.verify(written)
    for name, (precision, target) in NAMES.items():
        entry, about = listed.entry(name), read_metadata(written / name)
        assert entry is not None
        assert (entry.precision, entry.target) == (about.precision, about.target) == (precision, target)
        assert entry.checkpoint_sha256 == about.checkpoint_sha256 == checkpoint.Architecture.read(network).sha256
        assert (about.classes, about.mean, about.std, about.resize) == (tuple("abcd"), (0.5,), (0.25,), 18)
        assert entry.quantisation == about.quantisation
        if precision in ("int8", "fp8"):
            assert about.quantisation is not None
            assert (about.quantisation.calibration, about.quantisation.samples) == ("minmax", 16)
        else:
            assert about.quantisation is None


def test_every_file_is_valid_and_takes_any_batch(written: Path) -> None:
    for name in NAMES:
        onnx.checker.check_model(str(written / name), full_check=True)
        graph = onnx.shape_inference.infer_shapes(onnx.load(written / name), strict_mode=True).graph
        assert [value.name for value in (*graph.input, *graph.output)] == ["images", "logits"]
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(
    ("name", "largest"),
    [("net.fp16.onnx", 1e-3), ("net.int8.cpu.onnx", 0.1), ("net.int8.gpu.onnx", 0.1), ("net.fp8.gpu.onnx", 0.2)],
)
def test_other_precisions_compute_nearly_the_same(name: str, largest: float, written: Path) -> None:
    images = next(iter(loaded().test))[0].numpy()
    with (
        open_runtime(written / "net.fp32.onnx") as exact,
        open_runtime(written / name, for_verification=True) as other,
    ):
        expected = exact.run({"images": images})["logits"]
        actual = other.run({"images": images})["logits"]
        described = other.description()
    assert 0 < np.abs(actual - expected).max() < largest * np.abs(expected).max()
    assert described["numbers_only"] is name.endswith(".gpu.onnx")
    assert described["graph_optimization"] == ("basic" if described["numbers_only"] else "all")


def test_samples_show_which_layers_fp16_cannot_hold(network: Path, tmp_path: Path) -> None:
    """Images of 1e4 drive the first layers far beyond the range in which fp16 is accurate."""
    samples = calibration_samples(loaded(), 8)
    loud = Samples(samples.source, samples.images * 1e4, samples.test)
    for name, given in (("plain", None), ("loud", loud)):
        export_checkpoint(
            network, tmp_path, name=name, settings=ExportSettings(precision=("fp16",), fp32_io=True), samples=given
        )
    casts = {
        name: sum(node.op_type == "Cast" for node in onnx.load(tmp_path / f"{name}.fp16.onnx").graph.node)
        for name in ("plain", "loud")
    }
    assert casts["loud"] != casts["plain"]
    images = loud.images[:4]
    with open_runtime(tmp_path / "loud.fp16.onnx") as runtime:
        assert np.isfinite(runtime.run({"images": images})["logits"]).all()


def test_fp32_is_written_only_where_it_is_asked_for(network: Path, tmp_path: Path) -> None:
    samples = calibration_samples(loaded(), 8)
    settings = ExportSettings(precision=("int8",))
    entries = export_checkpoint(network, tmp_path, name="net", settings=settings, wanted={"cpu"}, samples=samples)
    assert [entry.file for entry in entries] == ["net.int8.cpu.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "net.int8.cpu.onnx"]


def test_layers_to_exclude_are_recorded_and_stay_in_floating_point(network: Path, tmp_path: Path) -> None:
    settings = ExportSettings(precision=("int8",), exclude=("conv1",))
    (entry,) = export_checkpoint(
        network, tmp_path, name="net", settings=settings, wanted={"gpu"}, samples=calibration_samples(loaded(), 8)
    )
    assert entry.quantisation is not None
    assert entry.quantisation.excluded == ("conv1",)


def test_the_layers_that_the_search_leaves_out_are_recorded(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def found(source: Path, **options: object) -> Exclusion:
        asked.append({"source": source.name, **options})
        return Exclusion(("fc",), ("conv1", "fc"), 90.0, 89.9, {"fc": 1.0}, ((0, 80.0), (1, 89.9)))

    monkeypatch.setattr("deploy.artefacts.least_exclusion", found)
    settings = ExportSettings(precision=("int8",), exclude=("conv1",), max_drop=0.5)
    samples = calibration_samples(loaded(), 8)
    (entry,) = export_checkpoint(network, tmp_path, name="net", settings=settings, wanted={"cpu"}, samples=samples)
    (options,) = asked
    assert (options["precision"], options["target"], options["max_drop"]) == ("int8", "cpu", 0.5)
    assert (options["exclude"], options["loader"]) == (("conv1",), samples.test)
    assert entry.quantisation is not None
    assert set(entry.quantisation.excluded) == {"conv1", "fc"}


def test_a_drop_that_is_met_at_once_leaves_nothing_out(network: Path, tmp_path: Path) -> None:
    settings = ExportSettings(precision=("int8",), max_drop=100)
    samples = calibration_samples(loaded(), 8)
    (entry,) = export_checkpoint(network, tmp_path, name="net", settings=settings, wanted={"cpu"}, samples=samples)
    assert entry.quantisation is not None
    assert entry.quantisation.excluded == ()


class TestBadInput:
    def test_no_images_for_int8(self, network: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="int8 takes the ranges of its activations from images: give --calib"):
            export_checkpoint(network, tmp_path, name="net", settings=ExportSettings(precision=("int8",)))
        assert not list(tmp_path.iterdir())

    def test_images_of_another_shape(self, network: Path, tmp_path: Path) -> None:
        samples = calibration_samples(loaded(shape=(3, 16, 16)), 8)
        with pytest.raises(InputError, match=r"tiny have shape \(3, 16, 16\), but .* takes \(1, 16, 16\)"):
            export_checkpoint(
                network, tmp_path, name="net", settings=ExportSettings(precision=("int8",)), samples=samples
            )
        assert not list(tmp_path.iterdir())

    def test_images_of_a_wrong_type(self) -> None:
        with pytest.raises(InputError, match=r"tiny give torch.uint8 \(8, 1, 16, 16\), but float images"):
            calibration_samples(loaded(dtype=torch.uint8), 8)

    def test_an_empty_set(self) -> None:
        with pytest.raises(InputError, match="tiny give no batch of training images"):
            calibration_samples(loaded(count=0), 8)

    def test_nan_among_the_images(self, network: Path, tmp_path: Path) -> None:
        samples = calibration_samples(loaded(), 8)
        broken = Samples(samples.source, np.full_like(samples.images, np.nan), samples.test)
        with pytest.raises(InputError, match="NaN or infinite"):
            export_checkpoint(
                network, tmp_path, name="net", settings=ExportSettings(precision=("int8",)), samples=broken
            )
        assert not list(tmp_path.iterdir())

    def test_a_layer_that_does_not_exist(self, network: Path, tmp_path: Path) -> None:
        settings = ExportSettings(precision=("int8",), exclude=("layer9.0.conv1",))
        with pytest.raises(InputError, match=r"layer9\.0\.conv1"):
            export_checkpoint(
                network, tmp_path, name="net", settings=settings, samples=calibration_samples(loaded(), 8)
            )
        assert not list(tmp_path.glob("*.onnx"))

    def test_a_precision_that_no_target_has(self, network: Path, tmp_path: Path) -> None:
        settings = ExportSettings(precision=("fp8",))
        with pytest.raises(InputError, match="fp8 files are made for gpu alone, and --target names cpu: add gpu"):
            export_checkpoint(network, tmp_path, name="net", settings=settings, wanted={"cpu"})

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"precision": ["fp64"]}, "--precision names 'fp64', but must be of fp32, fp16, bf16, int8, fp8"),
            ({"precision": []}, "--precision names ''"),
            ({"precision": ["int8", "int8"]}, "name each once"),
            ({"calibration": "guess"}, "--method is 'guess', but must be one of minmax, entropy, percentile"),
        ],
    )
    def test_options(self, options: dict, words: str) -> None:
        with pytest.raises(InputError, match=words):
            read_settings(**{"precision": ["fp32"], "calibration": "minmax", **options})

    def test_targets(self) -> None:
        assert read_targets(["cpu", "gpu"]) == {"cpu", "gpu"}
        for names in ([], ["tpu"]):
            with pytest.raises(InputError, match="--target names"):
                read_targets(names)


def test_names_and_targets() -> None:
    assert artefact_name("pruned", "fp16", "any") == "pruned.fp16.onnx"
    assert artefact_name("pruned", "int8", "gpu") == "pruned.int8.gpu.onnx"
    assert targets("fp16", {"cpu"}) == ("any",)
    assert targets("int8", {"cpu", "gpu"}) == ("cpu", "gpu")
    assert targets("fp8", {"cpu"}) == ()


def test_calibration_images_are_those_asked_for_and_the_same_every_time() -> None:
    first, second = (calibration_samples(loaded(), 10, seed=1) for _ in range(2))
    assert first.images.shape == (10, *SHAPE)
    np.testing.assert_array_equal(first.images, second.images)
    assert calibration_samples(loaded(), 1000).images.shape == (40, *SHAPE)
