"""The multilayer perceptron (Rumelhart, Hinton, Williams 1986, "Learning representations by back-propagating errors").

The idea: hidden units, trained by the chain rule, learn the features that a linear unit lacks.

Differences from the paper: a choice of three activations (the paper's is the sigmoid; ReLU does not saturate), and
dropout (Srivastava et al. 2014) after hidden layers. With the default widths it has 235,146 parameters on MNIST.
"""

from math import prod

from torch import Tensor, nn

from upright.architectures.layers import ACTIVATIONS, Activation, check_choice


class MLP(nn.Module):
    """Fully connected layers.

    Args:
        widths: units of each hidden layer.
        activation: activation after each hidden layer.
        dropout: share of hidden units that are dropped; one number for all hidden layers, or one for each.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        widths: tuple[int, ...] = (256, 128),
        activation: Activation = "relu",
        dropout: float | tuple[float, ...] = 0.0,
    ) -> None:
        super().__init__()
        rates = [dropout] * len(widths) if isinstance(dropout, int | float) else dropout
        if len(rates) != len(widths):
            raise ValueError(f"MLP takes one dropout or one per hidden layer ({len(widths)}), got {len(rates)}.")
        check_choice("activation", activation, ACTIVATIONS)
        layers: list[nn.Module] = []
        inputs = prod(input_shape)
        for width, rate in zip(widths, rates, strict=True):
            layers += [nn.Linear(inputs, width), ACTIVATIONS[activation](), nn.Dropout(rate)]
            inputs = width
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(inputs, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
