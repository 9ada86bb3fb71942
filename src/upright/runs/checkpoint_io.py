"""Checkpoints that are written completely or not at all."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from upright.files import replacing_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, sync, rename.

    Lightning's own goes through the temporary folder, which may be another file system, where a rename is a copy that
    can be cut off.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """See Lightning's `CheckpointIO.save_checkpoint`."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(target) as aside, open(aside, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch trips over the end that it could not write, and hides why.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
