"""Spatial transformer networks (Jaderberg, Simonyan, Zisserman, Kavukcuoglu 2015, arXiv:1506.02025).

The idea: a small network computes the parameters of a transform from the image, and a differentiable sampler applies
the transform before the image is classified. The classification loss alone trains both.

Differences from the paper:

- By default, the transform is a rotation and the localiser votes for its angle (`upright.architectures.voting`). So
  the transformer is upright by construction. The paper's is ``transform="affine"``.
- The regression layer is our own and follows any other localisation network. It starts at zero, so that such a
  transformer starts exactly at the identity.
- Sampling points are one matrix product.
- Border pixels follow ``align_corners=False``.
- ``rotation`` and ``similarity`` are not in the paper's list; they are sufficient for a rotated digit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from upright.architectures.layers import check_choice
from upright.architectures.localisers import ConvLocaliser, DenseLocaliser, Network, Shape
from upright.architectures.transforms import MatrixTransform, ThinPlate, TransformName
from upright.architectures.voting import PolarLocaliser, VotingLocaliser
from upright.warp import Padding, Sampling, full_precision, pixel_centres, sample

# Checkpoints of version 0.2 name the paper's localisers as classes of this module.
__all__ = ["ConvLocaliser", "DenseLocaliser", "Observation", "SpatialTransformer", "last_of", "observe", "observing"]


class SpatialTransformer(nn.Module):
    """A localiser, a grid of sampling points, and a sampler.

    ``theta`` ``(B, P)`` is zero at the identity; `upright.architectures.transforms` defines its entries.

    Args:
        input_shape: ``(C, H, W)`` of the images or feature maps that are transformed.
        transform: family of the transforms.
        control_points: control points of the thin-plate spline, per axis.
        localiser: factory of the localiser; it is called with ``(input_shape, num_outputs)``. By default a
            `PolarLocaliser` for ``rotation``, else a `ConvLocaliser`.
        features: number of features between the localiser and the regression of ``theta``, or its votes.
        sampling: interpolation between pixels; ``nearest`` gives the localiser no gradient.
        padding: values beyond the border.
        output_size: ``(H, W)`` of the output, by default that of the input. If it is smaller, several points per pixel
            are averaged to avoid aliasing, as the paper does after its transformer.
        start: ``theta`` before training, by default the identity. Parallel transformers can start at different places
            of the image. A localiser that votes has no start: it follows the image.
        lr_factor: learning rate of the transformer, as a multiple of the network's.

    Attributes:
        voting: True if the localiser is a `VotingLocaliser`.
        threshold: confidence below which the transformer abstains: ``theta`` is then 0, the identity. `upright export`
            sets it; it is 0 in training.
    """

    def __init__(
        self,
        input_shape: Shape,
        *,
        transform: TransformName = "rotation",
        control_points: int = 4,
        localiser: Network | None = None,
        features: int = 32,
        sampling: Sampling = "bilinear",
        padding: Padding = "zeros",
        output_size: tuple[int, int] | None = None,
        start: Sequence[float] | None = None,
        lr_factor: float = 1.0,
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        rows, columns = output_size or (height, width)
        if min(rows, columns) < 1:
            raise ValueError(f"output_size must be at least 1x1, got {rows}x{columns}.")
        self.sampling, self.padding, self.lr_factor = sampling, padding, lr_factor
        self.output_shape: Shape = (channels, rows, columns)
        check_choice("transform", transform, get_args(TransformName))
        check_choice("sampling", sampling, get_args(Sampling))
        check_choice("padding", padding, get_args(Padding))
        spline = transform == "thin_plate"
        self.transform = ThinPlate(control_points) if spline else MatrixTransform(transform, width / height)
        size = self.transform.size
        if start is not None and len(start) != size:
            raise ValueError(f"start needs {size} numbers for '{transform}', got {len(start)}.")
        localiser = localiser or (PolarLocaliser if transform == "rotation" else ConvLocaliser)
        body = localiser(input_shape, features)
        head: list[nn.Module] = [nn.ReLU(), Regression(features, start or [0.0] * size)]
        self.voting, self.threshold = isinstance(body, VotingLocaliser), 0.0
        if isinstance(body, VotingLocaliser):
            if transform != "rotation" or start is not None:
                raise ValueError(
                    f"{type(body).__name__} votes for the transform 'rotation' and has no start; "
                    f"got transform '{transform}' and start {start}."
                )
            head = body.head(features)
        self.localisation = nn.Sequential(body, *head)

    def locate(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return ``theta`` ``(B, P)`` of images ``(B, C, H, W)``, and the votes ``(B, N)`` if the localiser votes."""
        if not self.voting:
            theta: Tensor = self.localisation(images)
            return theta, None
        # Eight bits resolve an angle only to a degree or two.
        with full_precision(images.device):
            votes: Tensor = self.localisation(images.float()).softmax(dim=1)
            theta = self.localiser.theta(votes)
            if self.threshold:
                theta = torch.where(self.localiser.confidence(votes)[:, None] >= self.threshold, theta, 0.0)
            return theta, votes

    @property
    def localiser(self) -> VotingLocaliser:
        """The localiser, if ``voting`` is True."""
        localiser = self.localisation[0]
        assert isinstance(localiser, VotingLocaliser)
        return localiser

    def points(self, theta: Tensor, reference: Tensor) -> Tensor:
        """Map output points ``(N, 2)`` or ``(B, N, 2)`` to the input by ``theta`` ``(B, P)``: ``(B, N, 2)``."""
        with full_precision(theta.device):
            points: Tensor = self.transform(theta.float(), reference)
        return points

    def sample(self, images: Tensor, sources: Callable[[Tensor], Tensor]) -> Tensor:
        """Sample ``images`` ``(B, C, H, W)`` to the output size: ``(B, C, H', W')``.

        ``sources`` maps output points ``(N, 2)`` to points of ``images``, ``(B, N, 2)``. If the output has fewer pixels
        than ``images``, several points of each pixel are averaged.
        """
        _, rows, columns = self.output_shape
        shrink = (-(-images.shape[-2] // rows), -(-images.shape[-1] // columns))
        grid = pixel_centres(rows * shrink[0], columns * shrink[1], device=images.device)
        return sample(images.float(), sources(grid), rows, columns, self.padding, self.sampling, shrink)

    def forward(self, images: Tensor) -> Tensor:
        """Transform images ``(B, C, H, W)``: ``(B, C, H', W')``."""
        theta, votes = self.locate(images)
        return observe(self, theta, lambda: self.sample(images, partial(self.points, theta)), votes)


class Regression(nn.Linear):
    """A linear layer from features to ``theta``; before training it returns ``start`` for every input."""

    starts_fixed = True

    def __init__(self, features: int, start: Sequence[float]) -> None:
        super().__init__(features, len(start))
        nn.init.zeros_(self.weight)
        with torch.no_grad():
            self.bias.copy_(torch.tensor(start))
        self.register_load_state_dict_pre_hook(_refuse_angles)  # type: ignore[no-untyped-call]


def _refuse_angles(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Explain why the weights of a rotation with an angle in place of a direction cannot be loaded."""
    *_, errors = rest
    bias = state.get(f"{prefix}bias")
    assert isinstance(module, Regression)
    if bias is not None and (len(bias), module.out_features) in ((1, 2), (4, 5)):
        errors.append(
            "Upright 0.2 described a rotation by one angle, and now it is a direction: train it again, or use 0.2"
        )


@dataclass(eq=False)
class Observation:
    """The action of one transformer in one forward pass.

    Args:
        transformer: the transformer.
        theta: parameters of the transform, ``(B, P)``.
        output: output of the transformer, ``(B, C, H', W')``; empty if the pass was stopped before sampling.
        before: observation of the transformer before it, if there is one.
        votes: distribution over the candidates of a `VotingLocaliser`, ``(B, N)``; None for other localisers.
    """

    transformer: SpatialTransformer
    theta: Tensor
    output: Tensor
    before: "Observation | None"
    votes: Tensor | None = None

    def points(self, reference: Tensor) -> Tensor:
        """Map ``reference`` points ``(N, 2)`` of this output to the input of the first transformer: ``(B, N, 2)``."""
        points = self.transformer.points(self.theta, reference)
        return self.before.points(points) if self.before else points

    @property
    def confidence(self) -> Tensor | None:
        """Concentration of the votes, ``(B,)``, from 0 to 1; None for a localiser that does not vote."""
        return None if self.votes is None else self.transformer.localiser.confidence(self.votes)

    def view(self, images: Tensor) -> Tensor:
        """Sample the input ``images`` ``(B, C, H, W)`` of the first transformer at this output's points and size.

        For a transformer of images, the result is `output`. For a transformer inside a network, it is the part of the
        images that its feature maps represent.
        """
        return self.transformer.sample(images, self.points)


def last_of(observations: list[Observation]) -> list[Observation]:
    """Return the last observations: one, or one for each of parallel transformers."""
    followed = {id(observation.before) for observation in observations}
    return [observation for observation in observations if id(observation) not in followed]


@dataclass
class _Observer:
    observations: list[Observation]
    stop_after: int | None
    before: Observation | None = None


class _StopForward(Exception):
    pass


_observer: ContextVar[_Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observing(stop_after: int | None = None) -> Iterator[list[Observation]]:
    """Collect an `Observation` of every spatial transformer in the forward passes inside the ``with``, in order.

    The ``with`` block ends as soon as ``stop_after`` transformers have computed their ``theta``. The last of them does
    not sample, and nothing after it runs.
    """
    observer = _Observer([], stop_after)
    token = _observer.set(observer)
    try:
        yield observer.observations
    except _StopForward:
        pass
    finally:
        _observer.reset(token)


def observe(
    transformer: SpatialTransformer, theta: Tensor, sample_output: Callable[[], Tensor], votes: Tensor | None = None
) -> Tensor:
    """Return ``sample_output()``, and record it as an `Observation` inside `observing`."""
    observer = _observer.get()
    if observer is None:
        return sample_output()
    last = len(observer.observations) + 1 == observer.stop_after
    output = theta.new_empty(0) if last else sample_output()
    observer.before = Observation(transformer, theta, output, observer.before, votes)
    observer.observations.append(observer.before)
    if last:
        raise _StopForward
    return output


def run_branch(module: nn.Module, images: Tensor) -> Tensor:
    """Return ``module(images)`` for one of several parallel modules: the others do not follow its observation."""
    observer = _observer.get()
    before = observer.before if observer else None
    output: Tensor = module(images)
    if observer:
        observer.before = before
    return output
