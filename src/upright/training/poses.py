"""The losses of poses: the upright loss of two views, and the identity prior; and what the data must have for them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from upright.architectures.spatial_transformer import Observation, SpatialTransformer, last_of
from upright.architectures.voting import NetworkLocaliser, PolarLocaliser
from upright.data.batch import Points
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.training.orientation import votes
from upright.training.uprightness import final_points, upright_loss
from upright.warp import pixel_centres, rotation_angle


class PoseLosses:
    """The losses that compare poses, with their weights; see `ImageClassifier`.

    Raises:
        UserError: for a negative weight, and for a network without a spatial transformer.
    """

    def __init__(self, network: nn.Module, upright_weight: float, prior_weight: float) -> None:
        self.upright_weight, self.prior_weight = upright_weight, prior_weight
        transformers = [module for module in network.modules() if isinstance(module, SpatialTransformer)]
        for name, weight in (("upright_weight", upright_weight), ("prior_weight", prior_weight)):
            if weight < 0 or (weight > 0 and not transformers):
                raise UserError(
                    f"{name} {weight} needs a SpatialTransformer in the network; "
                    "use 0, or put a transformer in front (configs/stn_lenet.yaml)."
                )
        self.follows = all(isinstance(transformer.localisation[0], PolarLocaliser) for transformer in transformers)

    def __bool__(self) -> bool:
        return bool(self.upright_weight or self.prior_weight)

    def check_data(self, data: ImageDataModule | None) -> None:
        """Refuse data without a second view or a rotation, with mixed images, or with an unknown transform.

        ``data`` is None for data of another class.
        """
        if not self:
            return
        augmentation = data and data.augmentation
        if self.upright_weight and augmentation is None:
            raise UserError(
                "The upright loss needs two augmented views of each image, which only an ImageDataModule yields: use "
                "one, or set upright_weight 0."
            )
        loss, option = ("The upright loss", "upright_weight") if self.upright_weight else ("The prior", "prior_weight")
        # A PolarLocaliser follows every rotation, also of images that were never rotated.
        if not ((self.follows and not self.upright_weight) or (augmentation and augmentation.moves)):
            raise UserError(
                f"{loss} compares poses of an image, but the data are not rotated: add "
                f"upright.data.augmentation.RandomAffine with rotate to data.init_args.augment, or set {option} 0."
            )
        if augmentation and augmentation.mixes:
            raise UserError(
                f"{loss} compares poses of one image, but {augmentation.mixes} mixes two images: remove it from "
                f"data.init_args.augment, or set {option} 0."
            )
        if data and (unreported := data.augmentation.unreported or data.image_transforms.moving):
            raise UserError(
                f"{loss} needs the transform of each image, but {unreported} does not report it: use "
                f"RandomAffine or RandomElastic of upright.data.augmentation, a module with a transform_matrix, or set "
                f"{option} 0."
            )

    def __call__(
        self, transforms: Sequence[Points], observed: Sequence[list[Observation]], aspect: float
    ) -> Mapping[str, tuple[float, Tensor, int]]:
        """Return each loss with a weight by its name: the weight, its value, and the number of poses of its mean.

        For each view of the images, there is a transform, and there are the observations of the transformers.
        """
        views = list(zip(transforms, observed, strict=True))
        points = pixel_centres(4, 4, device=observed[0][0].theta.device)
        poses = [torch.cat(final_points(*view, points)) for view in views]
        losses: dict[str, tuple[float, Tensor, int]] = {}
        if self.upright_weight:
            first, second = poses
            losses["upright_loss"] = (self.upright_weight, upright_loss(first, second, points, aspect), len(first))
        if self.prior_weight:
            parts = [prior_loss(*view, points, aspect) for view in views]
            losses["prior_loss"] = (self.prior_weight, torch.stack(parts).mean(), sum(map(len, poses)))
        return losses


def prior_loss(transforms: Points, observations: list[Observation], points: Tensor, aspect: float) -> Tensor:
    """Return the mean loss of poses that should be the identity, for one view of the images.

    It is `upright_loss` against the identity. The votes of a `NetworkLocaliser` have modes, whose mean is no answer: it
    is their cross-entropy with the rotation of the image, which also trains an `OrientationEstimator`.
    """
    losses = []
    for last in last_of(observations):
        before = transforms(last.before.points(points) if last.before else points)
        if isinstance(last.transformer.localisation[0], NetworkLocaliser):
            assert last.votes is not None
            target = votes(rotation_angle(before.expand(len(last.votes), -1, -1), points, aspect), last.votes.shape[1])
            losses.append(-(target * last.votes.clamp(min=1e-12).log()).sum(dim=1).mean())
        else:
            final = transforms(last.points(points))
            losses.append(upright_loss(final, points.expand_as(final), points, aspect))
    return torch.stack(losses).mean()
