"""Downloads with a checksum, and the folders for them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pooch

from upright.errors import UserError


def absolute(path: str | Path) -> Path:
    """Return an absolute path, so that a checkpoint works from any working directory. Links are not resolved."""
    return Path(path).expanduser().absolute()


def data_folder(name: str) -> Path:
    """Return ``$UPRIGHT_DATA/<name>``, or ``<name>`` in the user's cache if that variable is not set."""
    return Path(os.environ.get("UPRIGHT_DATA") or pooch.os_cache("upright")).expanduser() / name


def download(file: str, md5: str, mirrors: Sequence[str], folder: Path, wanted_files: str) -> Path:
    """Download a file from the first mirror that has it. An incomplete file is deleted.

    Args:
        file: name of the file.
        md5: checksum from its publisher.
        mirrors: addresses of folders, tried in order.
        folder: target folder.
        wanted_files: files that the user may put there instead, for the message.

    Raises:
        UserError: if no mirror has it, with every address and its error.
    """
    failures = []
    for mirror in mirrors:
        url = f"{mirror}/{file}"
        try:
            return Path(pooch.retrieve(url, f"md5:{md5}", file, folder, progressbar=sys.stderr.isatty()))
        except Exception as error:  # a network or a disk makes the libraries below raise anything
            failures.append(f"{url} cannot be downloaded ({' '.join(str(error).split())[:300]})")
    raise UserError(
        f"{'; '.join(failures)}. Put {wanted_files} into '{folder}', or name their folder with --data.root."
    )
