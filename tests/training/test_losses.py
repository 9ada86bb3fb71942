import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from upright.errors import UprightError
from upright.training.losses import CrossEntropy

LOGITS, LABELS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 0, 1])
WEIGHTS = [0.5, 1.0, 4.0]


def test_without_weights_it_equals_torchs() -> None:
    for smoothing in (0.0, 0.1):
        ours = CrossEntropy(3, label_smoothing=smoothing)(LOGITS, LABELS)
        assert ours == pytest.approx(float(cross_entropy(LOGITS, LABELS, label_smoothing=smoothing)))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_apply_equally_to_labels_and_probabilities(smoothing: float) -> None:
    loss = CrossEntropy(3, label_smoothing=smoothing, class_weights=WEIGHTS)
    targets = one_hot(LABELS, 3).float()
    assert loss(LOGITS, LABELS) == pytest.approx(float(loss(LOGITS, targets)))
    smooth = (1 - smoothing) * targets + smoothing / 3
    formula = -(torch.tensor(WEIGHTS) * smooth * LOGITS.log_softmax(1)).sum(1).mean()
    assert loss(LOGITS, LABELS) == pytest.approx(float(formula))
    mixed = 0.3 * targets + 0.7 * targets.roll(1, 0)
    apart = 0.3 * loss(LOGITS, targets) + 0.7 * loss(LOGITS, targets.roll(1, 0))
    assert loss(LOGITS, mixed) == pytest.approx(float(apart), abs=1e-6)


def test_the_mean_over_batches_is_the_loss_of_all_images() -> None:
    loss = CrossEntropy(3, class_weights=WEIGHTS)
    parts = (2 * loss(LOGITS[:2], LABELS[:2]) + 4 * loss(LOGITS[2:], LABELS[2:])) / 6
    assert loss(LOGITS, LABELS) == pytest.approx(float(parts))


def test_balanced_gives_all_classes_the_same_weight() -> None:
    loss = CrossEntropy(3, class_weights="balanced")
    counts = LABELS.bincount()
    loss.balance(counts)
    assert loss.weight is not None and loss.weight * counts == pytest.approx(torch.full((3,), 2.0))
    # The class weights are part of the state dict.
    again = CrossEntropy(3, class_weights="balanced")
    again.load_state_dict(loss.state_dict())
    assert again(LOGITS, LABELS) == loss(LOGITS, LABELS)
    loss.balance(torch.tensor([5, 5, 0]))
    assert loss.weight.isfinite().all()


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1, -1, 1], [0, 0, 0], []])
def test_invalid_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UprightError, match=r"class_weights must be 3 numbers.*got \["):
        CrossEntropy(3, class_weights=weights)


def test_other_invalid_options_are_refused() -> None:
    with pytest.raises(UprightError, match="one per class, or balanced; got 'balance'"):
        CrossEntropy(3, class_weights="balance")
    with pytest.raises(UprightError, match=r"label_smoothing must be from 0 to 1, got 2"):
        CrossEntropy(3, label_smoothing=2)
