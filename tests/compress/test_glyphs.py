"""The generated letters: the same by seed, fonts kept apart, legible, cached so that damage is noticed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.data import glyphs
from compress.data.glyphs import CLASSES, Glyphs
from compress.errors import InputError


def equal(left: Glyphs, right: Glyphs) -> bool:
    return all(torch.equal(vars(left)[name], vars(right)[name]) for name in vars(left))


@pytest.fixture(scope="module")
def drawn() -> Glyphs:
    return glyphs.generate(train=124, test=62, seed=0)


def test_shapes_types_and_balance(drawn: Glyphs) -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 62
    assert drawn.train_images.shape == (124, 3, 32, 32)
    assert drawn.test_images.shape == (62, 3, 32, 32)
    assert drawn.train_images.dtype == torch.uint8
    assert drawn.train_labels.dtype == torch.int64
    assert drawn.train_labels.bincount().tolist() == [2] * 62
    assert drawn.test_labels.bincount().tolist() == [1] * 62


def test_the_seed_decides(drawn: Glyphs) -> None:
    assert equal(glyphs.generate(124, 62, seed=0), drawn)
    other = glyphs.generate(124, 62, seed=1)
    assert not torch.equal(other.train_images, drawn.train_images)
    assert not torch.equal(other.test_images, drawn.test_images)


def test_the_test_split_does_not_depend_on_the_training_size(drawn: Glyphs) -> None:
    assert torch.equal(glyphs.generate(10, 62, seed=0).test_images, drawn.test_images)


def test_the_global_generator_plays_no_part() -> None:
    before = torch.get_rng_state()
    glyphs.generate(5, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_share_no_font_family() -> None:
    families = [{name[:4] for name in fonts} for fonts in (glyphs.TRAIN_FONTS, glyphs.TEST_FONTS)]
    assert families[0].isdisjoint(families[1])  # Deja, cmb1, cmr1, … against STIX


@pytest.mark.parametrize("font", glyphs.TRAIN_FONTS + glyphs.TEST_FONTS)
def test_every_font_has_every_class(font: str) -> None:
    masks = glyphs._render_font(font)
    assert masks.shape == (62, 64, 64)
    assert masks.sum(dim=(1, 2)).min() > 50  # pixels of ink; an i has the least
    assert len({mask.numpy().tobytes() for mask in masks}) == 62  # no placeholder box stands for several
    upper, lower = CLASSES.index("X"), CLASSES.index("x")
    assert masks[upper].sum() > masks[lower].sum()


def test_contrast_holds_for_any_colours() -> None:
    torch.manual_seed(0)
    first, second = glyphs._background_colours(torch.rand(2000, 3), torch.rand(2000, 3))
    foreground = glyphs._contrasting(first, torch.rand(2000, 1, 3))  # one candidate: the fallback is used too
    for share in (0.0, 0.5, 1.0):
        background = first * (1 - share) + second * share
        contrast = ((foreground - background) @ glyphs._LUMINANCE).abs()
        assert contrast.min() >= glyphs.MINIMUM_CONTRAST - 1e-6
    for colours in (first, second, foreground):
        assert 0 <= colours.min() <= colours.max() <= 1


@pytest.mark.parametrize(("train", "test"), [(0, 4), (4, -1)])
def test_sizes_must_be_positive(train: int, test: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        glyphs.generate(train, test)


class TestCache:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_the_second_load_reads_the_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = glyphs.load(8, 4, seed=3)
        path = glyphs.cache_path(8, 4, 3)
        assert path.is_file()
        monkeypatch.setattr(glyphs, "generate", None)  # a second drawing would fail
        assert equal(glyphs.load(8, 4, seed=3), first)

    def test_each_request_has_its_own_file(self) -> None:
        assert len({glyphs.cache_path(*request) for request in [(8, 4, 0), (4, 8, 0), (8, 4, 1)]}) == 3

    @pytest.mark.parametrize("damage", ["truncated", "empty", "changed"])
    def test_a_damaged_file_is_drawn_again(self, damage: str, caplog: pytest.LogCaptureFixture) -> None:
        first = glyphs.load(8, 4)
        path = glyphs.cache_path(8, 4, 0)
        content = path.read_bytes()
        if damage == "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            path.write_bytes(content[:500] if damage == "truncated" else b"")
        assert equal(glyphs.load(8, 4), first)
        assert "damaged" in caplog.text
        assert path.read_bytes() == content

    def test_a_file_without_its_hash_is_drawn_again(self) -> None:
        first = glyphs.load(8, 4)
        path = glyphs.cache_path(8, 4, 0)
        tensors = load_file(path)
        tensors["train_images"] = 255 - tensors["train_images"]
        save_file(tensors, path)
        assert equal(glyphs.load(8, 4), first)

    def test_a_directory_that_cannot_be_written_names_the_variable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(InputError, match="XDG_CACHE_HOME"):
            glyphs.load(8, 4)
