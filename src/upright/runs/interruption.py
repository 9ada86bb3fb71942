"""Ctrl-C, SIGTERM and a scheduler's warning: the run ends where it stands, with a checkpoint to go on from."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from upright.internals.lightning import accumulates
from upright.runs.folder import is_first_process


class Interrupted(BaseException):
    """The run was asked to stop. No error, and nothing on its way shall take it for one.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # As a shell has it.
        self.exit_code = 128 + number


def is_whole_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a run that is saved after this batch goes on from there exactly.

    It does not amid an accumulation, for gradients are not saved, nor where validation follows, which Lightning leaves
    out when it goes on.
    """
    # Without a number of epochs between validations, Lightning counts the batches of all of them.
    counts_all = trainer.check_val_every_n_epoch is None
    batches = trainer.fit_loop.epoch_loop.total_batch_idx if counts_all else batch_idx
    validates = trainer.val_check_batch
    follows = trainer.is_last_batch or (isinstance(validates, int) and (batches + 1) % validates == 0)
    return not follows and not accumulates(trainer)


def _has_all_steps(trainer: L.Trainer) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step


class Interruption(Checkpoint):
    """Stops training after the step that it is in, or after validation, with ``last.ckpt`` written.

    Lightning's own ways save in the middle of a step (SLURM), do not save (Ctrl-C), or wait for each other for ever
    (SIGTERM in one of several processes). As a `Checkpoint` it comes after all other callbacks.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._asked: int | None = None
        self._when, self._training = 0.0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals; before training has begun, each raises `Interrupted` at once."""
        before = {number: signal.getsignal(number) for number in _signals()}
        # The others wait for the first in C, where no handler of ours would be called, and have nothing to give back.
        if is_first_process():
            self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in _signals():
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if not self._training:
            raise Interrupted(number)
        if self._asked is None:
            self._asked, self._when = number, time.monotonic()
            if is_first_process():
                # Not print, which it may have come into the middle of.
                os.write(2, b"\nupright: stopping after this step, or this validation; Ctrl-C then ends at once.\n")
        elif number == signal.SIGINT and time.monotonic() - self._when > 1:
            # Not sooner: torchrun hands on what its processes have heard already.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to save."""
        self._training = True
        # Lightning has put its own there.
        self._listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop, if asked."""
        if is_whole_step(trainer, batch_idx) and not _has_all_steps(trainer) and self._agreed(trainer):
            trainer.save_checkpoint(self.path)
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop, if asked: the checkpoint of the epoch has just been written. After the last epoch there is no need."""
        has_all_epochs = 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        ends = trainer.should_stop or has_all_epochs or _has_all_steps(trainer)
        if not ends and self._agreed(trainer):
            self._stop(trainer)

    def _agreed(self, trainer: L.Trainer) -> bool:
        # Each process hears of it at another moment, or not at all, and all have to stop at the same step.
        return trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        if self._asked == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        raise Interrupted(self._asked or signal.SIGTERM)


def _signals() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    # By the last, SLURM says that time is nearly up (#SBATCH --signal=USR1@120).
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]


def _requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"upright: job {job} could not be queued again: {error}", flush=True)
