"""Checkpoints: what is written, that it comes back bit for bit, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from compress import checkpoint, models
from compress.budget import Budget
from compress.errors import InputError
from compress.pruner import Pruner
from compress.removal import kept_slices

IMAGES = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)


def pruned_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = models.build("espalier:resnet20", in_channels=1, num_classes=10)
    pruner = Pruner(model, IMAGES, budget=Budget(macs=0.5), events=2, interval=1)
    for _ in range(2):
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([1, 2])).backward()
        pruner.step()
    return model


def write(model: nn.Module, directory: Path) -> None:
    checkpoint.save(
        model,
        directory,
        factory="espalier:resnet20",
        kwargs={"in_channels": 1, "num_classes": 10},
        image_shape=(1, 32, 32),
        classes=[str(digit) for digit in range(10)],
        mean=(0.3,),
        std=(0.4,),
    )


def test_fresh_process_gives_bit_identical_outputs(tmp_path: Path) -> None:
    model = pruned_resnet().eval()
    write(model, tmp_path / "pruned")
    torch.save(IMAGES, tmp_path / "images.pt")
    script = (
        "import sys, torch; from compress import checkpoint; model = checkpoint.load(sys.argv[1]);"
        "images = torch.load(sys.argv[2], weights_only=True);"
        "torch.save(model(images).detach(), sys.argv[3])"
    )
    arguments = [str(tmp_path / name) for name in ("pruned", "images.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True)
    with torch.no_grad():
        expected = model(IMAGES)
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), expected)


def test_architecture_lists_one_set_of_indices_for_a_residual_stream(tmp_path: Path) -> None:
    model = pruned_resnet()
    write(model, tmp_path)
    entries = checkpoint.Architecture.read(tmp_path).kept
    kept = kept_slices(model)
    assert sum(len(entry.slices) for entry in entries) == len(kept)
    for entry in entries:
        for text in entry.slices:
            tensor, dim = text.rsplit(":", 1)
            assert tuple(kept[tensor, int(dim)].tolist()) == entry.indices
    lists = {text: entry.indices for entry in entries for text in entry.slices}
    stream = [text for text in lists if text.startswith("stage3") and text.endswith("conv2.weight:0")]
    assert len(stream) == 3
    assert len({lists[text] for text in stream}) == 1


def test_a_loaded_network_is_pruned_further_and_saved_again(tmp_path: Path) -> None:
    write(pruned_resnet(), tmp_path / "one")
    model = checkpoint.load(tmp_path / "one")
    before = kept_slices(model)["conv1.weight", 0] if ("conv1.weight", 0) in kept_slices(model) else torch.arange(16)
    pruner = Pruner(model, IMAGES, budget=Budget(parameters=0.6), events=1, interval=1)
    nn.functional.cross_entropy(model.train()(IMAGES), torch.tensor([1, 2])).backward()
    pruner.step()
    write(model.eval(), tmp_path / "two")
    again = checkpoint.load(tmp_path / "two")
    with torch.no_grad():
        assert torch.equal(again(IMAGES), model(IMAGES))
    after = kept_slices(again).get(("conv1.weight", 0), torch.arange(16))
    assert set(after.tolist()) <= set(before.tolist())


def test_dense_model_has_an_empty_list(tmp_path: Path) -> None:
    write(models.build("espalier:resnet20", in_channels=1, num_classes=10), tmp_path)
    assert checkpoint.Architecture.read(tmp_path).kept == ()


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.ARCHITECTURE])
def test_a_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    write(pruned_resnet(), tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if name == checkpoint.ARCHITECTURE:
        position = data.index(b"0.3")
        data[position + 2] = ord("5")
    else:
        data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{name}.*changed after it was written"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "extra"),
        ({"format": "espalier-checkpoint/9"}, "format"),
        ({"kept": [{"of": 4, "indices": [2, 1], "slices": ["conv1.weight:0"]}]}, "ascending"),
        ({"image_shape": [1, 2]}, "image_shape"),
    ],
)
def test_a_forged_architecture_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    write(pruned_resnet(), tmp_path)
    path = tmp_path / checkpoint.ARCHITECTURE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path)


def test_indices_that_do_not_fit_the_factory_are_refused(tmp_path: Path) -> None:
    write(pruned_resnet(), tmp_path)
    path = tmp_path / checkpoint.ARCHITECTURE
    forged = checkpoint.Architecture.read(tmp_path).model_copy(
        update={"kept": (checkpoint.Kept(of=4, indices=(0,), slices=("conv1.weight:0",)),)}
    )
    path.write_text(forged.model_copy(update={"sha256": forged.own_digest()}).model_dump_json())
    with pytest.raises(InputError, match=r"conv1\.weight:0 of size 4"):
        checkpoint.load(tmp_path)


class Sized(nn.Module):
    """Takes a width from an attribute, and ties two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 8, (8, 4)
        self.a, self.b, self.c = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.c.weight = self.b.weight
        self.same, self.head = self.b, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(self.b(self.a(x).reshape(-1, self.width, 1024, 1)))
        return self.head(self.same(x).reshape(-1, self.sizes[0], 1024).mean(2))


def pruned_sized() -> nn.Module:
    torch.manual_seed(0)
    model = Sized()
    pruner = Pruner(model, IMAGES, budget=Budget(channels=0.5), events=2, interval=1, round_to=1)
    for _ in range(2):
        nn.functional.cross_entropy(model(IMAGES), torch.tensor([1, 2])).backward()
        pruner.step()
    return model.eval()


def save_sized(model: nn.Module, directory: Path) -> None:
    checkpoint.save(model, directory, factory=f"{__name__}:Sized", image_shape=(1, 32, 32))


def test_attributes_and_tied_tensors_come_back(tmp_path: Path) -> None:
    model = pruned_sized()
    save_sized(model, tmp_path / "one")
    architecture = checkpoint.Architecture.read(tmp_path / "one")
    assert architecture.attributes == {"width": 4, "sizes[0]": 4}
    slices = [text for entry in architecture.kept for text in entry.slices]
    assert sorted(text for text in slices if "weight:0" in text) == ["a.weight:0", "b.weight:0"]
    loaded = checkpoint.load(tmp_path / "one", trust=["*"])
    assert (loaded.width, loaded.sizes) == (4, (4, 4))
    assert loaded.c.weight is loaded.b.weight
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    save_sized(loaded, tmp_path / "two")
    assert checkpoint.Architecture.read(tmp_path / "two").attributes == architecture.attributes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"height": 4}, "sets height to 4, but .* builds no such integer"),
        ({"width[0]": 4}, r"sets width\[0\] to 4, but .* no such integer"),
        ({"sizes[2]": 4}, "no such integer"),
        ({"__class__": 4}, "no such integer"),
        ({"a.weight": 4}, "no such integer"),
        ({"forward.__defaults__": 4}, "no such integer"),
        ({"width": 9}, "sets width to 9, but .* builds 8 there"),
    ],
)
def test_attributes_that_do_not_fit_the_factory_are_refused(tmp_path: Path, attributes: dict, message: str) -> None:
    save_sized(Sized(), tmp_path)
    forged = checkpoint.Architecture.read(tmp_path).model_copy(update={"attributes": attributes})
    signed = forged.model_copy(update={"sha256": forged.own_digest()})
    (tmp_path / checkpoint.ARCHITECTURE).write_text(signed.model_dump_json())
    with pytest.raises(InputError, match=message):
        checkpoint.load(tmp_path, trust=["*"])


@pytest.mark.parametrize("value", [0, -4, True, "4", 4.0, None])
def test_an_attribute_is_a_positive_integer(tmp_path: Path, value: object) -> None:
    save_sized(Sized(), tmp_path)
    path = tmp_path / checkpoint.ARCHITECTURE
    path.write_text(json.dumps({**json.loads(path.read_text()), "attributes": {"width": value}}))
    with pytest.raises(InputError, match=r"damaged: attributes\.width"):
        checkpoint.load(tmp_path)


def test_a_digest_from_before_the_attributes_stays_valid(tmp_path: Path) -> None:
    write(models.build("espalier:resnet20", in_channels=1, num_classes=10), tmp_path)
    path = tmp_path / checkpoint.ARCHITECTURE
    content = json.loads(path.read_text())
    del content["attributes"], content["resize"]
    path.write_text(json.dumps(content))
    assert checkpoint.Architecture.read(tmp_path).attributes == {}


def test_own_factory_needs_trust(tmp_path: Path) -> None:
    checkpoint.save(nn.Linear(2, 2), tmp_path, factory="my_models.nets:make", image_shape=(1, 1, 2))
    with pytest.raises(InputError, match="--trust"):
        checkpoint.load(tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint.*architecture\.json"):
        checkpoint.load(tmp_path)
    write(pruned_resnet(), tmp_path)
    (tmp_path / checkpoint.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        checkpoint.load(tmp_path)


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot create the directory"):
        write(pruned_resnet(), tmp_path / "file" / "checkpoint")
