"""Inception-ResNet-v2 (Szegedy, Ioffe, Vanhoucke, Alemi 2016, arXiv:1602.07261, section 3.2).

The idea: the output of the branches of an Inception block is scaled down and added to the block's input. Wide residual
networks then train stably and fast.

Differences from the paper: this is the network that its authors published (TF-slim), with 55,843,464 parameters at 1000
classes.

- The stem is that of Inception-v3 and one block more (320 maps). The paper has the stem of Inception-v4 (384 maps).
  After the reductions there are therefore 1088 and 2080 maps, not 1152 and 2144.
- There are 10, 20, 10 blocks, not 5, 10, 5.
- A 1 x 1 convolution to 1536 maps follows the last block, which is neither scaled nor rectified.
"""

from upright.architectures.inception import Add, Conv, Inception, Plan, Valid, check_blocks
from upright.architectures.inception_v3 import STEM, block_a

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

# The branches of each kind of block
BRANCHES_A: Plan = [Conv(32), (Conv(32), Conv(32, 3)), (Conv(32), Conv(48, 3), Conv(64, 3))]  # Figure 16
BRANCHES_B: Plan = [Conv(192), (Conv(128), Conv(160, (1, 7)), Conv(192, (7, 1)))]  # Figure 17
BRANCHES_C: Plan = [Conv(192), (Conv(192), Conv(224, (1, 3)), Conv(256, (3, 1)))]  # Figure 19


class InceptionResNetV2(Inception):
    """A stem, three kinds of residual blocks with a reduction between, a global average, one linear layer.

    Args:
        blocks: number of blocks of each kind; at 299 pixels on grids of 35 x 35, 17 x 17 and 8 x 8.
        width: factor on every number of maps.
        dropout: probability of dropout before the linear layer.
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
        check_blocks(blocks)
        a, b, c = blocks
        plan: Plan = (
            # 35 x 35 x 320, 17 x 17 x 1088 and 8 x 8 x 2080 at 299 pixels
            ((STEM, block_a(pooled=64, first=96)), *(Add(BRANCHES_A, 0.17),) * a),
            (REDUCTION_A, *(Add(BRANCHES_B, 0.10),) * b),
            (REDUCTION_B, *(Add(BRANCHES_C, 0.20),) * (c - 1), Add(BRANCHES_C, 1.0, rectified=False)),
            Conv(1536),
        )
        super().__init__(input_shape, num_classes, plan, width=width, dropout=dropout)
