"""The task "orientation", from a folder of pictures without labels to answers of a bundle."""

import csv
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.architectures.polar import PolarNetwork
from upright.data.batch import Batch
from upright.errors import UserError
from upright.exporting.parity import Comparison, are_stable, choose_threshold
from upright.images import ImageSpec
from upright.runtime.task import OrientationEstimation
from upright.training.classifier import ImageClassifier
from upright.training.model import orientation
from upright.training.orientation import OrientationEstimator, OrientationMetrics, initial_angles, turn, votes
from upright.warp import rotation

SPEC = ImageSpec(3, 32, 32, (), (0.5,) * 3, (0.25,) * 3, "crop", mask="disc")
SGD = partial(torch.optim.SGD, lr=0.1)
SMALL = tuple(["--model.network.widths", "[8,16]", "--model.network.strides", "[2,2]", "--model.network.blocks", "1"])


def landscape(generator: np.random.Generator, height: int = 40, width: int = 48) -> Image.Image:
    """Return a picture whose upper half is bright."""
    rows = np.linspace(230, 30, height)[:, None, None] + 20 * generator.standard_normal((height, width, 3))
    return Image.fromarray(rows.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(120):
        path = folder / f"album {number % 3}" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        landscape(generator).save(path)
    return folder


def test_from_a_folder_to_a_bundle(pictures: Path, upright: Upright, capsys: pytest.CaptureFixture[str]) -> None:
    answer = upright(
        *("fit", "--config", ROOT / "configs/orientation.yaml", "--name", "up", "--wandb", "off"),
        *("--data.root", pictures, "--data.size", "32", "--data.batch_size", "16", "--trainer.max_epochs", "4"),
        *SMALL,
        *("--model.turns", "32"),
    )
    assert answer.code == 0, answer.err
    answer = upright("test", "--ckpt_path", "checkpoints/up")
    assert answer.code == 0, answer.err
    metrics = json.loads(Path("checkpoints/up/test.json").read_text())["metrics"]
    assert metrics["test/four_way"] > 0.9 and metrics["test/quarter_four_way"] > 0.9
    assert metrics["test/degrees_median"] < 15
    # The network sees no corner, with or without the mask.
    assert metrics["test/whole_degrees_median"] == pytest.approx(metrics["test/degrees_median"], abs=2)
    assert Path("checkpoints/up/test_orientation.png").is_file()

    assert upright("predict", "--ckpt_path", "checkpoints/up").code == 0
    rows = list(csv.DictReader(Path("checkpoints/up/predictions.csv").read_text().splitlines()))
    assert set(rows[0]) == {"name", "angle", "confidence"} and len(rows) == 24
    assert np.median([abs(float(row["angle"])) for row in rows]) < 15

    answer = upright("export", "checkpoints/up", "--max-wrong", "5")
    assert answer.code == 0, answer.err
    assert "share within 10 degrees" in answer.out and "Threshold of the confidence" in answer.out
    manifest = json.loads(Path("export/up/manifest.json").read_text())
    assert manifest["task"] == "orientation" and 0 < manifest["orientation"]["threshold"] < 1
    assert manifest["output"] == {"name": "orientation", "dtype": "float32", "shape": ["batch", 2]}
    parity = json.loads(Path("export/up/parity.json").read_text())
    assert parity["orientation"]["wrong"] <= 0.05 and parity["precisions"]["fp32"]["four_way"] > 0.9
    assert parity["precisions"]["fp32"]["largest_difference_degrees"] < 0.1
    assert upright("verify", "export/up").code == 0
    assert "estimates by which angle" in Path("export/up/README.md").read_text()

    answer = upright("report", "checkpoints/up", "export/up", "--images", "10", "--split", "val", "--vector", "svg")
    assert answer.code == 0 and answer.out.count("right side") == 2, answer.err
    report = json.loads(Path("checkpoints/report-up/report.json").read_text())
    checkpoint, deployed = report["models"]
    assert checkpoint["right_side"] == deployed["right_side"] and checkpoint["right_side"]["value"] > 0.9
    assert deployed["threshold"]["threshold"] == manifest["orientation"]["threshold"] and not checkpoint["threshold"]
    figures = {path.name for path in Path("checkpoints/report-up").glob("*.*g")}
    assert figures == {
        "abstention.png",
        "abstention.svg",
        "circle.png",
        "circle.svg",
        "pictures-1.png",
        "pictures-2.png",
    }
    answer = upright("select", "checkpoints/up")
    assert answer.code == 2 and "estimates the orientation, and select compares classifiers" in answer.err
    assert upright("describe", "checkpoints/up").code == 0
    recorded = "checkpoints/up/last.ckpt"
    assert upright("preview", recorded).code == 0
    answer = upright("fit", "--ckpt_path", recorded, "--trainer.max_epochs", "5", "--wandb", "off")
    assert answer.code == 0, answer.err

    from upright.runtime.predictor import OrientationPredictor, Predictor

    predict = OrientationPredictor("export/up")
    picture = landscape(np.random.default_rng(1), 300, 300)
    for degrees in (0, 90, 180, -90, 40):
        angle, confidence = predict(picture.rotate(degrees, Image.Resampling.BILINEAR))
        assert abs((angle - degrees + 180) % 360 - 180) < 20 and 0 < confidence <= 1
    with pytest.raises(UserError, match=r"'export/up' estimates the orientation; give one that classifies images"):
        Predictor("export/up")


def test_four_turns_never_resample(pictures: Path, upright: Upright) -> None:
    answer = upright(
        *("fit", "--config", ROOT / "configs/orientation.yaml", "--name", "four", "--wandb", "off"),
        *("--data.root", pictures, "--data.size", "32", "--data.batch_size", "16", "--trainer.max_epochs", "2"),
        *SMALL,
        *("--model.turns", "4"),
    )
    assert answer.code == 0, answer.err
    assert upright("test", "--ckpt_path", "checkpoints/four").code == 0
    metrics = json.loads(Path("checkpoints/four/test.json").read_text())["metrics"]
    assert metrics["test/four_way"] > 0.9 and metrics["test/degrees_median"] == pytest.approx(0, abs=1e-3)
    assert not any(name.startswith(("test/quarter", "test/whole")) for name in metrics)


@pytest.mark.parametrize("turns", [4, 12, 64])
def test_votes_and_orientation_are_inverse(turns: int) -> None:
    degrees = torch.arange(-175.0, 180, 5) if turns > 4 else torch.tensor([-90.0, 0, 90, 180])
    target = votes(degrees.deg2rad(), turns)
    torch.testing.assert_close(target.sum(dim=1), torch.ones(len(degrees)))
    answers = orientation((target + 1e-9).log())
    error = (answers[:, 0] - degrees + 180).remainder(360) - 180
    assert error.abs().max() < 360 / turns / 8
    torch.testing.assert_close(answers[:, 1], torch.ones(len(degrees)), atol=1e-4, rtol=0)


def test_another_side_does_not_pull_the_angle() -> None:
    share = torch.zeros(1, 64)
    share[0, 0], share[0, 16] = 0.7, 0.3
    ((angle, confidence),) = orientation((share + 1e-9).log()).tolist()
    assert angle == pytest.approx(0, abs=1e-3) and confidence == pytest.approx(0.7, abs=1e-4)


def test_a_confidence_is_at_most_1() -> None:
    peaks = torch.full((2000, 64), -60.0)  # all votes lie near one peak, so rounding decides whether they sum to more
    peaks[:, :7] = torch.rand(2000, 7, generator=torch.Generator().manual_seed(0))
    confidences = orientation(peaks)[:, 1]
    assert confidences.max() == 1
    metrics = OrientationMetrics()
    metrics.update("", orientation(peaks), torch.full((2000,), 2 * math.pi * 3 / 64))
    metrics.loss.update(0.0, 1)
    expected = 1 - confidences.mean()  # all answers are right
    torch.testing.assert_close(metrics.compute()["calibration_error"], expected, atol=1e-4, rtol=0)


def test_an_answer_of_two_equal_peaks_is_not_stable() -> None:
    peaks = torch.full((3, 64), -9.0)
    peaks[:, 5] = 0.0
    peaks[1, 5 + 32] = 0.0
    peaks[2, 5 + 32] = -0.1
    assert are_stable(peaks.numpy()).tolist() == [True, False, True]


def test_the_threshold_of_the_confidence() -> None:
    def comparison(*rows: tuple[float, float]) -> Comparison:
        answers, nothing = np.array(rows), np.zeros(len(rows), np.int64)
        names = [str(number) for number in nothing]
        return Comparison(names, nothing, nothing, answers, answers, {}, OrientationEstimation(), nothing == 0)

    some = comparison((0, 0.9), (3, 0.8), (90, 0.7), (0, 0.6), (180, 0.5))
    assert choose_threshold(some, 0) == (0.8, 0.4, 0.0)
    assert choose_threshold(some, 25) == (0.6, 0.8, 0.25)
    # Images of equal confidence are used together, and no confidence reaches the threshold of a hopeless model.
    threshold = choose_threshold(comparison((0, 1.0), (90, 1.0), (0, 0.5)), 10)
    assert threshold.share == 0 and threshold.threshold > 1


def test_turn_moves_pixels_without_a_change() -> None:
    images = torch.rand(4, 3, 8, 8)
    turned = turn(images, torch.tensor([0, 1, 2, 3]))
    for number in range(4):
        assert torch.equal(turned[number], torch.rot90(images[number], number, (1, 2)))


def test_data_that_rotate_are_known() -> None:
    degrees = torch.tensor([-170.0, -20, 0, 65])
    nothing = torch.zeros(4, dtype=torch.long)
    batch = Batch(torch.zeros(4, 3, 8, 8), nothing, nothing, nothing, rotation(degrees.deg2rad()))
    torch.testing.assert_close(initial_angles(batch).rad2deg(), degrees, atol=1e-3, rtol=0)


def test_metrics() -> None:
    metrics = OrientationMetrics()
    answers = torch.tensor([[-179.0, 0.9], [40.0, 0.8], [90.0, 0.5], [3.0, 1.0]])
    metrics.update("", answers, torch.tensor([math.pi, 0.0, 0.0, 0.0]))
    metrics.update("quarter", answers[3:], torch.zeros(1))
    metrics.loss.update(0.5, 4)
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["four_way"] == 0.75 and values["within_5"] == values["within_10"] == 0.5
    assert values["degrees_mean"] == pytest.approx((1 + 40 + 90 + 3) / 4)
    assert values["confidence"] == pytest.approx(0.8) and values["loss"] == 0.5
    # By bins: 0.9 and 0.8 and 1.0 are right, 0.5 is wrong.
    assert values["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.5 + 0.0) / 4)
    assert values["quarter_degrees_median"] == pytest.approx(3)
    metrics.reset()
    metrics.loss.update(0.5, 1)
    metrics.update("quarter", answers[3:], torch.zeros(1))
    assert "degrees_median" in metrics.compute()


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"classes": ("a", "b")}, {}, "takes pictures without classes, but the data have 2"),
        ({"resize": "stretch"}, {}, "square images that are not stretched, got 32x32 and resize stretch"),
        ({"width": 40}, {}, "square images that are not stretched, got 32x40"),
        ({}, {"turns": 6}, "turns must be a multiple of 4, got 6"),
    ],
)
def test_what_it_refuses(spec: dict[str, object], options: dict[str, int], message: str) -> None:
    content = {**SPEC.to_dict(), **spec}
    with pytest.raises(UserError, match=message):
        OrientationEstimator(ImageSpec.from_dict(content), PolarNetwork, SGD, **options)


def test_a_classifier_refuses_data_without_classes() -> None:
    with pytest.raises(UserError, match=r"no classes: train upright.OrientationEstimator"):
        ImageClassifier(SPEC, LeNet, SGD)
