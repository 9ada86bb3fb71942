import csv
from pathlib import Path

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, top_k_accuracy_score

from upright.training.metrics import Means, StageMetrics, write_tables


def answers(num_classes: int, count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, num_classes, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator)
    logits[torch.arange(count), target] += 1
    return logits.softmax(1), target


@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_metrics_equal_scikit_learns(num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some images are counted during the updates, the rest in `compute`.
    monkeypatch.setattr("upright.training.metrics.UPDATE_IMAGES", 100)
    preds, target = answers(num_classes)
    metrics = StageMetrics(num_classes, upright=False)
    for part in range(0, 300, 64):
        metrics.update(preds[part : part + 64], target[part : part + 64], torch.tensor(1.0))
    values, predicted = metrics.compute(), preds.argmax(1)
    assert values.pop("confusion").tolist() == confusion_matrix(target, predicted).tolist()
    ours = {name: float(value) for name, value in values.items()}
    precision, recall, f1, _ = precision_recall_fscore_support(target, predicted, average="macro")
    expected = {"precision": precision, "recall": recall, "f1": f1, "loss": 1.0}
    expected["accuracy"] = float((predicted == target).float().mean())
    # Expected calibration error: in each bin, mean confidence minus accuracy.
    confidence, right = preds.amax(1), (predicted == target).float()
    bins = (confidence * 15).ceil()
    gaps = [(bins == b).float().mean() * (confidence - right)[bins == b].mean().abs() for b in bins.unique()]
    expected["calibration_error"] = float(sum(gaps))
    if num_classes > 5:
        expected["top5"] = top_k_accuracy_score(target, preds, k=5)
    assert ours == pytest.approx(expected, abs=1e-5)


def test_a_first_batch_without_mistakes_does_not_merge_two_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upright.training.metrics.UPDATE_IMAGES", 8)
    metrics = StageMetrics(10, upright=False)
    target = torch.arange(8)
    metrics.update(torch.eye(10)[:8], target, torch.tensor(1.0))
    second = torch.linspace(1, 0.1, 10).expand(8, 10)
    metrics.update(second / second.sum(1, keepdim=True), target, torch.tensor(1.0))
    values = metrics.compute()
    assert values["accuracy"] == (8 + 1) / 16 and values["top5"] == (8 + 5) / 16


def test_the_loss_is_a_mean_over_images() -> None:
    metrics = StageMetrics(2, upright=False)
    preds, target = answers(2, 4)
    metrics.update(preds[:3], target[:3], torch.tensor(1.0))
    metrics.update(preds[3:], target[3:], torch.tensor(5.0))
    assert metrics.compute()["loss"] == 2


def test_tables(tmp_path: Path) -> None:
    preds, target = answers(5)
    # The last class occurs neither as label nor as prediction.
    confusion = torch.from_numpy(confusion_matrix(target, preds.argmax(1), labels=range(6)))
    names = ["a", "b, or c", 'd "e"', "ü", "f", "never"]
    assert write_tables(tmp_path, confusion, names) == [tmp_path / "test_confusion.csv", tmp_path / "test_classes.csv"]
    header, *rows = csv.reader((tmp_path / "test_confusion.csv").read_text().splitlines())
    assert header == ["label", *names] and [row[0] for row in rows] == names
    assert [[int(cell) for cell in row[1:]] for row in rows] == confusion.tolist()
    header, *rows = csv.reader((tmp_path / "test_classes.csv").read_text().splitlines())
    assert header == ["class", "precision", "recall", "f1", "support"] and [row[0] for row in rows] == names
    expected = precision_recall_fscore_support(target, preds.argmax(1), labels=range(6), zero_division=0)
    for ours, theirs in zip(zip(*(row[1:] for row in rows), strict=True), expected, strict=True):
        assert [float(cell) for cell in ours] == pytest.approx(theirs.tolist(), abs=1e-6)


def test_means_are_weighted_and_reset_after_each_epoch() -> None:
    means = Means()
    means.add("loss", torch.tensor(1.0), 3)
    means.add("loss", torch.tensor(5.0), 1)
    other = Means()
    other.load_state_dict(means.state_dict())
    assert means.take() == other.take() == {"loss": torch.tensor(2.0)}
    means.add("loss", torch.tensor(4.0), 2)
    assert means.take() == {"loss": torch.tensor(4.0)}
    assert means.take() == {}
