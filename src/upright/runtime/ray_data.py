"""Inference with Ray Data, for millions of images: on the cores of one machine, or on many machines."""

import os
from functools import cache
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pyarrow.fs import FileSelector, FileSystem, LocalFileSystem

from upright.errors import ImageError, UserError
from upright.image_paths import SUFFIXES, find_images
from upright.images import MAX_PIXELS
from upright.runtime.address import local_bundle
from upright.runtime.bundle import Bundle
from upright.runtime.predictor import open_predictor

FILE_IMAGES = 4096  # largest number of images in one file of answers; a killed worker loses no more of its work
MIN_FILE_IMAGES = 256  # Ray needs a tenth of a second to start a task
ANSWERS = {
    "classification": {"label": pa.string(), "probability": pa.float32()},
    "orientation": {"angle": pa.float32(), "confidence": pa.float32()},
}


def infer_images(
    images: str,
    bundle: str,
    answers: str,
    *,
    workers: int,
    precision: str = "fp32",
    max_pixels: int = MAX_PIXELS,
    key: str | None = None,
) -> int:
    """Answer the images of a folder or a bucket that have no answer yet, and return their number.

    Args:
        images: a folder, or an address that pyarrow reads, such as ``s3://bucket/photos``; with all its subfolders.
        bundle: a folder, an archive, or an address; every machine must find it.
        answers: folder or address that gets Parquet files with the columns ``path`` and those of `RayPredictor`.
        workers: number of processes, each with one core.
        precision: model of the bundle.
        max_pixels: limit for one image; a larger one is an error.
        key: a public key that must have signed the bundle.

    Raises:
        UserError: if there are no images or no workers, a name is not UTF-8, pyarrow cannot read an address, or
            ``answers`` holds files with another content.
        BundleError: if the bundle cannot be used.
        ray.exceptions.RayTaskError: if the storage or onnxruntime fails. The answers so far stay.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}.")
    bundle = bundle if "://" in bundle else os.path.abspath(bundle)
    opened = Bundle.open(local_bundle(bundle), key)
    open_predictor(opened, precision, max_pixels=max_pixels)  # raises errors here rather than in a worker
    filesystem, folder = _locate(answers)
    paths = pa.table({"path": _find(images)})
    paths = paths.filter(pc.invert(pc.is_in(paths["path"], _answered(filesystem, folder, opened.digest))))
    if not (count := len(paths)):
        return 0
    size = min(FILE_IMAGES, max(MIN_FILE_IMAGES, count // (4 * workers)))  # the workers end at about the same time
    dataset = ray.data.from_arrow([paths.slice(start, size) for start in range(0, count, size)])
    # With a function, Ray answers images and writes the answers in one task. With a class, it needs further processes.
    dataset.map_batches(
        _answer,
        fn_args=(bundle, images, opened.digest, precision, max_pixels),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=workers),
    ).write_parquet(folder, filesystem=filesystem, concurrency=workers)
    return count


def _answer(batch: pa.Table, bundle: str, images: str, digest: str, precision: str, max_pixels: int) -> pa.Table:
    return _predictor(bundle, images, digest, precision=precision, max_pixels=max_pixels)(batch)


class RayPredictor:
    """A class for ``map_batches`` with ``batch_format="pyarrow"``, for a dataset with a column ``path``.

    It adds the columns ``label`` and ``probability``, or ``angle`` and ``confidence`` if the bundle has no classes. The
    column ``error`` is the reason why an image has no answer. The column ``bundle`` is the bundle's `digest`.

    Args:
        bundle: a folder, an archive, or an address.
        images: a folder or an address on the file system of the images; by default, they are local files.
        expect: the `digest` that the bundle must have; None for any.
        **options: options of `Predictor`; ``threads`` is 1 by default.
    """

    def __init__(self, bundle: str, images: str = ".", expect: str | None = None, **options: Any) -> None:
        self.predictor = open_predictor(Bundle.open(local_bundle(bundle), expect=expect), **{"threads": 1} | options)
        self.filesystem, _ = _locate(images)
        columns = ANSWERS[self.predictor.task_name] | {"error": pa.string(), "bundle": pa.string()}
        self.schema = pa.schema(columns.items())

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the batch with the columns of the answers."""
        bundle, contents = {"bundle": self.predictor.bundle.digest}, map(self._read, batch["path"].to_pylist())
        rows = [
            ({"error": str(answer)} if isinstance(answer, ImageError) else answer._asdict()) | bundle
            for answer in self.predictor.stream(contents, errors="return")
        ]
        columns = pa.Table.from_pylist(rows, self.schema)
        return pa.table(dict(zip([*batch.column_names, *columns.column_names], [*batch, *columns], strict=True)))

    def _read(self, path: str) -> Any:
        try:
            with self.filesystem.open_input_file(path) as file:
                return BytesIO(file.read())
        except (FileNotFoundError, PermissionError) as error:
            return _Unreadable(error)


class _Unreadable:
    """A file that raises an error when the predictor reads it. The error is then that of one image."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def read(self) -> bytes:
        raise self.error


def _locate(address: str) -> tuple[Any, str]:
    """Return the file system of a folder or an address, and the path there."""
    try:
        filesystem, path = FileSystem.from_uri(address if "://" in address else os.path.abspath(address))
    except pa.ArrowInvalid as error:
        raise UserError(
            f"pyarrow cannot read '{address}': {error}. Give a folder, or an address like s3://bucket/photos."
        ) from None
    return filesystem, path


_predictor = cache(RayPredictor)  # tasks share the processes of Ray, so each process opens a bundle once


def _find(images: str) -> pa.Array:
    filesystem, folder = _locate(images)
    if isinstance(filesystem, LocalFileSystem):
        paths = list(map(str, find_images([folder])))
        try:
            return pa.array(paths, pa.string())
        except UnicodeEncodeError as error:
            raise UserError(f"Parquet holds names in UTF-8, and {error.object!r} is none; rename the file.") from None
    files = filesystem.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    paths = [file.path for file in files if file.is_file and PurePosixPath(file.path).suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"'{images}' holds no images ({' '.join(sorted(SUFFIXES))}).")
    return pa.array(paths, pa.string())


def _answered(filesystem: Any, folder: str, digest: str) -> pa.ChunkedArray:
    """Return the paths that have an answer. Remove files that a killed run left incomplete."""
    paths = []
    for entry in filesystem.get_file_info(FileSelector(folder, allow_not_found=True)):
        if not entry.path.endswith(".parquet"):
            continue
        try:
            file = pq.ParquetFile(entry.path, filesystem=filesystem)
        except pa.ArrowInvalid:  # it has no footer
            filesystem.delete_file(entry.path)
            continue
        with file:
            names = {"path", "bundle"} & set(file.schema_arrow.names)
            table = file.read(sorted(names))
        if len(names) < 2 or set(pc.unique(table["bundle"]).to_pylist()) - {digest}:
            raise UserError(f"'{entry.path}' has no answers, or those of another bundle; give another folder.")
        paths.append(table["path"])
    return pa.chunked_array([chunk for path in paths for chunk in path.chunks], pa.string())
