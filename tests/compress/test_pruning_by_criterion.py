"""Pruning while training by every criterion there is."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress.budget import Budget
from compress.errors import InputError, WorkError
from compress.importance import criteria
from compress.pruner import Pruner
from compress.training import TrainingConfig, fit


class Net(nn.Module):
    """A residual stream and an inner width, small enough for second derivatives at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        y = F.relu(self.inner_norm(self.inner(x)), inplace=True)
        return self.head(F.relu(x + self.outer_norm(self.outer(y)), inplace=True).mean((2, 3)))


CONFIG = TrainingConfig(epochs=1, learning_rate=0.05, schedule="constant")


def loader(images: int = 24) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % 3
    pictures = torch.randn(images, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(pictures, labels), batch_size=8)


def pruner(model: nn.Module, importance: str, events: int = 2) -> Pruner:
    return Pruner(
        model,
        torch.zeros(2, 1, 6, 6),
        budget=Budget(channels=0.6),
        importance=importance,
        events=events,
        interval=2,
        round_to=1,
    )


@pytest.mark.parametrize(
    "importance",
    [*criteria(), "taylor:combine=shared-gate", "hessian:estimator=hutchinson", "oracle:reduction=signed"],
)
def test_every_criterion_prunes_a_network_while_it_trains(importance: str) -> None:
    torch.manual_seed(0)
    model = Net()
    chosen = pruner(model, importance)
    fit(model, loader(), CONFIG, seed=0, pruner=chosen)
    assert chosen.finished
    assert chosen.kept <= 0.6
    assert len(chosen.history) == 2
    assert all(event.removed for event in chosen.history)
    assert torch.isfinite(model(torch.zeros(1, 1, 6, 6))).all()
    # Nothing goes on watching the network when pruning has finished.
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "importance", ["taylor-fg", "taylor-output", "oracle", "hessian:estimator=hutchinson", "random"]
)
def test_a_resumed_pruning_removes_what_an_unbroken_one_removes(importance: str) -> None:
    def one_step(model: nn.Module, chosen: Pruner, images: Tensor, labels: Tensor) -> None:
        from compress.importance import Minibatch

        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        chosen.step(minibatch=Minibatch((images,), lambda logits: F.cross_entropy(logits, labels)))

    torch.manual_seed(0)
    model = Net().eval()  # no running statistics that a resumed network would not have
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    unbroken = pruner(model, importance)
    batches = [*loader(), *loader()][:4]
    state = None
    for number, (images, labels) in enumerate(batches):
        if number == 3:
            state = unbroken.state_dict()
            widths = {name: value.clone() for name, value in model.state_dict().items()}
        one_step(model, unbroken, images, labels)
    again = Net().eval()
    again.load_state_dict(weights)
    resumed = pruner(again, importance)
    assert state is not None
    resumed.load_state_dict(state)
    again.load_state_dict(widths)
    one_step(again, resumed, *batches[3])
    assert [event.removed for event in resumed.history] == [event.removed for event in unbroken.history]


def test_a_criterion_on_activations_refuses_scaled_gradients_before_training() -> None:
    model = Net()
    config = CONFIG.model_copy(update={"precision": "fp16"})
    with pytest.raises(InputError, match=r"scales the gradients of activations.*prune\.training\.precision"):
        fit(model, loader(), config, seed=0, pruner=pruner(model, "taylor-fg"))


def test_a_loop_of_ones_own_that_gives_no_minibatch_is_told_what_to_give() -> None:
    model = Net()
    chosen = pruner(model, "oracle")
    images, labels = next(iter(loader()))
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(WorkError, match=r"compress\.Minibatch\(inputs, loss\)"):
        chosen.step()
