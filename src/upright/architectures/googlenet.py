"""GoogLeNet (Szegedy et al. 2014, "Going deeper with convolutions", arXiv:1409.4842, table 1).

The idea: windows of several sizes on the same maps. Before the large windows, 1 x 1 convolutions reduce the number of
maps, so that they stay cheap. A global average replaces large fully connected layers.

Differences from the paper:

- No auxiliary classifiers, so that there is one output in training and in evaluation.
- Pooling is padded by 1, which gives the paper's sizes with torch's rounding.
- Local response normalisation, which only the paper's figure 3 shows, has the constants of Caffe's reference model.
- Weights are initialised after He et al. 2015, because a narrow network does not learn otherwise.
- ``batch_norm=True`` follows Ioffe and Szegedy 2015 (arXiv:1502.03167), who changed widths and windows too.

The network has 6,998,552 parameters at 1000 classes.
"""

from functools import partial

from torch import Tensor, nn

from upright.architectures.initialisation import initialise
from upright.architectures.layers import Concat, ConvReLU, Window, scale_maps

Widths = tuple[int, tuple[int, int], tuple[int, int], int]
"""Maps of the four branches: 1 x 1; 1 x 1 then 3 x 3; 1 x 1 then 5 x 5; pooling then 1 x 1."""

STAGES: tuple[tuple[Widths, ...], ...] = (
    (  # 3a, 3b: 28 x 28 pixels of the paper's 224
        (64, (96, 128), (16, 32), 32),
        (128, (128, 192), (32, 96), 64),
    ),
    (  # 4a to 4e: 14 x 14
        (192, (96, 208), (16, 48), 64),
        (160, (112, 224), (24, 64), 64),
        (128, (128, 256), (24, 64), 64),
        (112, (144, 288), (32, 64), 64),
        (256, (160, 320), (32, 128), 128),
    ),
    (  # 5a, 5b: 7 x 7
        (256, (160, 320), (32, 128), 128),
        (384, (192, 384), (48, 128), 128),
    ),
)


class Inception(Concat):
    """Four windows on the same maps (figure 2b).

    Args:
        channels: number of input maps.
        widths: maps of the branches in the paper.
        width: factor on these numbers of maps.
        batch_norm: add batch normalisation after every convolution.
    """

    def __init__(self, channels: int, widths: Widths, *, width: float, batch_norm: bool) -> None:
        a, b, c, d = widths
        one, before_three, three, before_five, five, pooled = (scale_maps(maps, width) for maps in (a, *b, *c, d))
        conv = partial(ConvReLU, batch_norm=batch_norm)
        super().__init__(
            [
                conv(channels, one),
                nn.Sequential(conv(channels, before_three), conv(before_three, three, 3)),
                nn.Sequential(conv(channels, before_five), conv(before_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(channels, pooled)),
            ]
        )
        self.maps = one + three + five + pooled


class GoogLeNet(nn.Module):
    """A stem, nine inception blocks in three stages, a global average, one linear layer.

    Args:
        input_shape: ``(C, H, W)``, of any size.
        stem: window ``(kernel, stride, padding)`` of the first convolution. The paper's reduces 224 pixels to 28
            before the first block; ``(3, 1, 1)`` reduces 28 pixels to 7.
        batch_norm: add batch normalisation after every convolution, in place of its bias and of local response
            normalisation.
        width: factor on every number of maps.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        stem: Window = (7, 2, 3),
        batch_norm: bool = False,
        width: float = 1.0,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        conv = partial(ConvReLU, batch_norm=batch_norm)
        norm = nn.Identity if batch_norm else partial(nn.LocalResponseNorm, 5)
        halve = partial(nn.MaxPool2d, 3, 2, 1)
        inputs, first, channels = input_shape[0], scale_maps(64, width), scale_maps(192, width)
        kernel, stride, padding = stem
        self.features = nn.Sequential(
            *[conv(inputs, first, kernel, stride=stride, padding=padding), halve(), norm()],
            *[conv(first, first), conv(first, channels, 3), norm(), halve()],
        )
        for number, stage in enumerate(STAGES):
            if number > 0:
                self.features.append(halve())
            for widths in stage:
                block = Inception(channels, widths, width=width, batch_norm=batch_norm)
                self.features.append(block)
                channels = block.maps
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, "he_normal")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
