"""Classification losses: completed with the number of classes, from logits ``(B, K)`` and labels ``(B,)``.

A loss that also accepts probabilities ``(B, K)`` as labels can train on mixed images (`upright.data.mixing`). If a loss
has a true attribute ``balanced``, its method ``balance(counts)`` is called before training with the number of images of
each class; with several classes per image, with the numbers of images with and without each class, ``(2, K)``.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from upright.errors import UserError


class CrossEntropy(nn.Module):
    """Softmax cross entropy, with labels or probabilities: the mean over images.

    With weights it is the mean of ``-w[k] p[k] log q[k]``, summed over classes, for labels and for probabilities
    ``p``. The mean over batches is then the loss over all images. torch instead divides by the weights of the labels,
    and for probabilities by the number of images.

    Args:
        num_classes: ``K``.
        label_smoothing: share of the probability that is spread equally over all classes.
        class_weights: ``w``, one per class; ``balanced``: N / (K n[k]) for n[k] of N training images, which gives all
            classes the same total weight (King, Zeng 2001).

    Raises:
        UserError: if there is not one weight per class, or a weight is negative.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
        self.num_classes, self.label_smoothing, self.balanced = num_classes, label_smoothing, False
        if class_weights is None:
            self.weight = None
            return
        if isinstance(class_weights, str):
            if class_weights != "balanced":
                raise UserError(f"class_weights must be one per class, or balanced; got '{class_weights}'.")
            self.balanced, class_weights = True, [1.0] * num_classes
        if len(class_weights) != num_classes or min(class_weights) < 0 or not sum(class_weights):
            raise UserError(
                f"class_weights must be {num_classes} numbers, none negative and not all zero, one per class in the "
                f"order of the data; got {list(class_weights)}."
            )
        # Part of the weights, so that a test on any data uses the class weights of training.
        self.register_buffer("weight", torch.tensor(class_weights, dtype=torch.float32))

    def balance(self, counts: Tensor) -> None:
        """Set ``balanced`` class weights from the number of training images of each class, ``(K,)``."""
        if self.balanced and self.weight is not None:
            self.weight.copy_(counts.sum() / (self.num_classes * counts.clamp(min=1)))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits ``(B, K)`` and labels ``(B,)`` or probabilities ``(B, K)`` to a scalar."""
        total = cross_entropy(
            logits, targets, weight=self.weight, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / len(logits)


class BinaryCrossEntropy(nn.Module):
    """Cross entropy of each class on its own, for several classes per image: the mean over images and classes.

    Args:
        num_classes: ``K``.
        label_smoothing: weight of 0.5 in the mean of a target and 0.5.
        positive_weights: weights of the terms of images with a class, one per class; ``balanced``: the number of
            training images without the class for each one with it.

    Raises:
        UserError: if there is not one positive weight per class.
    """

    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        positive_weights: Sequence[float] | Literal["balanced"] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise UserError(f"label_smoothing must be from 0 to 1, got {label_smoothing}.")
        self.label_smoothing, self.balanced = label_smoothing, positive_weights == "balanced"
        weights = [1.0] * num_classes if self.balanced or positive_weights is None else list(positive_weights)
        if len(weights) != num_classes or not all(isinstance(each, int | float) and each > 0 for each in weights):
            raise UserError(
                f"positive_weights must be balanced, or {num_classes} numbers above 0, one per class in the order of "
                f"the data; got {positive_weights}."
            )
        # Part of the weights, so that a test on any data uses the weights of training.
        self.register_buffer("weight", None if positive_weights is None else torch.tensor(weights, dtype=torch.float32))

    def balance(self, counts: Tensor) -> None:
        """Set ``balanced`` weights from the numbers of training images with and without each class, ``(2, K)``."""
        if self.balanced and self.weight is not None:
            self.weight.copy_(counts[1].clamp(min=1) / counts[0].clamp(min=1))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits and labels or probabilities, both ``(B, K)``, to a scalar."""
        targets = targets.lerp(torch.full_like(targets, 0.5), self.label_smoothing)
        return binary_cross_entropy_with_logits(logits, targets, pos_weight=self.weight)


class PerceptronLoss(nn.Module):
    """Hinge loss without a margin: the lead of the best wrong class over the right one, or 0.

    With batches of one and plain SGD this is the perceptron's rule (Rosenblatt 1958; for several classes Duda, Hart
    1973, section 5.12). Only a mistake changes weights: those of the true and of the predicted class.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Map logits ``(B, K)`` and labels ``(B,)`` to a scalar."""
        right = logits.gather(1, labels[:, None])
        return (logits - right).amax(dim=1).mean()
