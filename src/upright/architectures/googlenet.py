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

from upright.architectures.inception import Conv, Plan, assemble
from upright.architectures.initialisation import initialise
from upright.architectures.layers import ConvReLU, Window, scale_maps


def block(one: int, three: tuple[int, int], five: tuple[int, int], pooled: int) -> Plan:
    """Return the plan of figure 2b by the maps of its branches: four windows on the same maps."""
    return [
        Conv(one),
        (Conv(three[0]), Conv(three[1], 3)),
        (Conv(five[0]), Conv(five[1], 5)),
        ("pool", Conv(pooled)),
    ]


STAGES: tuple[tuple[Plan, ...], ...] = (
    (  # 3a, 3b: 28 x 28 pixels of the paper's 224
        block(64, (96, 128), (16, 32), 32),
        block(128, (128, 192), (32, 96), 64),
    ),
    (  # 4a to 4e: 14 x 14
        block(192, (96, 208), (16, 48), 64),
        block(160, (112, 224), (24, 64), 64),
        block(128, (128, 256), (24, 64), 64),
        block(112, (144, 288), (32, 64), 64),
        block(256, (160, 320), (32, 128), 128),
    ),
    (  # 5a, 5b: 7 x 7
        block(256, (160, 320), (32, 128), 128),
        block(384, (192, 384), (48, 128), 128),
    ),
)


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
            for plan in stage:
                inception, channels = assemble(plan, channels, width, batch_norm)
                self.features.append(inception)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels, num_classes))
        initialise(self, "he_normal")

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
