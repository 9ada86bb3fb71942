"""The task "multilabel", from a table with several classes per image to the answers of a bundle."""

import csv
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support
from torch.nn.functional import binary_cross_entropy_with_logits

from tests.conftest import ROOT, Upright
from tests.runtime.bundles import write_orientation_bundle
from upright.architectures.lenet import LeNet
from upright.architectures.mlp import MLP
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.augmentation import RandomAffine
from upright.data.digits import Digits
from upright.data.mixing import CutMix, MixUp
from upright.data.table import Table
from upright.errors import UserError
from upright.exporting import card
from upright.exporting.parity import best_thresholds, f1_scores
from upright.images import ImageSpec
from upright.runs.plots import draw_transformer
from upright.runtime.predictor import MultiLabelPredictor, Predictor
from upright.runtime.task import MultiLabel
from upright.tables import read_rows
from upright.training.classifier import ImageClassifier
from upright.training.losses import BinaryCrossEntropy, CrossEntropy, PerceptronLoss
from upright.training.metrics import StageMetrics, write_tables
from upright.training.multilabel import MultiLabelClassifier
from upright.training.restoring import check_task

SPEC = ImageSpec(1, 12, 12, ("0", "1", "2"), (0.3,), (0.3,), multilabel=True)
SGD = partial(torch.optim.SGD, lr=0.1)
CONFIG = ROOT / "configs/multilabel.yaml"


@pytest.fixture(scope="module")
def mosaics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 360 pictures with place for two digits, and a table of the digits in each: two, one or none."""
    folder, generator = tmp_path_factory.mktemp("mosaics"), np.random.default_rng(0)
    digits = load_digits(n_class=3)
    rows = []
    for number in range(360):
        pixels, names = generator.integers(0, 60, (8, 16), np.uint8), set()
        for start in (0, 8):
            if generator.random() < 0.8:
                chosen = generator.integers(len(digits.target))
                pixels[:, start : start + 8] = digits.images[chosen] * 15
                names.add(str(digits.target[chosen]))
        Image.fromarray(pixels).resize((32, 16), Image.Resampling.NEAREST).save(folder / f"{number:03d}.png")
        rows.append([f"{number:03d}.png", "; ".join(sorted(names))])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    return folder


@pytest.mark.usefixtures("traced_once")
def test_from_a_table_to_a_bundle(mosaics: Path, upright: Upright) -> None:
    table = mosaics / "labels.csv"
    answer = upright(
        *("fit", "--config", CONFIG, "--name", "mosaic", "--wandb", "off", "--trainer.max_epochs", "6"),
        *("--data.file", table, "--data.size", "16", "--data.channels", "1", "--data.batch_size", "16"),
        *("--model.network", "upright.LeNet", "--model.loss.positive_weights", "balanced", "--data.augment", "[]"),
    )
    assert answer.code == 0, answer.err
    assert "val/map" in answer.out and Path("checkpoints/mosaic/curves.png").is_file()
    assert upright("test", "--ckpt_path", "checkpoints/mosaic").code == 0
    metrics = json.loads(Path("checkpoints/mosaic/test.json").read_text())["metrics"]
    assert metrics["test/map"] > 0.9 and metrics["test/f1"] > 0.8 and metrics["test/subset_accuracy"] > 0.6
    scores = read_rows(Path("checkpoints/mosaic/test_classes.csv"))
    assert np.mean([float(row["f1"]) for row in scores]) == pytest.approx(metrics["test/f1"], abs=1e-5)
    assert upright("predict", "--ckpt_path", "checkpoints/mosaic").code == 0
    rows = read_rows(Path("checkpoints/mosaic/predictions.csv"))
    assert list(rows[0]) == ["name", "label", "prediction", "0", "1", "2"]
    right = np.mean([row["label"] == row["prediction"] for row in rows])
    assert right == pytest.approx(metrics["test/subset_accuracy"]) and {"", "0", "1;2"} <= {
        row["label"] for row in rows
    }

    answer = upright("export", "checkpoints/mosaic", "--precision", "int8", "--max-drop", "5")
    assert answer.code == 0, answer.err
    assert "subset accuracy" in answer.out and "with thresholds that maximise it: 0 " in answer.out
    manifest = json.loads(Path("export/mosaic/manifest.json").read_text())
    parity = json.loads(Path("export/mosaic/parity.json").read_text())
    assert manifest["task"] == "multilabel" and "multilabel" not in manifest["spec"] and manifest["format"] == 2
    assert list(parity["multilabel"]["thresholds"].values()) == manifest["multilabel"]["thresholds"]
    assert parity["precisions"]["fp32"]["f1"] >= metrics["test/f1"] - 0.1
    assert parity["precisions"]["fp32"]["largest_difference"] < 1e-4
    assert "MultiLabelPredictor" in Path("export/mosaic/README.md").read_text()
    assert upright("verify", "export/mosaic").code == 0

    predict = MultiLabelPredictor("export/mosaic")
    truth = [set(filter(None, row[1].split("; "))) for row in csv.reader(table.read_text().splitlines())][1:]
    files = [mosaics / f"{number:03d}.png" for number in range(len(truth))]
    results = predict.predict(files)
    assert np.mean([set(result.labels) == names for result, names in zip(results, truth, strict=True)]) > 0.6
    limits = dict(zip("012", manifest["multilabel"]["thresholds"], strict=True))
    for result in results:
        assert result.labels == {name: p for name, p in result.probabilities.items() if p >= limits[name]}
        assert list(result.labels.values()) == sorted(result.labels.values(), reverse=True)
    with pytest.raises(UserError, match=r"finds several classes per image; give one that"):
        Predictor("export/mosaic")

    both, none = (next(n for n, names in enumerate(truth) if len(names) == count) for count in (2, 0))
    lines = upright("infer", "export/mosaic", files[both], files[none]).out.splitlines()
    assert lines[0].split()[0] in truth[both] and lines[1].endswith(str(files[none]))
    answer = upright("infer", "export/mosaic", files[both], "--format", "csv")
    (row,) = csv.DictReader(answer.out.splitlines())
    assert list(row) == ["path", "labels", "0", "1", "2"] and row["labels"] == ";".join(results[both].labels)
    answer = upright("infer", "export/mosaic", files[both], "--format", "jsonl")
    assert list(json.loads(answer.out)) == ["path", "labels", "probabilities"]
    sky = write_orientation_bundle(Path("export/sky"))
    for command, message in (
        (
            ("attach", sky, "export/mosaic/model.onnx", "--to", "export/both", "--images", mosaics),
            "attach compares the",
        ),
        (
            ("infer", "export/mosaic", files[0], "--top", "2"),
            "--top is for bundles with one class per image, and 'export/mosaic' finds",
        ),
        (("report", "checkpoints/mosaic"), "finds several classes per image, and report compares models"),
        (("select", "checkpoints/mosaic"), "single classes; `upright test` writes the metrics of a run to test.json"),
        (
            ("straighten", "export/mosaic", files[0], "--to", "out"),
            "finds several classes per image; give one that estimates the orientation",
        ),
        (("test", "--ckpt_path", "checkpoints/mosaic", "--data.separator", "null"), "line 5 has no label"),
    ):
        answer = upright(*command)
        assert answer.code == 2 and message in answer.err and answer.err.count("\n") == 1, answer
    assert upright("preview", "checkpoints/mosaic").code == upright("describe", "checkpoints/mosaic").code == 0
    answer = upright(
        "fit", "--ckpt_path", "checkpoints/mosaic/last.ckpt", "--trainer.max_epochs", "7", "--wandb", "off"
    )
    assert answer.code == 0, answer.err


def test_a_validation_split_needs_a_class(tmp_path: Path, upright: Upright) -> None:
    table = write(tmp_path, "a,train", "b,train", ",val", "a,test", header="path,label,split")
    answer = upright("fit", "--config", CONFIG, "--data.file", table, "--data.size", "16", "--wandb", "off")
    assert answer.code == 2 and "No image of the validation split has a class" in answer.err
    assert not Path("checkpoints/multilabel").exists()


def write(folder: Path, *lines: str, header: str = "path,label") -> str:
    for number in range(len(lines)):
        noise = np.random.default_rng(number % 10).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    (folder / "table.csv").write_text("\n".join([header, *(f"{n}.png,{line}" for n, line in enumerate(lines))]))
    return str(folder / "table.csv")


def test_a_table_with_several_classes(tmp_path: Path) -> None:
    labels = ["cat;dog", "cat", "", "dog; cat;cat", "10;cat", "", "dog", "dog", "cat", "cat", "dog"]
    data = Table(file=write(tmp_path, *labels), separator=";", size=8, channels=1, batch_size=4)
    assert data.spec.classes == ("10", "cat", "dog") and data.spec.task == "multilabel"
    assert data.source.labels.tolist()[:6] == [[0, 1, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 6, "val": 3, "test": 2}
    batch = next(iter(data.loader("train")))
    assert batch.labels.dtype == torch.float32 and batch.labels.shape == (4, 3)
    counts = np.sum([[split.get(name, 0) for name in data.spec.classes] for split in data.manifest.counts.values()], 0)
    assert counts.tolist() == [1, 6, 5]
    # Only one image has the first class, and the last image is a copy of the first one.
    assert sum("has the class '10'" in remark for remark in data.remarks) == 2
    (remark,) = (remark for remark in data.remarks if "duplicate" in remark)
    assert {"(cat;dog)", "(dog)"} <= set(remark.rstrip(".").split())
    assert data.recipe["init_args"]["separator"] == ";"
    assert [original.label for original in data.originals("val")] == data.samples("val").labels.int().tolist()


def test_a_table_with_lists(tmp_path: Path) -> None:
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    write(tmp_path, *[""] * 3)
    labels = {"path": [f"{n}.png" for n in range(3)], "label": [["b", "a"], [], ["b"]]}
    parquet.write_table(pyarrow.table(labels), file := str(tmp_path / "table.parquet"))
    assert Table(file=file, separator=",").source.labels.tolist() == [[1, 1], [0, 0], [0, 1]]
    with pytest.raises(UserError, match="line 1: the label is a list; give a `separator`"):
        Table(file=file).setup()


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    file = write(tmp_path, "a|b,train", "a,train", "b,train", "b|c,val", "a,test", header="path,label,split")
    with pytest.raises(
        UserError, match=r"line 5: label 'c' of split 'val' is not among the training labels \('a', 'b'\)"
    ):
        Table(file=file, separator="|").setup()
    with pytest.raises(UserError, match="separator must be at least one character"):
        Table(file=file, separator="")
    with pytest.raises(UserError, match="has no label"):
        Table(file=write(tmp_path, "a", "")).setup()
    for labels, found in ((("a", ""), "['a']"), (("", ""), "[]")):
        text = f"must have at least two labels for training; found {found}. For one class, label each image with one"
        with pytest.raises(UserError, match=re.escape(text)):
            _ = Table(file=write(tmp_path, *labels), separator=";").spec


def test_a_separator_that_no_label_contains_is_noted(tmp_path: Path) -> None:
    file = write(tmp_path, "a|b", "a", "", "b")
    remark = "No label contains the separator ';', so no image has several classes."
    assert Table(file=file, separator=";").source.remarks == [remark]
    assert Table(file=file, separator="|").source.remarks == []


def test_small_thresholds_are_printed_with_their_digits() -> None:
    assert card._thresholds({"thresholds": {"a": 0.5, "b": 0.000213}}) == "a 0.5, b 0.000213"


@pytest.mark.parametrize("mixing", [MixUp, CutMix])
def test_mixed_images_have_mixed_labels(tmp_path: Path, mixing: type) -> None:
    file = write(tmp_path, *["a;b", "b", "", "a"] * 5)
    data = Table(file=file, separator=";", size=12, channels=1, batch_size=12, augment=(partial(mixing, alpha=1.0),))
    batch = data.augment(next(iter(data.loader("train"))))
    assert batch.labels.shape == (12, 2) and ((batch.labels > 0) & (batch.labels < 1)).any()
    assert batch.labels.min() >= 0 and batch.labels.max() <= 1


def test_the_loss_is_torchs() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 0, 0]]).float()
    assert BinaryCrossEntropy(3)(logits, targets) == binary_cross_entropy_with_logits(logits, targets)
    smooth = binary_cross_entropy_with_logits(logits, 0.9 * targets + 0.05)
    assert BinaryCrossEntropy(3, label_smoothing=0.1)(logits, targets) == pytest.approx(float(smooth))
    weighted = BinaryCrossEntropy(3, positive_weights=[0.5, 1, 4])
    formula = -(
        torch.tensor([0.5, 1, 4]) * targets * logits.sigmoid().log() + (1 - targets) * (-logits).sigmoid().log()
    )
    assert weighted(logits, targets) == pytest.approx(float(formula.mean()))
    balanced = BinaryCrossEntropy(3, positive_weights="balanced")
    balanced.balance(torch.tensor([[5, 2, 0], [5, 8, 10]]))
    assert balanced.weight is not None and balanced.weight.tolist() == [1, 4, 10]
    for wrong in ([1.0, 2.0], [1, 0, 1], "balance"):
        with pytest.raises(UserError, match="positive_weights must be balanced, or 3 numbers above 0"):
            BinaryCrossEntropy(3, positive_weights=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="label_smoothing must be from 0 to 1, got 2"):
        BinaryCrossEntropy(3, label_smoothing=2)


def test_metrics_equal_scikit_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upright.training.metrics.UPDATE_IMAGES", 64)
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(200, 4, generator=generator) < 0.3).float()
    labels[:, 3] = 0  # of this class, no average precision can be computed
    probabilities = (labels + torch.randn(200, 4, generator=generator)).sigmoid()
    metrics = StageMetrics(4, upright=False, multilabel=True)
    for start in range(0, 200, 32):
        metrics.update(probabilities[start : start + 32], labels[start : start + 32], torch.tensor(2.0))
    values = metrics.compute()
    confusion = values.pop("confusion")
    chosen = probabilities >= 0.5
    precision, recall, f1, _ = precision_recall_fscore_support(labels, chosen, average="macro", zero_division=0)
    expected = {
        "map": average_precision_score(labels[:, :3], probabilities[:, :3]),
        **{"precision": precision, "recall": recall, "f1": f1, "loss": 2.0},
        "subset_accuracy": float((chosen == labels).all(dim=1).float().mean()),
    }
    assert {name: float(value) for name, value in values.items()} == pytest.approx(expected, abs=1e-5)
    assert write_tables(tmp_path, confusion, "abcd") == [tmp_path / "test_classes.csv"]
    rows = [list(row.values()) for row in read_rows(tmp_path / "test_classes.csv")]
    by_class = precision_recall_fscore_support(labels, chosen, zero_division=0)
    for ours, theirs in zip(zip(*(row[1:] for row in rows), strict=True), by_class, strict=True):
        assert [float(cell) for cell in ours] == pytest.approx(theirs.tolist(), abs=1e-6)


def test_thresholds_have_the_largest_f1() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random((80, 3)) < [0.5, 0.1, 0.0]).astype(np.int64)
    rows = np.round(1 / (1 + np.exp(-(2 * labels - 1 + 1.5 * generator.standard_normal((80, 3))))), 2)  # with ties
    thresholds = best_thresholds(rows, labels)
    scores = f1_scores(rows >= thresholds, labels)
    for k in range(2):
        every = [f1_score(labels[:, k], rows[:, k] >= limit) for limit in np.linspace(0, 1, 101) - 0.005]
        assert scores[k] == pytest.approx(max(every))
        assert np.abs(rows[:, k] - thresholds[k]).min() > 0.004  # midway between two probabilities
    assert thresholds[2] == 0.5 and scores[2] == 0
    ones = np.ones((4, 1), np.int64)
    assert best_thresholds(np.full((4, 1), 0.8), ones) == [0.4]


def test_answers_are_compared_at_their_thresholds() -> None:
    task = MultiLabel(("a", "b"), [0.3, 0.8])
    expected = np.array([[0.31, 0.1], [0.2, 0.9], [0.9, 0.81]])
    actual = np.array([[0.29, 0.1], [0.2, 0.95], [0.9, 0.7]])
    assert task.differences(expected, actual) == pytest.approx([0.02, 0.05, 0.11])
    assert task.changed(expected, actual).tolist() == [True, False, True]
    assert task.changed(expected, actual, 0.02).tolist() == [False, False, False]
    assert task.changed(expected, actual, 0.005).tolist() == [True, False, True]
    assert task.right(expected, np.array([[1, 0], [0, 1], [1, 0]])).tolist() == [True, True, False]
    assert [task.text(row) for row in expected] == ["a", "b", "a;b"] and task.label([0, 0]) == ""


def test_other_tasks_and_losses_are_refused() -> None:
    with pytest.raises(UserError, match=r"several classes per image: train upright.MultiLabelClassifier"):
        ImageClassifier(SPEC, LeNet, SGD)
    with pytest.raises(UserError, match=r"one class per image: train upright.ImageClassifier"):
        MultiLabelClassifier(Digits().spec, LeNet, SGD)
    with pytest.raises(UserError, match=r"'run' was trained on .*'2'\], any number per image; the data have"):
        check_task(SPEC, SimpleNamespace(spec=replace(SPEC, multilabel=False)), "run")  # type: ignore[arg-type]
    for loss in (CrossEntropy, PerceptronLoss):
        with pytest.raises(UserError, match=f"{loss.__name__} is for one class per image.*BinaryCrossEntropy"):
            MultiLabelClassifier(SPEC, MLP, SGD, loss=loss)


def test_a_transformer_trains_with_the_upright_loss(mosaics: Path) -> None:
    rotate = partial(RandomAffine, rotate=90)
    data = Table(file=str(mosaics / "labels.csv"), separator=";", size=16, channels=1, augment=(rotate,))
    network = partial(TransformerNetwork, network=MLP)
    classifier = MultiLabelClassifier(data.spec, network, SGD, upright_weight=1.0, prior_weight=1.0)
    batch = data.augment(next(iter(data.loader("train"))), classifier.views)
    loss = classifier.training_step(batch, 0)
    loss.backward()
    assert loss.isfinite() and set(classifier._means.take()) == {"train/loss", "train/upright_loss", "train/prior_loss"}
    classifier.eval().evaluate(next(iter(data.loader("val"))), "val")
    assert {"uprightness", "map"} <= set(classifier.metrics["_val"].compute())
    assert draw_transformer("Test", classifier, data).height > 6 * 2 * 16  # six images, each with an output
