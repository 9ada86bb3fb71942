"""Where spatial transformers go: in front of a network, inside it, in series, and side by side.

Source: Jaderberg et al. 2015 (arXiv:1506.02025), sections 3.4, 4.1 and 4.3; in series, inverse compositional networks
(Lin, Lucey 2017, arXiv:1612.03897), which compose what the transformers say instead of resampling what they gave.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from upright.architectures.spatial_transformer import Network, Shape, SpatialTransformer, branch, observed

Part = Callable[[Shape], nn.Module]
"""A transformer to be: completed with ``(input_shape)``; what it becomes has an ``output_shape``."""


class SeriesTransformer(nn.Module):
    """Transformers one after the other, each of which looks at what those before it gave.

    What they say is composed, and the original sampled: nothing is resampled twice.

    Args:
        input_shape: ``(C, H, W)``.
        transformers: each completed with the shape that the one before it gives.
    """

    def __init__(self, input_shape: Shape, *, transformers: Sequence[Callable[[Shape], SpatialTransformer]]) -> None:
        super().__init__()
        _some(transformers)
        self.transformers = nn.ModuleList()
        self.output_shape = input_shape
        for part in transformers:
            transformer = part(self.output_shape)
            if not isinstance(transformer, SpatialTransformer):
                raise ValueError(f"A series is of SpatialTransformers, got a {type(transformer).__name__}.")
            self.transformers.append(transformer)
            self.output_shape = transformer.output_shape

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` turned: ``(B, C, H', W')``."""
        turned, said = images, []
        for transformer in self.transformers:
            assert isinstance(transformer, SpatialTransformer)
            said.append((transformer, transformer.localisation(turned)))
            turned = observed(*said[-1], partial(self._sample, images, said))
        return turned

    @staticmethod
    def _sample(images: Tensor, said: list[tuple[SpatialTransformer, Tensor]]) -> Tensor:
        def where(points: Tensor) -> Tensor:
            for transformer, theta in reversed(said):
                points = transformer.points(theta, points)
            return points

        return said[-1][0].look(images, where)


class ParallelTransformer(nn.Module):
    """Transformers side by side, each of which looks at the same image; what they give is stacked as channels.

    The paper's arrangement for adding two digits (section 4.1, appendix A.1).

    Args:
        input_shape: ``(C, H, W)``.
        transformers: each completed with that; all give one size.
    """

    def __init__(self, input_shape: Shape, *, transformers: Sequence[Part]) -> None:
        super().__init__()
        _some(transformers)
        self.transformers = nn.ModuleList(part(input_shape) for part in transformers)
        shapes = [_output_shape(transformer) for transformer in self.transformers]
        if len({shape[1:] for shape in shapes}) != 1:
            raise ValueError(f"Parallel transformers must give one size to be stacked, got {shapes}.")
        self.output_shape: Shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` to ``(B, C * transformers, H', W')``."""
        return torch.cat([branch(part, images) for part in self.transformers], dim=1)


class ParallelNetwork(nn.Module):
    """Transformers side by side, each with a network of its own, and one linear layer over what those say.

    The paper's 2x and 4x arrangement for birds (section 4.3): each learns to look at another part.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: ``K``.
        network: completed with ``(shape, features)`` for every transformer.
        transformers: each completed with ``(input_shape)``.
        features: number of features that each network ends in.
    """

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        network: Network,
        transformers: Sequence[Part],
        features: int = 64,
    ) -> None:
        super().__init__()
        _some(transformers)
        self.branches = nn.ModuleList()
        for part in transformers:
            transformer = part(input_shape)
            self.branches.append(nn.Sequential(transformer, network(_output_shape(transformer), features), nn.ReLU()))
        self.classifier = nn.Linear(features * len(self.branches), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.cat([branch(part, images) for part in self.branches], dim=1))
        return logits


class TransformerNetwork(nn.Module):
    """A spatial transformer in front of any network, and at any place inside it.

    Args:
        input_shape: ``(C, H, W)``.
        num_classes: ``K``.
        network: the network that sees what was turned.
        transformer: completed with the shape of what it turns; one for every place.
        places: ``input``, and names of modules of the network (as ``named_modules`` gives them), before each of which
            a transformer turns the feature maps. Each is taken to follow the one that ran before it, so that no two
            should be in branches side by side.
    """

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        network: Network,
        transformer: Part = SpatialTransformer,
        places: Sequence[str] = ("input",),
    ) -> None:
        super().__init__()
        if len(set(places)) < len(places) or isinstance(places, str):
            raise ValueError(f"places must be a list of different names, got {places!r}.")
        self.transformer = transformer(input_shape) if "input" in places else nn.Identity()
        shape = _output_shape(self.transformer) if "input" in places else input_shape
        self.network = network(shape, num_classes)
        inside = [place for place in places if place != "input"]
        modules = dict(self.network.named_modules())
        for place in inside:
            if not place or place not in modules:
                names = ", ".join(name for name in modules if name)
                raise ValueError(f"The network has no module '{place}' to put a transformer before; it has: {names}.")
        for place in inside:
            _insert(self.network, place, modules[place], shape, transformer)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.transformer(images))
        return logits


def _some(transformers: Sequence[Part]) -> None:
    if not transformers:
        raise ValueError("transformers must name at least one.")


def _output_shape(transformer: nn.Module) -> Shape:
    shape = getattr(transformer, "output_shape", None)
    if shape is None:
        raise ValueError(f"{type(transformer).__name__} has no output_shape (C, H, W), so it is no transformer.")
    found: Shape = shape
    return found


def _insert(network: nn.Module, place: str, module: nn.Module, input_shape: Shape, transformer: Part) -> None:
    """Put a transformer before ``module``, whose input is found by a forward pass."""
    found: list[Shape] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: found.extend(tuple(x.shape[1:]) for x in inputs))
    _try(network, input_shape)
    handle.remove()
    if len(found) != 1 or len(found[0]) != 3:
        raise ValueError(
            f"'{place}' must be called once, with feature maps (C, H, W) as its one positional argument, for a "
            f"transformer before it; it is called with {found or 'none'}."
        )
    # Its name is another one if a transformer was put before a module that holds it.
    (name,) = (name for name, other in network.named_modules() if other is module)
    network.set_submodule(name, nn.Sequential(transformer(found[0]), module))
    try:
        _try(network, input_shape)
    except RuntimeError as error:
        raise ValueError(f"What follows the transformer at '{place}' cannot take its output: {error}") from None


@torch.no_grad()
def _try(network: nn.Module, input_shape: Shape) -> None:
    training = network.training
    device = next((parameter.device for parameter in network.parameters()), None)
    network.eval()(torch.zeros(1, *input_shape, device=device))
    network.train(training)
