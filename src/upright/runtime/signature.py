"""Signatures of bundles, in the format of OpenSSF Model Signing (package ``model-signing``, extra ``sign``)."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from upright.errors import BundleError, UserError, one_line

SIGNATURE = "model.sig"
UNSIGNED = ("SHA256SUMS", SIGNATURE)  # `SHA256SUMS` follows from the other files, and has the hash of the signature
PASSWORD = "UPRIGHT_SIGN_PASSWORD"
CURVES = "P-256, P-384 or P-521"


def read_signer(key: Path) -> Any:
    """Return a ``model_signing.signing.Config`` with a private key, whose password, if any, is in `PASSWORD`."""
    password = os.environ[PASSWORD].encode() if PASSWORD in os.environ else None
    signer = _model_signing().signing.Config()
    return _with_key(lambda: signer.use_elliptic_key_signer(private_key=key, password=password), key, "private")


def write_signature(target: Path, bundle: Path, hashes: Mapping[str, str], signer: Any) -> None:
    """Sign the hashes of the files of a bundle, whose name the signature records, by the signer of `read_signer`."""
    signer.set_hashing_config(_hashing(hashes)).sign(bundle, target)


def check_signature(bundle: Path, hashes: Mapping[str, str], signature: bytes, key: Path) -> None:
    """Check that a public key signed exactly these files, hashes by path. The signature cannot exempt a file.

    Raises:
        BundleError: if this is no signature of the files by the key.
        UserError: if the key cannot be used.
    """
    verifier = _model_signing().verifying.Config().set_hashing_config(_hashing(hashes))
    _with_key(lambda: verifier.use_elliptic_key_verifier(public_key=key), key, "public")
    with TemporaryDirectory() as workspace:
        path = Path(workspace) / SIGNATURE
        path.write_bytes(signature)
        try:
            verifier.verify(bundle, path)
        except Exception as error:  # a forged signature can lead the parsers to any exception
            reason = one_line(error).rstrip(". ")
            raise BundleError(
                f"Bundle '{bundle}' has no valid signature by '{key}': {reason:.300}. Do not use it; get bundle and "
                "key from their author."
            ) from None


def _model_signing() -> Any:
    try:
        import model_signing
    except ModuleNotFoundError as error:
        raise UserError(f"Signatures need the package '{error.name}': pip install 'upright[sign]'.") from None
    return model_signing


def _with_key(read: Callable[[], Any], key: Path, kind: str) -> Any:
    try:
        return read()
    except OSError:
        raise
    except Exception as error:  # cryptography raises many kinds
        reason = f" If it is encrypted, {PASSWORD} must be its password." if kind == "private" else ""
        raise UserError(f"'{key}' is no {kind} key in a PEM file on the curve {CURVES}.{reason}") from error


def _hashing(hashes: Mapping[str, str]) -> Any:
    """Return a ``hashing.Config`` that returns these hashes, so that an archive need not be unpacked."""
    from model_signing import hashing, manifest

    parameters = {"method": "files", "hash_type": "sha256", "allow_symlinks": True, "ignore_paths": UNSIGNED}
    kind = manifest.SerializationType.from_args(parameters)

    class Hashes(hashing.Config):  # type: ignore[misc,unused-ignore]  # without the package it is Any
        def hash(self, model_path: Path, **_: object) -> Any:
            digests = {name: bytes.fromhex(value) for name, value in hashes.items() if name not in UNSIGNED}
            items = [kind.new_item(name, hashing.hashing.Digest("sha256", value)) for name, value in digests.items()]
            return manifest.Manifest(model_path.name, items, kind)

    return Hashes()
