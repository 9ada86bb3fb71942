"""Whether a checkpoint is one that this run can go on from."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from upright.checkpoint import KEY
from upright.errors import UserError
from upright.training.classifier import ImageClassifier
from upright.training.finetuning import Freeze


def is_done(checkpoint: dict[str, Any], trainer: L.Trainer) -> bool:
    """Whether the run has all its epochs, or steps, behind it."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= _epochs(checkpoint)) or 0 <= steps <= checkpoint["global_step"]


def _epochs(checkpoint: dict[str, Any]) -> int:
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def check_resumable(checkpoint: dict[str, Any], model: ImageClassifier, trainer: Any, path: str | Path) -> None:
    """Refuse to go on as another run.

    Args:
        checkpoint: to go on from.
        model: that shall.
        trainer: with its callbacks.
        path: of the checkpoint, for messages.

    Raises:
        UserError: if optimiser, schedule, groups or averaging differ, or nothing is left to do.
    """
    for part in ("optimizer", "scheduler"):
        theirs, ours = (r["init_args"].get(part, {}) for r in (checkpoint[KEY]["model"], model.recipe))
        if theirs.get("class_path") != ours.get("class_path"):
            raise UserError(
                f"'{path}' was trained with {part} {theirs.get('class_path')} and cannot go on with "
                f"{ours.get('class_path')}; leave --ckpt_path out to start anew."
            )
    theirs = checkpoint["callbacks"].get(Freeze.__name__, {}).get("lr_factor", 1.0)
    ours = next((callback.lr_factor for callback in trainer.callbacks if isinstance(callback, Freeze)), 1.0)
    if theirs != ours:
        raise UserError(
            f"'{path}' was trained with an lr_factor of {theirs} for the body and cannot go on with {ours}; "
            "leave Freeze as it was, or --ckpt_path out to start anew."
        )
    for callback in trainer.callbacks:
        if isinstance(callback, Freeze):
            # It decides about groups.
            callback.setup(trainer, model, "fit")
    theirs, ours = (
        [len(group["params"]) for group in groups]
        for groups in (checkpoint["optimizer_states"][0]["param_groups"], model.grouped_optimizer().param_groups)
    )
    if theirs != ours:
        raise UserError(
            f"'{path}' trained {theirs} parameters in groups, and here they would be {ours}: weight decay, lr_factor "
            "or what is frozen differ. Go on with what it was trained with, or leave --ckpt_path out to start anew."
        )
    if is_done(checkpoint, trainer):
        limit, done = (
            ("max_epochs", _epochs(checkpoint)) if trainer.max_steps < 0 else ("max_steps", checkpoint["global_step"])
        )
        raise UserError(f"'{path}' has {done} {limit[4:]} behind it; raise --trainer.{limit} above that to go on.")
    if "averaging_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
        raise UserError(
            f"'{path}' averages its weights and cannot go on without: add the callback of its config.yaml to "
            "trainer.callbacks, or leave --ckpt_path out to start anew."
        )
