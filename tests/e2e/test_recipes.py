"""The recipes that we ship can be read, and say what they mean."""

from pathlib import Path

import pytest

from deploy.recipe_text import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path, ())
    assert recipe.prune.budget.budget().kept == 0.5


def test_the_papers_schedule_is_expressible() -> None:
    recipe = read_recipe(RECIPES / "imagenet_resnet101.yaml", ())
    assert recipe.baseline is None
    assert (recipe.prune.events, recipe.prune.interval) == (40, 30)
    assert recipe.prune.training.schedule == "constant"
    assert (recipe.finetune.epochs, recipe.finetune.step_epochs) == (25, (10, 20))
    assert recipe.finetune.distillation is None
