import csv
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, Upright
from upright.architectures.lenet import LeNet
from upright.architectures.spatial_transformer import SpatialTransformer
from upright.architectures.transformer_network import TransformerNetwork
from upright.data.digits import Digits
from upright.runs.drawing import Line, draw_blocks, draw_confusion, draw_curves, draw_tiles, save_png
from upright.runs.plots import RunPlots, draw_transformer, plot_epochs
from upright.training.classifier import ImageClassifier

LENET, STN = ROOT / "configs/lenet.yaml", ROOT / "configs/stn_lenet.yaml"
QUICK = ("--trainer.limit_train_batches", 2, "--wandb", "off")
LONG = "American Staffordshire terrier of the neighbours"


def read_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def pixels(height: int, width: int, channels: int) -> np.ndarray:
    return np.full((height, width, channels), 90, np.uint8)


@pytest.mark.parametrize("epochs", [1, 2, 9, 10, 11, 60, 300])
def test_at_most_ten_epochs_are_drawn_with_the_first_and_the_last(epochs: int) -> None:
    epochs_drawn = plot_epochs(epochs)
    assert len(epochs_drawn) == min(epochs, 10) and {0, epochs - 1} <= epochs_drawn <= set(range(epochs))
    gaps = np.diff(sorted(epochs_drawn))
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("size", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (64, 64, 3), (224, 160, 3)])
def test_a_sheet_scales_by_integers_and_truncates_long_names(size: tuple[int, int, int]) -> None:
    sheet = draw_tiles("a title", [pixels(*size)] * 9, [[Line(LONG), Line(LONG, "red")]] * 9)
    assert 8 * 64 < sheet.width < 1000 and 2 * 64 < sheet.height < 400
    grey = (np.asarray(sheet) == (90, 90, 90)).all(axis=2)
    rows, columns = np.flatnonzero(grey[:, grey.any(0)][:, 0]), np.flatnonzero(grey[grey.any(1)][0])
    tile = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)[0]
    # Small images are enlarged by an integer, and large ones are shrunk to fit.
    assert len(tile) % size[0] == 0 if size[0] <= 112 else len(tile) == 112
    assert len(np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)) == 8
    # Captions do not reach into the gap between two tiles.
    second = columns[0] + (len(tile) if size[0] == size[1] else 112)
    assert size[0] != size[1] or (np.asarray(sheet)[:, second + 1 : second + 4] == 255).all()


def test_a_sheet_without_images_has_its_title() -> None:
    assert draw_tiles("no mistakes among 12 images", [], []).width > 150


@pytest.mark.parametrize(
    ("count", "columns", "size", "side"),
    [(1, 1, 28, 112), (3, 5, 28, 112), (6, 2, 160, 112), (2, 9, 28, 112), (2, 20, 28, 56)],
)
def test_every_view_is_drawn_once_in_its_block(count: int, columns: int, size: int, side: int) -> None:
    # Each image has a different colour.
    levels = np.arange(2 * count * columns).reshape(count, 2, columns) + 100
    blocks = [
        (
            [[np.full((size, size, 3), (level, 50, 0), np.uint8) for level in row] for row in rows],
            [[Line(LONG)]] * columns,
        )
        for rows in levels
    ]
    sheet = np.asarray(draw_blocks("a title", ["a heading"] * columns, blocks))
    assert sheet.shape[1] < 1300
    places = {level: np.argwhere((sheet == (level, 50, 0)).all(axis=2)) for level in levels.flat}
    corners = {level: tuple(place.min(axis=0)) for level, place in places.items() if len(place) >= side * side}
    assert len(corners) == levels.size and all(
        (sheet[y : y + side, x : x + side] == (level, 50, 0)).all() for level, (y, x) in corners.items()
    )
    for rows in levels:
        ys, xs = (np.array([[corners[level][axis] for level in row] for row in rows]) for axis in (0, 1))
        assert (ys == ys[:, :1]).all() and (np.diff(ys, axis=0) > side).all()
        assert (xs == xs[:1]).all() and (np.diff(xs, axis=1) > side).all()


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_confusion_shows_every_class(classes: int) -> None:
    counts = torch.diag(torch.full((classes,), 12345))
    counts[0] = torch.tensor([0] * (classes - 1) + [7])
    image = np.asarray(draw_confusion("Test, epoch 1", counts, [LONG] * classes))
    assert max(image.shape) < 1200
    blue = (image == (8, 64, 129)).all(axis=2)
    matrix = blue[np.ix_(blue.any(axis=1), blue.any(axis=0))]
    # All images of the first class are predicted as the last.
    side = len(matrix) // classes
    assert matrix[0, -side:].all() and not matrix[:side, :-side].any() and matrix[-1, -side:].all()


def test_curves_of_one_epoch_of_many_and_of_a_resumed_run(tmp_path: Path) -> None:
    rows = [
        {"epoch": str(epoch), "train/loss": "1", "val/loss": "2", "lr": "0.1", "lr/1": "0.01"} for epoch in range(40)
    ]
    for number in (1, 40):
        figure = draw_curves("a run", rows[:number])
        assert [axis.get_title() for axis in figure.axes] == ["loss", "learning rate"]
        assert [line.get_label() for line in figure.axes[1].lines] == ["lr", "lr/1"]
        save_png(figure, tmp_path / "curves.png")
        assert read_png(tmp_path / "curves.png").width > 400
    degrees = {f"val/{name}_degrees_{part}": "3" for name in ("relative", "absolute") for part in ("median", "p95")}
    figure = draw_curves("a run", [rows[0] | degrees])
    assert [axis.get_title() for axis in figure.axes] == ["loss", "median deviation (degrees)", "learning rate"]
    labels = [line.get_label() for line in figure.axes[1].lines]
    assert labels == ["val/relative_degrees_median", "val/absolute_degrees_median"]
    # A column that only the resumed part has, and groups that always had the same rate.
    figure = draw_curves("a run", [rows[0] | {"lr/1": "0.1"}, rows[1] | {"lr/1": "0.1", "val/accuracy": "0.5"}])
    assert [line.get_xdata().tolist() for line in figure.axes[1].lines] == [[2]]
    assert [line.get_label() for line in figure.axes[2].lines] == ["lr"]


def read_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def columns_of(folder: Path) -> list[str]:
    state = torch.load(folder / "last.ckpt", weights_only=True)["callbacks"][RunPlots.state_key]
    assert sum(png.numel() for png in state["columns"].values()) < 250_000
    return list(state["columns"])


def test_a_run_writes_its_plots_and_a_resumed_one_adds_columns(upright: Upright, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/stn_lenet"
    assert upright("fit", "--config", STN, *QUICK, "--trainer.max_epochs", 2).code == 0
    for name in ("samples", "mistakes", "confusion", "transformer", "curves"):
        assert read_png(folder / f"{name}.png").width > 100
    assert columns_of(folder) == ["as it came", "epoch 1", "epoch 2"]
    assert {"lr", "lr/1", "images_per_second"} <= set(read_rows(folder)[0])
    before = read_png(folder / "transformer.png")
    # A digit's name and three columns, below the title.
    first, more = (0, 26, 230, before.height), (240, 26, 380, before.height)
    assert before.crop(more).getextrema() == ((255, 255),) * 3
    resume = ("fit", "--name", "stn_lenet", "--ckpt_path", "last", *QUICK)
    assert upright(*resume, "--trainer.max_epochs", 4).code == 0
    assert columns_of(folder) == ["as it came", *(f"epoch {number}" for number in (1, 2, 3, 4))]
    after = read_png(folder / "transformer.png")
    assert np.array_equal(after.crop(first), before.crop(first)) and after.crop(more).getextrema() != ((255, 255),) * 3


def test_plots_do_not_change_training(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = ("fit", "--config", STN, *QUICK, "--trainer.max_epochs", 2, "--name")
    assert upright(*fit, "with").code == 0
    monkeypatch.setattr("upright.runs.cli.fit.RunPlots", lambda folder: L.Callback())
    assert upright(*fit, "without").code == 0
    assert not (tmp_path / "checkpoints/without/samples.png").exists()
    ours, theirs = (
        torch.load(tmp_path / f"checkpoints/{name}/last.ckpt", weights_only=True) for name in ("with", "without")
    )
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items())


@pytest.mark.slow
def test_a_run_that_stops_early_is_drawn_at_its_end(
    upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []

    def draw(title: str, *_: object) -> Image.Image:
        titles.append(title)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("upright.runs.plots.draw_confusion", draw)
    when = "{monitor: val/loss, mode: max, patience: 1}"
    stop = f"[{{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {when}}}]"
    assert upright("fit", "--config", LENET, *QUICK, "--trainer.max_epochs", 100, "--trainer.callbacks", stop).code == 0
    last = len(read_rows(tmp_path / "checkpoints/lenet"))
    assert 1 < last < 12 and titles == ["Validation, epoch 1 of 100", f"Validation, epoch {last} of 100"]
    titles.clear()
    # With validation in every third epoch, the plots of the epochs between are drawn there.
    every = ("--trainer.max_epochs", 6, "--trainer.check_val_every_n_epoch", 3)
    assert upright("fit", "--config", LENET, "--force", *QUICK, *every).code == 0
    assert titles == ["Validation, epoch 3 of 6", "Validation, epoch 6 of 6"]


def test_plots_use_the_averaged_weights(upright: Upright, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right: list[float] = []

    def draw(title: str, counts: torch.Tensor, *_: object) -> Image.Image:
        right.append(float(counts.diagonal().sum() / counts.sum()))
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("upright.runs.plots.draw_confusion", draw)
    averaging = "[{class_path: lightning.pytorch.callbacks.EMAWeightAveraging, init_args: {decay: 0.9}}]"
    fit = ("fit", "--config", STN, *QUICK, "--trainer.max_epochs", 2, "--trainer.callbacks", averaging)
    assert upright(*fit).code == 0
    assert right == pytest.approx(
        [float(row["val/accuracy"]) for row in read_rows(tmp_path / "checkpoints/stn_lenet")], abs=1e-5
    )


def test_the_input_of_a_transformer_is_drawn_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(title: str, headings: list[str], blocks: list) -> Image.Image:
        corners = {int(image[0, 0, 0]) for rows, _ in blocks for image in rows[0]}
        centres = {image[7:21, 7:21, 0].tobytes() for rows, _ in blocks for image in rows[0]}
        assert corners == {round(255 * data.spec.mean[0])} and len(centres) > 2 and centres <= originals
        return Image.new("RGB", (1, 1))

    data = Digits(mask="disc", angles=[0, 45])
    originals = {image[0, 7:21, 7:21].numpy().tobytes() for image in data.samples("test")[:].images}
    network = partial(TransformerNetwork, network=LeNet, transformer=partial(SpatialTransformer, transform="affine"))
    monkeypatch.setattr("upright.runs.plots.draw_blocks", draw)
    classifier = ImageClassifier(data.spec, network, partial(torch.optim.Adam, lr=0.1)).eval()
    assert draw_transformer("Test", classifier, data).size == (1, 1)
