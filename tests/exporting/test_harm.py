"""Harm and gain by threshold, and the smallest threshold within a limit of harm."""

import json

import numpy as np
import pytest

from upright.errors import GateError
from upright.exporting.harm import Answers, effect_tables, summary
from upright.intervals import wilson


def random_answers(count: int = 400, harm: float = 0.1) -> Answers:
    """Return answers for each image upright and rotated seven times. Unsure transformers do more harm."""
    generator = np.random.default_rng(0)
    upright = np.tile(np.arange(8) == 0, count)
    confidence = generator.random(8 * count).astype(np.float32)
    bare = np.where(upright, generator.random(8 * count) < 0.9, generator.random(8 * count) < 0.3)
    straightened = np.where(upright, bare & (generator.random(8 * count) > 2 * harm * (1 - confidence)), True)
    return Answers(bare, straightened, confidence, upright, np.repeat(np.arange(count), 8))


def test_harm_counts_upright_images_and_gain_counts_rotated_ones() -> None:
    right, wrong = True, False
    answers = Answers(
        # Upright: harmed, improved, unchanged, unsure. Rotated: gained, lost, unchanged, unsure.
        np.array([right, wrong, right, right, wrong, right, wrong, wrong]),
        np.array([wrong, right, right, wrong, right, wrong, wrong, right]),
        np.array([0.9, 0.9, 0.9, 0.2, 0.9, 0.9, 0.9, 0.2], np.float32),
        np.repeat([True, False], 4),
        np.tile(np.arange(4), 2),
    )
    effect = answers.effect(0.5)
    for name, share in (("harm", 1 / 4), ("gain", 1 / 4), ("touched", 3 / 4)):
        value, *interval = (100 * number for number in wilson(share, 4))
        assert effect[name] == value and effect[f"{name}_interval"] == interval
    assert effect["accuracy"] == {
        "upright": {"bare": 0.75, "attached": 0.75}, "rotated": {"bare": 0.25, "attached": 0.25}
    }  # fmt: skip
    assert answers.effect(0)["harm"] == 50 and answers.effect(0)["gain"] == 50
    assert [answers.effect(1)[name] for name in ("harm", "gain", "touched")] == [0, 0, 0]
    plain = json.loads(json.dumps(effect))
    assert plain["harm"] == 25 and plain["harm_interval"] == pytest.approx([4.56, 69.94], abs=0.01)
    assert plain["images"] == {"upright": 4, "rotated": 4} and plain["threshold"] == 0.5
    assert summary(effect).startswith("Harm 25.00 points (95 %: 4.56 to 69.94), gain 25.00 points")
    table = " ".join(effect_tables(plain).split())
    assert "| harm: answers that go from right to wrong | 4 upright | 25.00 | 4.56 to 69.94 |" in table
    assert "| upright | 0.7500 | 0.7500 | | rotated | 0.2500 | 0.2500 |" in table


def test_the_threshold_is_the_smallest_one_within_the_limit() -> None:
    answers = random_answers()
    bounds = {value: answers.effect(value)["harm_interval"][1] for value in np.unique(answers.confidence)}
    thresholds = []
    for max_harm in (1, 2, 4, 20):
        threshold = answers.smallest_threshold(max_harm)
        thresholds.append(threshold)
        assert answers.effect(threshold)["harm_interval"][1] <= max_harm
        lower = max((value for value in bounds if value < threshold), default=None)
        assert lower is None or bounds[lower] > max_harm
    assert thresholds == sorted(thresholds, reverse=True) and thresholds[0] > thresholds[2] > thresholds[3] == 0


def test_the_bound_holds_on_new_images() -> None:
    """The harm on a population is within the limit for at least 95 % of the samples that chose a threshold."""
    generator, within = np.random.default_rng(0), 0
    for _ in range(300):
        confidence = generator.random(500).astype(np.float32)
        straightened = generator.random(500) > 0.2 * (1 - confidence)
        upright = np.arange(500) < 499  # one rotated image
        answers = Answers(np.ones(500, bool), straightened, confidence, upright, np.arange(500))
        threshold = answers.smallest_threshold(2)
        within += 0.1 * (1 - threshold) ** 2 <= 0.02
    assert within >= 0.95 * 300


def test_views_of_one_image_are_not_independent() -> None:
    answers = random_answers(count=50)
    single = Answers(*(values[answers.upright] for values in vars(answers).values()))
    repeated = Answers(*(np.repeat(values, 4) for values in vars(single).values()))
    both = [
        Answers(
            *(
                np.append(v, w[~answers.upright][:1])
                for v, w in zip(vars(each).values(), vars(answers).values(), strict=True)
            )
        )
        for each in (single, repeated)
    ]
    one, four = (each.effect(0) for each in both)
    assert one["harm"] == four["harm"] and four["harm_interval"][1] == pytest.approx(one["harm_interval"][1], abs=0.1)


def test_a_limit_that_cannot_be_met_is_refused() -> None:
    answers = random_answers(count=100)
    with pytest.raises(GateError, match=r"100 upright images cannot show a harm within --max-harm 1 points: .* 3.70"):
        answers.smallest_threshold(1)
    confident = Answers(*list(vars(answers).values())[:2], np.ones(800, np.float32), answers.upright, answers.groups)
    with pytest.raises(
        GateError, match="No threshold has a harm within --max-harm 5 points: the most confident images"
    ):
        confident.smallest_threshold(5)
    assert confident.smallest_threshold(50) == 0


def test_the_threshold_keeps_a_distance_from_every_confidence() -> None:
    near = np.float32(0.5)
    values = np.array([near, np.nextafter(near, np.float32(1)), 0.9], np.float32).repeat(400)
    flags = np.ones(1200, bool)
    answers = Answers(flags, values > near, values, np.arange(1200) > 0, np.arange(1200))
    assert answers.smallest_threshold(1) == pytest.approx(0.7)
