"""Read a checkpoint without running code in it, and without Lightning."""

import pickle
import subprocess
import warnings
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from upright.errors import CheckpointError, UserError, nearest

FORMAT = 1
KEY = "upright"
"""Key of Upright's own part of a checkpoint."""


@cache
def git_commit() -> str | None:
    """Return the commit of the working directory, with ``+`` if tracked files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


def find_checkpoint(path: str | Path) -> Path:
    """Return ``path`` if it is a file, or its ``best.ckpt`` if it is the folder of a run."""
    path = Path(path)
    if path.is_dir():
        if (path / "best.ckpt").is_file():
            return path / "best.ckpt"
        raise UserError(f"Folder '{path}' holds no best.ckpt; give the checkpoint file itself.")
    if not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(
            f"Checkpoint '{path}' does not exist.{nearest(str(path), [str(file) for file in siblings])} "
            "`upright fit` writes them to checkpoints/NAME/best.ckpt."
        )
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a complete checkpoint to the CPU, without running any code in it.

    Raises:
        UserError: if the file does not exist.
        CheckpointError: if it is damaged, contains code, or is not a checkpoint of this version of Upright.
    """
    path = find_checkpoint(path)
    checkpoint: dict[str, Any] = load_file(path, "an Upright checkpoint")
    check_format(checkpoint, path)
    return checkpoint


def check_format(checkpoint: Any, path: str | Path) -> None:
    """Refuse the content of the file ``path`` if it is not a checkpoint of this version of Upright."""
    ours = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(ours, dict) or "state_dict" not in checkpoint or not isinstance(ours.get("format"), int):
        raise CheckpointError(f"'{path}' holds weights, but it is not a checkpoint that `upright fit` wrote.")
    if ours["format"] > FORMAT:
        raise CheckpointError(
            f"'{path}' has format {ours['format']}, written by Upright {ours['versions'].get('upright')}; "
            f"this version reads up to {FORMAT}. Install a newer Upright."
        )


def load_file(path: Path, kind: str) -> Any:
    """Load a file of tensors and plain data to the CPU, without running any code in it.

    If the file is damaged or contains code, the error names the expected ``kind`` of file.
    """
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch does not compress its files.
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise ValueError("its content is larger than the file")
        with warnings.catch_warnings():
            # torch warns about the protocol of a pickle before it refuses the content.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"'{path}' is not {kind}: it is another kind of file, damaged, or a pickle that would run code when loaded."
        ) from None
    except Exception as error:  # a broken file can lead torch's unpickler to any exception
        raise CheckpointError(
            f"'{path}' is not a complete checkpoint; it is damaged or truncated ({_first_line(error)})."
        ) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load
    except ImportError as error:
        if error.name != "safetensors":
            raise
        raise UserError(f"'{path}' needs the package safetensors: pip install 'upright[timm]'.") from None
    try:
        tensors: dict[str, torch.Tensor] = load(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"'{path}' is not a complete safetensors file; it is damaged or truncated ({_first_line(error)})."
        ) from None
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def output_count(ours: Mapping[str, Any]) -> int:
    """Return the number of outputs of a network, from Upright's part of its checkpoint.

    Before version 0.3 it was not recorded.
    """
    return int(ours.get("outputs", len(ours["spec"]["classes"])))


def training_hashes(ours: Mapping[str, Any]) -> torch.Tensor | None:
    """Return content hashes of all images that the weights were trained on, by this run and by those it started from.

    The result is None if ``ours``, Upright's part of the checkpoint, records no images.
    """
    parts = (ours["split"] and ours["split"]["hashes"]["train"], ours.get("seen"))
    hashes = [part for part in parts if part is not None]
    return torch.unique(torch.cat(hashes)) if hashes else None
