"""The generated set `glyphs`: the 62 letters and digits at 32 x 32 in colour, from the fonts that matplotlib
ships.

Every image shows one glyph through a random affine map, in a random colour on a random background with a
gradient, pieces of other glyphs as clutter, and noise. The test split uses font families that the training
split never saw, so the test accuracy measures what was learnt about letters, not about fonts. Some pairs (O
and 0, l and I) differ in little but their size, which keeps the best possible accuracy below 100 %.
"""

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from compress.errors import InputError, WorkError
from compress.files import replacing
from compress.progress import progress_bar

CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
SIZE = 32  # pixels, both ways

# Fonts are kept apart by type family: bold and oblique cuts of one design are siblings and share a split.
# Left out are the fonts whose Latin letters or lining digits are missing (cmsy, cmex, cmmi, STIXSize*,
# STIXNonUnicode, *Display).
TRAIN_FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansMono-Oblique.ttf",
    "DejaVuSansMono-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSerif-BoldItalic.ttf",
    "cmb10.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmti10.ttf",
    "cmtt10.ttf",
)
TEST_FONTS = ("STIXGeneral.ttf", "STIXGeneralBol.ttf", "STIXGeneralBolIta.ttf", "STIXGeneralItalic.ttf")

MINIMUM_CONTRAST = 0.2  # of luminance in [0, 1], between the glyph and any point of its background, before noise

_VERSION = 1  # part of the cache's file name: raise it whenever the same seed would give other images
_OVERSAMPLING = 2  # glyphs are mapped at twice the resolution and averaged down, against aliasing
_CAP_HEIGHT = 18 / SIZE  # of the image, before the random scale
_SPREAD = 0.2  # the most that gradient and clutter may differ from the background's luminance
_BATCH = 500
_LUMINANCE = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Glyphs:
    """Both splits: images uint8 (N, 3, 32, 32); labels int64 (N,), indices into `CLASSES`, balanced."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def generate(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Glyphs:
    """Draw the set: the same numbers give the same images with the same versions of Pillow and torch.

    Raises:
        InputError: a size is not positive.
        WorkError: matplotlib comes without one of the fonts.
    """
    if train < 1 or test < 1:
        raise InputError(f"glyphs cannot have {train} training and {test} test images: ask for at least 1 of each.")
    # The test images do not depend on how many training images there are: each split has its own generator.
    train_images, train_labels = _draw_split(TRAIN_FONTS, train, seed=2 * seed, description="glyphs, training")
    test_images, test_labels = _draw_split(TEST_FONTS, test, seed=2 * seed + 1, description="glyphs, test")
    return Glyphs(train_images, train_labels, test_images, test_labels)


def load(train: int = 20_000, test: int = 4_000, seed: int = 0) -> Glyphs:
    """`generate`, kept on disk under $XDG_CACHE_HOME/espalier (default ~/.cache/espalier).

    A cached file that cannot be read, or whose content no longer has its recorded hash, is drawn again.

    Raises:
        InputError: a size is not positive, or the cache directory cannot be written.
    """
    path = cache_path(train, test, seed)
    if path.exists():
        cached = _read(path)
        if cached is not None:
            return cached
        logging.getLogger(__name__).warning("%s is damaged; drawing the glyphs again.", path)
    glyphs = generate(train, test, seed)
    tensors = {name: tensor.contiguous() for name, tensor in vars(glyphs).items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _digest(glyphs)})
    except InputError as error:
        raise InputError(f"{error} XDG_CACHE_HOME names the directory for cached data.") from error
    return glyphs


def cache_path(train: int, test: int, seed: int) -> Path:
    """Where `load` keeps the set of these sizes and this seed."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "espalier" / f"glyphs-v{_VERSION}-seed{seed}-{train}-{test}.safetensors"


def _read(path: Path) -> Glyphs | None:
    """The cached set, or None when the file is truncated or changed."""
    try:
        with safe_open(path, framework="pt") as file:
            glyphs = Glyphs(**{name: file.get_tensor(name) for name in Glyphs.__dataclass_fields__})
            recorded = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError):
        return None
    return glyphs if recorded == _digest(glyphs) else None


def _digest(glyphs: Glyphs) -> str:
    digest = hashlib.sha256()
    for tensor in vars(glyphs).values():
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _draw_split(fonts: Sequence[str], count: int, *, seed: int, description: str) -> tuple[Tensor, Tensor]:
    """`count` images (count, 3, 32, 32) uint8 and their labels, from these fonts."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.stack([_render_font(name) for name in fonts])  # (F, 62, S, S)
    labels = torch.arange(count) % len(CLASSES)
    labels = labels[torch.randperm(count, generator=generator)]
    images = []
    batches = labels.split(_BATCH)
    with progress_bar(description, total=len(batches)) as bar:
        for batch in batches:
            images.append(_draw(masks, batch, generator))
            bar.advance("")
    return torch.cat(images), labels


def _render_font(name: str) -> Tensor:
    """Coverage in [0, 1] of every class in one font, (62, S, S) at S = 64, all on one baseline."""
    side = SIZE * _OVERSAMPLING
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    try:
        probe = ImageFont.truetype(path, 100)
    except OSError as error:
        raise WorkError(f"The font {path} is missing or unreadable: reinstall matplotlib.") from error
    _, top, _, bottom = probe.getbbox("H", anchor="ls")
    font = ImageFont.truetype(path, 100 * _CAP_HEIGHT * side / (bottom - top))
    baseline = side * (1 + _CAP_HEIGHT) / 2
    masks = np.empty((len(CLASSES), side, side), dtype=np.float32)
    for index, character in enumerate(CLASSES):
        canvas = Image.new("L", (side, side))
        left, _, right, _ = font.getbbox(character, anchor="ls")
        position = ((side - left - right) / 2, baseline)
        ImageDraw.Draw(canvas).text(position, character, font=font, fill=255, anchor="ls")
        masks[index] = np.asarray(canvas, dtype=np.float32) / 255
    return torch.from_numpy(masks)


def _draw(masks: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One batch of images, uint8 (N, 3, 32, 32), of these labels."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    def any_glyph() -> tuple[Tensor, Tensor]:
        fonts = torch.randint(len(masks), (count,), generator=generator)
        return fonts, torch.randint(len(CLASSES), (count,), generator=generator)

    fonts, _ = any_glyph()
    glyph = _warp(
        masks[fonts, labels],
        angle=uniform(-25, 25),
        scale=uniform(0.6, 1.1, 1) * uniform(0.85, 1.15, 2),
        shear=uniform(-0.3, 0.3),
        shift=uniform(-4 / SIZE, 4 / SIZE, 2),
    )
    background, second = _background_colours(uniform(0, 1, 3), uniform(0, 1, 3))
    foreground = _contrasting(background, uniform(0, 1, 16, 3))

    # What the second colour covers: a linear gradient, then pieces of other glyphs, large and anyhow turned.
    direction = uniform(0, 2 * math.pi)
    axis = torch.linspace(-1, 1, SIZE)
    slope = direction.cos()[:, None, None] * axis + direction.sin()[:, None, None] * axis[:, None]  # (N, 32, 32)
    second_share = (0.5 + 0.5 * slope / math.sqrt(2)) * uniform(0, 1, 1, 1)
    for _ in range(4):
        piece = _warp(
            masks[any_glyph()],
            angle=uniform(-180, 180),
            scale=uniform(0.6, 2.0, 2),
            shear=uniform(-0.3, 0.3),
            shift=uniform(-0.4, 0.4, 2),
        )
        second_share = torch.maximum(second_share, piece * uniform(0.3, 1, 1, 1))

    share = second_share[:, None]  # (N, 1, 32, 32)
    canvas = background[:, :, None, None] * (1 - share) + second[:, :, None, None] * share
    glyph = glyph[:, None]
    images = canvas * (1 - glyph) + foreground[:, :, None, None] * glyph
    noise = torch.randn(images.shape, generator=generator) * uniform(0, 0.15, 1, 1, 1)
    return ((images + noise) * 255).round().clamp(0, 255).to(torch.uint8)


def _warp(masks: Tensor, *, angle: Tensor, scale: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Turn (degrees), scale, shear and shift (fractions of the image) each mask: (N, S, S) -> (N, 32, 32)."""
    radians = angle * (math.pi / 180)
    cosine, sine = radians.cos(), radians.sin()
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # (N, 2, 2)
    slant = torch.eye(2).repeat(len(masks), 1, 1)
    slant[:, 0, 1] = shear
    # affine_grid wants the map from output to input; grid coordinates run over [-1, 1], so a shift counts
    # double.
    inverse = torch.linalg.inv(turn @ slant @ torch.diag_embed(scale))
    theta = torch.cat([inverse, -(inverse @ (2 * shift)[:, :, None])], dim=2)  # (N, 2, 3)
    grid = functional.affine_grid(theta, [len(masks), 1, *masks.shape[1:]], align_corners=False)
    warped = functional.grid_sample(masks[:, None], grid, align_corners=False)
    return functional.avg_pool2d(warped, _OVERSAMPLING)[:, 0]


def _background_colours(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Pull the second colour towards the first, to within `_SPREAD` of its luminance; both (N, 3)."""
    difference = ((second - first) @ _LUMINANCE).abs()[:, None]
    return first, first + (second - first) * (_SPREAD / difference).clamp(max=1)


def _contrasting(background: Tensor, candidates: Tensor) -> Tensor:
    """The first candidate (N, K, 3) far enough from all that `_SPREAD` allows, else black or white."""
    luminance = background @ _LUMINANCE  # (N,)
    extreme = (luminance < 0.5).float()[:, None, None].expand(-1, 1, 3)  # at least 0.5 away
    candidates = torch.cat([candidates, extreme], dim=1)
    contrast = (candidates @ _LUMINANCE - luminance[:, None]).abs()
    chosen = (contrast >= MINIMUM_CONTRAST + _SPREAD).int().argmax(dim=1)  # argmax gives the first maximum
    return candidates[torch.arange(len(candidates)), chosen]
