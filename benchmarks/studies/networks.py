"""What the studies share: networks, each trained once and read from its checkpoint later; minibatches and scores."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.studies.study import Options
from compress import checkpoint, data, models
from compress.data import Data
from compress.graph import ChannelGraph
from compress.importance import build
from compress.training import TrainingConfig, evaluate, fit

Name = Literal["lenet3", "resnet20"]
Source = Literal["digits", "glyphs"]

TITLES: dict[Name, str] = {"lenet3": "LeNet3", "resnet20": "ResNet-20"}
BATCH_SIZE = 64
"""Images in a minibatch, of the training and of every gradient that a study takes."""


@dataclass(frozen=True)
class Setting:
    """How one network is trained on one source.

    Attributes:
        image_size: side in pixels. The digits are 8 x 8 by nature; ResNet-20 sees them at 16 x 16, where it is as
            accurate as at 32 x 32 for a quarter of the time, and LeNet3 at 32 x 32, the size it was made for.
        epochs, quick_epochs: passes over the training data, in the full and in the quick mode.
        learning_rate: its peak; it falls to 0 along a cosine.
        warmup_epochs: epochs over which it rises from 0.
    """

    image_size: int
    epochs: int
    quick_epochs: int
    learning_rate: float
    warmup_epochs: float = 0.0

    def training(self, *, quick: bool) -> TrainingConfig:
        return TrainingConfig(
            epochs=self.quick_epochs if quick else self.epochs,
            learning_rate=self.learning_rate,
            warmup_epochs=self.warmup_epochs,
            weight_decay=5e-4,
            nesterov=True,
        )


SETTINGS: dict[tuple[Name, Source], Setting] = {
    ("lenet3", "digits"): Setting(image_size=32, epochs=16, quick_epochs=12, learning_rate=0.05),
    ("resnet20", "digits"): Setting(image_size=16, epochs=12, quick_epochs=8, learning_rate=0.1, warmup_epochs=1),
    ("lenet3", "glyphs"): Setting(image_size=32, epochs=12, quick_epochs=4, learning_rate=0.05, warmup_epochs=0.5),
    ("resnet20", "glyphs"): Setting(image_size=32, epochs=6, quick_epochs=2, learning_rate=0.1, warmup_epochs=0.5),
}


def trained(name: Name, source: Source, seed: int, options: Options) -> tuple[nn.Module, Data]:
    """The dense network in evaluation mode, and the data it was trained on.

    Trained at the first call and kept under OUT/networks/NAME-SOURCE-SEED-(quick|full); a later call with the same
    settings reads it from there. `seed` fixes the initial weights and the order of the minibatches; the data of a
    source are the same for all seeds. Test accuracy and settings stand in the checkpoint's provenance.
    """
    setting = SETTINGS[name, source]
    loaded = data.load(source, batch_size=BATCH_SIZE, image_size=setting.image_size)
    config = setting.training(quick=options.quick)
    mode = "quick" if options.quick else "full"
    directory = options.out / "networks" / f"{name}-{source}-{seed}-{mode}"
    settings = {**config.model_dump(mode="json"), "seed": seed, "batch_size": BATCH_SIZE, "source": source}
    if (directory / checkpoint.ARCHITECTURE).is_file():
        architecture = checkpoint.Architecture.read(directory)
        if architecture.provenance.get("settings") == settings and architecture.image_shape == loaded.image_shape:
            return checkpoint.load(directory), loaded

    factory, arguments = f"espalier:{name}", _arguments(name, loaded)
    torch.manual_seed(seed)
    model = models.build(factory, **arguments)
    fit(model, loaded.train, config, seed=seed, description=directory.name)
    result = evaluate(model, loaded.test)
    checkpoint.save(
        model,
        directory,
        factory=factory,
        kwargs=arguments,
        image_shape=loaded.image_shape,
        classes=loaded.classes,
        mean=loaded.mean,
        std=loaded.std,
        provenance={"settings": settings, "top1_percent": result.top1, "loss_nats": result.loss},
    )
    return model, loaded


def _arguments(name: Name, loaded: Data) -> dict[str, Any]:
    channels, side, _ = loaded.image_shape
    arguments: dict[str, Any] = {"num_classes": len(loaded.classes), "in_channels": channels}
    if name == "lenet3":  # its first linear layer depends on the size of the images
        arguments["image_size"] = side
    return arguments


def minibatches(loaded: Data, count: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` training minibatches, however many epochs that takes; the same ones for the same seed.

    Order and augmentation are drawn from torch's global generator, which nothing else may use meanwhile.
    """
    torch.manual_seed(seed)
    endless = chain.from_iterable(repeat(loaded.train))
    return islice(endless, count)


def taylor_scores(
    model: nn.Module, graph: ChannelGraph, loaded: Data, count: int, *, seed: int, training: bool = False
) -> dict[str, Tensor]:
    """Group -> Taylor scores of its channels, (width,) float64, averaged over `count` minibatches; no weight moves.

    Args:
        training: whether batch normalisation uses the statistics of each minibatch, as while training, or its own.
    """
    copy = deepcopy(model).train(training)
    taylor = build("taylor", copy, graph, momentum=0.0)
    for images, labels in minibatches(loaded, count, seed=seed):
        copy.zero_grad()
        cross_entropy(copy(images), labels).backward()
        taylor.observe()
    return taylor.scores()


def spread(values: np.ndarray, digits: int = 2) -> str:
    """A quantity measured with several seeds, in words: its mean, and in brackets the smallest and the largest value.

    One number alone where there is one seed, or all are equal to that many digits.
    """
    mean, low, high = (f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max()))
    return mean if low == high else f"{mean} [{low}, {high}]"
