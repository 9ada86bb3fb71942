"""Decoded images of a source, in memory, in a memory-mapped file, or decoded again on access.

One pass over the source also records the facts of every image: content hash, size, and whether it can be decoded.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pooch
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from upright.cores import count_cores
from upright.data.source import Images, Source
from upright.data.split import Indices, content_hash
from upright.data.views import Angles, Views
from upright.data.workers import fetch
from upright.errors import UprightError, UserError
from upright.images import ImageSpec, Pixels, batches_of_one_size
from upright.warp import resize_pixels

Storage = Literal["auto", "memory", "disk", "none"]

FORMAT = 3
"""Version of the cache; it changes when the same file decodes to other pixels."""
FACTS = np.dtype([("identity", "<u8"), ("hash", "<i8"), ("height", "<u4"), ("width", "<u4"), ("state", "u1")])
"""Facts of an image: identity of its file (0 in memory), content hash, size, and `READ` or `UNREADABLE`."""
READ, UNREADABLE = 1, 2

MAX_MEMORY_BYTES = 64 * 2**20
"""``auto`` stores images from files on disk if they take more than this."""
RESIZED_PIXELS = 200_000
"""Pixels of originals that are resized together: with more, they do not fit into the processor's cache."""
CHUNK_BYTES = 4 * 2**20
"""Pixels decoded at a time. Workers send them through shared memory, which may be small."""


def cache_folder() -> Path:
    """Return ``$UPRIGHT_CACHE``, or ``decoded`` in the user's cache. The folder may be deleted at any time."""
    return Path(os.environ.get("UPRIGHT_CACHE") or Path(pooch.os_cache("upright")) / "decoded").expanduser()


class Decoder:
    """Views of images of a source at one size, decoded on access. Worker processes get a copy.

    ``indices`` lists the images to use. ``positions``, the argument of the methods, are positions in this list.
    """

    def __init__(
        self, images: Images, indices: Indices, spec: ImageSpec, size: tuple[int, int], views: Views | None = None
    ) -> None:
        self.images, self.indices, self.spec, self.size = images, indices, spec, size
        self.views = views or Angles((0.0,))
        self.row_shape = (len(self.views.names), spec.channels, *size)

    def __getitem__(self, positions: Indices) -> tuple[Tensor, npt.NDArray[Any]]:
        """Return all views of the images at ``positions``, uint8 ``(n, V, C, H, W)``, and their `FACTS`, ``(n,)``.

        The pixels of an image that cannot be decoded are zeros.
        """
        return self._decode(positions)

    def _decode(self, positions: Indices, *, hashed: bool = True) -> tuple[Tensor, npt.NDArray[Any]]:
        facts = np.zeros(len(positions), FACTS)

        def readable() -> Iterator[tuple[int, int, Pixels]]:
            for place, index in enumerate(self.indices[positions].tolist()):
                try:
                    pixels = self.images[index]
                except UprightError:
                    facts[place]["state"] = UNREADABLE
                    continue
                facts[place] = (0, content_hash(pixels) if hashed else 0, *pixels.shape[:2], READ)
                yield place, index, pixels

        resized = torch.zeros(len(positions), *self.row_shape, dtype=torch.uint8)
        # A few originals at a time: each may be a thousand times as large as its result.
        for batch in batches_of_one_size(readable(), lambda item: item[2], len(positions), RESIZED_PIXELS):
            places, indices, originals = zip(*batch, strict=True)
            pixels = torch.from_numpy(np.stack(originals))
            if not self.views.plain:
                views = self.views.show(to_tensor(pixels.numpy()), torch.tensor(indices))
                pixels = views.flatten(0, 1).movedim(1, -1)
            resized[list(places)] = self._fitted(pixels).view(len(places), *self.row_shape)
        return resized, facts

    def _fitted(self, pixels: Tensor) -> Tensor:
        """Resize images ``(B, h, w, C)``: ``(B, C, H, W)``."""
        spec, (height, width) = self.spec, pixels.shape[1:3]
        if (height, width) == self.size:
            return pixels.movedim(-1, 1).to(torch.uint8, memory_format=torch.contiguous_format)
        if spec.resize == "none":
            raise UserError(
                f"With resize none the images of a batch must have one size, {self.size[0]}x{self.size[1]}; "
                f"one has {height}x{width}. Use stretch, crop or pad."
            )
        return resize_pixels(pixels, *self.size, spec.resize, spec.background, spec.interpolation)

    def take(self, positions: Indices, views: Indices) -> Tensor:
        """Decode one view of each of the images at ``positions``: uint8 ``(n, C, H, W)``."""
        unique, inverse = np.unique(positions, return_inverse=True)
        resized, facts = self._decode(unique, hashed=False)
        for position in unique[facts["state"] == UNREADABLE].tolist():
            raise UserError(self.reason(position))
        return resized[torch.from_numpy(inverse), torch.from_numpy(views)]

    def reason(self, position: int) -> str:
        """Return the reason why the image at ``position`` cannot be decoded."""
        index = int(self.indices[position])
        try:
            self.images[index]
        except UprightError as error:
            return str(error)
        return f"Image {index} could not be read at first, but now it can. Run the command again."


class PixelArray:
    """Stored images, uint8 ``(rows, V, C, H, W)``, and the row of every image; by default ``i`` is in row ``i``."""

    def __init__(self, pixels: npt.NDArray[np.uint8], rows: Indices | None = None) -> None:
        self.pixels, self.rows = pixels, rows

    def take(self, positions: Indices, views: Indices) -> Tensor:
        """Return one view of each of the images at ``positions``: uint8 ``(n, C, H, W)``."""
        rows = positions if self.rows is None else self.rows[positions]
        return torch.from_numpy(self.pixels[rows, views])


class PixelFile(PixelArray):
    """Images stored in a memory-mapped file. A pickle of it contains the path, not the pixels."""

    def __init__(self, path: Path, shape: tuple[int, ...], rows: Indices) -> None:
        super().__init__(np.memmap(path, np.uint8, "r", shape=shape), rows)
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelFile, (self.path, self.pixels.shape, self.rows)


class Cache:
    """Facts of every image, and its pixels.

    On disk they are rows of two files, ``facts`` and ``pixels``, that only grow. A row is identified by path, number,
    size and times of the image file: new images are appended, and a changed image gets a new row. The name of the
    folder contains the class of the images; if you change how your own class decodes, delete the folder.

    Args:
        decoder: the images to store.
        source: the source of the images.
        storage: ``memory``, ``disk``, or ``none``, which stores only the facts and decodes images on access; ``auto``
            is ``memory`` for a small dataset and for images in memory, else ``disk``.
        workers: processes that decode; by default one per core, at most 8, for more than 1,000 images.
        max_unreadable: number of images that may be unreadable.

    Raises:
        UserError: if more images than ``max_unreadable`` cannot be decoded, the cache cannot be written, or images in
            memory should have another storage.
    """

    def __init__(
        self,
        decoder: Decoder,
        source: Source,
        storage: Storage = "auto",
        *,
        workers: int | None = None,
        max_unreadable: int = 0,
    ) -> None:
        self.decoder, self.max_unreadable = decoder, max_unreadable
        count, self._row_bytes = len(decoder.indices), int(np.prod(decoder.row_shape))
        self.facts = np.zeros(count, FACTS)
        if storage == "auto":
            storage = "memory" if not source.lazy or count * self._row_bytes <= MAX_MEMORY_BYTES else "disk"
        if storage != "memory" and not source.lazy:
            raise UserError(f"cache {storage}: the images of this dataset are in memory; use cache auto or memory.")
        if workers is None:
            workers = min(count_cores(), 8) if count > 1000 else 0
        self.workers, self._decoders = workers, workers if source.lazy else 0
        self.pixels: PixelArray | Decoder = decoder
        if storage == "memory":
            self.pixels = PixelArray(self._in_memory())
        else:
            self._on_disk(source, with_pixels=storage == "disk")
        self._check()

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Mask of the images that can be decoded, ``(N,)``."""
        return np.asarray(self.facts["state"] == READ)

    def _check(self) -> None:
        unreadable = np.flatnonzero(self.facts["state"] == UNREADABLE)
        if len(unreadable) > self.max_unreadable:
            more = len(unreadable) - 1
            raise UserError(
                f"{self.decoder.reason(unreadable[0])}{f' {more} more cannot be read.' if more else ''} "
                f"The limit for unreadable images is {self.max_unreadable}; --data.max_unreadable raises it."
            )

    def _decode(self, positions: Indices) -> Iterator[tuple[Indices, Tensor]]:
        """Decode the images at ``positions`` chunk by chunk, and record their facts."""
        size = max(1, CHUNK_BYTES // self._row_bytes)
        chunks = [positions[start : start + size] for start in range(0, len(positions), size)]
        visible = self._decoders > 0 and sys.stderr.isatty()
        with tqdm(total=len(positions), desc="Decoding", unit=" images", leave=False, disable=not visible) as bar:
            results = fetch(self.decoder.__getitem__, chunks, self._decoders)
            for chunk, (pixels, facts) in zip(chunks, results, strict=True):
                self.facts[chunk] = facts
                yield chunk, pixels
                self._check()
                bar.update(len(chunk))

    def _in_memory(self) -> npt.NDArray[np.uint8]:
        decoder, images = self.decoder, self.decoder.images
        if isinstance(images, np.ndarray) and images.shape[1:3] == decoder.size and decoder.views.plain:
            # The source's array already has the right size: use it without a copy if all of it is needed.
            used_images = images if len(decoder.indices) == len(images) else images[decoder.indices]
            self.facts["hash"] = [content_hash(pixels) for pixels in used_images]
            self.facts["height"], self.facts["width"], self.facts["state"] = *decoder.size, READ
            array: npt.NDArray[np.uint8] = used_images.transpose(0, 3, 1, 2)[:, None]
            return array
        pixels = np.empty((len(self.facts), *decoder.row_shape), np.uint8)
        for chunk, decoded in self._decode(np.arange(len(self.facts))):
            pixels[chunk] = decoded.numpy()
        return pixels

    def _on_disk(self, source: Source, *, with_pixels: bool) -> None:
        """Append the missing rows. A second process that needs the same cache waits for the first one."""
        indices = self.decoder.indices.tolist()
        if source.files is not None:
            files = [source.files[index] for index in indices]
            identities, place = list(map(_identity, files)), os.path.commonpath(files)
        else:
            identities, place = [_digest(f"{source.fingerprint}\0{i}") for i in indices], str(source.fingerprint)
        folder = cache_folder() / _key(self.decoder, place, with_pixels=with_pixels)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with acquire_lock(folder):
                rows = self._append_missing(folder, identities, with_pixels=with_pixels)
            if with_pixels and self.readable.any():
                shape = (int(rows.max()) + 1, *self.decoder.row_shape)
                self.pixels = PixelFile(folder / "pixels", shape, rows)
        except OSError as error:
            if with_pixels:
                raise UserError(
                    f"The cache '{folder}' cannot be used: {error.strerror or error}. Set UPRIGHT_CACHE to a folder "
                    "with more space, or decode images on access with --data.cache none."
                ) from error
            # The facts are small enough to compute them again in the next run.
            for _ in self._decode(np.flatnonzero(self.facts["state"] == 0)):
                pass

    def _append_missing(self, folder: Path, identities: list[int], *, with_pixels: bool) -> Indices:
        """Append the images that are not stored yet, and return the row of every image, 0 for unreadable ones."""
        facts_path, pixels_path = folder / "facts", folder / "pixels"
        row_bytes = self._row_bytes if with_pixels else 0
        stored = np.fromfile(facts_path, FACTS) if facts_path.is_file() else self.facts[:0]
        if with_pixels:  # the large file may have been deleted
            stored = stored[: pixels_path.stat().st_size // row_bytes if pixels_path.is_file() else 0]
        # Unreadable images are tried again: the reason may have been the disk.
        row_of = {int(stored["identity"][row]): row for row in np.flatnonzero(stored["state"] == READ).tolist()}
        rows = np.array([row_of.get(identity, -1) for identity in identities], np.int64)
        missing = np.flatnonzero(rows < 0)
        self.facts[rows >= 0] = stored[rows[rows >= 0]]
        rows[missing] = 0
        free = shutil.disk_usage(folder).free
        if (needed := len(missing) * row_bytes) > free:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
        # The pixels are written, not mapped, because a full disk would kill a process that writes to a map.
        with facts_path.open("ab") as facts, pixels_path.open("ab") if with_pixels else nullcontext() as pixels:
            # A killed process may have left an incomplete row, or pixels without facts.
            facts.truncate(stored.nbytes)
            if pixels:
                pixels.truncate(len(stored) * row_bytes)
            end = len(stored)
            for chunk, decoded in self._decode(missing):
                self.facts["identity"][chunk] = [identities[position] for position in chunk]
                readable = self.readable[chunk]
                rows[chunk[readable]] = np.arange(end, end + readable.sum())
                end += int(readable.sum())
                if pixels:
                    pixels.write(decoded.numpy()[readable].tobytes())
                    pixels.flush()
                    os.fsync(pixels.fileno())
                # The facts follow the pixels, so that they never describe a row that does not exist.
                facts.write(self.facts[chunk[readable]].tobytes())
                facts.flush()
        return rows


def _identity(file: Path) -> int:
    """Return 64 bits for the path and the current state of a file."""
    try:
        status = file.stat()
        # Two files that are exchanged keep their modification times, but not their inodes and status times.
        state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}"
    except OSError:  # for example a dangling link, which decoding reports
        state = ""
    return _digest(f"{file}\0{state}")


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _key(decoder: Decoder, place: str, *, with_pixels: bool) -> str:
    """Return the name of the cache folder, a hash of the dataset and of the options that decode it."""
    spec, views, images = decoder.spec, type(decoder.views), type(decoder.images)
    rule = [spec.resize, spec.interpolation]
    pixels = [decoder.row_shape, rule, f"{views.__module__}.{views.__qualname__}", decoder.views.key]
    decoding = [spec.channels, spec.background, f"{images.__module__}.{images.__qualname__}"]
    key = [FORMAT, place, decoding, pixels if with_pixels else None]
    return blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()


def acquire_lock(folder: Path) -> AbstractContextManager[object]:
    """Return a lock of a cache folder. While another process holds it, print a line and wait."""
    lock = FileLock(folder / "lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is filling '{folder}'; waiting for it ...", file=sys.stderr, flush=True)
        return lock.acquire()


def to_tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    """Convert uint8 ``(B, H, W, C)`` to float ``(B, C, H, W)`` in [0, 255]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float()
