"""Recipes: strict, versioned, able to print themselves, and clear about every mistake."""

from pathlib import Path

import pytest
import yaml

from compress.errors import InputError
from compress.training import Distillation
from deploy.recipe import Recipe
from deploy.recipe_text import difference, dump, read_recipe, validate

SMALLEST = {
    "name": "small",
    "model": {"factory": "torchvision:resnet50", "weights": "DEFAULT"},
    "data": {"source": "digits"},
    "prune": {"budget": {"macs": 0.5}},
}


def refusal(*changes: str) -> str:
    with pytest.raises(InputError) as caught:
        read_recipe(None, changes)
    return str(caught.value).removeprefix("the built-in recipe: ")


class TestMeaning:
    def test_the_built_in_recipe(self) -> None:
        recipe = read_recipe(None)
        assert (recipe.model.factory, recipe.data.source) == ("espalier:resnet20", "digits")
        assert recipe.prune.budget.budget().kept == 0.5
        assert recipe.baseline is not None

    def test_defaults(self) -> None:
        recipe = validate(SMALLEST, "test")
        assert recipe.version == 1
        assert recipe.baseline is None
        assert recipe.finetune.distillation == Distillation()
        assert recipe.prune.training.schedule == "constant"
        assert recipe.measure.batch_sizes == (1, 32)

    def test_distillation_can_be_switched_off(self) -> None:
        assert read_recipe(None, ["finetune.distillation=null"]).finetune.distillation is None

    @pytest.mark.parametrize("changes", [(), ("baseline.precision=no", "seed=7"), ("prune.ignore=[conv1, fc]",)])
    def test_a_dump_reads_back_as_the_same_recipe(self, changes: tuple[str, ...]) -> None:
        recipe = read_recipe(None, changes)
        text = dump(recipe, "first line\nsecond line")
        assert text.startswith("# first line\n# second line\nversion: 1\n")
        assert validate(yaml.safe_load(text), "test") == recipe

    def test_set_takes_yaml_and_makes_sections(self) -> None:
        recipe = read_recipe(
            None,
            [
                "prune.events=3",
                "measure.batch_sizes=[2, 4]",
                "baseline.learning_rate=1e-3",
                "model.kwargs.in_channels=1",
                "prune.budget={parameters: 0.3}",
            ],
        )
        assert recipe.prune.events == 3
        assert recipe.measure.batch_sizes == (2, 4)
        assert recipe.baseline is not None
        assert recipe.baseline.learning_rate == 0.001
        assert recipe.model.kwargs == {"in_channels": 1}
        assert recipe.prune.budget.budget().quantity == "parameters"

    def test_set_opens_a_section_that_was_null(self) -> None:
        changes = ["baseline=null", "baseline.epochs=4"]
        baseline = read_recipe(None, changes).baseline
        assert baseline is not None
        assert baseline.epochs == 4


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("prune.budgit=1", "prune.budgit: unknown key; did you mean prune.budget?"),
            ("finetune.learningrate=1", "finetune.learningrate: unknown key; did you mean finetune.learning_rate?"),
            ("finetune.distillation.wait=1", "finetune.distillation.wait: unknown key; did you mean "),
            ("round_to=4", "round_to: unknown key; did you mean prune.round_to?"),
            ("zzz=1", "zzz: unknown key; the keys there are version, name, seed,"),
        ],
    )
    def test_unknown_keys(self, change: str, expected: str) -> None:
        assert refusal(change).startswith(expected)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("prune.events=ten", 'prune.events is "ten", but must be a whole number (pruning events until'),
            ("prune.events=2.5", "prune.events is 2.5, but must be a whole number"),
            ("prune.events=yes", "prune.events is true, but must be a whole number"),
            ('seed="3"', 'seed is "3", but must be a whole number'),
            ("seed=-1", "seed is -1, but must be at least 0"),
            ("prune.budget.macs=0", "prune.budget.macs is 0, but must be above 0 (fraction of the multiply-adds"),
            ("prune.budget.macs=1.01", "prune.budget.macs is 1.01, but must be at most 1"),
            ("measure.time_limit_s=.inf", "measure.time_limit_s is Infinity, but must be a finite number"),
            ("measure.batch_sizes=4", "measure.batch_sizes is 4, but must be a list"),
            ("measure.batch_sizes=[1, x]", 'measure.batch_sizes.1 is "x", but must be a whole number'),
            ("prune=3", "prune is 3, but must be a section with keys"),
            ("finetune=null", "finetune is null, but must be a section with keys"),
            ("data.augment=0", "data.augment is 0, but must be true or false"),
            ("prune.graph=magic", "prune.graph is \"magic\", but must be 'export' or 'torch-pruning'"),
            (
                "export.precision=[fp64]",
                "export.precision.0 is \"fp64\", but must be 'fp32', 'fp16', 'bf16', 'int8' or 'fp8'",
            ),
            ("export.precision=[int8, int8]", "export.precision: int8, int8 names one precision twice; name each once"),
            (
                "export.calibration=guess",
                "export.calibration is \"guess\", but must be 'minmax', 'entropy' or 'percentile'",
            ),
            ("name=a/b", 'name is "a/b", but must be of another form (letters, digits'),
            ("baseline.distillation={}", "baseline.distillation is {}, but must be left out or null."),
            ("version=2", "version is 2, but must be 1"),
        ],
    )
    def test_wrong_values(self, change: str, expected: str) -> None:
        message = refusal(change)
        assert message.startswith(expected)
        assert message.endswith(".")
        assert "\n" not in message

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (
                ["prune.budget.channels=0.5"],
                "prune.budget: give exactly one of macs, parameters and channels, not macs",
            ),
            (["prune.budget.macs=null"], "prune.budget: give exactly one of macs, parameters and channels, not none"),
            (["prune.training.epochs=3"], "prune.training.epochs: pruning ends after prune.events"),
            (["baseline.schedule=step"], "baseline: step_epochs and schedule: step go together"),
            (["baseline=null"], "baseline is null, which trusts the model's weights, but model.weights names none"),
            (["model.kwargs.weights=DEFAULT"], "model.kwargs: weights stand in model.weights"),
            (["parity.samples=4"], "parity: samples (4) must be at least the largest of batch_sizes"),
            (["measure.batch_sizes=[2, 2]"], "measure.batch_sizes: batch sizes must be positive and different"),
        ],
    )
    def test_values_that_do_not_go_together(self, changes: list[str], expected: str) -> None:
        assert refusal(*changes).startswith(expected)

    def test_every_mistake_has_its_own_line(self) -> None:
        lines = refusal("seed=x", "prune.events=0", "nam=y").splitlines()
        assert [line.removeprefix("the built-in recipe: ").split()[0] for line in lines] == [
            "seed",
            "prune.events",
            "nam:",
        ]

    def test_a_missing_key_is_named(self) -> None:
        with pytest.raises(InputError, match=r"^test: prune\.budget is missing \(what is kept\)\.$"):
            validate(SMALLEST | {"prune": {}}, "test")

    @pytest.mark.parametrize("change", ["seed", "=3"])
    def test_set_without_key_or_value(self, change: str) -> None:
        assert refusal(change).startswith(f"--set {change} sets nothing")

    def test_set_below_a_plain_value(self) -> None:
        assert refusal("seed.deep=1") == "--set seed.deep=1: seed is no section that could hold deep."


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("name: [a\nseed: 1\n", ", line 2: "),
            ("seed: 1\nseed: 2\n", ", line 2: the key seed is given twice"),
            ("- 1\n", " holds a list, but a recipe is a mapping of sections."),
            ("", " is empty: give at least "),
            ("a: !!python/object:os.system x\n", ", line 1: "),
            ("name: \x00\n", " is no YAML"),
            ("model: {kwargs: {when: 2024-01-01}}\n", " holds a value that is no number, text, list or mapping"),
        ],
    )
    def test_what_is_no_recipe(self, text: str, expected: str, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(InputError) as caught:
            read_recipe(path)
        assert str(caught.value).startswith(f"{path}{expected}")

    def test_missing_and_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist: correct the path"):
            read_recipe(tmp_path / "none.yaml")
        with pytest.raises(InputError, match="Cannot read the recipe"):
            read_recipe(tmp_path)
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="is not text"):
            read_recipe(tmp_path / "binary.yaml")


class TestDifference:
    def recorded(self) -> Recipe:
        return read_recipe(None, ["model.kwargs={num_classes: 10, in_channels: 1}"])

    def test_what_is_left_to_the_data_is_no_difference(self) -> None:
        assert difference(read_recipe(None), self.recorded()) is None
        assert difference(self.recorded(), self.recorded()) is None

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ("seed=1", "seed is 1 and was 0"),
            ("model.kwargs.num_classes=12", "model.kwargs.num_classes is 12 and was 10"),
            ("model.kwargs.depth=3", "model.kwargs.depth is 3 and was not given"),
            ("finetune.distillation=null", "finetune.distillation.weight is not given and was 0.5"),
        ],
    )
    def test_the_first_key_is_named(self, change: str, expected: str) -> None:
        assert difference(read_recipe(None, [change]), self.recorded()) == expected
