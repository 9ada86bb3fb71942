"""What a run writes down while it runs: checkpoints with all they need, and metrics.csv; and when it stops itself."""

import csv
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch.nn.utils import get_total_norm

from upright.errors import GateError
from upright.files import replacing_file
from upright.runs.interruption import is_whole_step
from upright.tables import read_rows
from upright.training.metrics import BRIEF, Means


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
        self._validated = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """This epoch's row has metrics of its own."""
        self._validated = trainer.current_epoch

    @rank_zero_only
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started, self._images = time.monotonic(), 0

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images."""
        self._images += len(batch[1]) * trainer.world_size

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the row."""
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        found = _scalars(trainer)
        if self._validated != trainer.current_epoch:
            # Lightning keeps those of an earlier epoch.
            found = {name: value for name, value in found.items() if not name.startswith("val/")}
        row |= {name: f"{value:.6g}" for name, value in found.items()}
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
        epoch, epochs = trainer.current_epoch + 1, epochs_of(trainer)
        if self.lines and (epochs < 10 or epoch % (epochs // 10) == 0 or epoch == epochs):
            print(f"epoch {epoch}/{epochs}  {brief(found)}", flush=True)


def epochs_of(trainer: L.Trainer) -> int:
    """How many the run has, at most."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return trainer.max_epochs
    return math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches)


def _rates(trainer: L.Trainer) -> dict[str, float]:
    groups = trainer.optimizers[0].param_groups
    return {f"lr/{number}" if number else "lr": group["lr"] for number, group in enumerate(groups)}


def brief(metrics: Mapping[str, float]) -> str:
    """Those worth a look after every epoch, on one line."""
    shown = {name: value for name, value in metrics.items() if name.startswith("train/") or name[4:] in BRIEF}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items())


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
        self._mean, self._most = Means(), torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """Of the epoch so far."""
        return {"mean": self._mean.state_dict(), "most": self._most}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._mean.load_state_dict(state_dict["mean"])
        self._most = state_dict["most"]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Measure."""
        norm = get_total_norm([each.grad for each in pl_module.parameters() if each.grad is not None])
        self._mean.add("grad_norm/mean", norm, 1)
        self._most = torch.maximum(self._most.to(norm.device), norm)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log; several processes step with the same gradients."""
        if found := self._mean.take():
            pl_module.log_dict(found | {"grad_norm/max": self._most}, sync_dist=True)
        self._most = torch.zeros(())
