"""Weights & Biases: on this disk by default, never a prompt, never an account."""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from upright.errors import UprightError


def wandb_logger(mode: Literal["offline", "online", "off"], folder: Path, run: Mapping[str, str]) -> Logger | None:
    """The logger of a run, or None when it is off or wandb is not installed (which is said).

    Args:
        mode: ``offline`` keeps the record in ``folder/wandb``, for ``wandb sync``; ``online`` sends it.
        folder: of the run.
        run: its ``name`` and ``id``; a resumed run keeps both.

    Raises:
        UprightError: if ``online`` cannot be had.
    """
    if mode == "off":
        return None
    if find_spec("wandb") is None:
        if mode == "online":
            raise UprightError("--wandb online needs the package wandb: `pip install wandb`.")
        print("wandb is not installed (`pip install wandb`): this run is tracked in metrics.csv only.")
        return None
    if mode == "offline":
        # Nothing to say but where the record lies, and the README says that.
        os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    if mode == "online" and not wandb.login(prompt=False, verify=False):
        raise UprightError("--wandb online needs an account: `wandb login` once, or set WANDB_API_KEY.")
    logger = WandbLogger(
        project="upright",
        name=run["name"],
        id=run["id"],
        # The process that writes it may have started in another folder.
        save_dir=folder.resolve(),
        offline=mode == "offline",
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(console="off"),
    )
    # Lightning 2.6 always passes it, and wandb 0.31 warns of it.
    logger._wandb_init.pop("anonymous", None)
    return logger


def agent_run() -> str | None:
    """The id of this run if the agent of a W&B sweep started it; the agent says so in the environment."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def finish_wandb() -> None:
    """Close the record of a run, or the next one in this process would write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
