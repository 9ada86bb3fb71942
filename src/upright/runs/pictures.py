"""Which pictures a run leaves, of what and when."""

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
    pixels_of,
    save_picture,
)
from upright.tables import read_rows
from upright.training.classifier import ImageClassifier


def picture_epochs(epochs: int) -> set[int]:
    """The epochs, from 0, after which there are pictures: at most ten, evenly spread, the first and the last too."""
    return set(np.linspace(0, epochs - 1, min(epochs, 10)).round().astype(int).tolist())


class RunPictures(Callback):
    """Draws the validation split at some epochs, into the run's folder and every logger that takes images.

    ``samples.png``, ``mistakes.png``, ``confusion.png``, ``transformer.png``, and ``curves.png`` at the end. All comes
    from the validation pass that there is anyway: no other is made, no random number drawn. Of several processes the
    first one draws: its share of the images, and the confusion matrix of all.

    What the transformer made of some images at earlier epochs is part of the state, as a small PNG for each epoch.

    Args:
        folder: of the run.
    """

    SHOWN = 24
    """Images on a sheet, at most."""
    ROWS, SIDE = 10, 64
    """Of the transformer's picture: rows, at most, of squares of so many pixels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._epoch = self._drawn = -1
        self._answers: list[tuple[Tensor, ...]] = []
        # Positions of the images that have rows in the transformer's picture, and where in which batch they come.
        self._rows: list[int] = []
        self._places: dict[int, list[tuple[int, int]]] = {}
        self._views: dict[int, list[Tensor]] = {}
        self._columns: dict[str, bytes] = {}

    def state_dict(self) -> dict[str, Any]:
        """What cannot be made again: the columns of earlier epochs."""
        columns = {name: torch.frombuffer(bytearray(png), dtype=torch.uint8) for name, png in self._columns.items()}
        return {"rows": self._rows, "columns": columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same images."""
        self._rows = state_dict["rows"]
        self._columns = {name: png.numpy().tobytes() for name, png in state_dict["columns"].items()}

    @rank_zero_only
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the pass before."""
        self._answers, self._views = [], {}

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
        """Keep what was answered, and what the last transformers made of the images that have rows."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.sanity_checking or not isinstance(data, ImageDataModule):
            return
        assert isinstance(pl_module, ImageClassifier)
        self._answers.append((batch.position, batch.labels, *outputs["probabilities"].max(dim=1)))
        if not (last := last_of(outputs["observations"])):
            return
        if not self._rows:
            share = torch.arange(0, len(data.samples("val")), trainer.world_size)
            share = share[: int(trainer.num_val_batches[0]) * data.batch_size]
            self._rows = _of_each_class(data, share, self.ROWS // len(last))
        if batch_idx not in self._places:
            here = batch.position.tolist()
            self._places[batch_idx] = [(here.index(at), row) for row, at in enumerate(self._rows) if at in here]
        for place, row in self._places[batch_idx]:
            image = batch.images[place, None]
            normalised = pl_module.model.normalised(image)
            views = [pl_module.model.shown(_only(each, place).view(normalised)) for each in last]
            self._views[row] = [image, *views]

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, if it is time."""
        if trainer.sanity_checking:
            return
        self._epoch = trainer.current_epoch
        # An epoch without validation is drawn after the next one that has it.
        since = range(self._epoch - (trainer.check_val_every_n_epoch or 1) + 1, self._epoch + 1)
        if not picture_epochs(epochs_of(trainer)).isdisjoint(since):
            self._draw(trainer, pl_module)

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last epoch of a run that was stopped early, and the curves of all."""
        if self._drawn != self._epoch:
            self._draw(trainer, pl_module)
        if rows := read_rows(self.folder / "metrics.csv"):
            title = f"{self.folder.name}, {len(rows)} epochs" if len(rows) > 1 else f"{self.folder.name}, 1 epoch"
            save_picture(draw_curves(title, rows), self.folder / "curves.png")

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self._answers or not isinstance(data, ImageDataModule):
            return
        assert isinstance(pl_module, ImageClassifier)
        self._drawn = self._epoch
        when = f"Validation, epoch {self._epoch + 1} of {epochs_of(trainer)}"
        position, labels, confidence, predicted = (torch.cat(part).cpu() for part in zip(*self._answers, strict=True))
        wrong = (predicted != labels).nonzero().flatten()
        worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][: self.SHOWN]
        # The same ones at every epoch.
        some = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[: self.SHOWN])

        def sheet(title: str, chosen: Tensor) -> Image.Image:
            names, found = data.spec.classes, zip(predicted[chosen], confidence[chosen], labels[chosen], strict=True)
            captions = [
                [Line(f"{sure:.0%} · {names[guess]}"), *([] if guess == label else [Line(f"is {names[label]}", RED)])]
                for guess, sure, label in found
            ]
            return draw_tiles(title, pixels_of(data.samples("val")[position[chosen]].images), captions)

        pictures = {
            "samples": sheet(f"{when}: some of {len(labels):,} images, as predicted", some),
            "mistakes": sheet(f"{when}: the surest of {len(wrong):,} mistakes", worst)
            if len(wrong)
            else draw_tiles(f"{when}: no mistakes among {len(labels):,} images", [], []),
        }
        if pl_module.confusion is not None:
            pictures["confusion"] = draw_confusion(when, pl_module.confusion, data.spec.classes)
        if self._views:
            self._add_column()
            samples, views = data.samples("val"), len(data.views("val").names)
            labels = samples.labels[torch.tensor(self._rows) // views]
            columns = {name: Image.open(io.BytesIO(png)) for name, png in self._columns.items()}
            title = f"{when}: what the spatial transformer makes of them"
            pictures["transformer"] = draw_columns(title, [data.spec.classes[label] for label in labels], columns)
        for name, picture in pictures.items():
            path = self.folder / f"{name}.png"
            save_picture(picture, path)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"val/{name}", [str(path)], step=trainer.global_step - 1)

    def _add_column(self) -> None:
        branches = len(next(iter(self._views.values()))) - 1
        came: list[Pixels | None] = []
        seen: list[Pixels | None] = []
        for row in range(len(self._rows)):
            image, *views = (
                (pixels_of(each)[0] for each in self._views[row]) if row in self._views else [None] * (1 + branches)
            )
            came += [image] + [None] * (branches - 1)
            seen += views
        self._columns.setdefault("as it came", _png(came, self.SIDE))
        self._columns[f"epoch {self._epoch + 1}"] = _png(seen, self.SIDE)


def _of_each_class(data: ImageDataModule, share: Tensor, count: int) -> list[int]:
    """Positions in the validation split of an image of each of so many classes, in one view after the other."""
    views = len(data.views("val").names)
    labels = data.samples("val").labels[share // views]
    chosen = []
    for number, label in enumerate(torch.unique(labels)[: max(count, 1)]):
        of_class = share[labels == label]
        turned = of_class[of_class % views == number % views]
        chosen.append(int((turned if len(turned) else of_class)[0]))
    return chosen


def _only(observation: Observation, place: int) -> Observation:
    """What was done to one image of the batch."""
    before = observation.before and _only(observation.before, place)
    return replace(observation, theta=observation.theta[place, None], before=before)


def _png(images: Sequence[Pixels | None], side: int) -> bytes:
    written = io.BytesIO()
    draw_column(images, side).save(written, format="png")
    return written.getvalue()


def draw_transformer(title: str, classifier: ImageClassifier, data: ImageDataModule, count: int = 6) -> Image.Image:
    """For each image the views of the test split, and below what the last transformer sees of them.

    Of parallel transformers each has its own row. A transformer inside the network is shown by what its feature maps
    are of.

    Args:
        title: above all, followed by what is seen.
        classifier: with a spatial transformer.
        data: its test split is drawn.
        count: images of as many classes.
    """
    samples, views = data.samples("test"), data.views("test")
    columns, classes = len(views.names), data.spec.classes
    blocks = []
    for label in torch.unique(samples.labels)[:count].tolist():
        first = int((samples.labels == label).nonzero()[0])
        images = samples[first * columns : (first + 1) * columns].images.to(classifier.device)
        with torch.no_grad(), observing() as seen:
            predicted = classifier(images).argmax(dim=1).tolist()
            normalised = classifier.model.normalised(images)
            turned = [classifier.model.shown(last.view(normalised)) for last in last_of(seen)]
        rows = [pixels_of(pictures) for pictures in (images, *turned)]
        blocks.append((rows, [Line(classes[guess], BLACK if guess == label else RED) for guess in predicted]))
    title = f"{title}: above as it came, below as the spatial transformer turned it, with the prediction"
    return draw_blocks(title, [name + views.unit for name in views.names], blocks)
