"""Figures of a report: legends, ranges of training, and names with special characters."""

from typing import Any

import pytest

from upright.evidence.reporting.figures import (
    draw_invariance,
    draw_reliability,
    draw_rotation_response,
    draw_turning_circle,
)
from upright.evidence.reporting.invariance import distortions

NAMES = ["_plain", "$\\frac{$", "<b>"]
FAMILIES = distortions(28, 28, "zeros")
RANGES = {"rotation": (-30.0, 30.0)}


def model(name: str, share: float = 0.9, ranges: dict[str, tuple[float, float]] | None = None) -> dict[str, Any]:
    """Return a model of ``report.json`` with the same share at each strength."""
    curves = {
        family: {
            "unit": each.unit,
            "strengths": each.strengths,
            "trained": (ranges or {}).get(family),
            **dict.fromkeys(
                ("accuracy", "consistency"), [{"value": share, "low": 0.0, "high": 1.0}] * len(each.strengths)
            ),
        }
        for family, each in FAMILIES.items()
    }
    return {"name": name, "invariance": curves}


def test_every_model_is_in_the_legend_and_every_panel() -> None:
    figure = draw_invariance("accuracy", [model(NAMES[0]), model(NAMES[1]), model(NAMES[2], 0.5)])
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == NAMES
    assert [panel.get_xlabel().split(" (")[0] for panel in figure.axes] == list(FAMILIES)
    for panel, family in zip(figure.axes, FAMILIES.values(), strict=True):
        assert [list(line.get_xdata()) for line in panel.lines] == [list(family.strengths)] * 3
        assert [line.get_ydata()[0] for line in panel.lines] == [90, 90, 50]
        # Two equal lines are both visible, because the first one is thicker.
        assert panel.lines[0].get_linewidth() > panel.lines[1].get_linewidth()
        assert len({line.get_color() for line in panel.lines}) == 3 == len({line.get_marker() for line in panel.lines})


def test_the_range_of_training_is_one_area_or_one_bar_per_model() -> None:
    same = draw_invariance("accuracy", [model("a", ranges=RANGES), model("b", 0.5, RANGES)])
    rotation, scale = same.axes[:2]
    (area,) = rotation.patches
    assert area.get_extents().transformed(rotation.transData.inverted()).intervalx == pytest.approx([-30, 30])
    assert not scale.patches and len(rotation.lines) == 2
    differ = draw_invariance("accuracy", [model("a"), model("b", 0.5, RANGES)]).axes[0]
    assert not differ.patches and len(differ.lines) == 3
    bar, second = differ.lines[2], differ.lines[1]
    assert list(bar.get_xdata()) == [-30, 30] and bar.get_color() == second.get_color() and min(bar.get_ydata()) > 1


def test_one_model_needs_no_legend_and_four_fit() -> None:
    assert not draw_invariance("consistency", [model("a")]).legends
    share = {"value": 0.5, "low": 0.0, "high": 1.0}
    bins = [{"count": 0, "confidence": None, "accuracy": None}] * 14 + [
        {"count": 2, "confidence": 0.9, "accuracy": share}
    ]
    calibrations = [{"bins": bins, "bins_after": after} for after in (bins, None, None, None)]
    names = [*NAMES, "d"]
    figure = draw_reliability([{"name": n, "calibration": c} for n, c in zip(names, calibrations, strict=True)])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without temperature", "with temperature"]
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == names


def test_the_full_circle_has_a_line_without_the_rotation_of_a_transformer() -> None:
    transformer = model("a") | {"identity": model("a")["invariance"]["rotation"]["accuracy"], "effect": None}
    abstaining = model("b") | {"identity": None, "effect": {"threshold": 0.731}}
    figure = draw_turning_circle([transformer, abstaining])
    assert len(figure.axes[0].get_lines()) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a, without its rotation",
        "a",
        "b, abstains below 0.73",
    ]


def test_the_rotation_response_is_compared_with_the_diagonal() -> None:
    angles = tuple(range(-180, 181, 15))
    left = dict.fromkeys(("lower_quartile", "median", "upper_quartile"), [0.0] * len(angles))
    observed = {"name": "a", "uprightness": {"angles": angles, "left": left, "within": (-60, 60)}}
    panel = draw_rotation_response([{"name": "b", "uprightness": {"silent": "none"}}, observed]).axes[0]
    diagonal, line = panel.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [-180, 180]
    assert set(line.get_ydata()) == {0} and len(panel.patches) == 1
