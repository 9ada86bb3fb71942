"""Callbacks of a run: complete checkpoints, metrics.csv, gradient norms, and a stop when training diverges."""

import csv
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

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
    """Lightning's `ModelCheckpoint`, which also restores its best score after the run's folder was moved.

    Within an epoch it saves only after steps from which a run resumes exactly; see `is_whole_step`.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_whole_step(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the folder of all paths by the current one; without a best checkpoint there, restore nothing."""

        def here(path: str) -> str:
            return os.path.join(str(self.dirpath), os.path.basename(path)) if path else path

        if not os.path.isfile(here(state_dict["best_model_path"])):
            return
        paths = {key: here(state_dict[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


def checkpoints(folder: Path, monitor: str, mode: Literal["min", "max"], every_n_steps: int) -> list[Callback]:
    """Return callbacks that write ``best.ckpt`` by a metric of validation, and ``last.ckpt`` after every epoch.

    ``last.ckpt`` is also written within an epoch after ``every_n_steps`` steps; 0 for never.
    """
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False}
    callbacks: list[Callback] = [
        RunCheckpoint(**common, filename="best", monitor=monitor, mode=mode),
        RunCheckpoint(**common, filename="last", every_n_epochs=1, save_on_train_epoch_end=True),
    ]
    if every_n_steps:
        callbacks.append(RunCheckpoint(**common, filename="last", every_n_train_steps=every_n_steps))
    return callbacks


class MetricsFile(Callback):
    """Write one row per epoch to ``metrics.csv``; a resumed run continues after the rows up to its checkpoint.

    ``lr`` is the learning rate of the first parameter group, ``lr/1`` that of the second. ``seconds`` is the duration
    of the epoch, with validation and checkpoints. ``images_per_second`` is the number of training images over that
    time. The loggers get these values too. With ``lines``, the metrics of up to about ten epochs are printed, for
    terminals without a progress bar.
    """

    def __init__(self, path: Path, *, lines: bool = False) -> None:
        self.path, self.lines = path, lines
        self._started, self._images = time.monotonic(), 0
        self._validated = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = trainer.current_epoch

    @rank_zero_only
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started, self._images = time.monotonic(), 0

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[1]) * trainer.world_size

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning does not remove the validation metrics of an earlier epoch.
        metrics = {
            name: float(value)
            for name, value in sorted(trainer.callback_metrics.items())
            if self._validated == trainer.current_epoch or not name.startswith("val/")
        }
        seconds = time.monotonic() - self._started
        groups = enumerate(trainer.optimizers[0].param_groups)
        own = {f"lr/{number}" if number else "lr": group["lr"] for number, group in groups}
        own |= {"seconds": seconds, "images_per_second": self._images / seconds}
        row: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row |= {name: f"{value:.6g}" for name, value in (metrics | own).items()}
        for logger in trainer.loggers:
            # Lightning logs its own metrics of an epoch at this step.
            logger.log_metrics(own, step=trainer.global_step - 1)
        rows = [old for old in read_rows(self.path) if int(old["epoch"]) < trainer.current_epoch] + [row]
        with replacing_file(self.path) as aside, open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for old in rows for name in old)))
            writer.writeheader()
            writer.writerows(rows)
        epoch, epochs = trainer.current_epoch + 1, epochs_of(trainer)
        if self.lines and (epochs < 10 or epoch % (epochs // 10) == 0 or epoch == epochs):
            print(f"epoch {epoch}/{epochs}  {brief(metrics)}", flush=True)


def epochs_of(trainer: L.Trainer) -> int:
    """Return the maximum number of epochs of the run."""
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return trainer.max_epochs
    return math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / trainer.num_training_batches)


def brief(metrics: Mapping[str, float]) -> str:
    """Return the most important metrics on one line: all of training, and `BRIEF` of validation."""
    validation = [f"val/{name}" for name in BRIEF if f"val/{name}" in metrics]
    names = [*(name for name in metrics if name.startswith("train/")), *validation]
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in names)


class Divergence(Callback):
    """Stop a run when its loss or weights are not finite, before a checkpoint of them is written to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._losses: list[tuple[int, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._losses.append((trainer.global_step, outputs["loss"].detach()))
        # On other devices, reading a loss waits for the device.
        if pl_module.device.type == "cpu" or len(self._losses) >= 50:
            self._check_losses(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_losses(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the weights too: after a finite loss, the last step may have made them infinite or NaN."""
        self._check_losses(trainer)
        if not all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters()):
            self._stop(trainer, trainer.global_step, "weights are not finite")

    def _check_losses(self, trainer: L.Trainer) -> None:
        for step, loss in self._losses:
            if not math.isfinite(loss):
                self._stop(trainer, step, f"loss is {float(loss)}")
        self._losses.clear()

    def _stop(self, trainer: L.Trainer, step: int, what: str) -> None:
        paths = " and ".join(f"'{path}'" for path in sorted(self.folder.glob("*.ckpt")))
        raise GateError(
            f"The run diverged: the {what} at step {step} (epoch {trainer.current_epoch + 1}). Lower "
            "--model.optimizer.lr, let the schedule warm up, or clip gradients: --trainer.gradient_clip_val 1. "
            + (f"Earlier checkpoints: {paths}." if paths else "No checkpoint had been written yet.")
        )


class GradientNorm(Callback):
    """Log the norm of all gradients before clipping: its mean and its maximum over an epoch."""

    def __init__(self) -> None:
        self._mean, self._maximum = Means(), torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.state_dict(), "most": self._maximum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._mean.load_state_dict(state_dict["mean"])
        self._maximum = state_dict["most"]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        norm = get_total_norm([each.grad for each in pl_module.parameters() if each.grad is not None])
        self._mean.add("grad_norm/mean", norm, 1)
        self._maximum = torch.maximum(self._maximum.to(norm.device), norm)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log mean and maximum. Several processes step with the same gradients."""
        if means := self._mean.take():
            pl_module.log_dict(means | {"grad_norm/max": self._maximum}, sync_dist=True)
        self._maximum = torch.zeros(())
