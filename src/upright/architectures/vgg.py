"""VGG (Simonyan, Zisserman 2014, arXiv:1409.1556).

The idea: stack 3 x 3 convolutions. Two of them see as much as one of 5 x 5, with fewer weights and one more
nonlinearity.

Differences from the paper: weights are initialised after He et al. 2015. The paper draws all weights with one
deviation, so its authors had to start the deep networks from a trained shallow one. Batch normalisation
(``batch_norm=True``, which replaces the biases of the convolutions) came a year later.

Images of 224 pixels and 1000 classes give 132,863,336 parameters at depth 11, then 133,047,848, 138,357,544, and
143,667,240 at depth 19.
"""

from torch import Tensor, nn

from upright.architectures.initialisation import initialise
from upright.architectures.layers import maps_size
from upright.architectures.mlp import MLP

# Table 1: convolutions of each stage; with the three fully connected layers they make the depth.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Stages of convolutions, each with a pooling at its end, then three fully connected layers.

    Args:
        input_shape: ``(C, H, W)``, at least 32 x 32 with five stages, and half of that for every stage less.
        depth: 11, 13, 16 or 19, the paper's A, B, D, E.
        widths: maps of each stage; fewer than five widths leave out the last stages.
        units: units of the two hidden fully connected layers.
        batch_norm: add batch normalisation after each convolution.
        dropout: share of hidden fully connected units that are dropped.

    Attributes:
        maps: shape ``(C, H, W)`` of the maps that the fully connected layers read.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int = 16,
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        units: tuple[int, int] = (4096, 4096),
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"VGG has a depth of {', '.join(map(str, STAGES))}, got {depth}.")
        if not 1 <= len(widths) <= 5:
            raise ValueError(f"VGG has 1 to 5 stages, got {len(widths)} widths.")
        if len(units) != 2:
            raise ValueError(f"VGG has two hidden fully connected layers, got {len(units)} units.")
        layers: list[nn.Module] = []
        inputs = input_shape[0]
        for outputs, convolutions in zip(widths, STAGES[depth], strict=False):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if batch_norm else [nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.maps = (inputs, *maps_size(self, self.features, input_shape))
        self.classifier = MLP(self.maps, num_classes, widths=units, dropout=dropout)
        initialise(self, "he_normal")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits
