"""A bundle: one folder that holds a model and all that proves it. Hashes are checked before anything is parsed."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import UprightError
from upright.images import ImageSpec

FORMAT = 2
SUMS = "SHA256SUMS"
MODELS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
"""Precision -> file. A manifest says which of them are there, and names no files itself."""
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
            if version == FORMAT:
                for precision in ("fp32", *bundle.precisions):
                    _ = MODELS[precision], bundle.tolerance(precision), bundle.expected(precision)[0]
                _ = bundle.spec
                return bundle
            older = version < FORMAT
        except (KeyError, TypeError, ValueError, IndexError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UprightError(f"Bundle '{folder}' is not one that `upright export` wrote ({reason}).") from None
        raise UprightError(
            f"Bundle '{folder}' has format {version}, made by Upright {made_by}; this version reads {FORMAT}. "
            + ("Export it again." if older else "Install a newer Upright.")
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
    def precisions(self) -> list[str]:
        """Those that it holds, of `MODELS`; ``fp32`` is always one."""
        return list(self.manifest["precisions"])

    def model(self, precision: str) -> Path:
        """The ONNX file of one precision.

        Raises:
            UprightError: if the bundle does not hold it.
        """
        if precision not in self.precisions:
            raise UprightError(
                f"Bundle '{self.folder}' holds {', '.join(self.precisions)}, not {precision}; "
                f"`upright export CHECKPOINT --precision {precision}` makes one that does."
            )
        return self.folder / MODELS[precision]

    def tolerance(self, precision: str) -> float:
        """Largest difference of a probability that `verify` allows."""
        return float(self.manifest["precisions"][precision]["tolerance"])

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Real images with what the models say of them: ``file``, ``label``, ``probabilities`` by precision."""
        samples: list[dict[str, Any]] = json.loads((self.folder / EXPECTED).read_text(encoding="utf-8"))
        return samples

    def expected(self, precision: str) -> npt.NDArray[np.float32]:
        """What one precision said of the samples where it was exported: ``(N, K)``."""
        return np.array([sample["probabilities"][precision] for sample in self.samples], dtype=np.float32)
