import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import deploy.onnx_file
from compress.errors import InputError, WorkError
from deploy.export import export_onnx
from deploy.onnx_file import read_metadata, read_onnx
from deploy.runtimes import open_runtime

SHAPE = (3, 8, 8)


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():  # running statistics far from 0 and 1, so that their folding shows
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 3.0)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = tiny()
    path = export_onnx(
        model,
        tmp_path_factory.mktemp("export") / "artifacts" / "tiny.fp32.onnx",
        image_shape=SHAPE,
        metadata={"recipe": "digits"},
        classes=("zero", "één", "two", "three"),
        mean=(0.5, 0.25, 0.125),
        std=(1.0, 2.0, 3.0),
        checkpoint_digest="ab" * 32,
    )
    return model.eval(), path


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_any_batch_gives_the_models_logits(exported: tuple[nn.Module, Path], batch: int) -> None:
    model, path = exported
    images = torch.randn(batch, *SHAPE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(images).numpy(), rtol=1e-4, atol=1e-6)


def test_file_is_valid_and_dynamic_in_the_batch_only(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    onnx.checker.check_model(str(path), full_check=True)
    graph = read_onnx(path).graph
    sizes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert sizes == [["batch", 3, 8, 8], ["batch", 4]]


def test_batch_norm_is_folded_and_no_local_path_is_left(exported: tuple[nn.Module, Path]) -> None:
    _, path = exported
    operators = {node.op_type for node in read_onnx(path).graph.node}
    assert "Conv" in operators
    assert "BatchNormalization" not in operators
    assert b".py" not in path.read_bytes()


def test_metadata_round_trip(exported: tuple[nn.Module, Path]) -> None:
    metadata = read_metadata(exported[1])
    assert metadata.classes == ("zero", "één", "two", "three")
    assert metadata.mean == (0.5, 0.25, 0.125)
    assert metadata.std == (1.0, 2.0, 3.0)
    assert metadata.image_shape == SHAPE
    assert metadata.checkpoint_sha256 == "ab" * 32
    assert metadata.torch_version == torch.__version__
    assert metadata.other["recipe"] == "digits"


def test_metadata_is_json_to_every_reader(exported: tuple[nn.Module, Path]) -> None:
    session = onnxruntime.InferenceSession(str(exported[1]), providers=["CPUExecutionProvider"])
    entries = session.get_modelmeta().custom_metadata_map
    assert json.loads(entries["espalier.classes"]) == ["zero", "één", "two", "three"]
    assert json.loads(entries["espalier.image_shape"]) == [3, 8, 8]


def test_same_weights_give_the_same_bytes_and_another_model_in_the_process_works(
    exported: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    first = export_onnx(tiny(), tmp_path / "first.onnx", image_shape=SHAPE)
    again = export_onnx(tiny(), tmp_path / "again.onnx", image_shape=SHAPE)
    other = export_onnx(tiny(seed=1), tmp_path / "other.onnx", image_shape=SHAPE)
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_modes_are_restored_and_nothing_is_printed_or_left_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny().train()
    model[1].eval()  # a frozen batch normalisation inside a model that trains
    export_onnx(model, tmp_path / "tiny.onnx", image_shape=SHAPE)
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert model.training
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


class FixedBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.view(2, 3, 64).mean(2)


class ConstantBatch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((0, 2, 3), keepdim=False).expand(2, 3)


class OddAttention(nn.Module):
    """Attention on three axes, and on five, of which the exporter knows neither."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(3, 12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(images.flatten(2).mT).chunk(3, -1)  # (N, L, 4)
        plain = functional.scaled_dot_product_attention(q, k, v)
        windows = [part.unflatten(1, (4, -1)).unflatten(-1, (2, 2)).transpose(2, 3) for part in (q, k, v)]
        inside = functional.scaled_dot_product_attention(*windows).transpose(2, 3).flatten(-2).flatten(1, 2)
        return (plain + inside).mean(1)


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_zeros_padded_before_a_maximum_stay_values(value: float, tmp_path: Path) -> None:
    """As in BiT's stem: what the pool sees is negative but for the border, where a pool pads with nothing."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ConstantPad2d(1, value), nn.MaxPool2d(3, 2), nn.Flatten())
    nn.init.constant_(model[0].bias, -100.0)
    path = export_onnx(model.eval(), tmp_path / "pool.onnx", image_shape=(3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    expected = model(images).detach().numpy()
    assert (expected == value).any()
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    graph = onnx.load(path).graph
    assert {tensor.name for tensor in graph.initializer} == {name for node in graph.node for name in node.input[1:]}


def test_attention_on_other_than_four_axes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, images = OddAttention().eval(), torch.randn(3, 3, 4, 4)
    path = export_onnx(model, tmp_path / "m.onnx", image_shape=(3, 4, 4))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(logits, model(images).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [FixedBatch(), ConstantBatch()])
def test_fixed_batch_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(WorkError, match="dynamic batch") as caught:
        export_onnx(model, tmp_path / "fixed.onnx", image_shape=SHAPE)
    assert "fixed.onnx" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Eigenvalues(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(images[:, 0]).real


class Branch(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "cause"),
    [
        (Eigenvalues(), "aten.linalg_eig"),
        (Branch(), "data-dependent"),
        (nn.Conv2d(5, 4, 3), "to have 5 channels, but got 3"),
    ],
)
def test_failed_export_gives_the_cause_in_one_line_and_keeps_the_old_file(
    model: nn.Module, cause: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")
    with pytest.raises(WorkError, match=cause) as caught:
        export_onnx(model, path, image_shape=SHAPE)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"the old file"
    assert model.training
    assert capfd.readouterr() == ("", "")


class TwoOutputs(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean((2, 3)), images


def test_two_outputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="returns 2 tensors"):
        export_onnx(TwoOutputs(), tmp_path / "two.onnx", image_shape=SHAPE)


def test_large_weights_lie_beside_the_file_and_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.onnx"
    data = tmp_path / "tiny.onnx.data"
    model = tiny().eval()
    # onnx-ir keeps tensors below 256 bytes inside the file in any case; the convolution is larger.
    monkeypatch.setattr(deploy.onnx_file, "MAX_INLINE_BYTES", 100)
    export_onnx(model, path, image_shape=SHAPE)
    assert data.stat().st_size >= 3 * 8 * 9 * 4
    images = torch.randn(3, *SHAPE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        np.testing.assert_allclose(
            session.run(None, {"images": images.numpy()})[0], model(images).numpy(), rtol=1e-4, atol=1e-6
        )
    monkeypatch.undo()
    export_onnx(model, path, image_shape=SHAPE)
    assert [item.name for item in tmp_path.iterdir()] == ["tiny.onnx"]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_cut_off_file_is_named(exported: tuple[nn.Module, Path], tmp_path: Path, kept: float) -> None:
    content = exported[1].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(InputError, match=r"cut\.onnx is not a readable ONNX file.*export it again"):
        read_metadata(path)


def test_missing_and_foreign_files_are_named(exported: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx.*No such file"):
        read_metadata(tmp_path / "absent.onnx")
    foreign = read_onnx(exported[1])
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match=r"foreign\.onnx lacks Espalier's description"):
        read_metadata(tmp_path / "foreign.onnx")


def test_reserved_metadata_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'"espalier\.mean".*reserved'):
        export_onnx(tiny(), tmp_path / "x.onnx", image_shape=SHAPE, metadata={"espalier.mean": "0"})


def test_unwritable_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="Cannot create the directory"):
        export_onnx(tiny(), tmp_path / "file" / "x.onnx", image_shape=SHAPE)


class Pyramid(nn.Module):
    """A model with a backbone whose feature maps come as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Maps()


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(SHAPE[0], 4, 3)
        self.second = nn.Conv2d(4, 5, 3)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        fine = self.first(images)
        return {"fine": fine, "coarse": [self.second(fine)]}


def test_a_part_is_exported_with_all_that_it_returns(tmp_path: Path) -> None:
    model = Pyramid()
    path = export_onnx(model, tmp_path / "part.onnx", image_shape=SHAPE, part="backbone")
    images = torch.randn(3, *SHAPE)
    with torch.no_grad(), open_runtime(path) as runtime:
        assert [spec.name for spec in runtime.outputs] == ["backbone.fine", "backbone.coarse.0"]
        found = runtime.run({"images": images.numpy()})
        expected = model.backbone(images)
    assert torch.allclose(torch.from_numpy(found["backbone.fine"]), expected["fine"], atol=1e-5)
    assert torch.allclose(torch.from_numpy(found["backbone.coarse.0"]), expected["coarse"][0], atol=1e-5)


def test_there_is_no_such_part(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Pyramid has no part 'backbon': did you mean 'backbone'\?"):
        export_onnx(Pyramid(), tmp_path / "part.onnx", image_shape=SHAPE, part="backbon")


def test_of_a_dictionary_the_scores_are_exported_alone(tmp_path: Path) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(SHAPE[0], 7, 1)
            self.head = nn.Conv2d(SHAPE[0], 2, 1)

        def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"aux": self.aux(images), "out": self.head(images)}

    model = Heads()
    path = export_onnx(model, tmp_path / "heads.onnx", image_shape=SHAPE)
    images = torch.randn(2, *SHAPE)
    with torch.no_grad(), open_runtime(path) as runtime:
        found = runtime.run({"images": images.numpy()})
        assert list(found) == ["logits"]
        assert torch.allclose(torch.from_numpy(found["logits"]), model(images)["out"], atol=1e-5)
    assert not [tensor.name for tensor in onnx.load(str(path)).graph.initializer if "aux" in tensor.name]
