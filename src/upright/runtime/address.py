"""Bundles at an address: an archive on a web server, or an artifact of Weights & Biases. They are downloaded once."""

import http.client
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from upright.errors import UserError, one_line
from upright.files import cache_folder, file_hash
from upright.runtime.bundle import ARCHIVE_SUFFIX

WANDB = "wandb-artifact://"  # W&B's own scheme of references to artifacts
HASH = "#sha256="
MAX_BYTES = 8 * 2**30
CHUNK_BYTES = 2**20
TIMEOUT_SECONDS = 30
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def local_bundle(source: str, sha256: str | None = None) -> str:
    """Return the path of a bundle. One at an address is first downloaded to the cache, unless it is there.

    Args:
        source: a path, ``https://...``, or ``wandb-artifact://ENTITY/PROJECT/NAME:ALIAS``. An address may end in
            ``#sha256=HASH``.
        sha256: SHA-256 of an archive.

    Raises:
        UserError: if the address has another scheme or no hash, if it cannot be downloaded, if the archive has another
            hash, or if it is larger than `MAX_BYTES`.
    """
    address, _, fragment = source.partition(HASH)
    expected = (sha256 or fragment).lower()
    if expected and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise UserError(f"--sha256 must be a SHA-256, 64 hexadecimal digits, got '{expected}'.")
    if expected and (address.startswith(WANDB) or Path(address).is_dir()):
        raise UserError(f"--sha256 is the hash of an archive, and '{address}' is none; use --expect.")
    if address.startswith(WANDB):
        return str(_artifact(address.removeprefix(WANDB)))
    if "://" not in address:
        if expected and (actual := file_hash(Path(address))) != expected:
            raise UserError(f"'{address}' has the SHA-256 {actual}, not {expected}.")
        return address
    if not _is_safe(address):
        raise UserError(f"'{address}' is no address of a bundle; it must begin with https:// or {WANDB}.")
    if not expected:
        raise UserError(f"'{address}' needs the hash of the archive: give --sha256 HASH, or append {HASH}HASH.")
    name = unquote(urlsplit(address).path.rpartition("/")[2]).removesuffix(ARCHIVE_SUFFIX) or "bundle"
    target = _entry(expected, name + ARCHIVE_SUFFIX)
    try:
        download(address, expected, target)
    except UserError as error:
        raise UserError(f"{error} Check address and network, or download the archive and give its path.") from None
    return str(target)


def _is_safe(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOCAL_HOSTS)
    except ValueError:  # a bracket without its partner
        return False


class _Redirects(HTTPRedirectHandler):
    """Do not follow a redirect that leaves https."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if _is_safe(req.full_url) and not _is_safe(newurl):
            raise UserError(f"'{req.full_url}' leads to '{newurl}', which does not begin with https://.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(address: str, sha256: str, target: Path) -> None:
    """Download a file, unless ``target`` already has this hash. Several processes may do so at the same time.

    Raises:
        UserError: if the file cannot be downloaded, has another hash, or is larger than `MAX_BYTES`.
    """
    if target.is_file() and file_hash(target) == sha256:
        return
    print(f"Downloading {address} ...", file=sys.stderr, flush=True)
    with _new_entry(target) as new:
        try:
            with build_opener(_Redirects).open(address, timeout=TIMEOUT_SECONDS) as response, open(new, "wb") as file:
                length = int(response.headers["Content-Length"] or 0)
                while file.tell() <= MAX_BYTES >= length and (chunk := response.read(CHUNK_BYTES)):
                    file.write(chunk)
                if max(file.tell(), length) > MAX_BYTES:
                    raise UserError(f"'{address}' is larger than {_limit()}; it is not stored.")
                if file.tell() < length:
                    raise OSError(f"the connection ended after {file.tell()} of {length} bytes")
        except (OSError, http.client.HTTPException, ValueError) as error:  # an invalid address is a ValueError
            raise UserError(f"'{address}' cannot be downloaded ({one_line(error)}).") from None
        if (actual := file_hash(new)) != sha256:
            raise UserError(f"'{address}' has the SHA-256 {actual}, not {sha256}; it is not stored.")


def _artifact(name: str) -> Path:
    """Return the folder of a downloaded artifact, ``ENTITY/PROJECT/NAME:ALIAS``."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"'{WANDB}{name}' needs the package 'wandb': pip install 'upright[wandb]'.") from None
    try:
        artifact = wandb.Api().artifact(name)
        if artifact.size > MAX_BYTES:
            raise UserError(f"'{WANDB}{name}' is larger than {_limit()}; it is not stored.")
        target = _entry(artifact.digest, artifact.name.partition(":")[0].removeprefix("bundle-"))
        if not target.is_dir():
            with _new_entry(target) as new:
                artifact.download(str(new), skip_cache=True)
    except UserError:
        raise
    except Exception as error:  # a network makes the library raise anything
        raise UserError(
            f"'{WANDB}{name}' cannot be downloaded ({one_line(error, 300)}). It must be {WANDB}"
            "ENTITY/PROJECT/NAME:ALIAS, and `wandb login` stores the key of your account."
        ) from None
    return target


def _limit() -> str:
    return f"{MAX_BYTES / 2**30:g} GiB, the limit"


def _entry(digest: str, name: str) -> Path:
    """Return the path of a bundle in the cache."""
    parts = (re.sub(r"[^\w.-]", "-", part).lstrip(".") for part in (digest, name))
    return cache_folder().joinpath("bundles", *parts)


@contextmanager
def _new_entry(target: Path) -> Iterator[Path]:
    """Yield a path to write to, and rename it to ``target``. Several processes may do so at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=target.parent) as workspace:
        new = Path(workspace) / target.name
        yield new
        if not target.is_dir():
            os.replace(new, target)
