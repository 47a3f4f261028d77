"""Tables and scatter plot of espalier correlate."""

import copy
from typing import Any

import pytest
import torch
from rich.console import Console
from test_correlating import COEFFICIENTS, saved
from torch import nn

from compress import models
from compress.graph import trace
from compress.importance import criteria
from deploy import correlation_views
from deploy.agreement import residual as residual_groups
from deploy.console import TABLE_WIDTH
from deploy.correlating import correlate


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Few criteria on a residual network."""
    directory = saved(tmp_path_factory.mktemp("streams") / "resnet", "resnet20", side=8)
    return correlate(directory, "digits", names=["random", "oracle", "taylor"], batches=1, batch_size=8)


def shown(found: dict[str, Any], width: int = TABLE_WIDTH) -> list[str]:
    console = Console(width=width, markup=False)
    with console.capture() as capture:
        for table in correlation_views.tables(found):
            console.print(table)
    return capture.get().splitlines()


def with_criteria(found: dict[str, Any], names: list[str], value: float = -0.11) -> dict[str, Any]:
    """The same document with other criteria, all of the same widest numbers."""
    parts = copy.deepcopy(found["criteria"]["taylor"])
    for coefficients in parts.values():
        for name in coefficients:
            coefficients[name] = {"value": value, "low": -0.22, "high": -0.1}
    return {
        **found,
        "criteria": dict.fromkeys(names, parts),
        "seconds_per_minibatch": {"forward_and_backward": 1.0, **dict.fromkeys(names, 9.0)},
    }


def test_tables_on_a_terminal(residual: dict[str, Any]) -> None:
    lines = shown(residual)
    assert lines[0] == "Agreement with the measured change of loss (squared, 1 minibatch of 8 images)"
    order = [line.split()[0] for line in lines if line.strip().startswith(("oracle ", "taylor ", "random "))]
    assert order == ["oracle", "taylor", "random"]  # the best first
    header = next(line for line in lines if "criterion" in line)
    assert header.split() == ["criterion", "all", "(448)", "residual", "(112)", "all", "(448)", "all", "(448)", "ms"]
    assert any("1.00 [1.00, 1.00]  1.00 [1.00, 1.00]" in line for line in lines)
    assert "Spearman by layer; * is a residual stream" in lines
    layers = [line.split()[0] for line in lines if line.startswith((" conv", " stage"))]
    assert layers == [f"{name}{'*' * (name in residual['residual_groups'])}" for name in residual["channels"]]


def test_every_name_is_unbroken_in_a_terminal_of_110_columns(residual: dict[str, Any]) -> None:
    names = sorted(criteria())
    lines = shown(with_criteria(residual, names))
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert not any("…" in line for line in lines)
    for name in names:
        assert any(line.startswith(f" {name} ") and "[-.22, -.10]" in line for line in lines), name
    assert any(line.startswith("Spearman by layer, the best ") for line in lines)
    for layer in residual["channels"]:
        assert any(line.startswith((f" {layer} ", f" {layer}* ")) for line in lines)


def test_options_of_a_long_name_stand_below_it(residual: dict[str, Any]) -> None:
    lines = shown(with_criteria(residual, ["hessian:estimator=hutchinson:samples=2", "taylor:combine=mean"]))
    start = next(index for index, line in enumerate(lines) if line.startswith(" hessian "))
    assert [line.split()[0] for line in lines[start : start + 3]] == ["hessian", ":estimator=hutchinson", ":samples=2"]
    assert any(line.startswith(" taylor:combine=mean ") for line in lines)
    assert max(map(len, lines)) <= TABLE_WIDTH


def test_a_coefficient_that_is_not_defined_is_a_dash_and_comes_last(residual: dict[str, Any]) -> None:
    found = with_criteria(residual, ["one", "two"], value=-0.9)
    nothing = {"value": None, "low": None, "high": None}
    found["criteria"]["one"] = {part: dict.fromkeys(COEFFICIENTS, nothing) for part in found["criteria"]["one"]}
    lines = shown(found)
    rows = [line.split() for line in lines if line.startswith((" one ", " two "))]
    assert [row[0] for row in rows] == ["two", "one"]
    assert rows[1][1:] == ["—", "—", "—", "—", "9000.0"]


def test_no_agreement_at_all_ranks_above_less(residual: dict[str, Any]) -> None:
    found = with_criteria(residual, ["less"], value=-0.3)
    none = with_criteria(residual, ["none"], value=0.0)
    found["criteria"].update(none["criteria"])
    found["seconds_per_minibatch"].update(none["seconds_per_minibatch"])
    rows = [line.split() for line in shown(found) if line.startswith((" less ", " none "))]
    assert [row[:2] for row in rows] == [["none", ".00"], ["less", "-.30"]]


@pytest.mark.parametrize("count", [1, 5, 13])
def test_scatter(count: int) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 3))
    graph = trace(model, torch.randn(2, 1, 8, 8))
    assert list(graph.widths.values()) == [4, 6]
    torch.manual_seed(0)
    truth = {name: torch.rand(width) for name, width in graph.widths.items()}
    names = [f"criterion{index}" for index in range(count - 1)] + ["hessian:estimator=hutchinson:samples=2"]
    scores = {name: {group: torch.rand(width) for group, width in graph.widths.items()} for name in names}
    drawing = correlation_views.scatter(scores, truth, residual_groups(graph))
    drawing.draw_without_rendering()
    panels = [panel for panel in drawing.axes if panel.get_visible()]
    assert [panel.get_title().replace("\n", "") for panel in panels] == names
    boxes = [panel.get_tightbbox() for panel in panels]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= drawing.bbox.x1
        assert box.y1 <= drawing.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:index])
    points = panels[-1].collections[0].get_offsets()
    expected = correlation_views._ranks(scores[names[-1]]), correlation_views._ranks(truth)
    assert points.tolist() == [[float(x), float(y)] for x, y in zip(*expected, strict=True)]
    assert not drawing.legends  # there is one kind of group


def test_scatter_tells_residual_streams_apart() -> None:
    model = models.build("espalier:resnet20", in_channels=1)
    graph = trace(model, torch.randn(2, 1, 8, 8))
    truth = {name: torch.arange(width).double() for name, width in graph.widths.items()}
    drawing = correlation_views.scatter({"taylor": truth}, truth, residual_groups(graph))
    drawing.draw_without_rendering()
    (legend,) = drawing.legends
    assert [text.get_text() for text in legend.get_texts()] == ["other groups", "residual streams"]
    assert [len(points.get_offsets()) for points in drawing.axes[0].collections] == [448 - 112, 112]
    assert not legend.get_window_extent().overlaps(drawing.axes[0].get_tightbbox())
