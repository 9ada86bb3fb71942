"""Checks of the trainer's options, and of the checkpoint that a run resumes from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from upright.checkpoint import KEY
from upright.data.datamodule import ImageDataModule
from upright.errors import UserError
from upright.runs.callbacks import RunCheckpoint
from upright.training.finetuning import Freeze
from upright.training.module import ImageModule
from upright.training.optimisation import grouped_optimizer

UNSUPPORTED = {
    BackboneFinetuning: "it needs an attribute `backbone`: use upright.training.finetuning.Freeze",
    BatchSizeFinder: "it changes the batch size after the schedule was made: call Lightning's "
    "Tuner(trainer).scale_batch_size in a script, then fit with --data.batch_size",
    LearningRateFinder: "it replaces the schedule while it searches: call Lightning's Tuner(trainer).lr_find in a "
    "script, then fit with --model.optimizer.init_args.lr",
    StochasticWeightAveraging: "it averages after the last checkpoint is written, so that no checkpoint has the "
    "averaged weights: use lightning.pytorch.callbacks.EMAWeightAveraging",
    ModelPruning: "it gives the weights other names, which `test` and `export` could not load: prune a restored "
    "model in a script",
}
"""Callbacks of Lightning that do not work here, each with the reason and a replacement."""


def check_supported(trainer: Any) -> None:
    """Refuse options of the trainer that `fit` does not support; the message names a replacement."""
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} does not work with `upright fit`: {reason}.")
    for option in ("max_steps", "limit_train_batches"):
        if getattr(trainer, option) == 0:
            raise UserError(f"trainer.{option} 0 trains nothing: give more, or leave it out.")


def is_complete(checkpoint: Mapping[str, Any], trainer: L.Trainer) -> bool:
    """Return True if a run has finished all its epochs, or all its steps."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= _epochs(checkpoint)) or 0 <= steps <= checkpoint["global_step"]


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def check_resumable(
    checkpoint: Mapping[str, Any], model: ImageModule, data: L.LightningDataModule, trainer: Any, path: str | Path
) -> None:
    """Refuse to resume with options that a resumed run would ignore, or could not use.

    Lightning restores the state of optimiser and schedule, and with it their rates and weight decay. A changed option
    would be recorded but not used. A run that is complete is refused, too.
    """
    freeze = next((callback for callback in trainer.callbacks if isinstance(callback, Freeze)), Freeze())
    for key, old, new, reason in _options(checkpoint, model, data, freeze):
        if old != new:
            raise UserError(
                f"'{path}' was trained with {key} {old} and cannot resume with {new}, because {reason}; to train its "
                f"weights with another one: --start_from {path}."
            )
    monitors = [state["monitor"] for key, state in checkpoint["callbacks"].items() if key.startswith("RunCheckpoint")]
    for callback in trainer.callbacks:
        if not isinstance(callback, RunCheckpoint) or callback.monitor in [None, *monitors]:
            continue
        if monitors and (best := Path(str(callback.dirpath)) / "best.ckpt").is_file():
            raise UserError(
                f"'{best}' was chosen by {monitors[0]}, and {callback.monitor} cannot be compared with it: resume with "
                f"--monitor {monitors[0]}, or start a new run with another --name."
            )
    if freeze in trainer.callbacks:
        # Its setup sets the parameters' rates, which decide the groups.
        freeze.setup(trainer, model, "fit")
    theirs = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
    ours = [len(group["params"]) for group in grouped_optimizer(model.model, model.optimizer).param_groups]
    if theirs != ours:
        raise UserError(
            f"'{path}' has parameter groups of {theirs}, and this run has {ours}: weight decay, lr_factor or Freeze "
            "differ. Resume with the options that it was trained with, or leave --ckpt_path out to start a new run."
        )
    if is_complete(checkpoint, trainer):
        limit, count = (
            ("max_epochs", _epochs(checkpoint)) if trainer.max_steps < 0 else ("max_steps", checkpoint["global_step"])
        )
        raise UserError(f"'{path}' has done {count} {limit[4:]} already; raise --trainer.{limit} above that to resume.")
    if "averaging_state" in checkpoint and not any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
        raise UserError(
            f"'{path}' averages its weights and cannot resume without: add the callback of its config.yaml to "
            "trainer.callbacks, or leave --ckpt_path out to start a new run."
        )


def _options(
    checkpoint: Mapping[str, Any], model: ImageModule, data: Any, freeze: Freeze
) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield options with the old and the new value, and the reason why a resumed run must not change them.

    An option that one config lacks has its default there.
    """
    reason = "the optimiser's state is restored"
    for part in ("optimizer", "scheduler"):
        old, new = (each["init_args"].get(part) or {} for each in (checkpoint[KEY]["model"], model.recipe))
        yield f"model.{part}", old.get("class_path"), new.get("class_path"), reason
        old, new = old.get("init_args", {}), new.get("init_args", {})
        for name in sorted(old.keys() & new.keys()):
            yield f"model.{part}.init_args.{name}", old[name], new[name], reason
    yield "Freeze.lr_factor", checkpoint["callbacks"].get("Freeze", {}).get("lr_factor", 1.0), freeze.lr_factor, reason
    if isinstance(data, ImageDataModule):
        old = (checkpoint[KEY]["data"] or {}).get("init_args", {}).get("batch_size", data.batch_size)
        yield "data.batch_size", old, data.batch_size, "the schedule counts batches"
