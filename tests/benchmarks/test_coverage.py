"""The coverage table: tiny models through every stage, limits, and what the table says of made-up rows."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage.__main__ import main
from benchmarks.coverage.building import randomised
from benchmarks.coverage.catalogue import SETS, chosen
from benchmarks.coverage.limits import ended, worked
from benchmarks.coverage.removals import kept_width, output_channels, random_removals
from benchmarks.coverage.rows import Failure, Request, Row, Share, Stage, read_row, write_row
from benchmarks.coverage.table import memory_beyond, page, seconds, summary_lines
from benchmarks.coverage.zeroing import relative_error, zeroed
from compress.errors import InputError
from compress.graph import trace

HERE = "tests.benchmarks.test_coverage"
GIB = 2**30


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def endless() -> nn.Module:
    time.sleep(600)
    return tiny()


def greedy() -> nn.Module:
    held = [torch.ones(2**26) for _ in range(40)]  # a quarter of a GiB each
    return nn.Sequential(tiny(), nn.ParameterList(held))


def fatal() -> nn.Module:
    raise SystemExit(3)


def request(model: str, **options: object) -> Request:
    given = {"size": 8, "build": {}, "part": None, "side": "espalier", "shares": (0.5, 0.75), "until": "runtime"}
    return Request.model_validate(given | {"trace": {}, "threads": 1, "model": model} | options)


@pytest.mark.slow
def test_a_model_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--models", f"{HERE}:tiny", "--ratio", "0.5", "--out", str(tmp_path), "--against", "torch-pruning"]
    assert main(command) == 0
    assert "50 % of the channels: 1 of 1 models pass." in capsys.readouterr().out
    document = json.loads((tmp_path / "coverage.json").read_text())
    ours, theirs = (Row.model_validate(row) for row in document["rows"])
    assert (ours.request.side, theirs.request.side) == ("espalier", "torch-pruning")
    # 3 x 16 x 9 weights, 16 scales, 16 shifts, 16 x 5 weights, 5 biases; half of the 16 channels go.
    assert (ours.parameters, ours.shares["0.5"].parameters) == (432 + 32 + 85, 216 + 16 + 45)
    size = 64 * 64
    assert (ours.macs, ours.shares["0.5"].macs) == (432 * size + 80, 216 * size + 40)
    assert ours.graph is not None
    assert (ours.graph.groups, ours.graph.removable, ours.graph.channels) == (1, 16, 21)
    assert [(left.reason, left.first) for left in ours.graph.left_out] == [("output of the model", ("5",))]
    half = ours.shares["0.5"]
    assert half.removed == pytest.approx(8 / 21)
    assert half.parity is not None
    assert half.parity < 1e-5
    assert half.effect is not None
    assert half.effect > 0.01
    assert len(half.losses) == 2
    assert set(half.runtime) == {"1", "3"}
    assert max(half.runtime.values()) < 1e-3
    assert list(half.stages) == ["removal", "parity", "costs", "training", "export", "runtime"]
    assert theirs.shares["0.5"].failure is None
    assert theirs.equal_groups
    text = (tmp_path / "coverage.md").read_text()
    assert f"| {HERE}:tiny | 64 | 1 | 76% |" in text
    assert "right on 1 of 1 models; on 1 of these its groups are ours, on 0 all that" in text


def test_rows_are_kept_until_something_else_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake(wanted: Request, *, timeout_s: float, memory_bytes: int) -> Row:
        asked.append(f"{wanted.model} {wanted.until} {timeout_s:g} {memory_bytes / GIB:g}")
        failure = Failure(stage="trace", kind="refused", reason="no rule") if wanted.model == "timm:bad" else None
        return Row(request=wanted, failure=failure)

    monkeypatch.setattr("benchmarks.coverage.__main__.worked", fake)
    command = ["--out", str(tmp_path), "--timeout", "5", "--memory", "2", "--models"]
    assert main([*command, "timm:good"]) == 0
    assert main([*command, "timm:good,timm:bad"]) == 1
    assert main([*command, "timm:good", "--until", "parity"]) == 0
    assert main([*command, "timm:good", "--until", "parity", "--again"]) == 0
    assert main([*command, "good"]) == 2
    assert asked == ["timm:good runtime 5 2", "timm:bad runtime 5 2", *["timm:good parity 5 2"] * 2]
    rows = json.loads((tmp_path / "coverage.json").read_text())["rows"]
    assert [(row["request"]["model"], row["request"]["until"]) for row in rows] == [
        ("timm:bad", "runtime"),
        ("timm:good", "parity"),
    ]


def test_limits() -> None:
    limits = {"timeout_s": 60.0, "memory_bytes": 64 * GIB}
    row = worked(request(f"{HERE}:endless"), timeout_s=0.5, memory_bytes=64 * GIB)
    assert row.failure == Failure(stage="build", kind="time", reason="more than 0.5 s")
    assert list(row.failures()) == ["0.5", "0.75"]
    row = worked(request(f"{HERE}:greedy"), timeout_s=60.0, memory_bytes=2 * GIB)
    assert row.failure == Failure(stage="build", kind="memory", reason="more than 2 GiB of memory")
    row = worked(request(f"{HERE}:fatal"), **limits)
    assert row.failure is not None
    assert (row.failure.kind, row.failure.reason) == ("died", "exit code 3: without a word")
    row = worked(request(f"{HERE}:absent"), **limits)
    assert row.failure is not None
    assert (row.failure.stage, row.failure.kind) == ("build", "refused")
    assert "has no 'absent'" in row.failure.reason


def test_a_process_that_is_stopped_in_a_share_spares_those_before() -> None:
    row = Row(request=request("a"), shares={"0.5": Share(parity=0.0)}, now=("export", "0.75"))
    assert ended(row, ("time", "more than 1 s")).failures() == {
        "0.5": None,
        "0.75": Failure(stage="export", kind="time", reason="more than 1 s"),
    }
    row = Row(request=request("a"), now=("groups", None))
    assert ended(row, ("time", "more than 1 s")).failures() == {"0.5": None, "0.75": None}
    assert row.difference == "not compared: more than 1 s"


@pytest.mark.parametrize(
    ("width", "share", "step", "kept"),
    [
        (64, 0.3, 8, 48),
        (64, 0.6, 8, 24),
        (16, 0.6, 8, 8),
        (16, 0.1, 8, 16),
        (8, 0.6, 8, 3),
        (3, 0.3, 1, 2),
        (2, 0.9, 8, 1),
    ],
)
def test_widths_are_multiples_where_that_is_possible(width: int, share: float, step: int, kept: int) -> None:
    assert kept_width(width, share, step) == kept


def test_removal_equals_zeroing_and_zeroing_differs_from_nothing() -> None:
    model = randomised(tiny()).eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(model, images[:1])
    removals = random_removals(graph, 0.5, seed=0)
    assert [len(gone) for gone in removals.values()] == [8]
    assert (graph.removable, output_channels(model)) == (16, 21)
    dense, reference = model(images), zeroed(model, graph, removals)(images)
    graph.remove_from(model, removals)
    assert relative_error(model(images), reference) < 1e-5
    assert relative_error(reference, dense) > 0.01


def test_relative_error_is_that_of_the_worst_output() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([4.0])
    assert relative_error({"a": one, "b": two + 1}, {"a": one, "b": two}) == 0.25
    assert relative_error(one, torch.tensor([1.0, float("nan")])) == float("inf")
    with pytest.raises(ValueError, match=r"shapes \(1,\) instead of \(2,\)"):
        relative_error(two, one)


def test_no_tensor_is_left_that_hides_an_error() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = tiny(), nn.Parameter(torch.full((5,), 1e-6))
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * self.scale * self.body(x)

    small = Scaled()
    small.body[5].weight.data.mul_(0.01)
    model = randomised(small)
    assert model.body[5].weight.std().item() == pytest.approx(16**-0.5)
    assert 0.5 <= model.scale.min().item() < model.scale.max().item() <= 1.5
    assert model.gain.item() >= 0.5
    norm = model.body[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor.unique().numel() == 16


def test_sets_and_patterns() -> None:
    assert len({subject.model.partition("_")[0] for subject in SETS["timm"]()}) > 45
    assert [subject.model for subject in chosen(["torchvision:vgg1?"])] == [
        f"torchvision:vgg{depth}" for depth in (11, 13, 16, 19)
    ]
    assert chosen(["torchvision:vit_b_16"])[0].build == {"image_size": 64}
    assert chosen(["torchvision:ssd300_vgg16"])[0].part == "backbone"
    assert chosen(["timm:vit_base_patch16_224"])[0].size == 224
    assert len(chosen(["quick", "quick"])) == 12
    with pytest.raises(InputError, match="fits no model"):
        chosen(["resnet*"])


def test_the_page_of_made_up_rows(tmp_path: Path) -> None:
    def stage(took: float, before: int, peak: int) -> Stage:
        return Stage(seconds=took, before_bytes=before * 2**20, peak_bytes=peak * 2**20)

    good = Row(
        request=request("timm:b", shares=(0.5,)),
        bytes=20 * 2**20,
        stages={"forward": stage(1, 0, 100), "trace": stage(2, 90, 110)},
        shares={"0.5": Share(stages={"removal": stage(0.5, 110, 140)}, parity=2e-7, runtime={"1": 1e-6, "3": 3e-6})},
    )
    failure = Failure(stage="trace", kind="refused", reason="no rule for fft")
    bad = Row(request=request("timm:a", shares=(0.5,)), failure=failure)
    assert memory_beyond(good) == (30.0, 1.5)
    assert seconds(good) == 2.5
    assert summary_lines([good, bad]) == [
        "50 % of the channels: 1 of 2 models pass.",
        "  - 1 refused in trace: no rule for fft (timm:a)",
    ]
    surroundings = {"libraries": {"torch": "2.15"}, "cpu": {"model": "A CPU"}, "git": None, "python": "3.11"}
    text = page([good, bad], {}, surroundings, "python -m benchmarks.coverage")
    assert text.index("| timm:a |") < text.index("| timm:b | 8 |")
    assert "**refused in trace: no rule for fft** at 50 %" in text
    assert "| 2.5 | 1.5x (30 MB) |" in text
    assert "| 2e-07 | 3e-06 |" in text
    write_row(tmp_path / "row.json", good)
    assert read_row(tmp_path / "row.json") == good
    (tmp_path / "row.json").write_text("{}")
    assert read_row(tmp_path / "row.json") is None
