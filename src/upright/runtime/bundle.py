"""A bundle: a folder or an archive with a model, samples, and results of checks.

`Bundle.open` compares hashes before it parses. An archive is a ZIP without compression, which is read in place.
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upright.errors import BundleError, UserError, one_line
from upright.files import file_hash, replacing_file
from upright.images import ImageSpec
from upright.runtime.signature import SIGNATURE, check_signature
from upright.runtime.task import Task, task_of

FORMAT = 2
SUMS = "SHA256SUMS"
MODELS = {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}
"""File of each precision. The manifest lists only precisions, never files."""
MANIFEST = "manifest.json"
PARITY = "parity.json"
SAMPLES = "samples"
EXPECTED = f"{SAMPLES}/expected.json"
ARCHIVE_SUFFIX = ".upright.zip"
ARCHIVE_DATE = (1980, 1, 1, 0, 0, 0)  # date of all files in an archive, so that equal bundles have equal archives
OUTSIDE = {"mask": "none", "interpolation": "bilinear"}
"""Fields of a spec that stand beside ``spec`` in ``manifest.json``, with the value of a missing key. The graph applies
them, and an older reader refuses a new key in ``spec``."""
NOT_CONTENT = ("Thumbs.db", "desktop.ini")  # files that Windows adds to folders


def file_hashes(folder: Traversable) -> dict[str, str]:
    """Return the SHA-256 of all files in ``folder`` except ``SHA256SUMS``, by their path, sorted."""
    return {name: file_hash(folder / name) for name in sorted(file_names(folder)) if name != SUMS}


def spec_entries(spec: ImageSpec) -> dict[str, Any]:
    """Return the entries of ``manifest.json`` that describe a spec."""
    plain = spec.to_dict()
    del plain["multilabel"]  # follows from the task
    return {"task": spec.task, **{key: plain.pop(key) for key in OUTSIDE}, "spec": plain}


def read_spec(manifest: Mapping[str, Any]) -> ImageSpec:
    """Return the spec that a manifest describes."""
    outside = {key: manifest.get(key, default) for key, default in OUTSIDE.items()}
    return ImageSpec.from_dict(dict(**outside, **manifest["spec"], multilabel=manifest.get("task") == "multilabel"))


def read_thresholds(manifest: Mapping[str, Any]) -> list[Any]:
    """Return the threshold of each class; an empty list if a manifest has none."""
    return list(manifest.get("multilabel", {}).get("thresholds", ()))


def read_task(manifest: Mapping[str, Any]) -> Task:
    """Return the task of a manifest, with its thresholds."""
    return task_of(read_spec(manifest), read_thresholds(manifest))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file of a bundle."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checksums(folder: Traversable) -> str:
    """Return the text of ``SHA256SUMS`` for all other files in ``folder``, in the format of ``sha256sum``."""
    return _sums(file_hashes(folder))


def _sums(hashes: Mapping[str, str]) -> str:
    return "".join(f"{value}  {name}\n" for name, value in hashes.items())


def file_names(folder: Traversable, prefix: str = "") -> Iterator[str]:
    """Yield the path of each file in a bundle, relative to it.

    Names that start with a dot, such as ``.DS_Store`` and ``.gitattributes``, are no part of a bundle. A link to a file
    is followed, because the hash of its content is checked. Reading a pipe would block, and a link to a folder may
    contain itself.

    Raises:
        BundleError: if an entry is neither a file nor a folder.
    """
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name in NOT_CONTENT:
            continue
        if entry.is_file():
            yield prefix + entry.name
        elif entry.is_dir() and not (isinstance(entry, Path) and entry.is_symlink()):
            yield from file_names(entry, f"{prefix}{entry.name}/")
        else:
            raise BundleError(f"Bundle '{folder}' holds '{entry.name}', which is not a file; replace it by a copy.")


def write_archive(folder: Path, target: Path) -> None:
    """Write a bundle's folder as one file without compression."""
    from zipfile import ZipFile, ZipInfo

    with replacing_file(target) as new, ZipFile(new, "w") as archive:
        for name in sorted(file_names(folder)):
            info = ZipInfo(name, ARCHIVE_DATE)
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, (folder / name).read_bytes())


def open_archive(path: Path) -> Traversable:
    """Return the top of an archive. Nothing is written to the disk.

    An archive without compression cannot expand, and reading all its files takes no more memory than its size.

    Raises:
        BundleError: if the file is not a ZIP, if a file in it is compressed, encrypted or a link, or if files overlap,
            have one name, or have a path that leads outside.
    """
    from zipfile import ZIP_STORED, ZipFile
    from zipfile import Path as ZipPath

    try:
        archive = ZipFile(path)
        infos = archive.infolist()
        top: Traversable = ZipPath(archive)
    except Exception as error:  # a broken archive can lead zipfile to any exception
        reason = one_line(error)
        raise BundleError(f"'{path}' is neither a folder nor an archive of a bundle: {reason}.") from None
    names = [info.filename for info in infos]
    for info in infos:
        parts = info.filename.removesuffix("/").split("/")
        if info.orig_filename != info.filename or not all(parts) or {".", ".."} & set(parts) or "\\" in info.filename:
            problem = "has a path that leads outside of the archive"
        elif info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            problem = "is compressed or encrypted"
        elif stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is not a file"
        elif names.count(info.filename) > 1:
            problem = "is in it several times"
        else:
            continue
        raise BundleError(f"'{path}' holds {info.filename!r}, which {problem}; `upright export --archive` writes one.")
    if sum(info.file_size for info in infos) > path.stat().st_size:
        raise BundleError(f"'{path}' holds files that overlap; `upright export --archive` writes an archive.")
    return top


@dataclass(frozen=True)
class Bundle:
    """A bundle in a folder or an archive. `Bundle.open` checks it; the constructor does not."""

    folder: Path

    def __reduce__(self) -> tuple[type["Bundle"], tuple[Path]]:
        # An open archive cannot be pickled.
        return Bundle, (self.folder,)

    @cached_property
    def files(self) -> Traversable:
        """The bundle's folder, or the top of its archive."""
        return open_archive(self.folder) if self.folder.is_file() else self.folder

    @property
    def name(self) -> str:
        """Name of the folder, or of the archive without its suffix."""
        return self.folder.resolve().name.removesuffix(ARCHIVE_SUFFIX)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file SHA256SUMS, which stands for the content of all files."""
        return file_hash(self.files / SUMS)

    @classmethod
    def open(cls, folder: str | Path, key: str | Path | None = None, expect: str | None = None) -> "Bundle":
        """Check the hash of every file, then `digest` and the signature, then the format, then the content.

        Args:
            folder: the bundle's folder, or its archive.
            key: a public key that must have signed the bundle; None to check no signature.
            expect: the `digest` that the bundle must have; None for any.

        Raises:
            UserError: if the key cannot be used.
            BundleError: if the folder or the archive is not a bundle, if any bit of a file changed, if it contains
                anything but files, if it is not the expected one, if the key did not sign it, if it refers to a file
                outside, or if this version cannot read its format.
        """
        bundle, folder = cls(Path(folder)), Path(folder)
        if not (bundle.files / SUMS).is_file():
            raise BundleError(f"'{folder}' is not a bundle: it has no {SUMS}. `upright export CHECKPOINT` writes one.")
        try:
            recorded = (bundle.files / SUMS).read_bytes()
            hashes = file_hashes(bundle.files)
            actual = _sums(hashes).encode(errors="surrogateescape")
        except (BundleError, OSError):
            raise
        except Exception as error:  # a damaged archive can lead zipfile to any exception
            raise BundleError(f"Bundle '{folder}' is damaged: {error}. Export or copy it again.") from None
        if recorded != actual:
            lines = (set(text.decode(errors="replace").splitlines()) for text in (recorded, actual))
            differing = set.symmetric_difference(*lines)
            names = sorted({line.partition("  ")[2] or SUMS for line in differing} or {SUMS})
            raise BundleError(
                f"Bundle '{folder}' is damaged or was changed: {', '.join(names)}. Export or copy it again."
            )
        if expect is not None and expect.lower() != bundle.digest:
            raise BundleError(
                f"'{folder}' is not the expected bundle: its SHA256SUMS has the SHA-256 {bundle.digest}, not {expect}."
            )
        if key is not None:
            if SIGNATURE not in hashes:
                raise BundleError(f"Bundle '{folder}' has no signature; `upright export --sign KEY` writes one.")
            check_signature(folder, hashes, (bundle.files / SIGNATURE).read_bytes(), Path(key))
        try:
            version, writer = bundle.manifest["format"], bundle.manifest["provenance"]["versions"]["upright"]
            advice = "Export it again." if version < FORMAT else "Install a newer Upright."
            if version == FORMAT:
                bundle.check_content()
                return bundle
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError, OSError, UserError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise BundleError(f"'{folder}' is not a bundle that `upright export` wrote ({reason}).") from None
        raise BundleError(
            f"Bundle '{folder}' has format {version}, written by Upright {one_line(writer)}; "
            f"this version reads {FORMAT}. {advice}"
        )

    def check_content(self) -> None:
        """Check that manifest, samples and models are complete, and refer to no file outside the folder.

        If not, it raises a ``ValueError`` or another one of the errors that `open` catches.
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
        if not isinstance(self.threshold, int | float | None):
            raise ValueError(f"the threshold of the confidence must be a number, got {self.threshold!r}")
        if (task := self.manifest.get("task", "classification")) != spec.task:
            raise ValueError(f"the task is {task!r}, but its spec is one of {spec.task}")
        if not all(isinstance(each, float) and 0 <= each <= 1 for each in read_thresholds(self.manifest)):
            raise ValueError("the thresholds of the classes must be fractions from 0 to 1")
        files = {f"{SAMPLES}/{file.name}" for file in (self.files / SAMPLES).iterdir()}
        for sample in samples:
            if sample["file"] not in files or (spec.classes and not isinstance(sample["label"], str)):
                raise ValueError(f"the file or the label of sample {sample['file']!r} is missing")
        for precision in ("fp32", *self.precisions):
            with np.errstate(over="ignore"):
                expected = self.expected(precision)
            if expected.shape != (len(samples), self.task.columns) or not np.isfinite(expected).all():
                raise ValueError(f"the output {self.task.output} of {precision} in {EXPECTED} is missing or wrong")
            if not math.isfinite(self.tolerance(precision)):
                raise ValueError(f"the tolerance of {precision} is {self.tolerance(precision)}")
            # A tensor in another file has the key `location`, with its length in front, in one of two encodings. Old
            # versions of onnxruntime would read that file.
            content = self.model(precision).read_bytes()
            if not content:
                raise ValueError(f"{MODELS[precision]} is empty")
            if b"\x08location" in content or b"\x00location" in content:
                raise ValueError(f"{MODELS[precision]} refers to other files, and a bundle's model is one file")

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Content of ``manifest.json``."""
        manifest: dict[str, Any] = json.loads((self.files / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    @cached_property
    def spec(self) -> ImageSpec:
        """Format of the images."""
        return read_spec(self.manifest)

    @property
    def task(self) -> Task:
        """The task, with its thresholds."""
        return read_task(self.manifest)

    @property
    def precisions(self) -> list[str]:
        """Precisions of the bundle, keys of `MODELS`. The first one is ``fp32``."""
        return list(self.manifest["precisions"])

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size that the models take, or None if they take any."""
        batch = self.manifest["input"]["shape"][0]
        return batch if isinstance(batch, int) else None

    @property
    def threshold(self) -> float | None:
        """Smallest confidence of an angle to act on; None if the bundle records none."""
        threshold: float | None = self.manifest.get("orientation", {}).get("threshold")
        return threshold

    def model(self, precision: str) -> Traversable:
        """Return the ONNX file of one precision: a path, or a file in the archive."""
        if precision not in self.precisions:
            raise BundleError(
                f"Bundle '{self.folder}' holds {', '.join(self.precisions)}, not {precision}; "
                f"`upright export CHECKPOINT --precision {precision}` writes one that does."
            )
        return self.files / MODELS[precision]

    def tolerance(self, precision: str) -> float:
        """Return the largest difference of an answer that `verify` allows; see `Classification.differences`."""
        return float(self.manifest["precisions"][precision]["tolerance"])

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Validation images: ``file``, ``label`` if there are classes, and the main output by precision."""
        samples: list[dict[str, Any]] = json.loads((self.files / EXPECTED).read_text(encoding="utf-8"))
        return samples

    @property
    def sample_files(self) -> list[Path | bytes]:
        """The image files of the samples: paths, or the contents of files in the archive."""
        files = [self.files / sample["file"] for sample in self.samples]
        return [file if isinstance(file, Path) else file.read_bytes() for file in files]

    def expected(self, precision: str) -> npt.NDArray[np.float32]:
        """Return the main output for the samples ``(N, columns)`` that `export` recorded for one precision."""
        return np.array([sample[self.task.output][precision] for sample in self.samples], dtype=np.float32)
