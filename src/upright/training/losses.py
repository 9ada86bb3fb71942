"""Classification losses: completed with the number of classes, from logits ``(B, K)`` and labels ``(B,)``.

One that also takes probabilities ``(B, K)`` for labels can learn from mixed images (`upright.data.mixing`).
"""

from torch import Tensor, nn


class CrossEntropy(nn.CrossEntropyLoss):
    """Softmax cross entropy, with labels or probabilities.

    Args:
        num_classes: ``K``.
        label_smoothing: this much of the probability goes to all classes alike.
    """

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0) -> None:
        super().__init__(label_smoothing=label_smoothing)
        self.num_classes = num_classes


class PerceptronLoss(nn.Module):
    """The hinge at zero: by how much the best wrong class is ahead of the right one, and nothing where none is.

    With batches of one and plain SGD this is the perceptron's rule (Rosenblatt 1958; for several classes Duda, Hart
    1973, section 5.12): only a mistake changes weights, those of the right class and of the one it was taken for.

    Args:
        num_classes: ``K``.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits ``(B, K)`` and labels ``(B,)`` to a scalar."""
        right = logits.gather(1, labels[:, None])
        return (logits - right).amax(dim=1).mean()
