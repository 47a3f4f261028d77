"""What all criteria share: needs, options, averages, removals, and the sentences when they cannot score a model."""

from typing import Any

import pytest
import torch
from gates_by_hand import assert_scores, minibatch, prepared, scores_of
from random_nets import Spec
from random_nets import build as random_net
from random_nets import inputs as random_images
from test_importance import Concatenation, Plain, Residual, backward, batch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import InputError, WorkError
from compress.graph import trace
from compress.importance import Importance, Minibatch, build, criteria, criterion

# --- options and registry --------------------------------------------------------------------------------------------

NEEDS = {
    "bn-scale": set(),
    "bn-taylor": {"gradients"},
    "hessian": {"minibatch"},
    "magnitude": set(),
    "obd": {"minibatch"},
    "oracle": {"minibatch"},
    "random": set(),
    "taylor": {"gradients"},
    "taylor-fg": {"activations"},
    "taylor-logits": {"minibatch"},
    "taylor-output": {"activations"},
    "taylor-so": {"minibatch"},
    "taylor-so-full": {"minibatch"},
    "taylor-weight": {"gradients"},
}


def test_needs_of_every_criterion() -> None:
    assert criteria() == sorted(NEEDS)
    for name, needs in NEEDS.items():
        kind, options = criterion(name)
        assert (kind.name, set(kind.needs), options) == (name, needs, {})


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if "minibatch" in needs])
def test_a_criterion_that_runs_the_network_asks_for_the_minibatch(name: str) -> None:
    model, graph = prepared(Residual)
    with pytest.raises(WorkError, match=f"The criterion {name} runs the network by itself: give pruner.step"):
        build(name, model, graph).observe()


@pytest.mark.parametrize(
    ("inputs", "images"),
    [
        ((torch.zeros(4, 3, 8, 8),), 4),
        ((torch.tensor(0.5), {"pixels": torch.zeros(5, 3, 8, 8)}), 5),
        (([torch.zeros(3, 8, 9), torch.zeros(3, 9, 8)], [{"boxes": torch.zeros(6, 4)}] * 2), 2),  # a detector's
        (((torch.zeros(7, 3, 8, 8), torch.zeros(7, 2)),), 7),
    ],
)
def test_images_of_a_minibatch_are_counted(inputs: tuple[Any, ...], images: int) -> None:
    assert Minibatch(inputs, torch.sum).images == images


def test_a_minibatch_without_a_tensor_has_no_images() -> None:
    with pytest.raises(WorkError, match="no tensor is among the inputs"):
        _ = Minibatch(("text",), torch.sum).images


def test_options_have_the_types_of_their_defaults() -> None:
    assert criterion("taylor:combine=mean:momentum=0:normalise=true")[1] == {
        "combine": "mean",
        "momentum": 0.0,
        "normalise": True,
    }
    assert criterion("hessian:samples=4:seed=7:estimator=hutchinson:normalise=false")[1] == {
        "samples": 4,
        "seed": 7,
        "estimator": "hutchinson",
        "normalise": False,
    }
    model, graph = prepared(Residual)
    importance = build("taylor:combine=mean:momentum=0", model, graph, momentum=0.5, normalise=True)
    assert (importance.combine, importance.momentum, importance.normalise) == ("mean", 0.0, True)  # the text goes first
    assert build("taylor-output", model, graph).normalise
    assert not build("taylor-output:normalise=false", model, graph).normalise


SENTENCES = {
    "tailor": r"importance is 'tailor', which is no criterion: did you mean 'taylor'\?",
    "hesian": r"did you mean 'hessian'\?",
    "xyz": r"importance is 'xyz', which is no criterion: choose one of bn-scale, bn-taylor, .*taylor-weight\.",
    "taylor:speed=1": r"taylor has no option 'speed': it has momentum, combine, normalise\.",
    "magnitude:samples=1": r"magnitude has no option 'samples': it has momentum, combine, normalise, norm\.",
    "taylor:": r"taylor has no option '': it has",
    "taylor:momentum=x": r"'momentum=x' is no value for the option momentum of taylor: write taylor:momentum=0\.9\.",
    "hessian:samples=1.5": r"'samples=1\.5' is no value for the option samples of hessian: write hessian:samples=1\.",
    "taylor:combine": r"The option combine of taylor has no value: write taylor:combine=joint\.",
    "taylor:momentum": r"The option momentum of taylor has no value: write taylor:momentum=0\.9\.",
    "taylor:normalise": r"The option normalise of taylor has no value: write taylor:normalise=false\.",
    "taylor:normalise=1": r"'normalise=1' is no value for the option normalise of taylor: write taylor:normalise=false",
    "taylor:momentum=1": r"momentum is 1\.0, but must lie in \[0, 1\)\.",
    "taylor:momentum=-0.1": r"momentum is -0\.1, but must lie in \[0, 1\)\.",
    "taylor:momentum=nan": r"momentum is nan, but must lie in \[0, 1\)\.",
    "taylor:combine=sum": r"combine is 'sum', but must be one of joint, mean, max, shared-gate\.",
    "magnitude:combine=shared-gate": r"'shared-gate', which magnitude does not offer: choose one of joint, mean, max\.",
    "oracle:combine=mean": r"combine is 'mean', which oracle does not offer: choose one of joint\.",
    "magnitude:norm=l3": r"norm is 'l3', but must be l1 or l2\.",
    "hessian:estimator=exact": r"estimator is 'exact', but must be fisher or hutchinson\.",
    "hessian:samples=0": r"samples is 0, but must be at least 1\.",
    "oracle:reduction=mean": r"reduction is 'mean', but must be one of squared, absolute, signed\.",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_a_wrong_option_is_one_sentence(text: str) -> None:
    model, graph = prepared(Residual)
    with pytest.raises(InputError, match=SENTENCES[text]):
        build(text, model, graph)


def test_what_a_sentence_says_to_write_is_accepted() -> None:
    model, graph = prepared(Residual)
    for text in (
        "taylor:normalise=yes",
        "taylor:momentum=high",
        "taylor:combine",
        "hessian:samples=x",
        "hessian:seed=",
    ):
        with pytest.raises(InputError) as caught:
            build(text, model, graph)
        advice = str(caught.value).rpartition("write ")[2].removesuffix(".")
        build(advice, model, graph)


@pytest.mark.parametrize("name", ["magnitude", "taylor", "taylor-fg", "taylor-output", "hessian", "oracle"])
def test_normalise_divides_each_group_by_its_norm(name: str) -> None:
    model, graph = prepared(Residual)
    plain = scores_of(name, model, graph, normalise=False)
    expected = {group: values / values.square().sum().sqrt() for group, values in plain.items()}
    assert_scores(scores_of(name, model, graph, normalise=True), expected)


def test_normalise_leaves_a_group_of_zeros() -> None:
    model, graph = prepared(Residual)
    nn.init.zeros_(model.inner.weight)
    assert scores_of("magnitude:normalise=true", model, graph)["inner"].tolist() == [0.0] * 5


@pytest.mark.parametrize("name", ["taylor", "taylor-fg", "oracle", "hessian:estimator=hutchinson"])
def test_scores_are_averaged_over_minibatches_and_events(name: str) -> None:
    model, graph = prepared(Residual)

    def one_of(seed: int) -> dict[str, Tensor]:
        return observed(build(f"{name}:momentum=0", model, graph), (seed,))

    def observed(importance: Importance, seeds: tuple[int, ...]) -> dict[str, Tensor]:
        for seed in seeds:
            backward(model, seed)
            importance.observe(minibatch(seed))
        return importance.scores()

    if name.startswith("hessian"):  # draws anew for every minibatch
        importance = build(f"{name}:momentum=0", model, graph)
        singles = {seed: observed(importance, (seed,)) for seed in (1, 2, 3)}
    else:
        singles = {seed: one_of(seed) for seed in (1, 2, 3)}
    importance = build(f"{name}:momentum=0.25", model, graph)
    first = observed(importance, (1, 2))
    means = {group: (singles[1][group] + singles[2][group]) / 2 for group in graph.groups}
    assert_scores(first, means)
    second = observed(importance, (3,))
    assert_scores(second, {group: means[group] / 4 + singles[3][group] * 3 / 4 for group in graph.groups})
    importance.close()


@pytest.mark.parametrize("name", [name for name, needs in NEEDS.items() if not needs and name != "random"])
def test_a_criterion_that_needs_nothing_is_not_averaged(name: str) -> None:
    model, graph = prepared(Residual)
    importance = build(name, model, graph, momentum=0.9)
    importance.observe()
    importance.scores()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    importance.observe()
    importance.observe()
    assert_scores(importance.scores(), scores_of(name, model, graph))
    with pytest.raises(WorkError, match="No minibatch was observed"):
        importance.scores()


@pytest.mark.parametrize("name", sorted(set(NEEDS) - {"random", "taylor-so"}))
def test_scores_after_a_removal_are_those_of_the_smaller_network(name: str) -> None:
    model, graph = prepared(Residual)
    importance = build(name, model, graph, momentum=0.0)
    backward(model, 1)
    importance.observe(minibatch())
    importance.scores()
    removals, widths = {"stem": torch.tensor([0, 3]), "inner": torch.tensor([4])}, graph.widths
    graph.remove_from(model, removals)
    importance.removed(removals, widths)
    with pytest.raises(WorkError, match="No minibatch was observed"):
        importance.scores()
    backward(model, 1)
    importance.observe(minibatch())
    importance.close()
    fresh = trace(model, batch(0)[0])
    assert_scores(importance.scores(), scores_of(name, model, fresh))


def test_averages_of_removed_channels_go_and_those_of_the_others_stay() -> None:
    model, graph = prepared(Residual)
    importance = build("oracle:momentum=0.5", model, graph)
    importance.observe(minibatch())
    before = importance.scores()
    removals, widths = {"stem": torch.tensor([0, 3])}, graph.widths
    graph.remove_from(model, removals)
    importance.removed(removals, widths)
    importance.observe(minibatch())
    now = scores_of("oracle", model, graph)
    stem = (before["stem"][[1, 2, 4, 5]] + now["stem"]) / 2
    assert_scores(importance.scores(), {"stem": stem, "inner": (before["inner"] + now["inner"]) / 2})


# --- a criterion that cannot score a model says so -------------------------------------------------------------------

CANNOT = [
    ("bn-scale", Plain, r"bn-scale cannot score 3 of 3 channel groups \(first: .* follows first; second: .*hidden"),
    ("bn-taylor", Plain, r"bn-taylor cannot score 3 of 3 channel groups \(first: .* follows first; second: .*hidden"),
    (
        "bn-scale",
        Concatenation,
        r"bn-scale cannot score 1 of 3 channel groups \(last: no norm.* follows last\): choose",
    ),
    ("taylor-fg", "layer-scale", r"taylor-fg cannot score 1 of 2 .*\(0\.0\.0: the channels of 1 are not"),
    ("taylor-output", "layer-scale", r"taylor-output cannot score 1 of 2 .*\(0\.0\.0: the channels of 1 are"),
    ("hessian", "own", r"hessian cannot score 1 of 2 channel groups \(own: own is no convolution or linear layer\)"),
    ("taylor-fg", "own", r"taylor-fg cannot score 1 of 2 channel groups \(own: the channels of own are not those of a"),
]


class OwnLinear(nn.Module):
    """A linear layer that is no `nn.Linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 8), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class OwnLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.hidden, self.head = OwnLinear(2 * 8 * 8, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.own(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize(("name", "net", "sentence"), CANNOT)
def test_a_criterion_that_cannot_score_a_model_names_the_layers(name: str, net: object, sentence: str) -> None:
    if net == "layer-scale":
        model = random_net(Spec(8, (("layer-scale", 4),), "mean", seed=0))
        graph = trace(model, random_images())
    else:
        model, graph = prepared(OwnLayers if net == "own" else net)
    with pytest.raises(InputError, match=sentence + r".*ignore\.$" if "choose" not in sentence else sentence):
        build(name, model, graph)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_processes_that_train_together_score_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, of which the other one's scores are 1 higher."""
    model, graph = prepared(Residual)
    alone = scores_of("oracle", model, graph)
    importance = build("oracle", model, graph)
    importance.observe(minibatch())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.mul_(2).add_(1))
    for name, values in importance.scores().items():
        torch.testing.assert_close(values, alone[name] + 0.5)
