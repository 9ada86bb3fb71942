"""Figures say who is who and what was trained on, whatever models are called."""

import numpy as np

from upright.evidence.intervals import wilson
from upright.evidence.reporting.figures import draw_invariance, draw_reliability, draw_turning
from upright.evidence.reporting.invariance import Curve, Turning, distortions
from upright.evidence.reporting.measures import reliability

NAMES = ["_plain", "$\\frac{$", "<b>"]
WAYS = distortions(28, 28, "zeros")


def curves(share: float) -> dict[str, Curve]:
    shares = {way.name: [wilson(share, 100)] * len(way.strengths) for way in WAYS}
    return {way.name: Curve(way.strengths, shares[way.name], shares[way.name]) for way in WAYS}


def test_every_model_is_in_the_legend_and_every_panel() -> None:
    figure = draw_invariance("accuracy", NAMES, [curves(0.9), curves(0.9), curves(0.5)], WAYS, [{}, {}, {}])
    figure.canvas.draw()
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == NAMES
    assert [panel.get_xlabel().split(" (")[0] for panel in figure.axes] == [way.name for way in WAYS]
    for panel, way in zip(figure.axes, WAYS, strict=True):
        assert [list(line.get_xdata()) for line in panel.lines] == [list(way.strengths)] * 3
        assert [line.get_ydata()[0] for line in panel.lines] == [90, 90, 50]
        # Two that lie on each other are both seen.
        assert panel.lines[0].get_linewidth() > panel.lines[1].get_linewidth()
        assert len({line.get_color() for line in panel.lines}) == 3 == len({line.get_marker() for line in panel.lines})


def test_what_was_trained_on_is_one_area_or_a_bar_for_each() -> None:
    ranges = {"rotation": (-30.0, 30.0)}
    same = draw_invariance("accuracy", NAMES[:2], [curves(0.9), curves(0.5)], WAYS, [ranges, ranges])
    rotation, scale = same.axes[:2]
    (area,) = rotation.patches
    assert area.get_extents().transformed(rotation.transData.inverted()).intervalx.tolist() == [-30, 30]
    assert not scale.patches and len(rotation.lines) == 2
    differ = draw_invariance("accuracy", NAMES[:2], [curves(0.9), curves(0.5)], WAYS, [{}, ranges]).axes[0]
    assert not differ.patches and len(differ.lines) == 3
    bar, second = differ.lines[2], differ.lines[1]
    assert list(bar.get_xdata()) == [-30, 30] and bar.get_color() == second.get_color() and min(bar.get_ydata()) > 1


def test_one_model_needs_no_legend_and_four_fit() -> None:
    assert not draw_invariance("consistency", NAMES[:1], [curves(0.9)], WAYS, [{}]).legends
    found = reliability(np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([0, 0]), np.arange(2))
    figure = draw_reliability([*NAMES, "d"], [found] * 4, [found, None, None, None])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["without temperature", "with temperature"]
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == [*NAMES, "d"]


def test_what_transformers_leave_is_beside_what_nothing_would() -> None:
    angles = tuple(range(-180, 181, 15))
    turning = Turning(angles, np.zeros((len(angles), 3)), 0.0, (-60, 60))
    panel = draw_turning([1], ["a"], [turning]).axes[0]
    nothing, line = panel.lines
    assert list(nothing.get_xdata()) == list(nothing.get_ydata()) == [-180, 180]
    assert np.ptp(line.get_ydata()) == 0 and len(panel.patches) == 1
