"""Observations of transformers are rebuilt from the theta of a graph, without the weights of its network."""

from functools import partial

import pytest
import torch
from torch import nn

from upright.architectures.lenet import LeNet
from upright.architectures.resnet import SmallResNet
from upright.architectures.spatial_transformer import SpatialTransformer, last_of, observing
from upright.architectures.transformer_network import ParallelTransformer, SeriesTransformer, TransformerNetwork
from upright.evidence.reporting.subjects import _observations, _with_thetas
from upright.images import ImageSpec
from upright.training.model import Model
from upright.warp import pixel_centres

SPEC = ImageSpec(1, 28, 28, tuple("0123456789"), (0.4,), (0.5,))
ROTATION, SPLINE = (partial(SpatialTransformer, transform=name) for name in ("rotation", "thin_plate"))
NETWORKS = {
    "in front": partial(TransformerNetwork, network=LeNet),
    "in series": partial(
        TransformerNetwork, network=LeNet, transformer=partial(SeriesTransformer, transformers=[ROTATION, SPLINE])
    ),
    "side by side": partial(
        TransformerNetwork, network=LeNet, transformer=partial(ParallelTransformer, transformers=[ROTATION, SPLINE])
    ),
    "inside": partial(TransformerNetwork, network=partial(SmallResNet, depth=8, width=4), places=["input", "blocks.1"]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_theta_is_enough_to_rebuild_the_observations(name: str) -> None:
    def build_model(seed: int) -> Model:
        torch.manual_seed(seed)
        network: nn.Module = NETWORKS[name](SPEC.input_shape, len(SPEC.classes))
        for parameter in network.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        return Model(SPEC, network).eval()

    trained, other = build_model(1), build_model(2)
    images = torch.randint(0, 256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    with torch.no_grad(), observing() as observations:
        trained(images)
    rebuilt = _with_thetas(_observations(other), [each.theta for each in observations])
    assert len(rebuilt) == len(observations) and len(last_of(rebuilt)) == len(last_of(observations))
    points, normalised = pixel_centres(4, 4), trained.normalise(images)
    for ours, theirs in zip(last_of(rebuilt), last_of(observations), strict=True):
        assert ours.transformer is not theirs.transformer
        torch.testing.assert_close(ours.points(points), theirs.points(points))
        torch.testing.assert_close(ours.view(normalised), theirs.view(normalised))
