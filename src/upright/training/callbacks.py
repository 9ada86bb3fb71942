"""What a run leaves behind: checkpoints with all they need, metrics.csv, and pictures."""

import csv
import io
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torch.nn.utils import get_total_norm

from upright.architectures.spatial_transformer import Observation, last_of
from upright.data.datamodule import ImageDataModule
from upright.errors import GateError
from upright.files import replacing_file
from upright.images import Pixels
from upright.training.checkpoint import KEY, contents
from upright.training.classifier import ImageClassifier
from upright.training.interruption import is_whole_step
from upright.training.metrics import BRIEF
from upright.training.pictures import (
    RED,
    Line,
    draw_column,
    draw_columns,
    draw_confusion,
    draw_curves,
    draw_tiles,
    pixels_of,
    save_picture,
)


class RunCheckpoint(ModelCheckpoint):
    """Knows its best score again after the run's folder was moved (Lightning's own forgets it then).

    Within an epoch it saves only where a run goes on exactly.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See `is_whole_step`."""
        if is_whole_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @cached_property
    def state_key(self) -> str:
        """Lightning's own, which it asks for at every hook of every step."""
        return super().state_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the files where the folder is now; a best one that is not there is none."""

        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        if not os.path.isfile(here(state_dict["best_model_path"])):
            return
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


def checkpoints(folder: Path, every_n_steps: int) -> list[Callback]:
    """``best.ckpt`` by validation loss and ``last.ckpt`` after every epoch, and every so many steps within one.

    Accuracy on a few thousand images is coarse, and its luckiest epoch often one before the rate has come down.
    """
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False}
    found: list[Callback] = [
        RunCheckpoint(**common, filename="best", monitor="val/loss", mode="min"),
        RunCheckpoint(**common, filename="last", every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    if every_n_steps:
        found.append(RunCheckpoint(**common, filename="last", every_n_train_steps=every_n_steps))
    return found


class RunRecord(Callback):
    """Writes Upright's part into every checkpoint.

    Args:
        run: name and id of the run, as the checkpoint shall hold them.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self.run = run

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """See `checkpoint.contents`."""
        assert isinstance(pl_module, ImageClassifier)
        data = trainer.datamodule if isinstance(trainer.datamodule, ImageDataModule) else None  # type: ignore[attr-defined]
        # What it was chosen by; a training metric may be of the epoch before.
        metrics = {name: value for name, value in _scalars(trainer).items() if name.startswith("val/")}
        checkpoint[KEY] = contents(pl_module, data, self.run, metrics)


def _scalars(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}


class MetricsFile(Callback):
    """One row per epoch in ``metrics.csv``; a resumed run goes on where its checkpoint stood.

    ``lr`` is the learning rate of the first parameter group, ``lr/1`` that of the second. ``seconds`` are of the epoch,
    validation and checkpoints included, and so are ``images_per_second``, of training. The loggers get them too.

    Args:
        path: of the file.
        lines: also print a line now and then, for terminals without a progress bar.
    """

    def __init__(self, path: Path, *, lines: bool = False) -> None:
        self.path, self.lines = path, lines
        self._started, self._images = time.monotonic(), 0

    @rank_zero_only
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started, self._images = time.monotonic(), 0

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch.labels) * trainer.world_size

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= {name: f"{value:.6g}" for name, value in _scalars(trainer).items()}
        seconds = time.monotonic() - self._started
        own = _rates(trainer) | {"seconds": seconds, "images_per_second": self._images / seconds}
        row |= {name: f"{value:.6g}" for name, value in own.items()}
        for logger in trainer.loggers:
            # The step of Lightning's own metrics of an epoch.
            logger.log_metrics(own, step=trainer.global_step - 1)
        rows = [old for old in read_rows(self.path) if int(old["epoch"]) < trainer.current_epoch] + [row]
        with replacing_file(self.path) as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for old in rows for name in old)))
            writer.writeheader()
            writer.writerows(rows)
        epochs = trainer.max_epochs or 0
        if self.lines and (epochs < 10 or (trainer.current_epoch + 1) % (epochs // 10) == 0):
            print(f"epoch {trainer.current_epoch + 1}/{epochs}  {brief(_scalars(trainer))}", flush=True)


def _rates(trainer: L.Trainer) -> dict[str, float]:
    groups = trainer.optimizers[0].param_groups
    return {f"lr/{number}" if number else "lr": group["lr"] for number, group in enumerate(groups)}


def brief(metrics: Mapping[str, float]) -> str:
    """Those worth a look after every epoch, on one line."""
    shown = {name: value for name, value in metrics.items() if name.startswith("train/") or name[4:] in BRIEF}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.csv``; none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Divergence(Callback):
    """Stops a run whose loss or weights are not finite any more, before a checkpoint of them is written.

    Args:
        folder: of the run, with what it saved before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._losses: list[tuple[int, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss."""
        self._losses.append((trainer.global_step, outputs["loss"].detach()))
        # Elsewhere a look waits for the device.
        if pl_module.device.type == "cpu" or len(self._losses) >= 50:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what is left."""
        self._look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the weights too: a finite loss may have been their last."""
        self._look(trainer)
        if not all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters()):
            self._stop(trainer, trainer.global_step, "weights are not finite")

    def _look(self, trainer: L.Trainer) -> None:
        for step, loss in self._losses:
            if not math.isfinite(loss):
                self._stop(trainer, step, f"loss is {float(loss)}")
        self._losses.clear()

    def _stop(self, trainer: L.Trainer, step: int, what: str) -> None:
        kept = " and ".join(f"'{path}'" for path in sorted(self.folder.glob("*.ckpt")))
        raise GateError(
            f"The run diverged: the {what} at step {step} (epoch {trainer.current_epoch + 1}). Lower "
            "--model.optimizer.lr, let the schedule warm up, or clip gradients: --trainer.gradient_clip_val 1. "
            + (f"From before there is {kept}." if kept else "No checkpoint had been written yet.")
        )


class GradientNorm(Callback):
    """Logs mean and maximum, over an epoch, of the norm of all gradients, before they are clipped."""

    def __init__(self) -> None:
        self._norms: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Those of the epoch so far."""
        return {"norms": self._norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self._norms = state_dict["norms"]

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew."""
        self._norms = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure."""
        self._norms.append(get_total_norm([each.grad for each in pl_module.parameters() if each.grad is not None]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log."""
        norms = torch.stack(self._norms)
        pl_module.log_dict({"grad_norm/mean": norms.mean(), "grad_norm/max": norms.max()})


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
        if not (last := last_of(outputs["seen"])):
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
        if not picture_epochs(_epochs(trainer)).isdisjoint(since):
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
        when = f"Validation, epoch {self._epoch + 1} of {_epochs(trainer)}"
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


def _epochs(trainer: L.Trainer) -> int:
    """How many the run has, at most."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return trainer.max_epochs
    return math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches)


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
