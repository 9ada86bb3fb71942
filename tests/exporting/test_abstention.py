"""A spatial transformer that abstains below a threshold of its confidence, by `upright export`."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Upright
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer, observing
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.digits import Digits
from upright.data.distorted_mnist import DistortedMNIST
from upright.errors import UserError
from upright.exporting.abstention import measure
from upright.exporting.apart import ANGLES, rotated_views
from upright.runtime.predictor import open_session, run_batch
from upright.training.model import Model
from upright.training.restoring import restore


def model(**options: object) -> Model:
    torch.manual_seed(0)
    spec = Digits(size=28, margin=4).spec
    transformer = partial(SpatialTransformer, **options)
    network = TransformerNetwork(spec.input_shape, 10, network=LeNet, transformer=transformer)
    return Model(spec, network).eval()


def test_the_answers_are_those_at_the_identity_and_at_the_pose_of_the_transformer() -> None:
    turning, data = model(), Digits(size=28, margin=4, angles=(0, 90), val_fraction=0.01)
    answers = measure(turning, data, "--max-harm")
    indices = data.splits["val"]
    assert len(answers.confidence) == len(ANGLES) * len(indices) and answers.upright.sum() == len(indices)
    views = np.stack([rotated_views(data.source.images[i], "zeros") for i in indices]).reshape(-1, 28, 28, 1)
    images = torch.from_numpy(views).permute(0, 3, 1, 2)
    labels = np.repeat([data.source.labels[i] for i in indices], len(ANGLES))
    with torch.no_grad(), observing() as observations:
        # Without its transformer, the network has the images as they are.
        bare = turning.network.network(turning.normalise(images)).argmax(dim=1).numpy() == labels
        straightened = turning(images).argmax(dim=1).numpy() == labels
    assert np.array_equal(answers.bare_right, bare) and np.array_equal(answers.straightened_right, straightened)
    np.testing.assert_allclose(answers.confidence, observations[0].confidence.numpy(), atol=1e-5)
    assert (bare != straightened).any() and np.array_equal(answers.groups, np.arange(len(views)) // len(ANGLES))


def test_below_the_threshold_the_pose_is_the_identity() -> None:
    turning, pixels = model(), torch.rand(20, 1, 28, 28) * 255
    transformer = turning.network.transformer
    with torch.no_grad():
        theta, votes = transformer.locate(turning.normalise(pixels))
        confidence = transformer.localiser.confidence(votes)
        transformer.threshold = float(confidence.median())
        abstaining, same_votes = transformer.locate(turning.normalise(pixels))
    acts = confidence >= transformer.threshold
    assert 0 < acts.sum() < 20 and torch.equal(votes, same_votes)
    assert torch.equal(abstaining[acts], theta[acts]) and not abstaining[~acts].any()


def test_the_graph_abstains(run_folder: Path, upright: Upright) -> None:
    restored = restore(run_folder)
    images = restored.data.samples("val")[:100].images
    with torch.no_grad(), observing() as observations:
        restored.classifier.model(images)
    threshold = float(observations[0].confidence.median()) + 1e-4
    answer = upright("export", run_folder, "--threshold", threshold, "--outputs", "theta")
    assert answer.code == 0 and f"Threshold of the confidence: {threshold:.4f}. Harm " in answer.out, answer.err
    parity, manifest = (json.loads(Path(f"export/small/{name}.json").read_text()) for name in ("parity", "manifest"))
    effect = parity["effect"]
    assert manifest["orientation"]["threshold"] == effect["threshold"] == pytest.approx(threshold)
    assert parity["max_harm"] is None and parity["angles"] == list(ANGLES) and 0 < effect["touched"] < 100
    assert effect["images"] == {"upright": 270, "rotated": 7 * 270}
    assert manifest["other_outputs"] == ["theta", "confidence"] and parity["precisions"]["fp32"]["agreement"] == 1
    text = " ".join(Path("export/small/README.md").read_text().split())
    assert f"| {effect['harm']:.2f} |" in text and "the spatial transformer abstains" in text
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    theta, confidence = run_batch(open_session(Path("export/small/model.onnx")), pixels, ["theta", "confidence"])
    acts = confidence[:, 0] >= effect["threshold"]
    assert 10 < acts.sum() < 90 and not theta[~acts].any() and theta[acts].any(axis=1).all()
    np.testing.assert_allclose(theta[acts], observations[0].theta.numpy()[acts], atol=1e-4)
    assert upright("verify", "export/small").code == 0
    content = Path("export/small/SHA256SUMS").read_bytes()
    answer = upright("export", run_folder, "--max-harm", "0.5", "--force")
    assert answer.code == 1 and "270 upright images cannot show a harm within --max-harm 0.5 points" in answer.err
    assert answer.err.count("\n") == 1 and Path("export/small/SHA256SUMS").read_bytes() == content


def test_only_a_transformer_that_votes_can_abstain(upright: Upright) -> None:
    data = Digits(size=28, margin=4)
    with pytest.raises(UserError, match="--max-harm needs the confidence of one spatial transformer with a localiser"):
        measure(model(transform="affine"), data, "--max-harm")
    with pytest.raises(UserError, match="of one spatial transformer of the network, which has 0; the localisers of"):
        measure(Model(data.spec, LeNet(data.spec.input_shape, 10)), data, "--threshold")
    with pytest.raises(UserError, match="--max-harm needs upright images, but DistortedMNIST distorts those of its"):
        measure(model(), DistortedMNIST(task="R"), "--max-harm")
    answer = upright("export", "checkpoints/x", "--max-harm", "1", "--threshold", "0.5")
    assert answer.code == 2 and "give only one of --max-harm and --threshold" in answer.err
