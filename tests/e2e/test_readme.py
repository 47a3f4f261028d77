"""What the README shows is true: its code runs, its recipe is valid, its commands, files and links exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import load, models
from deploy.recipe_text import read_recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_training_loop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    torch.manual_seed(0)
    model = models.build("torchvision:resnet50")
    images = torch.randn(2, 3, 64, 64)
    names = {
        "model": model,
        "example_inputs": images[:1],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "criterion": torch.nn.CrossEntropyLoss(),
        "loader": [(images, torch.tensor([1, 2]))] * 2,
    }
    exec(code.replace("interval=30", "interval=1"), names)
    assert len(names["pruner"].history) == 2
    with torch.no_grad():
        assert torch.equal(load("pruned/")(images), model.eval()(images))


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert read_recipe(path, ("finetune.epochs=30",)).finetune.epochs == 30


def test_the_commands_exist(invoke: Any) -> None:
    shown = set(re.findall(r"`espalier (\w+)", README)) | set(
        re.findall(r"^espalier (\w+)", README, flags=re.MULTILINE)
    )
    assert {"run", "inspect", "bench", "export", "doctor"} <= shown
    for command in shown:
        assert invoke(command, "--help").exit_code == 0, command


def test_links_and_files_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    files = re.findall(r"`(?:pytest|espalier run) ((?:tests|recipes)/\S+)`", README)
    assert len(files) >= 4
    for target in [*targets, *files]:
        assert (ROOT / target).exists(), target
