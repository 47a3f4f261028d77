import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compress.errors import InputError, WorkError
from compress.training import Distillation, History, TrainingConfig, evaluate, fit

CONSTANT = TrainingConfig(epochs=4, learning_rate=0.05, schedule="constant")
COSINE = TrainingConfig(epochs=4, learning_rate=0.05)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class KillError(Exception):
    pass


class Net(nn.Module):
    """Convolutions of 8 and 4 channels, a normalisation, and dropout that draws random numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        features = self.second(torch.relu(self.norm(self.first(images))))
        return self.head(self.drop(features.amax(dim=(2, 3))))


class LeastGradientPruner:
    """Removes a channel of `Net.first` every `interval` minibatches: that with the least summed gradient."""

    def __init__(self, model, *, interval=3, keep=4):
        self.model, self.interval, self.keep = model, interval, keep
        self.kept = list(range(8))
        self.minibatches = 0
        self.scores = torch.zeros(8)

    @property
    def finished(self):
        return len(self.kept) == self.keep

    needs = frozenset({"gradients"})

    def step(self, optimizer=None, loss=None, minibatch=None):
        self.scores += self.model.norm.weight.grad.abs()
        self.minibatches += 1
        if self.minibatches % self.interval:
            return None
        left = [channel for channel in range(len(self.kept)) if channel != int(self.scores.argmin())]
        self.remove_all_but(left, optimizer)
        self.kept = [self.kept[channel] for channel in left]
        self.scores = torch.zeros(len(self.kept))
        return loss

    def remove_all_but(self, left, optimizer=None):
        model = self.model
        left = torch.tensor(left)
        for parameter, dim in (
            (model.first.weight, 0),
            (model.norm.weight, 0),
            (model.norm.bias, 0),
            (model.second.weight, 1),
        ):
            parameter.data = parameter.data.index_select(dim, left)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.index_select(dim, left)
            for name, value in (optimizer.state[parameter] if optimizer else {}).items():
                if torch.is_tensor(value) and value.dim():
                    optimizer.state[parameter][name] = value.index_select(dim, left)
        model.norm.running_mean = model.norm.running_mean[left]
        model.norm.running_var = model.norm.running_var[left]
        model.norm.num_features = model.first.out_channels = model.second.in_channels = len(left)

    def state_dict(self):
        return {"kept": list(self.kept), "minibatches": self.minibatches, "scores": self.scores}

    def load_state_dict(self, state):
        self.remove_all_but(state["kept"])
        self.kept, self.minibatches, self.scores = list(state["kept"]), state["minibatches"], state["scores"]


class NoisyLoader:
    """Noisy batches from the global generator; raises `KillError` in the pass number `fails_in`."""

    batch_size = 8

    def __init__(self, loader, fails_in=None):
        self.loader, self.fails_in, self.passes = loader, fails_in, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.passes += 1
        for number, (images, labels) in enumerate(self.loader):
            if self.passes == self.fails_in and number == 2:
                raise KillError
            yield images + 0.1 * torch.randn_like(images), labels


def stripes(samples=40):
    """Separable images (1, 6, 6): noise, a bright row or a bright column."""
    generator = torch.Generator().manual_seed(0)
    images = 0.1 * torch.randn(samples, 1, 6, 6, generator=generator)
    labels = torch.arange(samples) % 3
    images[labels == 1, :, 2, :] += 1
    images[labels == 2, :, :, 2] -= 1
    return TensorDataset(images, labels)


def batches(batch_size=8, shuffle=True):
    return DataLoader(stripes(), batch_size=batch_size, shuffle=shuffle)


def new_net(seed=1):
    torch.manual_seed(seed)
    return Net()


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_seconds(history):
    return [replace(epoch, seconds=0.0) for epoch in history.epochs]


def test_a_separable_problem_is_learnt():
    model = new_net()
    config = TrainingConfig(epochs=15, learning_rate=0.1, warmup_epochs=1)
    history = fit(model, batches(), config, seed=0, test_loader=batches(shuffle=False))
    assert history.epochs[-1].train_loss < 0.5 * history.epochs[0].train_loss
    assert history.epochs[-1].test.top1 > 90
    assert history.epochs[-1].test.samples == 40
    assert not model.training
    assert model.first.weight.stride() == nn.Conv2d(1, 8, 3).weight.stride()


def test_one_step_equals_plain_torch():
    model, plain = new_net(), new_net()
    model.drop.p = plain.drop.p = 0.0
    everything = batches(batch_size=40, shuffle=False)
    config = TrainingConfig(
        epochs=2, learning_rate=0.1, momentum=0.9, weight_decay=0.01, schedule="constant", label_smoothing=0.1
    )
    fit(model, everything, config, seed=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    (images, labels) = next(iter(everything))
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_history_survives_json_and_counts():
    history = fit(new_net(), batches(), COSINE, seed=0, test_loader=batches(shuffle=False))
    assert History.from_dict(json.loads(json.dumps(history.as_dict()))) == history
    assert history.steps == 20
    assert [epoch.steps for epoch in history.epochs] == [5, 5, 5, 5]
    # Cosine over 20 steps, one before the end: 0.05 (1 + cos(19 pi / 20)) / 2.
    assert history.epochs[-1].learning_rate == pytest.approx(3.0779e-4, rel=1e-4)


def test_same_seed_same_weights_other_seed_other_weights():
    models = [new_net(), new_net(), new_net()]
    for model, seed in zip(models, (3, 3, 4), strict=True):
        torch.rand(seed)  # the state of the global generator before the call does not matter
        fit(model, NoisyLoader(batches()), COSINE, seed=seed)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path, optimizer):
    config = COSINE.model_copy(update={"optimizer": optimizer, "distillation": Distillation()})
    arguments = {"seed": 5, "teacher": new_net(seed=2), "test_loader": batches(shuffle=False)}
    unbroken, broken, resumed = new_net(), new_net(), new_net()
    history = fit(unbroken, NoisyLoader(batches()), config, **arguments)
    state = tmp_path / "state.pt"
    with pytest.raises(KillError):
        fit(broken, NoisyLoader(batches(), fails_in=3), config, state_path=state, **arguments)
    rest = NoisyLoader(batches())
    again = fit(resumed, rest, config, state_path=state, **arguments)
    assert rest.passes == 2
    assert same_weights(unbroken, resumed)
    assert without_seconds(again) == without_seconds(history)
    assert state.exists()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_pruning_ends_as_an_unbroken_one(tmp_path, optimizer):
    config = CONSTANT.model_copy(update={"optimizer": optimizer})
    state = tmp_path / "state.pt"
    results = []
    for fails_in, path in ((None, None), (3, state), (None, state)):
        model = new_net()
        pruner = LeastGradientPruner(model, interval=4)
        loader = NoisyLoader(batches(), fails_in)
        if fails_in:
            with pytest.raises(KillError):
                fit(model, loader, config, seed=5, pruner=pruner, state_path=path)
        else:
            results.append((model, pruner, fit(model, loader, config, seed=5, pruner=pruner, state_path=path), loader))
    (unbroken, one, history, _), (resumed, other, again, rest) = results
    assert rest.passes == 2  # 16 minibatches in epochs of 5; two epochs were saved
    assert one.kept == other.kept
    assert resumed.first.weight.shape == (4, 1, 3, 3)
    assert same_weights(unbroken, resumed)
    assert without_seconds(again) == without_seconds(history)


def test_pruning_ends_at_the_minibatch_that_reaches_the_budget(tmp_path):
    model = new_net()
    pruner = LeastGradientPruner(model, interval=3, keep=4)
    config = TrainingConfig(epochs=1, learning_rate=0.05, schedule="constant")
    state = tmp_path / "state.pt"
    history = fit(model, batches(), config, seed=0, pruner=pruner, state_path=state)
    # 4 removals, one every 3 minibatches, in epochs of 5: `epochs=1` does not stop it.
    assert [epoch.steps for epoch in history.epochs] == [5, 5, 2]
    assert pruner.minibatches == 12

    fresh = new_net()
    finished = LeastGradientPruner(fresh, interval=3, keep=4)
    loader = NoisyLoader(batches())
    assert fit(fresh, loader, config, seed=0, pruner=finished, state_path=state) == history
    assert loader.passes == 0
    assert same_weights(fresh, model)


def test_state_of_another_training_is_refused_with_what_differs(tmp_path):
    state = tmp_path / "state.pt"
    fit(new_net(), batches(), COSINE, seed=0, state_path=state)
    other = COSINE.model_copy(update={"learning_rate": 0.2})
    with pytest.raises(
        InputError, match=r"state\.pt.+\(learning_rate was 0\.05 and is now 0\.2; seed was 0 and is now 1\)"
    ):
        fit(new_net(), batches(), other, seed=1, state_path=state)
    with pytest.raises(InputError, match="training batches was 5 and is now 10"):
        fit(new_net(), batches(batch_size=4), COSINE, seed=0, state_path=state)
    with pytest.raises(InputError, match="model structure"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), batches(), COSINE, seed=0, state_path=state)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "other"])
def test_a_damaged_state_is_refused_by_name(tmp_path, damage):
    state = tmp_path / "state.pt"
    fit(new_net(), batches(), COSINE, seed=0, state_path=state)
    content = state.read_bytes()
    if damage == "other":
        torch.save([1, 2], state)
    else:
        state.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\x80nonsense", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"state\.pt.+delete it"):
        fit(new_net(), batches(), COSINE, seed=0, state_path=state)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt():
    images, labels = stripes().tensors
    images[20] = float("inf")
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    model = new_net()
    with pytest.raises(WorkError, match=r"nan at epoch 1, step 3 of 5.+0\.05.+lower learning_rate"):
        fit(model, loader, CONSTANT, seed=0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_teacher_alone_teaches_what_it_knows():
    teacher = new_net()
    fit(teacher, batches(), TrainingConfig(epochs=15, learning_rate=0.1), seed=0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images, labels = stripes().tensors
    wrong = DataLoader(TensorDataset(images, (labels + 1) % 3), batch_size=8, shuffle=True)
    student = new_net(seed=9)
    config = TrainingConfig(epochs=15, learning_rate=0.1, distillation=Distillation(weight=1.0, temperature=2.0))
    fit(student, wrong, config, seed=0, teacher=teacher)
    assert evaluate(student, batches()).top1 > 90
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bfloat16_learns_too():
    history = fit(new_net(), batches(), COSINE.model_copy(update={"precision": "bf16", "epochs": 8}), seed=0)
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss


def test_one_line_an_epoch_is_logged_where_no_terminal_is(caplog):
    with caplog.at_level(logging.INFO, logger="compress.training"):
        fit(new_net(), batches(), COSINE, seed=0, test_loader=batches(), description="fine-tuning")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert lines[1].startswith("fine-tuning: epoch 2/4, loss ")
    assert "top-1" in lines[1]


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        (COSINE, {"teacher": Net()}, "both a teacher and the setting"),
        (COSINE.model_copy(update={"distillation": Distillation()}), {}, "both a teacher and the setting"),
        (COSINE, {"pruner": LeastGradientPruner(Net())}, "schedule: constant"),
    ],
)
def test_arguments_that_contradict_each_other(config, extra, message):
    with pytest.raises(InputError, match=message):
        fit(new_net(), batches(), config, seed=0, **extra)


def test_loaders_that_cannot_be_used():
    empty = DataLoader(stripes(4), batch_size=8, drop_last=True)
    with pytest.raises(InputError, match=r"no batch.+data\.batch_size"):
        fit(new_net(), empty, COSINE, seed=0)
    with pytest.raises(InputError, match="no length"):
        fit(new_net(), (batch for batch in batches()), COSINE, seed=0)
    with pytest.raises(InputError, match="no batch in epoch 2"):
        fit(new_net(), iter(batches()), COSINE, seed=0)
    assert fit(new_net(), batches(), COSINE.model_copy(update={"epochs": 0}), seed=0) == History()


def test_outputs_of_training_mode_that_are_no_tensor():
    class Auxiliary(Net):
        def forward(self, images):
            logits = super().forward(images)
            return (logits, logits) if self.training else logits

    with pytest.raises(InputError, match="tuple in training mode"):
        fit(Auxiliary(), batches(), COSINE, seed=0)
