"""A bundle: one folder that holds a model and all that proves it. Hashes are checked before anything is parsed."""

import json
import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import UprightError, UserError
from upright.files import file_hash
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
            lines.append(f"{file_hash(folder / name)}  {name}\n")
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
            UserError: if it is no bundle, any bit of it changed, anything in it is or refers to something outside,
                or its format is newer than this version reads.
        """
        folder = Path(folder)
        if not (folder / SUMS).is_file():
            raise UserError(f"'{folder}' is not a bundle: it has no {SUMS}. `upright export CHECKPOINT` makes one.")
        for path in folder.rglob("*"):
            # A pipe would never end, and a link leads elsewhere.
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise UserError(
                    f"Bundle '{folder}' holds '{path.name}', which is no plain file; copy it with contents."
                )
        written = (folder / SUMS).read_bytes()
        found = checksums(folder).encode(errors="surrogateescape")
        if written != found:
            lines = (set(text.decode(errors="replace").splitlines()) for text in (written, found))
            differing = set.symmetric_difference(*lines)
            names = sorted({line.partition("  ")[2] or SUMS for line in differing} or {SUMS})
            raise UserError(
                f"Bundle '{folder}' is damaged or was changed: {', '.join(names)}. Export or copy it again."
            )
        bundle = cls(folder)
        try:
            version, made_by = bundle.manifest["format"], bundle.manifest["provenance"]["versions"]["upright"]
            if version == FORMAT:
                bundle._check()
                return bundle
            older = version < FORMAT
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError, OSError, UprightError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"Bundle '{folder}' is not one that `upright export` wrote ({reason}).") from None
        made_by = " ".join(str(made_by).split())
        raise UserError(
            f"Bundle '{folder}' has format {version}, made by Upright {made_by}; this version reads {FORMAT}. "
            + ("Export it again." if older else "Install a newer Upright.")
        )

    def _check(self) -> None:
        """Whatever is asked of manifest, samples and models later is there, of its kind, and inside the folder."""
        spec, samples = self.spec, self.samples
        match self.manifest:
            case {
                "name": str(),
                "spec": {"height": int(), "width": int(), "classes": list(), "background": int()},
                "input": {"shape": [int() | str(), int() | str(), int() | str(), spec.channels]},
                "other_outputs": list(others),
                "provenance": {"model": dict()},
            } if all(isinstance(name, str) for name in (*spec.classes, *others)):
                pass
            case _:
                raise ValueError(f"{MANIFEST} lacks something, or it is of another kind")
        files = {f"{SAMPLES}/{path.name}" for path in (self.folder / SAMPLES).iterdir()}
        for sample in samples:
            if sample["file"] not in files or not isinstance(sample["label"], str):
                raise ValueError(f"sample {sample['file']!r} is not in it, or without a label")
        for precision in ("fp32", *self.precisions):
            with np.errstate(over="ignore"):
                expected = self.expected(precision)
            if expected.shape != (len(samples), len(spec.classes)) or not np.isfinite(expected).all():
                raise ValueError(f"{EXPECTED} holds no probabilities of {precision}")
            if not math.isfinite(self.tolerance(precision)):
                raise ValueError(f"the tolerance of {precision} is {self.tolerance(precision)}")
            if _has_external_data(self.model(precision)):
                raise ValueError(f"{MODELS[precision]} refers to other files, and a bundle's model is one file")

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
            UserError: if the bundle does not hold it.
        """
        if precision not in self.precisions:
            raise UserError(
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


def _has_external_data(model: Path) -> bool:
    """Whether any tensor of an ONNX file lies elsewhere: in any file that its maker names, for older onnxruntimes.

    A tensor says so under the key ``location``. Before that stands its length, 8, in whichever way a protobuf may
    write it; a name that only ends in this word has another one.
    """
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(before + b"location") >= 0 for before in (b"\x08", b"\x00"))
