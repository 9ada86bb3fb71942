"""Private names of wandb (tested with 0.31) and of Lightning's logger for it."""

from typing import TYPE_CHECKING

from lightning.pytorch.loggers import WandbLogger

if TYPE_CHECKING:
    from wandb import Artifact, Run


def use_artifact_offline(run: "Run", artifact: "Artifact") -> None:
    """Record that an offline run used an artifact, because `Run.use_artifact` refuses offline runs.

    ``wandb sync`` uploads the record.
    """
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)  # noqa: SLF001


def without_anonymous(logger: WandbLogger) -> WandbLogger:
    """Remove the argument ``anonymous``: Lightning 2.6 always passes it, and wandb 0.31 warns about it."""
    logger._wandb_init.pop("anonymous", None)  # noqa: SLF001
    return logger
