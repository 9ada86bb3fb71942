"""A bundle: one folder that holds a model and all that proves it. Hashes are checked before anything is parsed."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upright.errors import UprightError
from upright.images import ImageSpec

FORMAT = 1
SUMS = "SHA256SUMS"
MODEL = "model.onnx"
MANIFEST = "manifest.json"
SAMPLES = "samples"
EXPECTED = f"{SAMPLES}/expected.json"


def checksums(folder: Path) -> str:
    """The text of ``SHA256SUMS`` for everything in ``folder`` but itself, in the format of ``sha256sum``."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    lines = []
    for name in files:
        if name != SUMS:
            with open(folder / name, "rb") as file:
                lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are what was written.

    Args:
        folder: where it lies.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Check every file's hash, then the format.

        Raises:
            UprightError: if it is no bundle, any bit of it changed, or its format is newer than this version reads.
        """
        folder = Path(folder)
        if not (folder / SUMS).is_file():
            raise UprightError(f"'{folder}' is not a bundle: it has no {SUMS}. `upright export CHECKPOINT` makes one.")
        written = (folder / SUMS).read_bytes()
        found = checksums(folder).encode()
        if written != found:
            differing = set(written.decode(errors="replace").splitlines()) ^ set(found.decode().splitlines())
            names = sorted({line.partition("  ")[2] or SUMS for line in differing} or {SUMS})
            raise UprightError(
                f"Bundle '{folder}' is damaged or was changed: {', '.join(names)}. Export or copy it again."
            )
        bundle = cls(folder)
        try:
            version, made_by = bundle.manifest["format"], bundle.manifest["provenance"]["versions"]["upright"]
            if version <= FORMAT:
                _ = bundle.spec, bundle.tolerance, bundle.samples[0]["probabilities"]
                return bundle
        except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UprightError(f"Bundle '{folder}' is not one that `upright export` wrote ({reason}).") from None
        raise UprightError(
            f"Bundle '{folder}' has format {version}, made by Upright {made_by}; "
            f"this version reads up to {FORMAT}. Install a newer Upright."
        )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """``manifest.json``."""
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    @cached_property
    def spec(self) -> ImageSpec:
        """What an image is; the manifest rules."""
        return ImageSpec.from_dict(self.manifest["spec"])

    @property
    def tolerance(self) -> float:
        """Largest difference of a probability that `verify` allows."""
        return float(self.manifest["tolerance"])

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Real images with what the model says of them: ``file``, ``label``, ``probabilities``."""
        samples: list[dict[str, Any]] = json.loads((self.folder / EXPECTED).read_text(encoding="utf-8"))
        return samples
