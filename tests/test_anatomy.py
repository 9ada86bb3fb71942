import pytest
import torch
from torch import Tensor, nn

from upright.anatomy import Description, Layer, Window, describe
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer


def layers(network: nn.Module, *input_shape: int) -> list[Layer]:
    return describe(network, input_shape).layers


def test_lenet_matches_a_computation_by_hand() -> None:
    description = describe(LeNet((1, 28, 28), 10), (1, 28, 28))
    columns = [
        (row.kind, row.output, row.receptive_field, row.jump, row.parameters, row.multiply_adds)
        for row in description.layers
        if row.kind not in ("Tanh", "Flatten")
    ]
    image, no_jump = (28, 28), (0, 0)
    assert columns == [
        ("Conv2d", (6, 28, 28), (5, 5), (1, 1), 6 * 25 + 6, 6 * 25 * 28 * 28),
        ("AvgPool2d", (6, 14, 14), (6, 6), (2, 2), 0, 0),
        ("Conv2d", (16, 10, 10), (14, 14), (2, 2), 16 * 6 * 25 + 16, 16 * 6 * 25 * 10 * 10),
        ("AvgPool2d", (16, 5, 5), (16, 16), (4, 4), 0, 0),
        ("Linear", (120,), image, no_jump, 400 * 120 + 120, 400 * 120),
        ("Linear", (84,), image, no_jump, 120 * 84 + 84, 120 * 84),
        ("Linear", (10,), image, no_jump, 84 * 10 + 10, 84 * 10),
    ]
    rows = description.layers
    assert [row.name for row in rows[:2]] == ["features.0", "features.1"]
    assert rows[0].window == Window((5, 5), (1, 1), (2, 2))
    assert rows[2].window == Window((2, 2), (2, 2), (0, 0)) and rows[1].window is None
    totals = description.totals
    assert totals.parameters == totals.trainable == 61_706 and totals.megabytes == pytest.approx(0.246824)
    assert totals.multiply_adds == 416_520
    assert totals.activations == 2 * 4704 + 1176 + 2 * 1600 + 400 + 400 + 2 * (120 + 84) + 10
    assert description.warnings == []


def test_shares_of_a_dense_layer() -> None:
    rows = layers(LeNet((1, 28, 28), 10), 1, 28, 28)
    assert rows[0].connections == 6 * 25 * 28 * 28 / (28 * 28 * 6 * 28 * 28) == pytest.approx(25 / 28**2)
    assert rows[0].weights == 6 * 25 / (28 * 28 * 6 * 28 * 28)
    assert rows[1].connections is rows[1].weights is None
    assert (rows[-1].connections, rows[-1].weights) == (1, 1)


def test_output_shapes_match_the_formula() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, (7, 3), stride=(2, 1), padding=(3, 0)),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 5, padding="same", groups=4),
        nn.AvgPool2d(2),
    )
    before: tuple[int, ...] = (37, 41)
    for row in layers(network, 3, *before):
        assert row.window
        axes = zip(before, row.window.kernel, row.window.stride, row.window.padding, strict=True)
        before = tuple((n - f + 2 * p) // s + 1 for n, f, s, p in axes)
        assert row.output[1:] == before
    # 7 + 2*2 + 4*4 + 4*4 + 4 rows would be more than the image has; 3 + 2 + 4*2 + 4*2 + 2 columns.
    assert row.receptive_field == (37, 23) and row.jump == (8, 4)


def test_layers_outside_the_formula_are_marked() -> None:
    rows = layers(nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.ConvTranspose2d(1, 1, 2, 2)), 1, 8, 8)
    assert rows[0].kind == "MaxPool2d (ceil)" and rows[0].output == (1, 4, 4)
    assert rows[1].window is None and rows[1].receptive_field == (8, 8)


class Branches(nn.Module):
    """Two parallel branches, and a residual connection that takes every second pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(1, 2, 5, padding=2), nn.Conv2d(1, 2, 1)
        self.norm, self.after, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 1, 3)

    def forward(self, images: Tensor) -> Tensor:
        both = self.norm(torch.cat([self.wide(images), self.narrow(images)], dim=1)).relu_()
        return self.last(self.after(both) + both[:, :, ::2, ::2])


def test_the_largest_field_of_branches_counts() -> None:
    rows = layers(Branches(), 1, 32, 32)
    assert [row.name for row in rows] == ["wide", "narrow", "norm", "after", "last"]
    assert [row.receptive_field[0] for row in rows if row.receptive_field] == [5, 1, 5, 7, 11]
    assert [row.jump for row in rows] == [(1, 1), (1, 1), (1, 1), (2, 2), (2, 2)]


def test_slicing_with_a_step_increases_the_jump() -> None:
    class Every(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps[:, :, ::2, ::3]

    (row, conv) = layers(nn.Sequential(Every(), nn.Conv2d(1, 1, 3)), 1, 20, 20)
    assert row.receptive_field == (1, 1) and conv.receptive_field == (5, 7) and conv.jump == (2, 3)


def test_a_mean_over_the_image_depends_on_all_of_it() -> None:
    class Gate(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps * maps.mean(dim=(2, 3), keepdim=True).sigmoid()

    rows = layers(nn.Sequential(nn.AdaptiveAvgPool2d(8), Gate(), nn.AdaptiveAvgPool2d(1)), 1, 16, 16)
    assert [(row.receptive_field, row.jump) for row in rows] == [
        ((2, 2), (2, 2)),
        ((16, 16), (2, 2)),
        ((16, 16), (0, 0)),
    ]


def test_local_response_normalisation_does_not_enlarge_the_field() -> None:
    rows = layers(nn.Sequential(nn.Conv2d(1, 8, 3), nn.LocalResponseNorm(5), nn.Dropout()), 1, 9, 9)
    assert [row.receptive_field for row in rows] == [(3, 3)] * 3


class Rows(nn.Module):
    """An LSTM and attention over the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.lstm(images.squeeze(1))
        return self.attention(states, states, states)[0][:, -1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recurrent_layers_and_attention(device: str) -> None:
    with torch.device(device):
        lstm, attention = layers(Rows(), 1, 8, 8)
    assert lstm.output == (8, 5) and lstm.receptive_field == (8, 8)
    assert lstm.parameters == 4 * 5 * (8 + 5 + 2) and lstm.multiply_adds == 8 * 4 * 5 * (8 + 5)
    # The output projection of the attention is a submodule that is never called.
    assert attention.kind == "MultiheadAttention" and attention.parameters == 4 * (5 * 5 + 5)


def test_parameters_of_a_layer_that_runs_twice_count_once() -> None:
    layer = nn.Linear(6, 6)
    description = describe(nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer), (1, 2, 3))
    first, second = (row for row in description.layers if row.kind == "Linear")
    assert first.parameters == description.totals.parameters == 42 and second.parameters == 0
    assert first.multiply_adds == second.multiply_adds == 36 and description.totals.multiply_adds == 72


def test_operations_outside_of_layers_are_counted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Flatten(), nn.Linear(3, 3)
            self.matrix = nn.Parameter(torch.zeros(4, 2), requires_grad=False)

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images) @ self.matrix

    description = describe(Odd(), (1, 2, 2))
    assert description.layers[-1] == Layer("(elsewhere)", "", None, (), None, None, 12 + 8, 8, 0)
    assert description.totals.parameters == 20 and description.totals.trainable == 12


def test_after_a_spatial_transformer_the_field_is_the_complete_image() -> None:
    rows = layers(nn.Sequential(SpatialTransformer((1, 28, 28), transform="affine"), LeNet((1, 28, 28), 10)), 1, 28, 28)
    inside, *_, after = (row for row in rows if row.kind == "Conv2d" and row.name.endswith(("layers.1", "features.0")))
    assert inside.receptive_field == (10, 10)
    assert after.receptive_field == (28, 28) and after.jump == (0, 0)


def test_hooks_are_removed_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("broken")

    network = nn.Sequential(nn.Conv2d(1, 1, 3), Broken())
    with pytest.raises(RuntimeError, match="broken"):
        describe(network, (1, 8, 8))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


def described(*modules: nn.Module) -> Description:
    return describe(nn.Sequential(*modules), (3, 64, 64))


def test_a_large_reduction_gets_a_warning() -> None:
    (text,) = described(nn.Conv2d(3, 96, 11, 4, 2), nn.MaxPool2d(2)).warnings
    assert text.startswith("0 (Conv2d) keeps 225 of 4,096 positions, 1 in 18; smaller strides")


@pytest.mark.parametrize(
    "modules",
    [
        (nn.MaxPool2d(2), nn.Conv2d(3, 1, 3, 2)),
        (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
        (nn.Flatten(), nn.Linear(3 * 64 * 64, 2)),
    ],
    ids=["steps", "global pooling", "classifier"],
)
def test_small_reductions_and_heads_get_no_warning(modules: tuple[nn.Module, ...]) -> None:
    assert described(*modules).warnings == []
