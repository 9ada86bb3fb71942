"""Arrangements of spatial transformers: in front of a network, inside it, in series, and in parallel.

Sources: Jaderberg et al. 2015 (arXiv:1506.02025), sections 3.4, 4.1 and 4.3. The series follows inverse compositional
networks (Lin, Lucey 2017, arXiv:1612.03897), which compose the transforms instead of resampling the outputs.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from upright.architectures.localisers import Network, Shape
from upright.architectures.spatial_transformer import SpatialTransformer, observe, run_branch

TransformerFactory = Callable[[Shape], nn.Module]
"""A factory of transformers: it is called with ``(input_shape)``; its result has an ``output_shape``."""


class SeriesTransformer(nn.Module):
    """Transformers in series: the input of each is the output of the one before.

    The transforms are composed and the original images are sampled, so nothing is resampled twice.

    Args:
        transformers: factories; each is called with the output shape of the transformer before.
    """

    def __init__(self, input_shape: Shape, *, transformers: Sequence[Callable[[Shape], SpatialTransformer]]) -> None:
        super().__init__()
        _check_not_empty(transformers)
        self.transformers = nn.ModuleList()
        self.output_shape = input_shape
        for part in transformers:
            transformer = part(self.output_shape)
            if not isinstance(transformer, SpatialTransformer):
                raise ValueError(f"A series consists of SpatialTransformers, got a {type(transformer).__name__}.")
            self.transformers.append(transformer)
            self.output_shape = transformer.output_shape

    def forward(self, images: Tensor) -> Tensor:
        """Transform images ``(B, C, H, W)``: ``(B, C, H', W')``."""
        output, steps = images, []
        for transformer in self.transformers:
            assert isinstance(transformer, SpatialTransformer)
            theta, votes = transformer.locate(output)
            steps.append((transformer, theta))
            output = observe(transformer, theta, partial(self._sample, images, steps), votes)
        return output

    @staticmethod
    def _sample(images: Tensor, steps: list[tuple[SpatialTransformer, Tensor]]) -> Tensor:
        def sources(points: Tensor) -> Tensor:
            for transformer, theta in reversed(steps):
                points = transformer.points(theta, points)
            return points

        return steps[-1][0].sample(images, sources)


class ParallelTransformer(nn.Module):
    """Transformers in parallel on the same image; their outputs are concatenated along the channels.

    It is the paper's arrangement for the addition of two digits (section 4.1, appendix A.1).

    Args:
        transformers: factories; each is called with ``(input_shape)``. All outputs must have one size.
    """

    def __init__(self, input_shape: Shape, *, transformers: Sequence[TransformerFactory]) -> None:
        super().__init__()
        _check_not_empty(transformers)
        self.transformers = nn.ModuleList(part(input_shape) for part in transformers)
        shapes = [_output_shape(transformer) for transformer in self.transformers]
        if len({shape[1:] for shape in shapes}) != 1:
            raise ValueError(f"Parallel transformers need outputs of one size, got {shapes}.")
        self.output_shape: Shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def forward(self, images: Tensor) -> Tensor:
        """Transform images ``(B, C, H, W)``: ``(B, C * transformers, H', W')``."""
        return torch.cat([run_branch(part, images) for part in self.transformers], dim=1)


class ParallelNetwork(nn.Module):
    """Transformers in parallel, each with its own network, and one linear layer on the outputs of these networks.

    It is the paper's 2x and 4x arrangement for birds (section 4.3): each transformer learns to look at another part.

    Args:
        network: factory of networks; it is called with ``(shape, features)`` for every transformer.
        transformers: factories; each is called with ``(input_shape)``.
        features: number of output features of each network.
    """

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        network: Network,
        transformers: Sequence[TransformerFactory],
        features: int = 64,
    ) -> None:
        super().__init__()
        _check_not_empty(transformers)
        self.branches = nn.ModuleList()
        for part in transformers:
            transformer = part(input_shape)
            self.branches.append(nn.Sequential(transformer, network(_output_shape(transformer), features), nn.ReLU()))
        self.classifier = nn.Linear(features * len(self.branches), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.cat([run_branch(part, images) for part in self.branches], dim=1))
        return logits


class TransformerNetwork(nn.Module):
    """A spatial transformer in front of any network, and at any place inside it.

    Places in parallel branches of the network are not supported: each transformer is treated as the successor of the
    one that ran before it.

    Args:
        network: factory of the network; it gets the transformed images.
        transformer: factory of transformers; for every place it is called with the shape of the input there.
        places: ``input``, and names of modules of the network, as in ``named_modules``. A transformer is put before
            each of these modules.
    """

    def __init__(
        self,
        input_shape: Shape,
        num_classes: int,
        *,
        network: Network,
        transformer: TransformerFactory = SpatialTransformer,
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
                raise ValueError(f"The network has no module '{place}' for a transformer; it has: {names}.")
        for place in inside:
            _insert(self.network, place, modules[place], shape, transformer)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(self.transformer(images))
        return logits


def _check_not_empty(transformers: Sequence[TransformerFactory]) -> None:
    if not transformers:
        raise ValueError("transformers needs at least one transformer.")


def _output_shape(transformer: nn.Module) -> Shape:
    shape = getattr(transformer, "output_shape", None)
    if shape is None:
        raise ValueError(f"{type(transformer).__name__} has no output_shape (C, H, W), so it is not a transformer.")
    output_shape: Shape = shape
    return output_shape


def _insert(
    network: nn.Module, place: str, module: nn.Module, input_shape: Shape, transformer: TransformerFactory
) -> None:
    """Put a transformer before ``module``. A forward pass determines the shape of its input."""
    shapes: list[Shape] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: shapes.extend(tuple(x.shape[1:]) for x in inputs))
    _run_once(network, input_shape)
    handle.remove()
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise ValueError(
            f"A transformer before '{place}' needs a module that is called once, with feature maps (C, H, W) as its "
            f"one positional argument; it is called with {shapes or 'none'}."
        )
    # The name has changed if a transformer was put before a module that contains this one.
    (name,) = (name for name, other in network.named_modules() if other is module)
    network.set_submodule(name, nn.Sequential(transformer(shapes[0]), module))
    try:
        _run_once(network, input_shape)
    except RuntimeError as error:
        raise ValueError(f"The layers after the transformer at '{place}' do not take its output: {error}") from None


@torch.no_grad()
def _run_once(network: nn.Module, input_shape: Shape) -> None:
    training = network.training
    device = next((parameter.device for parameter in network.parameters()), None)
    network.eval()(torch.zeros(1, *input_shape, device=device))
    network.train(training)
