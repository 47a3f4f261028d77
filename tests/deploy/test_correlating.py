"""espalier correlate on tiny networks: what it finds, writes, reuses, prints and refuses."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from typer.testing import CliRunner, Result

from compress import checkpoint, models
from compress.errors import InputError
from compress.graph import trace
from compress.importance import comparison, oracle
from deploy import correlating
from deploy.cli import app

FILES = {"correlation.json", "scores.csv", "scatter.png", "oracle.safetensors"}
COEFFICIENTS = {"pearson", "spearman", "kendall"}
SMALL = ("--data", "digits", "--batches", "2", "--batch-size", "8")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["correlate", *map(str, arguments)])


def sentence(result: Result, code: int = 2) -> str:
    """The one sentence on stderr, after checking that it is one."""
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith((".\n", "?\n"))
    return result.stderr.removeprefix("error: ").strip()


def saved(directory: Path, name: str, seed: int = 0, side: int = 16, **kwargs: Any) -> Path:
    torch.manual_seed(seed)
    model = models.build(f"espalier:{name}", in_channels=1, **kwargs)
    kwargs = {"in_channels": 1, **kwargs}
    checkpoint.save(model, directory, factory=f"espalier:{name}", kwargs=kwargs, image_shape=(1, side, side))
    return directory


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain network; nothing is ever written beside it but by `measured`."""
    return saved(tmp_path_factory.mktemp("plain") / "lenet", "lenet3", image_size=16)


@pytest.fixture(scope="module")
def measured(lenet: Path) -> Result:
    """The default criteria on the plain network, into the default directory."""
    return invoke(lenet, *SMALL, "--json")


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Few criteria on a residual network."""
    directory = saved(tmp_path_factory.mktemp("streams") / "resnet", "resnet20", side=8)
    return correlating.correlate(directory, "digits", names=["random", "oracle", "taylor"], batches=1, batch_size=8)


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """One entry for every time that the oracle begins to measure."""
    begun: list[object] = []

    class Counted(oracle.Ablation):
        def __init__(self, *arguments: Any) -> None:
            begun.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr(oracle, "Ablation", Counted)
    return begun


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


# --- what it finds and writes ---------------------------------------------------------------------------------------


def check_shape(found: dict[str, Any], sets: set[str]) -> None:
    for name, parts in found["criteria"].items():
        assert set(parts) == sets, name
        for part, coefficients in parts.items():
            assert set(coefficients) == COEFFICIENTS
            for values in coefficients.values():
                assert list(values) == ["value", "low", "high"]
                if values["value"] is None:  # a score that is the same everywhere
                    assert values == {"value": None, "low": None, "high": None}, (name, part)
                else:
                    assert -1 <= values["low"] <= values["value"] <= values["high"] <= 1


def test_json_on_stdout_is_the_document_and_nothing_else(measured: Result, lenet: Path) -> None:
    assert measured.exit_code == 0, measured.output

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(measured.stdout, parse_constant=refuse)
    assert found["channels"] == {"conv1": 16, "conv2": 32, "fc1": 120, "fc2": 84}
    check_shape(found, {"all", *found["channels"]})
    assert found["residual_groups"] == []
    assert set(found["criteria"]) == {
        *("hessian", "magnitude", "random", "taylor", "taylor-fg"),
        *("taylor-logits", "taylor-output", "taylor-so-full", "taylor-weight"),
    }
    assert set(found["seconds_per_minibatch"]) == {"forward_and_backward", *found["criteria"]}
    assert all(seconds >= 0 for seconds in found["seconds_per_minibatch"].values())
    assert (found["data"], found["batches"], found["batch_size"], found["reduction"]) == ("digits", 2, 8, "squared")
    written = json.loads((lenet.parent / "correlation" / "correlation.json").read_text(), parse_constant=refuse)
    assert {**written, "directory": str(lenet.resolve().parent / "correlation")} == found


def test_what_cannot_score_the_network_is_left_out_with_a_warning(measured: Result) -> None:
    skipped = json.loads(measured.stdout)["skipped"]
    assert set(skipped) == {"bn-scale", "bn-taylor"}
    lines = measured.stderr.splitlines()
    assert len(lines) == 2
    for line, (name, reason) in zip(lines, skipped.items(), strict=True):
        assert line.endswith(f"left out: {reason}")
        assert f"{name} cannot score 4 of 4 channel groups (conv1: no normalisation layer follows conv1" in line


def test_files(measured: Result, lenet: Path) -> None:
    found = json.loads(measured.stdout)
    directory = Path(found["directory"])
    assert set(contents(directory)) == FILES
    assert (directory / "scatter.png").read_bytes().startswith(b"\x89PNG")
    with (directory / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["group", "channel", "oracle", *found["criteria"]]
    expected = [(name, str(channel)) for name, width in found["channels"].items() for channel in range(width)]
    assert [(row["group"], row["channel"]) for row in rows] == expected
    columns = {name: [float(row[name]) for row in rows] for name in ("oracle", "taylor", "random")}
    for name in ("taylor", "random"):
        value = found["criteria"][name]["all"]["spearman"]["value"]
        assert value == pytest.approx(spearmanr(columns[name], columns["oracle"]).statistic, abs=1e-12)
    layer = [float(row["taylor"]) for row in rows if row["group"] == "fc2"]
    truth = [float(row["oracle"]) for row in rows if row["group"] == "fc2"]
    value = found["criteria"]["taylor"]["fc2"]["spearman"]["value"]
    assert value == pytest.approx(spearmanr(layer, truth).statistic, abs=1e-12)


def test_a_residual_network_and_the_oracle_against_itself(residual: dict[str, Any]) -> None:
    assert residual["residual_groups"] == ["conv1", "stage2.0.conv2", "stage3.0.conv2"]
    check_shape(residual, {"all", "residual", *residual["channels"]})
    assert list(residual["criteria"]) == ["random", "oracle", "taylor"]  # as they were named
    for coefficients in residual["criteria"]["oracle"].values():
        for values in coefficients.values():
            assert list(values.values()) == pytest.approx([1, 1, 1], abs=1e-12)
    assert residual["criteria"]["taylor"]["all"]["spearman"]["low"] > 0.5
    assert residual["criteria"]["random"]["all"]["spearman"]["high"] < 0.5


@pytest.mark.parametrize("reduction", ["absolute", "signed"])
def test_reduction_is_what_the_criteria_are_held_against(reduction: str, lenet: Path, tmp_path: Path) -> None:
    own, other = f"oracle:reduction={reduction}", "oracle"
    options = ("--criteria", f"{own}, {other},", "--reduction", reduction, "--data", "digits", "--batches", 2)
    result = invoke(lenet, *options, "--batch-size", 4, "--out", tmp_path / "out", "--json")
    found = json.loads(result.stdout)["criteria"]
    assert list(found) == [own, other]
    assert found[own]["all"]["pearson"]["value"] == pytest.approx(1, abs=1e-12)
    assert found[other]["all"]["pearson"]["value"] < 0.999


# --- what it reuses -------------------------------------------------------------------------------------------------

ONE = ("--criteria", "taylor", "--json")


def test_a_second_call_reuses_the_oracle(
    measured: Result, lenet: Path, tmp_path: Path, ablations: list[object]
) -> None:
    first = json.loads(measured.stdout)
    out = shutil.copytree(first["directory"], tmp_path / "out")
    again = json.loads(invoke(lenet, *SMALL, *ONE, "--out", out).stdout)
    assert not ablations
    assert again["criteria"] == {"taylor": first["criteria"]["taylor"]}
    assert again["channels"] == first["channels"]


@pytest.mark.parametrize("change", ["weights", "seed", "batches", "image size"])
def test_another_measurement_does_not_reuse_it(
    change: str, measured: Result, lenet: Path, tmp_path: Path, ablations: list[object]
) -> None:
    first = json.loads(measured.stdout)
    out = shutil.copytree(first["directory"], tmp_path / "out")
    given = saved(tmp_path / "other", "lenet3", seed=1, image_size=16) if change == "weights" else lenet
    options = {"seed": ("--seed", 1), "batches": ("--batches", 3), "image size": ("--image-size", 17)}
    again = invoke(given, *SMALL, *options.get(change, ()), *ONE, "--out", out)
    assert again.exit_code == 0, again.output
    assert len(ablations) == 1
    assert json.loads(again.stdout)["criteria"]["taylor"] != first["criteria"]["taylor"]


def test_what_was_measured_before_a_kill_is_kept(
    lenet: Path, tmp_path: Path, ablations: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    call = (lenet, *SMALL, *ONE, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(correlating, "score", killed)
        result = invoke(*call)
    assert (result.exit_code, result.stderr) == (130, "interrupted: the same command goes on where it stopped.\n")
    assert set(contents(tmp_path / "out")) == {"oracle.safetensors"}
    assert invoke(*call).exit_code == 0
    assert len(ablations) == 1
    assert set(contents(tmp_path / "out")) == FILES


# --- what it prints -------------------------------------------------------------------------------------------------


def test_tables_of_a_plain_network_and_the_directory(measured: Result, lenet: Path) -> None:
    result = invoke(lenet, *SMALL, "--criteria", "magnitude", "--out", json.loads(measured.stdout)["directory"])
    assert result.exit_code == 0
    assert "residual" not in result.stdout
    assert "forward and backward" not in result.stdout  # nothing needed one
    assert "Spearman by layer\n" in result.stdout
    assert result.stdout.endswith(f"Scatter plot and all numbers: {json.loads(measured.stdout)['directory']}\n")


# --- a user's own network and data ----------------------------------------------------------------------------------

OWN = """
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width)
        self.inner, self.outer = nn.Conv2d(width, 3, 3, padding=1), nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.outer(self.inner(x).relu())).relu().mean((2, 3)))


def net(width=5):
    model = Net(width)
    model.stem.requires_grad_(False)
    model.norm.requires_grad_(False)
    return model


def head():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def images(batch_size):
    generator = torch.Generator().manual_seed(int(Path("seed.txt").read_text()))
    data = TensorDataset(torch.randn(48, 1, 8, 8, generator=generator), torch.arange(48) % 3)
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)
"""
OWN_MODULE = "espalier_users_module"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The working directory is that of the user's module, and `net` and `head` are checkpoints in it."""
    (tmp_path / f"{OWN_MODULE}.py").write_text(OWN)
    (tmp_path / "seed.txt").write_text("0")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("net", "head"):
        factory = f"{OWN_MODULE}:{name}"
        model = models.build(factory, trust=[OWN_MODULE])
        checkpoint.save(model, tmp_path / name / "dense", factory=factory, image_shape=(1, 8, 8))
    return f"{OWN_MODULE}:images"


def test_a_users_own_network_with_frozen_layers_and_own_data(own: str, ablations: list[object]) -> None:
    call = ("net/dense", "--data", own, "--batches", 3, "--batch-size", 8, "--trust", OWN_MODULE, "--json")
    result = invoke(*call)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["channels"] == {"stem": 5, "inner": 3}
    assert found["residual_groups"] == ["stem"]
    assert {"taylor", "hessian", "taylor-so-full", "taylor-fg"} <= set(found["criteria"])
    assert found["criteria"]["taylor"]["all"]["spearman"]["value"] > 0.5
    assert set(contents(Path("net/correlation"))) == FILES
    assert json.loads(invoke(*call).stdout)["criteria"] == found["criteria"]
    assert len(ablations) == 1
    Path("seed.txt").write_text("1")  # the same source, but other images
    assert json.loads(invoke(*call).stdout)["criteria"] != found["criteria"]
    assert len(ablations) == 2


def test_code_that_is_not_trusted_does_not_run(own: str, lenet: Path) -> None:
    assert f"add --trust {OWN_MODULE}" in sentence(invoke("net/dense", "--data", "digits"))
    assert f"add --trust {OWN_MODULE}" in sentence(invoke(lenet, "--data", own))


def test_nothing_to_prune(own: str) -> None:
    said = sentence(invoke("head/dense", "--data", own, "--trust", OWN_MODULE))
    assert said == "Nothing in head/dense can be pruned, so there is nothing to score."
    assert not Path("head/correlation").exists()


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--reduction", "mean"], "--reduction is 'mean', but must be one of squared, absolute, signed."),
        (["--criteria", "tailor"], "'tailor', which is no criterion: did you mean 'taylor'?"),
        (["--criteria", "taylor,magnitude,nonsense"], "'nonsense', which is no criterion: choose one of bn-scale"),
        (["--criteria", "taylor:speed=1"], "taylor has no option 'speed'"),
        (["--criteria", "taylor:combine=sum"], "combine is 'sum', but must be one of joint, mean"),
        (["--criteria", "taylor,bn-scale"], "bn-scale cannot score 4 of 4 channel groups (conv1: no normalisation"),
        (["--criteria", ""], "--criteria names no criterion"),
        (["--criteria", " , "], "--criteria names no criterion"),
        (["--data", "digitz"], "There is no data source 'digitz': did you mean 'digits'?"),
        (["--data", "imagefolder:/nowhere"], "/nowhere"),
        (["--data", "digits:/path"], "digits takes no path"),
        (["--data", "glyphs"], "The model takes images of 1 channels but the data have 3"),
        (["--image-size", "8"], "set --image-size to a size it takes"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_lost(
    arguments: list[str], expected: str, lenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured_in_vain(*_: object, **__: object) -> None:
        raise AssertionError("measured before the input was checked")

    monkeypatch.setattr(correlating, "changes_of_loss", measured_in_vain)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "correlation.json").write_text("earlier")
    for out in (earlier, tmp_path / "new"):
        result = invoke(lenet, *SMALL, "--out", out, *arguments)
        said = sentence(result)
        assert expected in said
        assert "model.kwargs" not in said
        assert "data.source" not in said
    assert contents(earlier) == {"correlation.json": b"earlier"}
    assert not (tmp_path / "new").exists()


def test_data_of_other_classes(tmp_path: Path) -> None:
    other = saved(tmp_path / "other", "lenet3", num_classes=7, image_size=16)
    said = sentence(invoke(other, *SMALL))
    assert said == f"The model has 7 outputs but the data have 10 classes: give --data that {other} was trained for."
    assert not (tmp_path / "correlation").exists()


@pytest.mark.parametrize("path", ["/nowhere", "/etc"])
def test_a_missing_checkpoint(path: str) -> None:
    assert sentence(invoke(path, *SMALL)) == f"{path} is no checkpoint: it holds no architecture.json."


@pytest.mark.parametrize("place", ["file/out", "file", "/proc/espalier"])
def test_a_directory_that_cannot_be_written_is_known_before_the_measurement(
    place: str, lenet: Path, tmp_path: Path, ablations: list[object]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / place
    assert f"Cannot create the directory {out}" in sentence(invoke(lenet, *SMALL, "--out", out))
    assert (tmp_path / "file").read_text() == "in the way"
    assert not ablations


def test_a_network_that_diverged(lenet: Path, tmp_path: Path) -> None:
    model = checkpoint.load(lenet)
    nn.init.constant_(model.fc3.bias, float("nan"))
    kwargs = {"in_channels": 1, "image_size": 16}
    broken = tmp_path / "broken"
    checkpoint.save(model, broken, factory="espalier:lenet3", kwargs=kwargs, image_shape=(1, 16, 16))
    said = sentence(invoke(broken, *SMALL, "--criteria", "taylor"), code=1)
    assert said == f"The loss of {broken} on digits is NaN or infinite: check its weights and the images."
    assert not (tmp_path / "correlation" / "correlation.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--batches", "0"), ("--batch-size", "1"), ("--image-size", "0"), ("--seed", "-1"), ("--no-such-option",)],
)
def test_usage_errors(arguments: tuple[str, ...], lenet: Path) -> None:
    result = invoke(lenet, "--data", "digits", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert arguments[0] in result.stderr
    assert "Traceback" not in result.stderr


def test_the_data_must_be_named(lenet: Path) -> None:
    result = invoke(lenet)
    assert result.exit_code == 2
    assert "--data" in result.stderr


def test_no_minibatch_from_python(lenet: Path) -> None:
    with pytest.raises(InputError, match="batches is 0, but must be at least 1"):
        correlating.correlate(lenet, "digits", batches=0)


def test_a_criterion_that_cannot_score_lets_the_others_go() -> None:
    model = models.build("espalier:lenet3", in_channels=1, image_size=16)
    graph = trace(model, torch.randn(2, 1, 16, 16))
    with pytest.raises(InputError, match="bn-scale cannot score"):
        comparison.build_all(["taylor-fg", "bn-scale"], model, graph)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    built, skipped = comparison.build_all(["random", "bn-scale"], model, graph, skip_unscorable=True)
    assert (list(built), list(skipped)) == (["random"], ["bn-scale"])
