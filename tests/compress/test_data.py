"""Data sources: digits and their split, glyphs, users' loaders, and what wrong sources are told."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from compress import data
from compress.data import Data, glyphs
from compress.data.in_memory import TensorImages
from compress.errors import InputError


def epoch(found: Data, seed: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    return [(images, labels) for images, labels in found.train]


def same(left: list[tuple[Tensor, Tensor]], right: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


class TestDigits:
    def test_the_split_is_fixed_and_stratified(self) -> None:
        found = data.load("digits", batch_size=64)
        train, test = found.train.dataset, found.test.dataset
        assert isinstance(train, TensorImages)
        assert isinstance(test, TensorImages)
        counts = torch.stack([train.split.labels.bincount(), test.split.labels.bincount()])
        assert counts.sum(1).tolist() == [1437, 360]
        whole = torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])  # scikit-learn's documentation
        assert counts.sum(0).equal(whole)
        assert ((counts[1] - whole * 360 / 1797).abs() < 1).all()
        again = data.load("digits", batch_size=64, seed=5).test.dataset
        assert isinstance(again, TensorImages)
        assert torch.equal(again.split.images, test.split.images)

    def test_batches_are_normalised(self) -> None:
        found = data.load("digits", batch_size=1437, augment=False)
        assert found.classes == tuple("0123456789")
        assert found.image_shape == (1, 32, 32)
        images, labels = next(iter(found.train))
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape == (1437, *found.image_shape)
        assert abs(images.mean().item()) < 1e-3
        assert abs(images.std().item() - 1) < 1e-3

    def test_another_size(self) -> None:
        found = data.load("digits", batch_size=8, image_size=20)
        assert found.image_shape == (1, 20, 20)
        assert next(iter(found.test))[0].shape == (8, 1, 20, 20)

    def test_training_leaves_out_the_short_batch_and_testing_does_not(self) -> None:
        found = data.load("digits", batch_size=100)
        assert [len(labels) for _, labels in found.train] == [100] * 14
        assert [len(labels) for _, labels in found.test] == [100] * 3 + [60]

    def test_a_batch_larger_than_the_split_is_kept(self) -> None:
        found = data.load("digits", batch_size=2000)
        assert [len(labels) for _, labels in found.train] == [1437]

    def test_the_global_seed_repeats_an_epoch(self) -> None:
        found = data.load("digits", batch_size=500)
        first = epoch(found, 7)
        assert same(first, epoch(found, 7))
        assert not same(first, epoch(found, 8))

    def test_augmentation_can_be_left_out(self) -> None:
        found = data.load("digits", batch_size=1437, augment=False)
        torch.manual_seed(0)
        first, second = (next(iter(found.train)) for _ in range(2))
        assert not torch.equal(first[1], second[1])  # shuffled
        ink = [batch[0].sum((1, 2, 3)).sort().values for batch in (first, second)]
        assert torch.allclose(*ink, atol=0.1)


def test_glyphs_come_from_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    small = glyphs.generate(70, 62, seed=2)
    asked: list[int] = []

    def cached(seed: int) -> glyphs.Glyphs:
        asked.append(seed)
        return small

    monkeypatch.setattr(glyphs, "load", cached)
    found = data.load("glyphs", batch_size=32, seed=2)
    assert asked == [2]
    assert found.image_shape == (3, 32, 32)
    assert len(found.classes) == 62
    assert [len(labels) for _, labels in found.train] == [32, 32]
    assert torch.equal(torch.cat([labels for _, labels in found.test]), small.test_labels)


class TestUserFunctions:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "userdata.py").write_text(
            "import torch\n"
            "from torch.utils.data import DataLoader, TensorDataset\n"
            "from compress.data import Data\n"
            "def pair(batch_size, seed):\n"
            "    split = TensorDataset(torch.zeros(6, 3, 8, 9), torch.tensor([0, 1, 2, 3, 4, 2]))\n"
            "    return DataLoader(split, batch_size), DataLoader(split, batch_size)\n"
            "def named(**options):\n"
            "    train, test = pair(options['batch_size'], options['seed'])\n"
            "    train.dataset.classes = ['a', 'b', 'c', 'd', 'e', 'f']\n"
            "    return train, test\n"
            "def whole(batch_size):\n"
            "    train, test = pair(batch_size, 0)\n"
            "    return Data('mine', train, test, ('x', 'y'), (3, 8, 9), (0.5,) * 3, (0.5,) * 3)\n"
            "def lists():\n    return [], []\n"
            "def flat():\n"
            "    split = TensorDataset(torch.zeros(6, 5), torch.zeros(6).long())\n"
            "    return DataLoader(split), DataLoader(split)\n"
            "def demanding(path):\n    return path\n"
        )
        monkeypatch.chdir(tmp_path)
        yield
        sys.modules.pop("userdata", None)

    def load(self, name: str, trust: tuple[str, ...] = ("userdata",)) -> Data:
        return data.load(f"userdata:{name}", batch_size=4, trust=trust)

    def test_a_pair_of_loaders_is_completed(self) -> None:
        found = self.load("pair")
        assert found.image_shape == (3, 8, 9)
        assert found.classes == ("0", "1", "2", "3", "4")  # the last is in the second batch only
        assert (found.mean, found.std) == ((), ())
        assert found.train.batch_size == 4

    def test_class_names_of_the_data_set_are_used(self) -> None:
        assert self.load("named").classes == ("a", "b", "c", "d", "e", "f")

    def test_data_is_taken_as_it_is(self) -> None:
        found = self.load("whole")
        assert (found.name, found.classes, found.mean) == ("mine", ("x", "y"), (0.5, 0.5, 0.5))

    def test_untrusted(self) -> None:
        with pytest.raises(InputError, match="--trust userdata"):
            self.load("pair", trust=())

    @pytest.mark.parametrize(
        ("name", "message"),
        [("lists", "pair of DataLoaders"), ("flat", r"images \(N, C, H, W\)"), ("demanding", "'path'")],
    )
    def test_what_does_not_fit_is_said(self, name: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            self.load(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("imagenet", "data source 'imagenet'"),
        ("digits:/tmp", "takes no path"),
        ("cifar10", "cifar10:/path"),
        ("imagefolder:/does/not/exist", "/does/not/exist"),
    ],
)
def test_wrong_sources(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.load(source, batch_size=4)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"batch_size": 4, "image_size": 0}])
def test_impossible_options_are_named(option: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        data.load("digits", **option)  # type: ignore[arg-type]
