"""What docs/criteria.md says is true: every criterion is there, its names are accepted, its code runs."""

import re
from pathlib import Path
from typing import Any

from compress.importance import base, criteria, criterion

PAGE = Path(__file__).parents[2] / "docs" / "criteria.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_criterion_is_listed() -> None:
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", TEXT, flags=re.MULTILINE)) == criteria()


def test_every_name_that_is_shown_is_accepted() -> None:
    shown = re.findall(r"importance[:=] ?\"?([a-z][\w:=.-]*)", TEXT)
    assert {"taylor", "taylor-logits:outputs=5", "taylor-fg"} <= set(shown)
    for name in shown:
        criterion(name)


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target


def test_a_criterion_of_ones_own_is_one_class() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    names: dict[str, Any] = {}
    try:
        exec(code, names)
        assert criterion("my-criterion:momentum=0.5") == (names["MyCriterion"], {"momentum": 0.5})
    finally:
        base._REGISTRY.pop("my-criterion", None)


def test_the_command_exists(invoke: Any) -> None:
    for command in re.findall(r"^espalier (\w+)", TEXT, flags=re.MULTILINE):
        assert invoke(command, "--help").exit_code == 0
