"""Ctrl-C, SIGTERM and a scheduler's warning: the run stops after its current step, with a checkpoint to resume from."""

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
    """Request to stop the run by a signal. It is no `Exception`, so that no handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        # The exit code that shells use.
        self.exit_code = 128 + number


def is_whole_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Return True if a run that is saved after this batch resumes from there exactly.

    It does not within a gradient accumulation, because checkpoints do not store gradients. It does not if validation
    follows, because Lightning skips that validation when it resumes.
    """
    # Without a number of epochs between validations, Lightning counts the batches of all epochs.
    counts_all = trainer.check_val_every_n_epoch is None
    batches = trainer.fit_loop.epoch_loop.total_batch_idx if counts_all else batch_idx
    validates = trainer.val_check_batch
    follows = trainer.is_last_batch or (isinstance(validates, int) and (batches + 1) % validates == 0)
    return not follows and not accumulates(trainer)


def _is_last_step(trainer: L.Trainer) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step


class Interruption(Checkpoint):
    """Stop training after the current step or validation, and write ``last.ckpt``.

    Lightning's own handlers save in the middle of a step (SLURM), do not save (Ctrl-C), or wait for each other forever
    (SIGTERM in one of several processes). This class is a `Checkpoint`, so it runs after all other callbacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signal: int | None = None
        self._signal_time, self._training = 0.0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; before training starts, each raises `Interrupted` at once."""
        before = {number: signal.getsignal(number) for number in _signals()}
        # The other processes wait for the first one in C code, where no Python handler runs. They hold no lock.
        if is_first_process():
            self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in _signals():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if not self._training:
            raise Interrupted(number)
        if self._signal is None:
            self._signal, self._signal_time = number, time.monotonic()
            if is_first_process():
                # Not print: the signal may have interrupted one.
                os.write(2, b"\nupright: stopping after this step or validation; press Ctrl-C again to end at once.\n")
        elif number == signal.SIGINT and time.monotonic() - self._signal_time > 1:
            # Not within a second: torchrun forwards a signal that its processes have received already.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        # Lightning has set its own handlers.
        self._listen()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop after a signal."""
        if is_whole_step(trainer, batch_idx) and not _is_last_step(trainer) and self._should_stop(trainer):
            trainer.save_checkpoint(self.path)
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop after a signal, unless this was the last epoch. The checkpoint of the epoch has just been written."""
        is_last_epoch = 0 <= (trainer.max_epochs or -1) <= trainer.current_epoch + 1
        ends = trainer.should_stop or is_last_epoch or _is_last_step(trainer)
        if not ends and self._should_stop(trainer):
            self._stop(trainer)

    def _should_stop(self, trainer: L.Trainer) -> bool:
        # Each process gets the signal at another time, or not at all, and all must stop at the same step.
        return trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        if self._signal == signal.SIGUSR1 and trainer.is_global_zero:
            _requeue()
        raise Interrupted(self._signal or signal.SIGTERM)


def _signals() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    # SLURM sends SIGUSR1 shortly before the time limit (#SBATCH --signal=USR1@120).
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]


def _requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"upright: job {job} could not be queued again: {error}", flush=True)
