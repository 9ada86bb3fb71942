"""Inception-ResNet-v2 (Szegedy, Ioffe, Vanhoucke, Alemi 2016, arXiv:1602.07261, section 3.2).

The idea: the branches of an Inception block say what to add to its input, scaled down, so that wide residual networks
train stably and fast.

What differs from the paper: it is the network that its authors published (TF-slim), of 55,843,464 parameters at 1000
classes. Where the paper has the stem of Inception-v4 (384 maps), it has that of Inception-v3 and one block more (320);
hence 1088 and 2080 maps after the reductions, where 1152 and 2144 would be. There are 10, 20, 10 blocks, not 5, 10, 5;
a last 1 x 1 convolution to 1536; and the last block is neither scaled nor rectified.
"""

from torch import Tensor, nn

from upright.architectures.inception import Conv, Plan, Valid, assemble, shrinking_windows
from upright.architectures.layers import ConvReLU, check_size, least_size, scaled

STEM: Plan = (
    (Valid(32, stride=2), Valid(32), Conv(64, 3), "max", Conv(80), Valid(192), "max"),
    [Conv(96), (Conv(48), Conv(64, 5)), (Conv(64), Conv(96, 3), Conv(96, 3)), ("avg", Conv(64))],
)

REDUCTION_A: Plan = [  # Figure 7, with k, l, m, n of table 1
    Valid(384, stride=2),
    (Conv(256), Conv(256, 3), Valid(384, stride=2)),
    "max",
]

REDUCTION_B: Plan = [  # Figure 18
    (Conv(256), Valid(384, stride=2)),
    (Conv(256), Valid(288, stride=2)),
    (Conv(256), Conv(288, 3), Valid(320, stride=2)),
    "max",
]

STAGES: tuple[tuple[Plan, Plan, float], ...] = (
    # What comes before the blocks, the branches of each, their scale. At 299 pixels:
    # 35 x 35 x 320, figure 16
    (STEM, [Conv(32), (Conv(32), Conv(32, 3)), (Conv(32), Conv(48, 3), Conv(64, 3))], 0.17),
    # 17 x 17 x 1088, figure 17
    (REDUCTION_A, [Conv(192), (Conv(128), Conv(160, (1, 7)), Conv(192, (7, 1)))], 0.10),
    # 8 x 8 x 2080, figure 19
    (REDUCTION_B, [Conv(192), (Conv(192), Conv(224, (1, 3)), Conv(256, (3, 1)))], 0.20),
)


class Residual(nn.Module):
    """What branches make of the maps, brought to as many by 1 x 1, scaled, and added to them.

    Args:
        channels: maps that come in, and go out.
        branches: the plan of what to add.
        width: factor on the maps of the branches.
        scale: of what is added.
    """

    def __init__(self, channels: int, branches: Plan, *, width: float, scale: float) -> None:
        super().__init__()
        self.branches, given = assemble(branches, channels, width)
        self.expand = nn.Conv2d(given, channels, 1)
        self.scale = scale
        self.activation: nn.Module = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps ``(B, C, H, W)`` to maps of the same shape."""
        total: Tensor = self.activation(maps + self.scale * self.expand(self.branches(maps)))
        return total


class InceptionResNetV2(nn.Module):
    """Three kinds of residual blocks behind a stem and two reductions, a global average, one linear layer.

    Args:
        input_shape: ``(C, H, W)``, at least 75 x 75; the paper's are 299 x 299.
        num_classes: ``K``.
        blocks: of each kind; at 299 pixels on grids of 35 x 35, 17 x 17 and 8 x 8.
        width: factor on every number of maps.
        dropout: probability, before the linear layer.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        blocks: tuple[int, int, int] = (10, 20, 10),
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if min(blocks) < 1:
            raise ValueError(f"blocks must be at least 1 of each kind, got {blocks}.")
        check_size(self, input_shape, least_size(shrinking_windows(tuple(before for before, *_ in STAGES))))
        self.features = nn.Sequential()
        channels = input_shape[0]
        for (before, branches, scale), number in zip(STAGES, blocks, strict=True):
            start, channels = assemble(before, channels, width)
            repeated = [Residual(channels, branches, width=width, scale=scale) for _ in range(number)]
            self.features.append(nn.Sequential(start, *repeated))
        repeated[-1].scale, repeated[-1].activation = 1.0, nn.Identity()
        maps = scaled(1536, width)
        self.features.append(ConvReLU(channels, maps))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(maps, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, C, H, W)`` to logits ``(B, K)``."""
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits
