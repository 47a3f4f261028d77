"""Model factories, the papers' small networks, and weights from files."""

from compress.models.factories import FACTORIES, build, find, resolve, without_weights
from compress.models.networks import lenet3, resnet20, resnet32, resnet56
from compress.models.weights import load_weights

__all__ = [
    "FACTORIES",
    "build",
    "find",
    "lenet3",
    "load_weights",
    "resnet20",
    "resnet32",
    "resnet56",
    "resolve",
    "without_weights",
]
