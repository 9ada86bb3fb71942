"""Plots of a run: a callback that draws the validation split during training, and a figure of the transformer."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from upright.architectures.spatial_transformer import Observation, last_of, observing
from upright.data.datamodule import ImageDataModule
from upright.images import Pixels
from upright.runs.callbacks import epochs_of
from upright.runs.drawing import (
    BLACK,
    RED,
    Line,
    draw_blocks,
    draw_column,
    draw_columns,
    draw_confusion,
    draw_curves,
    draw_tiles,
    draw_turns,
    pixels_of,
    save_png,
)
from upright.runs.loggers import log_picture
from upright.tables import read_rows
from upright.training.module import ImageModule
from upright.warp import rotation, warp

COMPASS = tuple(range(0, 360, 45))
"""Angles in `draw_orientation` and in reports, in degrees anticlockwise."""
MAX_VIEWS = 36
"""Maximum number of views in `draw_transformer`, as long as it draws one image."""


def plot_epochs(epochs: int) -> set[int]:
    """Return the epochs, from 0, after which plots are drawn: at most ten, evenly spread, including first and last."""
    return set(np.linspace(0, epochs - 1, min(epochs, 10)).round().astype(int).tolist())


class RunPlots(Callback):
    """Draw the validation split at some epochs, into the run's folder and every logger that takes images.

    The files are ``samples.png``, ``mistakes.png``, ``confusion.png``, ``transformer.png``, and at the end
    ``curves.png``. The callback uses the outputs of the regular validation pass. It runs no pass of its own and uses
    no random numbers. With several processes, the first one draws its share of the images, and the confusion matrix of
    all.

    The state contains the transformer's outputs at earlier epochs, as a small PNG per epoch.

    Args:
        folder: the folder of the run.
    """

    MAX_IMAGES = 24
    """Maximum number of images on a sheet."""
    MAX_ROWS, TILE_SIDE = 10, 64
    """Maximum number of rows in ``transformer.png``, and the side of each image in pixels."""
    state_key = "RunPictures"
    """Name of the state in a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._epoch = self._drawn = -1
        self._predictions: list[tuple[Tensor, ...]] = []
        # Positions of the images that have rows in transformer.png, and their places in each batch.
        self._rows: list[int] = []
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._columns: dict[str, bytes] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the columns of earlier epochs, which cannot be drawn again."""
        columns = {name: torch.frombuffer(bytearray(png), dtype=torch.uint8) for name, png in self._columns.items()}
        return {"rows": self._rows, "columns": columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]
        self._columns = {name: png.numpy().tobytes() for name, png in state_dict["columns"].items()}

    @rank_zero_only
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._predictions, self._views = [], {}

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the predictions, and the last transformers' outputs for the images that have rows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, ImageDataModule) or not data.spec.classes:
            return
        assert isinstance(pl_module, ImageModule)
        self._predictions.append((batch.position, batch.labels, *outputs["probabilities"].max(dim=1)))
        if not (last := last_of(outputs["observations"])):
            return
        if not self._rows:
            share = torch.arange(0, len(data.samples("val")), trainer.world_size)
            share = share[: int(trainer.num_val_batches[0]) * data.batch_size]
            self._rows = _one_per_class(data, share, self.MAX_ROWS // len(last))
        if batch_idx not in self._places:
            here = batch.position.tolist()
            self._places[batch_idx] = [(here.index(at), row) for row, at in enumerate(self._rows) if at in here]
        for place, row in self._places[batch_idx]:
            normalised = pl_module.model.normalise(batch.images[place, None])
            views = [pl_module.model.denormalise(_select_image(each, place).view(normalised)) for each in last]
            self._views[row] = [pl_module.model.denormalise(normalised), *views]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._epoch = trainer.current_epoch
        # An epoch without validation is drawn after the next validation.
        since = range(self._epoch - (trainer.check_val_every_n_epoch or 1) + 1, self._epoch + 1)
        if not plot_epochs(epochs_of(trainer)).isdisjoint(since):
            self._draw(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last epoch of a run that stopped early, and the curves of all epochs."""
        if self._drawn != self._epoch:
            self._draw(trainer, pl_module)
        if rows := read_rows(self.folder / "metrics.csv"):
            title = f"{self.folder.name}, {len(rows)} epochs" if len(rows) > 1 else f"{self.folder.name}, 1 epoch"
            save_png(draw_curves(title, rows), self.folder / "curves.png")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self._predictions or not isinstance(data, ImageDataModule):
            return
        assert isinstance(pl_module, ImageModule)
        self._drawn = self._epoch
        when = f"Validation, epoch {self._epoch + 1} of {epochs_of(trainer)}"
        position, labels, confidence, predicted = (
            torch.cat(part).cpu() for part in zip(*self._predictions, strict=True)
        )
        mistakes = (predicted != labels).nonzero().flatten()
        worst = mistakes[confidence[mistakes].argsort(descending=True, stable=True)][: self.MAX_IMAGES]
        # A fixed seed selects the same images at every epoch.
        some = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[: self.MAX_IMAGES])

        def sheet(title: str, rows: Tensor) -> Image.Image:
            names, answers = data.spec.classes, zip(predicted[rows], confidence[rows], labels[rows], strict=True)
            captions = [
                [Line(f"{sure:.0%} · {names[guess]}"), *([] if guess == label else [Line(f"is {names[label]}", RED)])]
                for guess, sure, label in answers
            ]
            return draw_tiles(title, pixels_of(data.samples("val")[position[rows]].images), captions)

        plots = {
            "samples": sheet(f"{when}: some of {len(labels):,} images, with predictions", some),
            "mistakes": sheet(f"{when}: the most confident of {len(mistakes):,} mistakes", worst)
            if len(mistakes)
            else draw_tiles(f"{when}: no mistakes among {len(labels):,} images", [], []),
        }
        if pl_module.confusion is not None:
            plots["confusion"] = draw_confusion(when, pl_module.confusion, data.spec.classes)
        if self._views:
            self._add_column()
            samples, views = data.samples("val"), len(data.views("val").names)
            labels = samples.labels[torch.tensor(self._rows) // views]
            columns = {name: Image.open(io.BytesIO(png)) for name, png in self._columns.items()}
            title = f"{when}: outputs of the spatial transformer"
            plots["transformer"] = draw_columns(title, [data.spec.classes[label] for label in labels], columns)
        for name, plot in plots.items():
            path = self.folder / f"{name}.png"
            save_png(plot, path)
            for logger in trainer.loggers:
                log_picture(logger, f"val/{name}", path, trainer.global_step - 1)

    def _add_column(self) -> None:
        branches = len(next(iter(self._views.values()))) - 1
        inputs: list[Pixels | None] = []
        outputs: list[Pixels | None] = []
        for row in range(len(self._rows)):
            image, *views = (
                (pixels_of(each)[0] for each in self._views[row]) if row in self._views else [None] * (1 + branches)
            )
            inputs += [image] + [None] * (branches - 1)
            outputs += views
        self._columns.setdefault("as it came", _png(inputs, self.TILE_SIDE))
        self._columns[f"epoch {self._epoch + 1}"] = _png(outputs, self.TILE_SIDE)


def _one_per_class(data: ImageDataModule, share: Tensor, count: int) -> list[int]:
    """Return positions in the validation split: one image for each of ``count`` classes, cycling through the views."""
    views = len(data.views("val").names)
    labels = data.samples("val").labels[share // views]
    positions = []
    for number, label in enumerate(torch.unique(labels)[: max(count, 1)]):
        of_class = share[labels == label]
        of_view = of_class[of_class % views == number % views]
        positions.append(int((of_view if len(of_view) else of_class)[0]))
    return positions


def _select_image(observation: Observation, place: int) -> Observation:
    before = observation.before and _select_image(observation.before, place)
    votes = None if observation.votes is None else observation.votes[place, None]
    return replace(observation, theta=observation.theta[place, None], votes=votes, before=before)


def _png(images: Sequence[Pixels | None], side: int) -> bytes:
    buffer = io.BytesIO()
    draw_column(images, side).save(buffer, format="png")
    return buffer.getvalue()


def draw_orientation(title: str, model: ImageModule, data: ImageDataModule, count: int = 6) -> Image.Image:
    """Draw test images at eight angles, and below each the image after a rotation by its estimated angle.

    Args:
        title: the title, to which an explanation of the rows is added.
        model: a model whose answers are angles.
        data: the datamodule, whose test split is drawn.
        count: maximum number of images, evenly spread over the split.
    """
    samples = data.samples("test")
    angles = rotation(torch.tensor(COMPASS).deg2rad())
    blocks = []
    for place in torch.linspace(0, len(samples) - 1, min(count, len(samples))).round().long().tolist():
        image = samples[place : place + 1].images.to(model.device).float()
        with torch.no_grad():
            before = warp(image.expand(len(COMPASS), -1, -1, -1), angles.to(image.device), "reflection")
            answers = model.model.answers(model(before))
            after = warp(before, rotation(-answers[:, 0].deg2rad()), "reflection")
        before, after = (model.model.denormalise(model.model.normalise(each)) for each in (before, after))
        blocks.append((before, after, answers.cpu().numpy()))
    title = f"{title}: images at eight angles, and rotated back by the estimated angle, which is red for a wrong side"
    return draw_turns(title, COMPASS, blocks)


def draw_transformer(title: str, classifier: ImageModule, data: ImageDataModule, count: int = 6) -> Image.Image:
    """Draw the test split's views of some images, and below each view the output of the last transformer.

    Each of several parallel transformers has its own row. For a transformer inside the network, the figure shows the
    part of the image that its feature maps cover.

    Args:
        title: the title, to which an explanation of the rows is added.
        classifier: a classifier with a spatial transformer.
        data: the datamodule, whose test split is drawn.
        count: maximum number of images, of as many classes; images with many views are fewer (`MAX_VIEWS`).
    """
    samples, views = data.samples("test"), data.views("test")
    columns, classes = len(views.names), data.spec.classes
    labels = torch.unique(samples.labels)
    count = min(count, len(labels), max(1, MAX_VIEWS // columns))
    blocks = []
    for label in labels[torch.linspace(0, len(labels) - 1, count).round().long()].tolist():
        first = int((samples.labels == label).nonzero()[0])
        images = samples[first * columns : (first + 1) * columns].images.to(classifier.device)
        with torch.no_grad(), observing() as observations:
            predicted = classifier(images).argmax(dim=1).tolist()
            normalised = classifier.model.normalise(images)
            outputs = [classifier.model.denormalise(last.view(normalised)) for last in last_of(observations)]
        rows = [pixels_of(batch) for batch in (classifier.model.denormalise(normalised), *outputs)]
        blocks.append((rows, [Line(classes[guess], BLACK if guess == label else RED) for guess in predicted]))
    title = f"{title}: input above, output of the spatial transformer below, with the prediction, red if wrong"
    return draw_blocks(title, [name + views.unit for name in views.names], blocks)
