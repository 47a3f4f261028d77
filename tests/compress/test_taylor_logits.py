"""taylor-logits: the loss at the logits that a first-order expansion gives."""

import pytest
import torch
from gates_by_hand import CLOSE, each_net, gated, minibatch, places, prepared, scores_of
from test_importance import GATES
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import InputError
from compress.graph import trace
from compress.importance import Minibatch, build


def slopes(model: nn.Module, where: list[tuple[str, int]], width: int) -> Tensor:
    """(images, classes, channels): derivatives of the logits by one gate at all of these places."""
    (images,) = minibatch().inputs

    def logits(gate: Tensor) -> Tensor:
        with gated(model, dict.fromkeys(where, gate)):
            return model(images)

    return torch.autograd.functional.jacobian(logits, torch.ones(width, dtype=torch.double))


@each_net
@pytest.mark.parametrize("outputs", [1, 2, 10])
def test_score_is_the_change_of_loss_at_the_expanded_logits(net: type[nn.Module], outputs: int) -> None:
    model, graph = prepared(net)
    one = minibatch()
    scores = scores_of(f"taylor-logits:outputs={outputs}", model, graph)
    logits = model(*one.inputs).detach()
    for group in GATES[net]:
        width = graph.groups[group].width
        slope = slopes(model, places(net, group), width)
        expected = []
        for channel in range(width):
            estimate = logits.clone()
            for image in range(len(logits)):
                for output in logits[image].argsort(descending=True)[:outputs].tolist():
                    estimate[image, output] -= slope[image, output, channel]
            expected.append((one.loss(estimate) - one.loss(logits)).square())
        torch.testing.assert_close(scores[group], torch.stack(expected), **CLOSE)


def test_it_is_the_oracle_where_the_network_is_linear_behind_the_gates() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()
    images, labels = torch.randn(7, 4, dtype=torch.double), torch.arange(7) % 3
    graph = trace(model, images)
    one = Minibatch((images,), lambda logits: F.cross_entropy(logits, labels))
    estimated, measured = (build(name, model, graph) for name in ("taylor-logits", "oracle"))
    for importance in (estimated, measured):
        importance.observe(one)
    found, truth = estimated.scores(), measured.scores()
    assert set(found) == {"0", "1"}
    for group, values in truth.items():
        torch.testing.assert_close(found[group], values, rtol=1e-9, atol=1e-18)


def test_no_hook_and_no_gradient_stays_behind() -> None:
    model, graph = prepared(next(iter(GATES)))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    build("taylor-logits", model, graph).observe(minibatch())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_it_cannot_score_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.second(self.first(x))
            return y, y * 2

    model = Pair()
    images = torch.randn(4, 4)
    graph = trace(model, images)
    with pytest.raises(InputError, match=r"logits of \(images, classes\)"):
        build("taylor-logits", model, graph).observe(Minibatch((images,), lambda pair: pair[0].sum()))
    with pytest.raises(InputError, match="outputs is 0"):
        build("taylor-logits:outputs=0", model, graph)
