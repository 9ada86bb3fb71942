"""Inception-v3 (Szegedy et al. 2015, "Rethinking the Inception architecture for computer vision", arXiv:1512.00567).

The idea: replace a large window by several small ones in a row, and n x n by 1 x n then n x 1. This takes fewer
parameters and adds nonlinearities. Convolution and pooling in parallel shrink the image, so that no layer is a
bottleneck.

Differences from the paper: this is the network that its authors published (TF-slim), with 23,834,568 parameters at 1000
classes. The paper's table 1 only outlines it.

- The stem ends in 1 x 1 to 80 maps, 3 x 3 to 192 and pooling. The 35 x 35 blocks have one 5 x 5 window. The numbers of
  maps within the blocks are not in the paper.
- No auxiliary classifier, so that there is one output in training and in evaluation.
- No label smoothing, which belongs to the loss.
"""

from upright.architectures.inception import Conv, Inception, Plan, Valid

# 35 x 35 x 192, from the paper's 299 x 299
STEM: Plan = (Valid(32, stride=2), Valid(32), Conv(64, 3), "max", Conv(80), Valid(192), "max")


def block_a(pooled: int, first: int = 64) -> Plan:
    """Return a block of figure 5: a 5 x 5 window as two of 3 x 3, in parallel with a true 5 x 5 window."""
    return [
        Conv(first),
        (Conv(48), Conv(64, 5)),
        (Conv(64), Conv(96, 3), Conv(96, 3)),
        ("avg", Conv(pooled)),
    ]


def block_b(inner: int) -> Plan:
    """Return a block of figure 6 with n = 7: each 7 x 7 window as 1 x 7 and 7 x 1."""
    return [
        Conv(192),
        (Conv(inner), Conv(inner, (1, 7)), Conv(192, (7, 1))),
        (Conv(inner), Conv(inner, (7, 1)), Conv(inner, (1, 7)), Conv(inner, (7, 1)), Conv(192, (1, 7))),
        ("avg", Conv(192)),
    ]


BLOCK_C: Plan = [  # Figure 7: wide, for the coarsest grid
    Conv(320),
    (Conv(384), [Conv(384, (1, 3)), Conv(384, (3, 1))]),
    (Conv(448), Conv(384, 3), [Conv(384, (1, 3)), Conv(384, (3, 1))]),
    ("avg", Conv(192)),
]

STAGES: tuple[Plan, ...] = (
    STEM,
    # 35 x 35 x 288
    tuple(block_a(pooled) for pooled in (32, 64, 64)),
    # 17 x 17 x 768, as figure 10
    [Valid(384, stride=2), (Conv(64), Conv(96, 3), Valid(96, stride=2)), "max"],
    tuple(block_b(inner) for inner in (128, 160, 160, 192)),
    # 8 x 8 x 1280
    [
        (Conv(192), Valid(320, stride=2)),
        (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Valid(192, stride=2)),
        "max",
    ],
    # 8 x 8 x 2048
    (BLOCK_C, BLOCK_C),
)


class InceptionV3(Inception):
    """A stem, eleven blocks on three grids, a global average, one linear layer.

    Args:
        width: factor on every number of maps.
        dropout: probability of dropout before the linear layer.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        super().__init__(input_shape, num_classes, STAGES, width=width, dropout=dropout)
