"""Downloads with a checksum, and the folders for them."""

import os
import sys
from pathlib import Path

import pooch

from upright.errors import UserError, one_line


def absolute(path: str | Path) -> Path:
    """Return an absolute path, so that a checkpoint works from any working directory. Links are not resolved."""
    return Path(path).expanduser().absolute()


def data_folder(name: str) -> Path:
    """Return ``$UPRIGHT_DATA/<name>``, or ``<name>`` in the user's cache if that variable is not set."""
    return Path(os.environ.get("UPRIGHT_DATA") or pooch.os_cache("upright")).expanduser() / name


def download(file: str, md5: str, address: str, folder: Path, wanted_files: str) -> Path:
    """Download a file from the folder at an address, and check its MD5. An incomplete file is deleted.

    The `UserError` of a failure asks for ``wanted_files``, which the user may put into ``folder`` instead.
    """
    url = f"{address}/{file}"
    try:
        return Path(pooch.retrieve(url, f"md5:{md5}", file, folder, progressbar=sys.stderr.isatty()))
    except Exception as error:  # a network or a disk makes the libraries below raise anything
        raise UserError(
            f"{url} cannot be downloaded ({one_line(error, 300)}). Put {wanted_files} into '{folder}', "
            "or name their folder with --data.root."
        ) from None
