"""LeNet-5 (LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition", II.B).

The idea: local receptive fields, shared weights and subsampling make the network tolerant of shifts and distortions,
so that it learns from pixels.

Differences from the paper: C3 sees all maps of S2 (the paper's table I connects only some), pooling has no trained
scale and bias, and the output is linear (the paper's is radial basis functions). This is the common version; it has
61,706 parameters. ``activation="relu", pooling="max"`` is the modern variant.
"""

from torch import Tensor, nn

from upright.architectures.layers import ACTIVATIONS, POOLINGS, Activation, Pooling, check_choice, maps_size


class LeNet(nn.Module):
    """Two convolutions with pooling, three fully connected layers.

    Args:
        input_shape: ``(C, H, W)``, at least 12 x 12. Below 32 pixels the first convolution pads by 2, because the
            paper puts MNIST's 28 pixels into 32.
        widths: maps of C1 and C3, units of C5 and F6.
        activation: activation after each convolution and hidden layer.
        pooling: kind of the 2 x 2 pooling.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, int, int, int] = (6, 16, 120, 84),
        activation: Activation = "tanh",
        pooling: Pooling = "avg",
    ) -> None:
        super().__init__()
        channels, height, width = input_shape
        padding = 2 if min(height, width) < 32 else 0
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("pooling", pooling, POOLINGS)
        if len(widths) != 4:
            raise ValueError(f"LeNet needs widths of C1, C3, C5 and F6, got {len(widths)}.")
        c1, c3, c5, f6 = widths
        act, pool = ACTIVATIONS[activation], POOLINGS[pooling]
        self.features = nn.Sequential(
            nn.Conv2d(channels, c1, 5, padding=padding),
            act(),
            pool(2),
            nn.Conv2d(c1, c3, 5),
            act(),
            pool(2),
        )
        rows, columns = maps_size(self, self.features, input_shape)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(c3 * rows * columns, c5),
            act(),
            nn.Linear(c5, f6),
            act(),
            nn.Linear(f6, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits
