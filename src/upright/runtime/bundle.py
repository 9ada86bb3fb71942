"""A bundle: a folder with a model, samples, and results of checks. `Bundle.open` compares hashes before it parses."""

import json
import math
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import BundleError, UserError
from upright.files import file_hash
from upright.images import ImageSpec

FORMAT = 2
SUMS = "SHA256SUMS"
MODELS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
"""File of each precision. The manifest lists only precisions, never files."""
MANIFEST = "manifest.json"
SAMPLES = "samples"
EXPECTED = f"{SAMPLES}/expected.json"


def checksums(folder: Path) -> str:
    """Return the text of ``SHA256SUMS`` for all other files in ``folder``, in the format of ``sha256sum``."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return "".join(f"{file_hash(folder / name)}  {name}\n" for name in names if name != SUMS)


@dataclass(frozen=True)
class Bundle:
    """A bundle. `Bundle.open` checks it; the constructor does not.

    Args:
        folder: the bundle's folder.
    """

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Check the hash of every file, then the format, then the content.

        Raises:
            BundleError: if the folder is not a bundle, if any bit of it changed, if it contains a link or refers to a
                file outside, or if this version cannot read its format.
        """
        folder = Path(folder)
        if not (folder / SUMS).is_file():
            raise BundleError(f"'{folder}' is not a bundle: it has no {SUMS}. `upright export CHECKPOINT` writes one.")
        for path in folder.rglob("*"):
            # Reading a pipe would block, and a link may point outside the folder.
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise BundleError(
                    f"Bundle '{folder}' holds '{path.name}', which is not a plain file; replace it by a copy."
                )
        recorded, actual = (folder / SUMS).read_bytes(), checksums(folder).encode(errors="surrogateescape")
        if recorded != actual:
            lines = (set(text.decode(errors="replace").splitlines()) for text in (recorded, actual))
            differing = set.symmetric_difference(*lines)
            names = sorted({line.partition("  ")[2] or SUMS for line in differing} or {SUMS})
            raise BundleError(
                f"Bundle '{folder}' is damaged or was changed: {', '.join(names)}. Export or copy it again."
            )
        bundle = cls(folder)
        try:
            version, writer = bundle.manifest["format"], bundle.manifest["provenance"]["versions"]["upright"]
            advice = "Export it again." if version < FORMAT else "Install a newer Upright."
            if version == FORMAT:
                bundle.check_content()
                return bundle
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError, OSError, UserError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise BundleError(f"'{folder}' is not a bundle that `upright export` wrote ({reason}).") from None
        raise BundleError(
            f"Bundle '{folder}' has format {version}, written by Upright {' '.join(str(writer).split())}; "
            f"this version reads {FORMAT}. {advice}"
        )

    def check_content(self) -> None:
        """Check that manifest, samples and models are complete, and refer to no file outside the folder.

        Raises:
            ValueError: if something is missing or wrong. This method may also raise the other errors that `open`
                catches.
        """
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
                raise ValueError(f"a key of {MANIFEST} is missing, or its value has the wrong type")
        files = {f"{SAMPLES}/{path.name}" for path in (self.folder / SAMPLES).iterdir()}
        for sample in samples:
            if sample["file"] not in files or not isinstance(sample["label"], str):
                raise ValueError(f"the file or the label of sample {sample['file']!r} is missing")
        for precision in ("fp32", *self.precisions):
            with np.errstate(over="ignore"):
                expected = self.expected(precision)
            if expected.shape != (len(samples), len(spec.classes)) or not np.isfinite(expected).all():
                raise ValueError(f"the probabilities of {precision} in {EXPECTED} are missing or wrong")
            if not math.isfinite(self.tolerance(precision)):
                raise ValueError(f"the tolerance of {precision} is {self.tolerance(precision)}")
            if _has_external_data(self.model(precision)):
                raise ValueError(f"{MODELS[precision]} refers to other files, and a bundle's model is one file")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Content of ``manifest.json``."""
        manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    @cached_property
    def spec(self) -> ImageSpec:
        """Format of the images."""
        # The graph holds the mask, and an older reader refuses a new key in `spec`. So the key stands outside of it.
        return ImageSpec.from_dict(dict(mask=self.manifest.get("mask", "none"), **self.manifest["spec"]))

    @property
    def precisions(self) -> list[str]:
        """Precisions of the bundle, keys of `MODELS`. The first one is ``fp32``."""
        return list(self.manifest["precisions"])

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the models take, or None if they take any."""
        batch = self.manifest["input"]["shape"][0]
        return batch if isinstance(batch, int) else None

    def model(self, precision: str) -> Path:
        """Return the ONNX file of one precision.

        Raises:
            BundleError: if the bundle does not hold it.
        """
        if precision not in self.precisions:
            raise BundleError(
                f"Bundle '{self.folder}' holds {', '.join(self.precisions)}, not {precision}; "
                f"`upright export CHECKPOINT --precision {precision}` writes one that does."
            )
        return self.folder / MODELS[precision]

    def tolerance(self, precision: str) -> float:
        """Return the largest difference of a probability that `verify` allows."""
        return float(self.manifest["precisions"][precision]["tolerance"])

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Validation images with their predictions: ``file``, ``label``, ``probabilities`` by precision."""
        samples: list[dict[str, Any]] = json.loads((self.folder / EXPECTED).read_text(encoding="utf-8"))
        return samples

    @property
    def sample_paths(self) -> list[Path]:
        """Files of the samples."""
        return [self.folder / sample["file"] for sample in self.samples]

    def expected(self, precision: str) -> npt.NDArray[np.float32]:
        """Return the probabilities of the samples ``(N, K)`` that `export` recorded for one precision."""
        return np.array([sample["probabilities"][precision] for sample in self.samples], dtype=np.float32)


def _has_external_data(model: Path) -> bool:
    """Return whether an ONNX file stores a tensor in another file. Old versions of onnxruntime would read that file.

    Such a tensor has the key ``location``. A protobuf writes the length of the key, 8, in front of it, in one of two
    encodings. In front of a longer name that ends in this word, the length is different.
    """
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return any(content.find(length + b"location") >= 0 for length in (b"\x08", b"\x00"))
