"""Classification losses: completed with the number of classes, from logits ``(B, K)`` and labels ``(B,)``."""

from torch import nn


class CrossEntropy(nn.CrossEntropyLoss):
    """Softmax cross entropy.

    Args:
        num_classes: ``K``.
        label_smoothing: this much of the probability goes to all classes alike.
    """

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.num_classes = num_classes
