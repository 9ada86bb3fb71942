"""Where files live (a folder of the user's, or a cache) and how they come there: once, whole, with a checksum."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pooch

from upright.errors import UserError


def absolute(path: str | Path) -> Path:
    """``path`` from the root, for a checkpoint is used from any working directory; links stay what the user said."""
    return Path(path).expanduser().absolute()


def cache(name: str) -> Path:
    """``$UPRIGHT_DATA/<name>``, or ``<name>`` in the user's cache where that variable is not set."""
    return Path(os.environ.get("UPRIGHT_DATA") or pooch.os_cache("upright")).expanduser() / name


def download(file: str, md5: str, mirrors: Sequence[str], folder: Path, what: str) -> Path:
    """``file`` in ``folder``, from the first mirror that has it; what is not whole is not kept.

    Args:
        file: its name, there and here.
        md5: checksum, from who published it.
        mirrors: addresses of the folders that hold it, tried one after the other.
        folder: where it goes.
        what: what the user may put there instead, for the message.

    Raises:
        UserError: if no mirror has it, with every address and its error, and what to do without a network.
    """
    failures = []
    for mirror in mirrors:
        url = f"{mirror}/{file}"
        try:
            return Path(pooch.retrieve(url, f"md5:{md5}", file, folder, progressbar=sys.stderr.isatty()))
        except Exception as error:  # whatever a network or a disk leads the libraries below to
            failures.append(f"{url} cannot be downloaded ({' '.join(str(error).split())[:300]})")
    raise UserError(f"{'; '.join(failures)}. Put {what} into '{folder}', or say with --data.root where they are.")
