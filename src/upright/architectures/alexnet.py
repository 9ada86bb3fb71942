"""AlexNet (Krizhevsky, Sutskever, Hinton 2012, "ImageNet classification with deep convolutional neural networks").

The idea: a much deeper and wider LeNet. ReLU, dropout and two GPUs made its training possible.

Differences from the paper:

- The first convolution pads by 2, because otherwise images of 224 pixels do not give the paper's 55 x 55 maps.
- Response normalisation spans both towers. In the paper each tower was on its own GPU.
- Weights are initialised after He et al. 2015, because the signal vanishes in a narrow network with the paper's
  deviation of 0.01. ``paper_start=True`` restores the paper's initialisation.

Images of 224 pixels and 1000 classes give 60,965,224 parameters, or 62,378,344 with one tower.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn

from upright.architectures.initialisation import initialise
from upright.architectures.layers import Window, maps_size
from upright.architectures.mlp import MLP


class Stage(NamedTuple):
    """A convolution, and the layers after it."""

    window: Window
    towers: bool = False
    """True if each tower gets only its own maps."""
    normalised: bool = False
    pooled: bool = False


STAGES = (
    Stage((11, 4, 2), normalised=True, pooled=True),
    Stage((5, 1, 2), towers=True, normalised=True, pooled=True),
    Stage((3, 1, 1)),
    Stage((3, 1, 1), towers=True),
    Stage((3, 1, 1), towers=True, pooled=True),
)


class AlexNet(nn.Module):
    """Five convolutions, overlapping pooling, three fully connected layers.

    Args:
        input_shape: ``(C, H, W)``, at least 63 x 63, or 15 x 15 with the stem ``(3, 1, 1)``.
        widths: maps of the convolutions.
        units: units of the two hidden fully connected layers.
        groups: 2 for the paper's two towers, which meet in the third convolution; 1 for a single tower.
        stem: window ``(kernel, stride, padding)`` of the first convolution.
        local_response_norm: add local response normalisation after the first two convolutions.
        dropout: share of hidden fully connected units that are dropped.
        paper_start: start with weights of deviation 0.01, and with biases of one in the same layers as the paper.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, int, int, int, int] = (96, 256, 384, 384, 256),
        units: tuple[int, int] = (4096, 4096),
        groups: Literal[1, 2] = 2,
        stem: Window = STAGES[0].window,
        local_response_norm: bool = True,
        dropout: float = 0.5,
        paper_start: bool = False,
    ) -> None:
        super().__init__()
        if groups not in (1, 2):
            raise ValueError(f"AlexNet has 1 or 2 groups, got {groups}.")
        if len(widths) != 5 or len(units) != 2:
            raise ValueError(f"AlexNet needs 5 widths and 2 units, got {len(widths)} and {len(units)}.")
        stages = (STAGES[0]._replace(window=stem), *STAGES[1:])
        layers: list[nn.Module] = []
        inputs = input_shape[0]
        for outputs, stage in zip(widths, stages, strict=True):
            layers += [nn.Conv2d(inputs, outputs, *stage.window, groups=groups if stage.towers else 1), nn.ReLU()]
            inputs = outputs
            if stage.normalised and local_response_norm:
                # PyTorch divides alpha by the size; the paper's is 1e-4.
                layers.append(nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2))
            if stage.pooled:
                layers.append(nn.MaxPool2d(3, 2))
        self.features = nn.Sequential(*layers)
        maps = (inputs, *maps_size(self, self.features, input_shape))
        self.classifier = MLP(maps, num_classes, widths=units, dropout=dropout)
        initialise(self, "normal" if paper_start else "he_normal")
        if paper_start:
            biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
            # Convolutions 2, 4, 5 and the hidden layers: with these biases their ReLUs are active from the first step.
            for layer in (1, 3, 4, 5, 6):
                nn.init.constant_(biases[layer], 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits
