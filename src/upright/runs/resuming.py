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
    """Refuse options of the trainer that `fit` does not support.

    Args:
        trainer: the parsed options of ``trainer``.

    Raises:
        UserError: if there is such an option; the message names a replacement.
    """
    callbacks = trainer.callbacks or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        for kind, reason in UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} does not work with `upright fit`: {reason}.")
    for option in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, option) == 0:
            raise UserError(f"trainer.{option} 0 trains nothing: give more, or leave it out.")


def is_complete(checkpoint: Mapping[str, Any], trainer: L.Trainer) -> bool:
    """Return True if a run has finished all its epochs, or all its steps."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    return (epochs is not None and 0 <= epochs <= _epochs(checkpoint)) or 0 <= steps <= checkpoint["global_step"]


def _epochs(checkpoint: Mapping[str, Any]) -> int:
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def check_resumable(
    checkpoint: Mapping[str, Any],
    model: ImageModule,
    data: L.LightningDataModule,
    trainer: Any,
    path: str | Path,
) -> None:
    """Refuse to resume with options that a resumed run would ignore, or could not use.

    Lightning restores the state of optimiser and schedule, and with it their rates and weight decay. A changed option
    would be recorded but not used.

    Args:
        checkpoint: the checkpoint to resume from.
        model: the model of this run.
        data: the data of this run.
        trainer: the trainer with its callbacks.
        path: path of the checkpoint, for messages.

    Raises:
        UserError: if optimiser, schedule, groups, batch size or averaging differ, or if the run is complete.
    """
    for part in ("optimizer", "scheduler"):
        theirs, ours = (r["init_args"].get(part) or {} for r in (checkpoint[KEY]["model"], model.recipe))
        for key, (old, new) in _differences(theirs, ours, f"model.{part}"):
            raise UserError(
                f"'{path}' was trained with {key} {old} and cannot resume with {new}, because the optimiser's "
                f"state is restored; to train its weights with another one: --start_from {path}."
            )
    if isinstance(data, ImageDataModule):
        theirs = (checkpoint[KEY]["data"] or {}).get("init_args", {}).get("batch_size", data.batch_size)
        if theirs != data.batch_size:
            raise UserError(
                f"'{path}' was trained with data.batch_size {theirs} and cannot resume with {data.batch_size}, because "
                f"the schedule counts batches; to train its weights with another one: --start_from {path}."
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
    theirs = checkpoint["callbacks"].get(Freeze.__name__, {}).get("lr_factor", 1.0)
    ours = next((callback.lr_factor for callback in trainer.callbacks if isinstance(callback, Freeze)), 1.0)
    if theirs != ours:
        raise UserError(
            f"'{path}' was trained with an lr_factor of {theirs} for the body and cannot resume with {ours}; "
            "use Freeze with the same lr_factor, or leave --ckpt_path out to start a new run."
        )
    for callback in trainer.callbacks:
        if isinstance(callback, Freeze):
            # Its setup sets the parameters' rates, which decide the groups.
            callback.setup(trainer, model, "fit")
    theirs, ours = (
        [len(group["params"]) for group in groups]
        for groups in (
            checkpoint["optimizer_states"][0]["param_groups"],
            grouped_optimizer(model.model, model.optimizer).param_groups,
        )
    )
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


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], key: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the options that differ between two configs. An option that one lacks has its default there."""
    if theirs.get("class_path") != ours.get("class_path"):
        yield key, (theirs.get("class_path"), ours.get("class_path"))
        return
    old, new = theirs.get("init_args", {}), ours.get("init_args", {})
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            yield f"{key}.init_args.{name}", (old[name], new[name])
