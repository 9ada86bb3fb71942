"""Inception-v4 (Szegedy, Ioffe, Vanhoucke, Alemi 2016, arXiv:1602.07261, section 3.1).

The idea: Inception-v3 without the constraints of the training software of its time. One block per grid size is repeated
unchanged, and the stem has branches too.

Difference from the paper: figure 5 prints two 1 x 7 windows in a row; here the second is 7 x 1, as in the published
network (TF-slim). The number of parameters is the same: 42,679,816 at 1000 classes.
"""

from upright.architectures.inception import Conv, Inception, Plan, Valid, check_blocks

STEM: Plan = (  # Figure 3
    (Valid(32, stride=2), Valid(32), Conv(64, 3)),
    ["max", Valid(96, stride=2)],
    [(Conv(64), Valid(96)), (Conv(64), Conv(64, (7, 1)), Conv(64, (1, 7)), Valid(96))],
    [Valid(192, stride=2), "max"],
)

BLOCK_A: Plan = [  # Figure 4
    ("avg", Conv(96)),
    Conv(96),
    (Conv(64), Conv(96, 3)),
    (Conv(64), Conv(96, 3), Conv(96, 3)),
]

REDUCTION_A: Plan = [  # Figure 7, with k, l, m, n of table 1
    "max",
    Valid(384, stride=2),
    (Conv(192), Conv(224, 3), Valid(256, stride=2)),
]

BLOCK_B: Plan = [  # Figure 5
    ("avg", Conv(128)),
    Conv(384),
    (Conv(192), Conv(224, (1, 7)), Conv(256, (7, 1))),
    (Conv(192), Conv(192, (1, 7)), Conv(224, (7, 1)), Conv(224, (1, 7)), Conv(256, (7, 1))),
]

REDUCTION_B: Plan = [  # Figure 8
    "max",
    (Conv(192), Valid(192, stride=2)),
    (Conv(256), Conv(256, (1, 7)), Conv(320, (7, 1)), Valid(320, stride=2)),
]

BLOCK_C: Plan = [  # Figure 6
    ("avg", Conv(256)),
    Conv(256),
    (Conv(384), [Conv(256, (1, 3)), Conv(256, (3, 1))]),
    (Conv(384), Conv(448, (1, 3)), Conv(512, (3, 1)), [Conv(256, (3, 1)), Conv(256, (1, 3))]),
]


class InceptionV4(Inception):
    """A stem, three kinds of blocks with a reduction between, a global average, one linear layer.

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
        blocks: tuple[int, int, int] = (4, 7, 3),
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        check_blocks(blocks)
        a, b, c = blocks
        plan: Plan = (STEM, (BLOCK_A,) * a, REDUCTION_A, (BLOCK_B,) * b, REDUCTION_B, (BLOCK_C,) * c)
        super().__init__(input_shape, num_classes, plan, width=width, dropout=dropout)
