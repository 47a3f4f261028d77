"""The experiments of `scale_invariance`: networks trained and rescaled, networks trained from a rescaled start.

Scikit-learn's digits: 8 x 8 pixels, 10 classes, 1,437 training and 360 test images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.studies.two_layer import CRITERIA, MINIBATCH, TwoLayer, natural, prune_units, prune_weights

LAMBDAS = (0.1, 1.0, 10.0)
UNITS = 100
LEARNING_RATE = 0.1
EPOCHS = 30
SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
QUOTED = SPARSITIES.index(0.8)
SUBSET = 0.2
SUBSET_DRAWS = 10

Split = tuple[Tensor, Tensor]


def digits() -> tuple[Split, Split]:
    """Training and test split, the same stratified one for every seed; pixels in [0, 1], float64."""
    bunch = load_digits()
    x, labels = torch.from_numpy(bunch.data / 16), torch.from_numpy(bunch.target)
    chosen, held_out = train_test_split(range(len(x)), test_size=360, stratify=bunch.target, random_state=0)
    return (x[chosen], labels[chosen]), (x[held_out], labels[held_out])


def train(scale: float, seed: int) -> list[TwoLayer]:
    """The network at the start and after every epoch; starts of one seed are one function, whatever `scale` is."""
    (x, labels), _ = digits()
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(UNITS, x.shape[1], generator=generator, dtype=x.dtype) * (2 / x.shape[1]) ** 0.5
    output = torch.randn(10, UNITS, generator=generator, dtype=x.dtype) / UNITS**0.5
    net = TwoLayer(hidden, output).scaled(scale)
    epochs = [net]
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(MINIBATCH):
            net = _descend(net, x[batch], labels[batch])
        epochs.append(net)
    return epochs


def rescale(seed: int) -> dict[str, Any]:
    """One network trained at λ = 1, then rescaled: accuracies, and how far function and natural importance moved."""
    training, test = digits()
    net = train(1.0, seed)[-1]
    importance, logits = natural(net, *training), net.logits(test[0])
    result = {}
    for scale in LAMBDAS:
        scaled = net.scaled(scale)
        moved = natural(scaled, *training)
        result[f"{scale:g}"] = {
            "logits_change": _relative_change([logits], [scaled.logits(test[0])]),
            "natural_change": _relative_change([importance.hidden, importance.output], [moved.hidden, moved.output]),
            "weights": {name: weight_accuracies(scaled, name, training, test) for name in CRITERIA},
            "units": {name: unit_accuracies(scaled, name, training, test) for name in CRITERIA},
        }
    return result


def train_scaled(scale: float, seed: int) -> dict[str, Any]:
    """One network trained from a λ-scaled start: its layers in every epoch, and pruning at the end."""
    training, test = digits()
    epochs = train(scale, seed)
    net = epochs[-1]
    kept_output = {}
    for name, criterion in CRITERIA.items():
        pruned = prune_weights(net, criterion.weights(net, *training), SPARSITIES[QUOTED])
        kept_output[name] = (pruned.output != 0).double().mean().item()
    return {
        "magnitude": [[layer.abs().mean().item() for layer in (each.hidden, each.output)] for each in epochs],
        "importance": [layer_importance(each, *training) for each in epochs],
        "loss": [each.loss(*training) for each in epochs],
        "weights": {name: weight_accuracies(net, name, training, test) for name in CRITERIA},
        "output_layer_kept": kept_output,
    }


def layer_importance(net: TwoLayer, x: Tensor, labels: Tensor) -> list[float]:
    """Mean change of the loss when a random `SUBSET` of one layer's weights is zeroed, for W and for V."""
    generator = torch.Generator().manual_seed(0)
    before = net.loss(x, labels)
    changes = []
    for _ in range(SUBSET_DRAWS):
        hidden, output = (
            layer * (torch.rand(layer.shape, generator=generator) >= SUBSET) for layer in (net.hidden, net.output)
        )
        changes.append(
            [
                TwoLayer(hidden, net.output).loss(x, labels) - before,
                TwoLayer(net.hidden, output).loss(x, labels) - before,
            ]
        )
    return np.mean(changes, axis=0).tolist()


def weight_accuracies(net: TwoLayer, criterion: str, training: Split, test: Split) -> list[float]:
    """Test accuracy at every sparsity of single weights."""
    scores = CRITERIA[criterion].weights(net, *training)
    return [prune_weights(net, scores, sparsity).accuracy(*test) for sparsity in SPARSITIES]


def unit_accuracies(net: TwoLayer, criterion: str, training: Split, test: Split) -> list[float]:
    """Test accuracy at every sparsity of hidden units."""
    scores = CRITERIA[criterion].units(net, *training)
    return [prune_units(net, scores, sparsity).accuracy(*test) for sparsity in SPARSITIES]


def _descend(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:
    weights = TwoLayer(net.hidden.requires_grad_(), net.output.requires_grad_())
    gradients = torch.autograd.grad(cross_entropy(weights.logits(x), labels), (weights.hidden, weights.output))
    with torch.no_grad():
        return TwoLayer(net.hidden - LEARNING_RATE * gradients[0], net.output - LEARNING_RATE * gradients[1])


def _relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Largest absolute change over the largest absolute value."""
    change = max((b - a).abs().max().item() for a, b in zip(before, after, strict=True))
    return change / max(a.abs().max().item() for a in before)
