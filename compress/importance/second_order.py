"""Second-order criteria: the network is run again, and Hessian-vector products are taken, in evaluation mode."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import one_hot

from compress.errors import InputError, WorkError
from compress.graph import ChannelGraph
from compress.importance.ablation import Ablation
from compress.importance.base import Combine, Importance, Minibatch, Need, register
from compress.importance.slices import SliceSums, filters, layer_of
from compress.importance.taylor import combined
from compress.modes import aside

_PER_EXAMPLE_BYTES = 64 * 2**20
"""Memory for the per-image gradients of one layer's filters; images are taken in portions that fit."""


class OnGates(Importance):
    """Gradient and curvature of every gate by itself, exactly.

    K copies of the minibatch run behind the gates, each with a factor of its own on one channel. No copy's loss depends
    on another's factor, so one Hessian-vector product with a vector of ones gives K entries of the diagonal. That costs
    several times the K ablations themselves.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"minibatch"})

    _ablation: Ablation | None = None

    def _expansion(self, minibatch: Minibatch) -> tuple[Tensor, Tensor]:
        """First and second derivative of the mean loss by each gate at 1, each (channels,) float64."""
        with _twice_differentiable():
            return self._derivatives(minibatch)

    def _derivatives(self, minibatch: Minibatch) -> tuple[Tensor, Tensor]:
        if self._ablation is None:
            self._ablation = Ablation(self.model, self.graph, minibatch)
        state = self._ablation.on(minibatch)
        first, second = [], []
        for name, group in self.graph.groups.items():
            for channels in torch.arange(group.width).split(state.copies((name,))):
                factors = torch.ones(len(channels), dtype=torch.float64, requires_grad=True)
                masks = 1 + one_hot(channels, group.width) * (factors[:, None] - 1)
                losses = state.losses({name: masks}, gates_only=True)
                # Where the loss, or its slope, does not depend on the gates, there is nothing to differentiate.
                gradient = curvature = torch.zeros_like(factors, requires_grad=False)
                if losses.requires_grad:
                    gradient = _derivative(losses, factors, create_graph=True)
                if gradient.requires_grad:
                    curvature = _derivative(gradient, factors)
                first.append(gradient.detach())
                second.append(curvature)
        return torch.cat(first), torch.cat(second)

    def _widths_changed(self) -> None:
        self._ablation = None


def _twice_differentiable() -> AbstractContextManager[None]:
    """Attention as the operators that it consists of: PyTorch's fused kernels have no second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _derivative(values: Tensor, factors: Tensor, *, create_graph: bool = False) -> Tensor:
    """(K,) derivatives of each value by its own factor; 0 where it does not depend on it."""
    return torch.autograd.grad(
        values.sum(), factors, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )[0]


@register("taylor-so")
class TaylorSecondOrder(OnGates):
    """Squared second-order estimate of the change of loss, `(−∂E/∂z_c + ½ ∂²E/∂z_c²)²` at z = 1.

    Equation 7 of Molchanov et al. (CVPR 2019, arXiv 1906.10771) with the gate's own second derivative, exact. Averaged
    over minibatches. It costs more than measuring the change of loss itself (`oracle`).
    """

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        first, second = self._expansion(minibatch)
        return (second / 2 - first).square()


@register("obd")
class OptimalBrainDamage(OnGates):
    """Half the gate's second derivative, `½ ∂²E/∂z_c²` (LeCun et al. 1990; at a minimum the first derivative is 0).

    Exact, averaged over minibatches. Negative where the loss curves downwards.
    """

    signed: ClassVar[bool] = True

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        return self._expansion(minibatch)[1] / 2


@register("taylor-so-full")
class TaylorSecondOrderFull(Importance):
    """Squared second-order estimate with the whole row of the Hessian, `(−∂E/∂z_c + ½ Σ_d ∂²E/∂z_c∂z_d)²` at z = 1.

    Equation 7 of Molchanov et al. (CVPR 2019, arXiv 1906.10771), on gates: H_c z with z = 1. One Hessian-vector product
    for all channels: two forward and backward passes' worth. Averaged over minibatches.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"minibatch"})

    _sums: SliceSums | None = None

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        if self._sums is None:
            self._sums = SliceSums(self.model, self.graph)
        sums = self._sums
        direction = sums.masked({name: parameter.detach() for name, parameter in sums.tensors.items()})
        gradient, product = _hessian_vector(self.model, minibatch, direction)
        first = sums.rows(lambda name, value: value * gradient[name])
        row = sums.rows(lambda name, value: value * product[name])
        return (sums.sum(row) / 2 - sums.sum(first)).square()

    def _widths_changed(self) -> None:
        self._sums = None


@register("hessian")
class HessianDiagonal(Importance):
    """Weights scaled by the diagonal of the Hessian, `½ Σ_{i∈filter} H_ii w_i²` (Li et al. 2020, arXiv 2006.10903).

    Over the weights, without biases, of every layer that makes the channel; averaged over minibatches.

    estimator=fisher: `H_ii = 1/N Σ_n (∂E_n/∂w_i)²`, the empirical Fisher information; per-image gradients are taken
    layer by layer. estimator=hutchinson: `H_ii = v_i (H v)_i` for random signs v, `samples` of them for each
    minibatch (Bekas et al. 2007); unbiased, noisy, and negative where the loss curves downwards.
    Combine: `joint` adds the producers up.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"minibatch"})
    combines: ClassVar[tuple[Combine, ...]] = ("joint", "mean", "max")

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        *,
        estimator: Literal["fisher", "hutchinson"] = "fisher",
        samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """
        Args:
            samples: random vectors for each minibatch, for hutchinson.
            seed: of their signs.

        Raises:
            InputError: an option is out of range, or a layer's filters cannot be scored; names it.
        """
        if estimator not in ("fisher", "hutchinson"):
            raise InputError(f"estimator is {estimator!r}, but must be fisher or hutchinson.")
        if samples < 1:
            raise InputError(f"samples is {samples}, but must be at least 1.")
        self.estimator, self.samples = estimator, samples
        self.signed = estimator == "hutchinson"  # type: ignore[misc]  # the class attribute is the default
        super().__init__(model, graph, **options)
        self._random = torch.Generator().manual_seed(seed)
        self._sums: SliceSums | None = None

    def _unscorable(self) -> dict[str, str]:
        modules = dict(self.model.named_modules())
        kinds = (nn.modules.conv._ConvNd, nn.Linear)
        found = {}
        for name, group in self.graph.groups.items():
            strange = [station.layer for station in filters(group) if not isinstance(modules.get(station.layer), kinds)]
            if strange or not group.filters:
                found[name] = f"{', '.join(strange) or name} is no convolution or linear layer"
        return found

    def _measure(self, minibatch: Minibatch | None) -> Tensor:
        assert minibatch is not None
        if self._sums is None:
            self._sums = SliceSums(self.model, self.graph, filters)
        sums = self._sums
        estimate = self._fisher if self.estimator == "fisher" else self._hutchinson
        diagonal = estimate(minibatch, sums.tensors)
        return combined(sums, sums.rows(lambda name, value: value.square() * diagonal[name] / 2), self.combine)

    def _hutchinson(self, minibatch: Minibatch, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for _ in range(self.samples):
            signs = {
                name: (torch.randint(2, weight.shape, generator=self._random) * 2 - 1).to(weight)
                for name, weight in weights.items()
            }
            _, product = _hessian_vector(self.model, minibatch, signs)
            for name in weights:
                total[name] += signs[name] * product[name] / self.samples
        return total

    def _fisher(self, minibatch: Minibatch, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        _check_trainable(weights)
        handles = []
        with aside(self.model), torch.enable_grad():
            for name in weights:
                module = self.model.get_submodule(layer_of(name))
                handles.append(module.register_forward_hook(_squares(total[name], minibatch.images)))
            try:
                loss = minibatch.loss(self.model(*minibatch.inputs))
            finally:
                for handle in handles:
                    handle.remove()
            torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return total

    def _widths_changed(self) -> None:
        self._sums = None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "random": self._random.get_state()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self._random.set_state(state["random"])


def _hessian_vector(
    model: nn.Module, minibatch: Minibatch, direction: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient of the loss by the named parameters, and the Hessian among them times `direction`."""
    parameters = dict(model.named_parameters())
    names = list(direction)
    _check_trainable({name: parameters[name] for name in names})
    chosen = [parameters[name] for name in names]
    with aside(model), torch.enable_grad(), _twice_differentiable():
        loss = minibatch.loss(model(*minibatch.inputs))
        # Unused are the layers that run in training mode only: auxiliary heads.
        gradients = torch.autograd.grad(loss, chosen, create_graph=True, allow_unused=True, materialize_grads=True)
        curved = [(gradient, name) for gradient, name in zip(gradients, names, strict=True) if gradient.requires_grad]
        products = torch.autograd.grad(
            [gradient for gradient, _ in curved],
            chosen,
            [direction[name] for _, name in curved],
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(names, (g.detach() for g in gradients), strict=True)), dict(zip(names, products, strict=True))


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise WorkError(
                f"{name} takes no gradient, so its channels cannot be scored: unfreeze the layer, or name it in ignore."
            )


def _squares(total: Tensor, images: int) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that adds to `total`, shaped as the layer's weight, 1/N Σ_n (∂E_n/∂w)²."""

    calls: list[tuple[Tensor, list[Tensor]]] = []  # a layer that runs several times has one gradient

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        features = inputs[0].detach().clone()  # the next layer may write into it
        weight: Tensor = module.get_parameter("weight").detach()
        bare: Any = copy.copy(module)  # without the hooks of whoever else watches the layer
        bare.__dict__ = {
            **module.__dict__,
            "_parameters": dict(module._parameters),
            "_forward_hooks": OrderedDict(),
            "_forward_pre_hooks": OrderedDict(),
        }

        def gradient_of(one: Tensor, upstream: Tensor) -> Tensor:
            pull = vjp(lambda value: functional_call(bare, {"weight": value}, one[None]), weight)[1]
            return pull(upstream[None])[0]

        own: list[Tensor] = []
        calls.append((features, own))

        def backward(gradient: Tensor) -> None:
            own.append(gradient)
            if not all(gradients for _, gradients in calls):
                return
            portion = max(1, _PER_EXAMPLE_BYTES // (weight.numel() * weight.element_size()))
            for start in range(0, len(features), portion):
                part = slice(start, start + portion)
                each: Any = sum(vmap(gradient_of)(one[part], gradients[0][part]) for one, gradients in calls)
                # The loss is a mean over N images: N times larger is an image's own gradient.
                total.add_(each.square().sum(0) * images)
            calls.clear()

        output.register_hook(backward)

    return forward
