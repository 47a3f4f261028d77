"""Pruning and training on a GPU; skipped where there is none."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compress import models
from compress.budget import Budget
from compress.graph import trace
from compress.importance import Minibatch, build, criteria
from compress.pruner import Pruner
from compress.training import TrainingConfig, evaluate, fit

pytestmark = pytest.mark.gpu

IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 10


@pytest.mark.parametrize("criterion", [name for name in criteria() if name != "random"])
def test_scores_equal_those_of_the_cpu(criterion: str) -> None:
    torch.manual_seed(0)
    model = models.build("espalier:resnet20").double()
    images = IMAGES[:8, :, ::2, ::2].double()
    graph = trace(model, images[:1])
    on_gpu = copy.deepcopy(model).cuda()
    scores = []
    for network, device in ((model, "cpu"), (on_gpu, "cuda")):
        importance = build(criterion, network, graph)
        one = Minibatch((images.to(device),), partial(F.cross_entropy, target=LABELS[:8].to(device)))
        one.loss(network(*one.inputs)).backward()
        importance.observe(one)
        scores.append(importance.scores())
        importance.close()
    for name, values in scores[0].items():
        torch.testing.assert_close(scores[1][name].cpu(), values, rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_fit_prunes_on_the_gpu_and_brings_the_model_back(precision: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = models.build("espalier:resnet20")
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    pruner = Pruner(model, IMAGES[:1], budget=Budget(macs=0.5), events=3, interval=2)
    config = TrainingConfig(schedule="constant", learning_rate=0.01, precision=precision)
    fit(model, loader, config, seed=0, pruner=pruner)
    assert pruner.finished
    assert pruner.kept <= 0.5
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert evaluate(model, loader).samples == 32


def test_a_users_loop_on_the_gpu() -> None:
    torch.manual_seed(0)
    model = models.build("espalier:resnet20").cuda()
    images, labels = IMAGES.cuda(), LABELS.cuda()
    pruner = Pruner(model, images[:1], budget=Budget(parameters=0.5), events=2, interval=2)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        pruner.step(optimizer)
        optimizer.step()
    assert pruner.kept <= 0.5
