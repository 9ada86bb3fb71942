"""Figures of a report: legends, ranges of training, and names with special characters."""

import numpy as np
import pytest

from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_rotation_response
from upright.evidence.reporting.invariance import InvarianceCurve, RotationResponse, distortions
from upright.evidence.reporting.measures import reliability
from upright.intervals import wilson

NAMES = ["_plain", "$\\frac{$", "<b>"]
FAMILIES = distortions(28, 28, "zeros")


def curves(share: float) -> dict[str, InvarianceCurve]:
    shares = {family.name: [wilson(share, 100)] * len(family.strengths) for family in FAMILIES}
    return {
        family.name: InvarianceCurve(family.strengths, shares[family.name], shares[family.name]) for family in FAMILIES
    }


def test_every_model_is_in_the_legend_and_every_panel() -> None:
    figure = draw_invariance("accuracy", NAMES, [curves(0.9), curves(0.9), curves(0.5)], FAMILIES, [{}, {}, {}])
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == NAMES
    assert [panel.get_xlabel().split(" (")[0] for panel in figure.axes] == [family.name for family in FAMILIES]
    for panel, family in zip(figure.axes, FAMILIES, strict=True):
        assert [list(line.get_xdata()) for line in panel.lines] == [list(family.strengths)] * 3
        assert [line.get_ydata()[0] for line in panel.lines] == [90, 90, 50]
        # Two equal lines are both visible, because the first one is thicker.
        assert panel.lines[0].get_linewidth() > panel.lines[1].get_linewidth()
        assert len({line.get_color() for line in panel.lines}) == 3 == len({line.get_marker() for line in panel.lines})


def test_the_range_of_training_is_one_area_or_one_bar_per_model() -> None:
    ranges = {"rotation": (-30.0, 30.0)}
    same = draw_invariance("accuracy", NAMES[:2], [curves(0.9), curves(0.5)], FAMILIES, [ranges, ranges])
    rotation, scale = same.axes[:2]
    (area,) = rotation.patches
    assert area.get_extents().transformed(rotation.transData.inverted()).intervalx == pytest.approx([-30, 30])
    assert not scale.patches and len(rotation.lines) == 2
    differ = draw_invariance("accuracy", NAMES[:2], [curves(0.9), curves(0.5)], FAMILIES, [{}, ranges]).axes[0]
    assert not differ.patches and len(differ.lines) == 3
    bar, second = differ.lines[2], differ.lines[1]
    assert list(bar.get_xdata()) == [-30, 30] and bar.get_color() == second.get_color() and min(bar.get_ydata()) > 1


def test_one_model_needs_no_legend_and_four_fit() -> None:
    assert not draw_invariance("consistency", NAMES[:1], [curves(0.9)], FAMILIES, [{}]).legends
    bins = reliability(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), np.arange(2))
    calibrations = [{"bins": bins, "bins_after": after} for after in (bins, None, None, None)]
    figure = draw_reliability([*NAMES, "d"], calibrations)
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without temperature", "with temperature"]
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == [*NAMES, "d"]


def test_the_rotation_response_is_compared_with_the_diagonal() -> None:
    angles = tuple(range(-180, 181, 15))
    response = RotationResponse(angles, np.zeros((len(angles), 3)), None, (-60, 60))
    panel = draw_rotation_response({1: response}, ["a"]).axes[0]
    diagonal, line = panel.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [-180, 180]
    assert np.ptp(line.get_ydata()) == 0 and len(panel.patches) == 1
