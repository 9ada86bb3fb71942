"""Plots of a run: a callback that draws the validation split during training, and a figure of the transformer."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
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
    caption,
    draw_blocks,
    draw_column,
    draw_columns,
    draw_confusion,
    draw_curves,
    draw_tiles,
    evenly_spread,
    pixels_of,
    save_png,
)
from upright.runs.loggers import log_picture
from upright.runtime.task import QUARTER, deviation, task_of
from upright.tables import read_rows
from upright.training.model import Model
from upright.training.module import ImageModule
from upright.warp import rotation, warp

COMPASS = tuple(range(0, 360, 45))
"""Angles in `draw_orientation` and in reports, in degrees anticlockwise."""
EXAMPLES = 6
"""Maximum number of images in `draw_orientation`, in `draw_transformer` and in reports."""
MAX_VIEWS = 36
"""Maximum number of views in `draw_transformer`, as long as it draws one image."""


def plot_epochs(epochs: int) -> set[int]:
    """Return the epochs, from 0, after which plots are drawn: at most ten, evenly spread, including first and last."""
    return set(evenly_spread(epochs, 10))


class RunPlots(Callback):
    """Draw the validation split at some epochs, into the run's ``folder`` and every logger that takes images.

    The files are ``samples.png``, ``mistakes.png``, ``confusion.png``, ``transformer.png``, and at the end
    ``curves.png``. The callback uses the outputs of the regular validation pass. It runs no pass of its own and uses
    no random numbers. With several processes, the first one draws its share of the images, and the confusion matrix of
    all. The state contains the transformer's outputs at earlier epochs, as a small PNG per epoch.
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
        # Positions of the images that have rows in transformer.png. Input and outputs of each row at this epoch.
        self._rows: list[int] = []
        self._views: dict[int, list[Pixels]] = {}
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
        if trainer.sanity_checking or not isinstance(data, ImageDataModule) or data.spec.task != "classification":
            return
        assert isinstance(pl_module, ImageModule)
        self._predictions.append((batch.position, batch.labels, *outputs["probabilities"].max(dim=1)))
        if not (last := last_of(outputs["observations"])):
            return
        if not self._rows:
            share = torch.arange(0, len(data.samples("val")), trainer.world_size)
            share = share[: int(trainer.num_val_batches[0]) * data.batch_size]
            self._rows = _one_per_class(data, share, self.MAX_ROWS // len(last))
        places = (batch.position.cpu()[:, None] == torch.tensor(self._rows)).nonzero()
        if len(places):
            shown = transformer_images(pl_module.model, batch.images, outputs["observations"])
            self._views |= {row: [images[place] for images in shown] for place, row in places.tolist()}

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
            answers = zip(predicted[rows].tolist(), confidence[rows].tolist(), labels[rows].tolist(), strict=True)
            captions = [caption(data.spec.classes, *answer) for answer in answers]
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
            image, *views = self._views.get(row, [None] * (1 + branches))
            inputs += [image] + [None] * (branches - 1)
            outputs += views
        self._columns = {"as it came": _png(inputs), **self._columns, f"epoch {self._epoch + 1}": _png(outputs)}


def _png(images: Sequence[Pixels | None]) -> bytes:
    buffer = io.BytesIO()
    draw_column(images, RunPlots.TILE_SIDE).save(buffer, format="png")
    return buffer.getvalue()


def _one_per_class(data: ImageDataModule, share: Tensor, count: int) -> list[int]:
    """Return positions in the validation split: one image for each of ``count`` classes, cycling through the views."""
    views = len(data.views("val").names)
    labels = data.samples("val").labels[share // views]
    return [
        min(share[labels == label].tolist(), key=lambda position: (position - number) % views)
        for number, label in enumerate(torch.unique(labels)[: max(count, 1)])
    ]


def transformer_images(model: Model, images: Tensor, observations: list[Observation]) -> list[list[Pixels]]:
    """Return the input of the network, and the output of each last transformer, for images ``(B, C, H, W)``."""
    normalised = model.normalise(images)
    outputs = [last.view(normalised) for last in last_of(observations)]
    return [pixels_of(model.denormalise(batch)) for batch in (normalised, *outputs)]


def turned(image: Tensor, degrees: Sequence[int]) -> Tensor:
    """Rotate a square image ``(1, C, S, S)`` by each angle anticlockwise, ``(A, C, S, S)``, uint8."""
    images = warp(
        image.float().expand(len(degrees), -1, -1, -1), rotation(torch.tensor(degrees).deg2rad()), "reflection"
    )
    for number, angle in enumerate(degrees):
        if angle % 90 == 0:
            images[number] = torch.rot90(image[0], angle // 90, (1, 2))  # exact: no pixel is resampled
    return images.round().clamp(0, 255).to(torch.uint8)


def draw_turns(
    title: str,
    images: Sequence[Tensor],
    answer: Callable[[Tensor], npt.NDArray[np.floating[Any]]],
    show: Callable[[Tensor], Tensor] = Tensor.float,
) -> Image.Image:
    """Draw images ``(1, C, S, S)`` at eight angles, and below each the image rotated back by its estimated angle.

    The line below has the angle and the confidence; it is red for a wrong side. ``answer`` maps uint8 images ``(B, C,
    S, S)`` to both, ``(B, 2)``, and ``show`` maps images to the pixels to draw.
    """
    blocks = []
    for image in images:
        before = turned(image, COMPASS)
        answers = answer(before)
        after = warp(before.float(), rotation(-torch.from_numpy(answers[:, 0]).float().deg2rad()), "reflection")
        errors = deviation(answers[:, 0] - np.array(COMPASS))
        lines = [
            [Line(f"{round(angle)}°/{confidence:.0%}", RED if error >= QUARTER else BLACK)]
            for (angle, confidence), error in zip(answers.tolist(), errors.tolist(), strict=True)
        ]
        blocks.append(([pixels_of(show(before)), pixels_of(show(after))], lines))
    return draw_blocks(title, [f"{angle}°" for angle in COMPASS], blocks)


def draw_orientation(title: str, model: ImageModule, data: ImageDataModule) -> Image.Image:
    """Draw test images by `draw_turns`, evenly spread over the split."""
    samples, ours = data.samples("test"), model.model

    @torch.no_grad()
    def answer(images: Tensor) -> npt.NDArray[np.floating[Any]]:
        return np.asarray(ours.answers(model(images.to(model.device))).cpu())

    return draw_turns(
        f"{title}: images at eight angles, and rotated back by the estimated angle, which is red for a wrong side",
        [samples[place : place + 1].images for place in evenly_spread(len(samples), EXAMPLES)],
        answer,
        lambda images: ours.denormalise(ours.normalise(images.to(model.device))),
    )


def draw_transformer(title: str, classifier: ImageModule, data: ImageDataModule) -> Image.Image:
    """Draw the test split's views of images of some labels, and the outputs of the last transformers.

    Images with many views are fewer, see `MAX_VIEWS`. Each of several parallel transformers has its own row. For a
    transformer inside the network, the figure shows the part of the image that its feature maps cover.
    """
    samples, views = data.samples("test"), data.views("test")
    columns, task = len(views.names), task_of(data.spec)
    labels, blocks = torch.unique(samples.labels, dim=0), []
    for label in labels[evenly_spread(len(labels), min(EXAMPLES, max(1, MAX_VIEWS // columns)))]:
        first = int((samples.labels == label).reshape(len(samples.labels), -1).all(dim=1).nonzero()[0])
        images = samples[first * columns : (first + 1) * columns].images.to(classifier.device)
        with torch.no_grad(), observing() as observations:
            answers = classifier.model.answers(classifier(images)).cpu().numpy()
            rows = transformer_images(classifier.model, images, observations)
        truth, predicted = task.label(label.tolist()), [task.text(row) for row in answers]
        blocks.append((rows, [[Line(guess or "none", BLACK if guess == truth else RED)] for guess in predicted]))
    title = f"{title}: input above, output of the spatial transformer below, with the prediction, red if wrong"
    return draw_blocks(title, [name + views.unit for name in views.names], blocks)
