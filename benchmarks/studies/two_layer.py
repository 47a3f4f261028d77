"""A two-layer ReLU network without biases, f(x) = V relu(Wx), and what the criteria say of its weights and units.

(λW, V/λ) is the same function for every λ > 0. Everything is in float64 and in closed form where there is one. The loss
is the mean cross-entropy over all examples; W is (m, d), V is (k, m), x is (N, d), labels are (N,).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

MINIBATCH = 32


@dataclass(frozen=True)
class TwoLayer:
    """The weights W = `hidden` (m, d) and V = `output` (k, m); also used for one score per weight."""

    hidden: Tensor
    output: Tensor

    def scaled(self, factor: float) -> "TwoLayer":
        """The same function with W times `factor` and V divided by it."""
        return TwoLayer(self.hidden * factor, self.output / factor)

    def logits(self, x: Tensor) -> Tensor:
        return relu(x @ self.hidden.T) @ self.output.T  # (N, d) -> (N, k)

    def loss(self, x: Tensor, labels: Tensor) -> float:
        return cross_entropy(self.logits(x), labels).item()

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        return (self.logits(x).argmax(1) == labels).double().mean().item()


@dataclass(frozen=True)
class Criterion:
    """How one criterion scores every weight, and every hidden unit (m,) with its d + k weights."""

    weights: Callable[[TwoLayer, Tensor, Tensor], TwoLayer]
    units: Callable[[TwoLayer, Tensor, Tensor], Tensor]


def magnitude(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:  # noqa: ARG001 - every criterion takes the data
    """w²."""
    return TwoLayer(net.hidden**2, net.output**2)


def hessian(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:  # noqa: ARG001
    """H_ii w_i² with the exact diagonal of the Hessian (LeCun et al. 1990, "Optimal brain damage", without its ½).

    As f is piecewise linear in each single weight, the diagonal is the Gauss-Newton one. With p the softmax:
    for V_kj the mean of p_k (1 − p_k) h_j²; for W_jd the mean of 1{h_j > 0} x_d² (Σ_k p_k V_kj² − (Σ_k p_k V_kj)²).
    """
    active = relu(x @ net.hidden.T)  # (N, m)
    p = net.logits(x).softmax(1)  # (N, k)
    curvature = p @ net.output**2 - (p @ net.output) ** 2  # (N, m): of the loss in the activation h_j
    hidden = (curvature * (active > 0)).T @ x**2 / len(x)
    output = (p * (1 - p)).T @ active**2 / len(x)
    return TwoLayer(hidden * net.hidden**2, output * net.output**2)


def taylor(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:
    """(w ∂E/∂w)² of every minibatch of 32, averaged (Molchanov et al. 2019, arXiv 1906.10771, equation 8)."""
    return _mean_square(_gradient_products(net, x, labels))


def natural(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:
    """|E with the weight zeroed − E|, the measured natural importance of every single weight (Li et al. 2020).

    The absolute value, because removals that each lower the loss a little raise it when made together.
    """
    shares = [len(batch) / len(x) for batch in x.split(MINIBATCH)]
    changes = [loss_changes(net, *batch) for batch in _minibatches(x, labels)]
    return TwoLayer(
        torch.stack([share * change.hidden for share, change in zip(shares, changes, strict=True)]).sum(0).abs(),
        torch.stack([share * change.output for share, change in zip(shares, changes, strict=True)]).sum(0).abs(),
    )


def oracle(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:
    """(E with the weight zeroed − E)² of every minibatch of 32, averaged: what Taylor estimates."""
    return _mean_square([loss_changes(net, *batch) for batch in _minibatches(x, labels)])


def loss_changes(net: TwoLayer, x: Tensor, labels: Tensor) -> TwoLayer:
    """E with each weight alone zeroed, minus E. Takes memory for N·m·d·k numbers."""
    logits, inputs = net.logits(x), x @ net.hidden.T
    active = relu(inputs)  # (N, m)
    # Zeroing W_jd moves h_j, and with it the logits along V_:j.
    step = relu(inputs[..., None] - x[:, None] * net.hidden) - active[..., None]  # (N, m, d)
    moved = logits[:, None, None] + step[..., None] * net.output.T[:, None]  # (N, m, d, k)
    right = logits.gather(1, labels[:, None])[..., None] + step * net.output[labels][..., None]  # of the true class
    hidden = (moved.logsumexp(3) - right).mean(0) - cross_entropy(logits, labels)
    # Zeroing V_kj moves logit k alone, by −V_kj h_j.
    step = -active[:, None] * net.output  # (N, k, m)
    p = logits.softmax(1)[..., None]
    is_right = labels[:, None, None] == torch.arange(len(net.output))[:, None]
    output = (torch.log1p(p * torch.expm1(step)) - is_right * step).mean(0)
    return TwoLayer(hidden, output)


def unit_sums(score: Callable[[TwoLayer, Tensor, Tensor], TwoLayer]) -> Callable[[TwoLayer, Tensor, Tensor], Tensor]:
    """A unit's score as the sum over its weights."""

    def units(net: TwoLayer, x: Tensor, labels: Tensor) -> Tensor:
        scores = score(net, x, labels)
        return scores.hidden.sum(1) + scores.output.sum(0)

    return units


def unit_taylor(net: TwoLayer, x: Tensor, labels: Tensor) -> Tensor:
    """(∂E/∂z_j)² of every minibatch, averaged; the gate gradient is Σ_k V_kj ∂E/∂V_kj."""
    return torch.stack([product.output.sum(0) ** 2 for product in _gradient_products(net, x, labels)]).mean(0)


def unit_natural(net: TwoLayer, x: Tensor, labels: Tensor) -> Tensor:
    """|E with the unit removed − E|."""
    return unit_loss_changes(net, x, labels).abs()


def unit_oracle(net: TwoLayer, x: Tensor, labels: Tensor) -> Tensor:
    """(E with the unit removed − E)² of every minibatch, averaged."""
    return torch.stack([unit_loss_changes(net, *batch) ** 2 for batch in _minibatches(x, labels)]).mean(0)


def unit_loss_changes(net: TwoLayer, x: Tensor, labels: Tensor) -> Tensor:
    """E with each unit alone removed, minus E, (m,)."""
    logits, active = net.logits(x), relu(x @ net.hidden.T)
    without = logits[:, None] - active[..., None] * net.output.T  # (N, m, k)
    losses = cross_entropy(without.transpose(1, 2), labels[:, None].expand(active.shape), reduction="none")  # (N, m)
    return losses.mean(0) - cross_entropy(logits, labels)


CRITERIA = {
    "magnitude": Criterion(magnitude, unit_sums(magnitude)),
    "hessian": Criterion(hessian, unit_sums(hessian)),
    "taylor": Criterion(taylor, unit_taylor),
    "natural": Criterion(natural, unit_natural),
    "oracle": Criterion(oracle, unit_oracle),
}


def prune_weights(net: TwoLayer, scores: TwoLayer, sparsity: float) -> TwoLayer:
    """Zero the share `sparsity` of all weights, both layers together, that score lowest."""
    flat = torch.cat([scores.hidden.flatten(), scores.output.flatten()])
    kept = torch.ones(len(flat), dtype=torch.bool)
    kept[flat.argsort(stable=True)[: round(sparsity * len(flat))]] = False
    hidden, output = kept.split([net.hidden.numel(), net.output.numel()])
    return TwoLayer(net.hidden * hidden.view_as(net.hidden), net.output * output.view_as(net.output))


def prune_units(net: TwoLayer, scores: Tensor, sparsity: float) -> TwoLayer:
    """Remove the share `sparsity` of the hidden units that score lowest."""
    kept = scores.argsort(stable=True)[round(sparsity * len(scores)) :]
    return TwoLayer(net.hidden[kept], net.output[:, kept])


def _minibatches(x: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(MINIBATCH), labels.split(MINIBATCH), strict=True)


def _mean_square(scores: Sequence[TwoLayer]) -> TwoLayer:
    return TwoLayer(
        torch.stack([score.hidden**2 for score in scores]).mean(0),
        torch.stack([score.output**2 for score in scores]).mean(0),
    )


def _gradient_products(net: TwoLayer, x: Tensor, labels: Tensor) -> list[TwoLayer]:
    """w ∂E/∂w of every weight on every minibatch."""
    weights = TwoLayer(net.hidden.clone().requires_grad_(), net.output.clone().requires_grad_())
    products = []
    for inputs, answers in _minibatches(x, labels):
        loss = cross_entropy(weights.logits(inputs), answers)
        hidden, output = torch.autograd.grad(loss, (weights.hidden, weights.output))
        products.append(TwoLayer(hidden * net.hidden, output * net.output))
    return products
