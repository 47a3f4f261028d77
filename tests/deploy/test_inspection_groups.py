"""What `espalier inspect --groups` says: groups worked out by hand, the reasons of the rest, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import compress
from compress import models
from compress.errors import InputError
from deploy import inspection
from deploy.cli import app
from deploy.inspection_groups import inspect_groups
from deploy.inspection_groups_views import LONGEST
from deploy.recipe_text import dump, read_recipe
from deploy.run_directory import RunDirectory

BLOCK = "tests.deploy.made_blocks:block"


def inspected(target: Any = BLOCK, shape: str | None = "3,8,8", **options: Any) -> dict[str, Any]:
    return inspect_groups(str(target), shape=shape, trust=["tests"], options=options)


def shown(found: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        for part in inspection.tables(found):
            console.print(part)
    return capture.get()


def one_line(text: str) -> str:
    return " ".join(text.split())


class TestBlock:
    def test_groups(self) -> None:
        found = inspected()
        heads, hidden = found["groups"]
        assert heads == {
            "name": "attn.qkv",
            "goes": "heads",
            "width": 4,
            "step": 4,  # of 6 rows each: 24 is the smallest multiple of 8
            "narrowest": 4,
            "producers": [{"layer": "attn.qkv", "rows": 6, "norms": []}],
            "consumers": ["attn.proj"],
            "exact": True,
            "residue": None,
            "mixed": None,
        }
        assert (hidden["name"], hidden["goes"], hidden["width"], hidden["narrowest"]) == ("fc1", "channels", 16, 8)
        assert (hidden["exact"], hidden["residue"]) == (False, "fc2")
        assert json.loads(json.dumps(found)) == found

    def test_what_stays(self) -> None:
        found = inspected()
        assert [(one["layers"], one["hint"]) for one in found["stays"]] == [
            (["stem", "attn.proj", "fc2"], "--embedding"),
            (["odd"], "a rule for the operator (docs/graph.md)"),
            (["head"], None),
        ]
        assert list(found["operators_without_rule"]) == ["aten.linalg_matrix_exp.default"]
        assert [one["attribute"] for one in found["attributes"]] == ["attn.num_heads"]

    def test_a_query_its_key_and_its_value_are_a_channel_and_no_head(self) -> None:
        (group,) = inspected("tests.deploy.made_blocks:one_head")["groups"]
        assert (group["goes"], group["width"], group["producers"][0]["rows"]) == ("channels", 4, 3)

    def test_counts(self) -> None:
        found = inspected()
        assert found["channels"] == {"removable": 24 + 16, "all": 8 + 24 + 8 + 16 + 8 + 3 + 5}
        # Four tokens: stem 8 x 48, qkv 24 x 8, proj, fc1 and fc2; two products of 4 x 4 tokens x 8; odd on 64 pixels
        now = 4 * (8 * 48 + 24 * 8 + 8 * 8 + 2 * 16 * 8) + 2 * 4 * 4 * 8 + 8 * 3 + 64 * 5 * 3
        assert found["macs"] == {"now": now, "narrowest": now - 4 * 2 * 8 * 8}

    def test_embedding(self) -> None:
        found = inspected(embedding=True)
        stream = found["groups"][0]
        assert [one["layer"] for one in stream["producers"]] == ["stem", "attn.proj", "fc2"]
        assert (stream["exact"], stream["mixed"]) == (False, "norm1")
        assert not [one for one in found["stays"] if one["hint"] == "--embedding"]
        assert "mixed by norm1" in shown(found)

    def test_keep(self) -> None:
        found = inspected(attention="keep")
        assert [one["name"] for one in found["groups"]] == ["fc1"]
        assert ["attn.qkv"] in [one["layers"] for one in found["stays"] if one["hint"] == "--attention heads"]

    def test_widths(self) -> None:
        group = inspected(attention="widths")["groups"][0]
        # One of the two channels of each of four heads, in queries, keys and values
        assert (group["name"], group["goes"], group["width"]) == ("attn.qkv", "head channels", 2)
        assert group["producers"][0]["rows"] == 12

    @pytest.mark.parametrize("width", [100, 160])
    def test_terminal(self, width: int) -> None:
        text = shown(inspected(), width)
        assert max(map(len, text.splitlines())) <= width
        for expected in (
            "attn.qkv  4 heads x 6     4  attn.proj  exact",
            "reads fc2",
            "Operators without a rule: aten.linalg_matrix_exp.default (1x).",
            "attn.num_heads (1/2 of dimension 1 of attn.proj.weight)",
            "40 of 72 output channels (56 %) stand in groups. 4.824 k multiply-adds",
        ):
            assert expected in one_line(text) or expected in text


def test_long_names_and_lists_at_100_columns() -> None:
    """As those of torchvision's vit_b_16 with `embedding`."""
    block = "encoder.layers.encoder_layer_{}"
    stream = ["conv_proj", *(f"{block.format(index)}.mlp.3" for index in range(12))]
    group = {
        "name": "conv_proj",
        "goes": "channels",
        "width": 768,
        "step": 8,
        "narrowest": 8,
        "producers": [{"layer": layer, "rows": 1, "norms": []} for layer in stream],
        "consumers": [f"{block.format(index)}.self_attention" for index in range(12)],
        "exact": False,
        "residue": None,
        "mixed": f"{block.format(0)}.ln_1",
    }
    name = f"{block.format(10)}.self_attention"
    made = {"layer": name, "rows": 192, "norms": []}
    attention = group | {"name": name, "goes": "heads", "width": 12, "mixed": None, "exact": True}
    attention |= {"producers": [made], "consumers": [f"{name}.out_proj"]}
    stays = [{"layers": [f"{name}.in.the.deepest.of.all.places", *stream], "reason": "a word " * 12, "hint": None}]
    found = inspected() | {"groups": [group, attention], "stays": stays}
    text = shown(found)
    assert len(name) == LONGEST
    assert max(map(len, text.splitlines())) <= 100
    for line in (f"{name}  12 heads x 192", "and 10 more", "and 9 more", "and 11 more", "….out_proj", "mixed by"):
        assert line in text


class TestTargets:
    def test_factories_bring_their_size(self) -> None:
        assert inspected("espalier:lenet3", None)["image_shape"] == [3, 32, 32]

    def test_grouped_convolutions(self) -> None:
        found = inspected("tests.deploy.made_blocks:grouped", "3,8,8")
        assert [(one["name"], one["width"], one["goes"]) for one in found["groups"]] == [
            ("0", 4, "grouped channels"),
            ("1", 4, "grouped channels"),
        ]

    def test_checkpoint_and_run(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        run = RunDirectory(tmp_path / "run")
        run.root.mkdir()
        changes = ("prune.ignore=[conv1]", "model.factory=espalier:lenet3")
        run.recipe.write_text(dump(read_recipe(None, changes)))
        with pytest.raises(InputError, match="holds no network yet"):
            inspected(run.root, None)
        kwargs = {"in_channels": 1, "image_size": 16}
        model = models.build("espalier:lenet3", **kwargs)
        compress.save(model, run.baseline, factory="espalier:lenet3", kwargs=kwargs, image_shape=(1, 16, 16))
        # Of the run the recipe says what stays; options given go before it; a checkpoint has no recipe.
        assert [one["name"] for one in inspected(run.root, None)["groups"]] == ["conv2", "fc1", "fc2"]
        assert [one["name"] for one in inspected(run.root, None, ignore=["conv2"])["groups"]] == ["conv1", "fc1", "fc2"]
        run.recipe.write_text(dump(read_recipe(None, (*changes, "prune.graph=torch-pruning"))))
        assert [one["name"] for one in inspected(run.root, None)["groups"]] == ["conv2", "fc1", "fc2"]
        found = inspected(run.baseline, None)
        assert [one["name"] for one in found["groups"]] == ["conv1", "conv2", "fc1", "fc2"]
        assert found["image_shape"] == [1, 16, 16]

    def test_part(self) -> None:
        with pytest.raises(InputError, match=r"Its backbone can be traced alone: --part backbone\."):
            inspected("tests.deploy.made_blocks:detector")
        found = inspected("tests.deploy.made_blocks:detector", part="backbone")
        assert [one["name"] for one in found["groups"]] == ["backbone.0"]
        assert "part backbone" in shown(found)


class TestCommand:
    def test_json(self) -> None:
        options = ["--shape", "3,8,8", "--trust", "tests", "--ignore", "fc1", "--protect", "odd", "--json"]
        done = CliRunner().invoke(app, ["inspect", BLOCK, "--groups", *options])
        assert done.exit_code == 0, done.stderr
        found = json.loads(done.stdout)
        assert [one["name"] for one in found["groups"]] == ["attn.qkv"]
        assert found["options"] == {
            "attention": "heads",
            "embedding": False,
            "ignore": ["fc1"],
            "protect": ["odd"],
            "tie": [],
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nowhere", "--groups"), "nowhere does not exist"),
            ((__file__, "--groups"), "is a file, of which channel groups cannot be found"),
            ((BLOCK, "--groups"), "add --trust tests"),
            (("espalier:lenet", "--groups"), "did you mean 'lenet3'"),
            (("espalier:lenet3", "--groups", "--shape", "3,x"), "--shape is '3,x', but has the form 3,224,224"),
            (("espalier:lenet3", "--groups", "--shape", "3,8,8"), "cannot be captured as a graph"),
            (("espalier:lenet3", "--groups", "--attention", "all"), "attention is 'all'"),
            (("espalier:lenet3", "--groups", "--ignore", "conv3"), "did you mean 'conv"),
            (("espalier:lenet3", "--embedding"), "--embedding: of use with --groups only"),
            (("espalier:lenet3",), "with --groups also a model factory"),
        ],
    )
    def test_refusals(self, arguments: tuple[str, ...], message: str) -> None:
        done = CliRunner().invoke(app, ["inspect", *arguments])
        assert done.exit_code == 2
        assert message in one_line(done.stderr)
        assert "Traceback" not in done.stderr
