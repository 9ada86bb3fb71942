"""Checkpoints that are written completely or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from upright.files import replacing_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its target, sync, and rename it.

    Lightning's own class writes to the temporary folder first. That may be on another file system, where a rename is a
    copy, which an interruption truncates.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as aside, open(aside, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch fails again when it cannot write the end of the file, and hides the first error.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
