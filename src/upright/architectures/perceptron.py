"""The perceptron (Rosenblatt 1958, "The perceptron: a probabilistic model for information storage and organization").

The idea: every pixel votes for every class with a weight that is learned from examples.

Differences from the paper: units are linear, not thresholded. They learn by the gradient of any loss, not only from
mistakes; with cross-entropy this is softmax regression. It has 7,850 parameters on MNIST.
"""

from math import prod

from torch import Tensor, nn


class Perceptron(nn.Module):
    """One linear unit per class."""

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(prod(input_shape), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(images.flatten(1))
        return logits
