"""Every image of a source, decoded once: kept in memory, in a file that is mapped, or decoded again when it is wanted.

The one pass over the source also notes what else must be known of each image: its content hash, its own size, and
whether it can be read at all.
"""

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pooch
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from upright.data.source import Images
from upright.data.split import Indices, content_hash
from upright.data.views import Angles, Views
from upright.data.workers import fetch
from upright.errors import UprightError, UserError
from upright.images import ImageSpec, Pixels, batches_of_one_size
from upright.warp import resize

Where = Literal["auto", "memory", "disk", "none"]

FORMAT = 1
FACTS = np.dtype([("identity", "<u8"), ("hash", "<i8"), ("height", "<u4"), ("width", "<u4"), ("state", "u1")])
"""What is known of each image: of which file (0 where it is none), content, size; whether it was read."""
READ, UNREADABLE = 1, 2

MAX_MEMORY = 64 * 2**20
"""Pictures from files that take more bytes than this are kept on disk unless told otherwise."""

CHUNK_BYTES = 4 * 2**20
"""So much is decoded at a time; what worker processes send goes through shared memory, which may be small."""


def cache_folder() -> Path:
    """Where decoded images are kept: ``$UPRIGHT_CACHE``, or ``decoded`` in the user's cache. It may be deleted."""
    return Path(os.environ.get("UPRIGHT_CACHE") or Path(pooch.os_cache("upright")) / "decoded").expanduser()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Decoded(NamedTuple):
    """Some images: pixels, uint8 ``(n, V, C, H, W)``, and `FACTS` ``(n,)``."""

    pixels: Tensor
    facts: npt.NDArray[Any]


class Decoder:
    """Decode, show, resize: what a worker process does.

    Args:
        images: of the source.
        indices: which of them; a position below is one in this list.
        spec: channels, resize rule and background.
        size: height and width of the result.
        views: what each is shown as.
    """

    def __init__(
        self, images: Images, indices: Indices, spec: ImageSpec, size: tuple[int, int], views: Views | None = None
    ) -> None:
        self.images, self.indices, self.spec, self.size = images, indices, spec, size
        self.views = views or Angles((0.0,))
        self.row_shape = (len(self.views.names), spec.channels, *size)

    def __getitem__(self, positions: Indices) -> Decoded:
        """The images at ``positions``; of one that cannot be read, the facts say so."""
        count = len(positions)
        found = Decoded(torch.zeros(count, *self.row_shape, dtype=torch.uint8), np.zeros(count, FACTS))

        def readable() -> Iterator[tuple[int, int, Pixels]]:
            for place, index in enumerate(self.indices[positions].tolist()):
                try:
                    pixels = self.images[index]
                except UprightError:
                    found.facts[place]["state"] = UNREADABLE
                    continue
                found.facts[place] = (0, content_hash(pixels), *pixels.shape[:2], READ)
                yield place, index, pixels

        # One batch of originals at a time: they may be a thousand times as large as what is kept of them.
        for batch in batches_of_one_size(readable(), lambda item: item[2], count):
            places, indices = [place for place, _, _ in batch], torch.tensor([index for _, index, _ in batch])
            stacked = to_tensor(np.stack([pixels for _, _, pixels in batch]))
            found.pixels[places] = self._fitted(self.views.show(stacked, indices))
        return found

    def _fitted(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != self.size:
            if self.spec.resize == "none":
                raise UserError(
                    f"With resize none the images of a batch must have one size, {self.size[0]}x{self.size[1]}; "
                    f"one has {images.shape[-2]}x{images.shape[-1]}. Use stretch or crop."
                )
            fitted = resize(images.flatten(0, 1), *self.size, self.spec.resize).round().clamp(0, 255)
            images = fitted.reshape(*images.shape[:2], *fitted.shape[1:])
        return images.to(torch.uint8)

    def take(self, positions: Indices, views: Indices) -> Tensor:
        """One view of each of the images at ``positions``, decoded now: uint8 ``(n, C, H, W)``."""
        unique, inverse = np.unique(positions, return_inverse=True)
        decoded = self[unique]
        for position in unique[decoded.facts["state"] == UNREADABLE].tolist():
            raise UserError(self.reason(position))
        return decoded.pixels[torch.from_numpy(inverse), torch.from_numpy(views)]

    def reason(self, position: int) -> str:
        """Why the image there cannot be read."""
        index = int(self.indices[position])
        try:
            self.images[index]
        except UprightError as error:
            return str(error)
        return f"Picture {index} could not be read just now, and now it can: run this again."


class Kept:
    """Pixels in memory or in a mapped file.

    Args:
        pixels: uint8 ``(rows, V, C, H, W)``.
        rows: the row of every image; by default the first is in the first.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], rows: Indices | None = None) -> None:
        self.pixels, self.rows = pixels, rows

    def take(self, positions: Indices, views: Indices) -> Tensor:
        """See `Decoder.take`."""
        rows = positions if self.rows is None else self.rows[positions]
        return torch.from_numpy(self.pixels[rows, views])


class Cache:
    """Facts of every image, and its pixels.

    On disk they are rows of two files that only ever grow, each known by path, number, size and times of the file it
    was made of: pictures that come later are added, and one that changes gets another row. They are of one class of
    `Images`; who changes how an own one decodes deletes the folder.

    Args:
        decoder: what to keep.
        files: that the images are read from; none where they are in memory.
        where: ``memory``, ``disk``, or ``none`` (files are decoded whenever they are wanted, only the facts are kept);
            ``auto`` is memory for what is there already and what is small, else disk.
        workers: processes that decode; by default as many as cores, at most 8, where it is worth it.
        max_unreadable: so many images may be unreadable.

    Raises:
        UserError: if more images cannot be read, or the cache cannot be written.
    """

    def __init__(
        self,
        decoder: Decoder,
        files: Sequence[Path] | None,
        where: Where = "auto",
        *,
        workers: int | None = None,
        max_unreadable: int = 0,
    ) -> None:
        self.decoder, self.max_unreadable = decoder, max_unreadable
        count, self._row = len(decoder.indices), int(np.prod(decoder.row_shape))
        self.facts = np.zeros(count, FACTS)
        if where == "auto":
            where = "memory" if files is None or count * self._row <= MAX_MEMORY else "disk"
        if workers is None:
            workers = min(cores(), 8) if count > 1000 else 0
        self.workers = workers if files is not None else 0
        self.pixels: Kept | Decoder = decoder
        if files is None or where == "memory":
            self.pixels = Kept(self._in_memory())
        else:
            stored = self._on_disk([files[i] for i in decoder.indices.tolist()], with_pixels=where == "disk")
            self.pixels = stored or decoder
        self._check(np.flatnonzero(self.facts["state"] == UNREADABLE).tolist())

    @property
    def readable(self) -> npt.NDArray[np.bool_]:
        """Which images can be used, ``(N,)``."""
        usable: npt.NDArray[np.bool_] = self.facts["state"] == READ
        return usable

    def _check(self, unreadable: list[int]) -> None:
        if len(unreadable) > self.max_unreadable:
            position, more = unreadable[0], len(unreadable) - 1
            reason = self.decoder.reason(position)
            raise UserError(
                f"{reason}{f' And {more} more cannot be read.' if more else ''} Unreadable pictures that may be left "
                f"out: {self.max_unreadable}; --data.max_unreadable allows more."
            )

    def _decoded(self, positions: Indices) -> Iterator[tuple[Indices, Decoded]]:
        """Decode what is at ``positions``, chunk by chunk, and note the facts."""
        most = max(1, CHUNK_BYTES // self._row)
        chunks = [positions[start : start + most] for start in range(0, len(positions), most)]
        unreadable: list[int] = []
        shown = self.workers > 0 and sys.stderr.isatty()
        with tqdm(total=len(positions), desc="Decoding", unit=" images", leave=False, disable=not shown) as bar:
            for chunk, decoded in zip(chunks, fetch(self.decoder, chunks, self.workers), strict=True):
                self.facts[chunk] = decoded.facts
                yield chunk, decoded
                unreadable += chunk[decoded.facts["state"] == UNREADABLE].tolist()
                self._check(unreadable)
                bar.update(len(chunk))

    def _in_memory(self) -> npt.NDArray[np.uint8]:
        decoder, images = self.decoder, self.decoder.images
        if isinstance(images, np.ndarray) and images.shape[1:3] == decoder.size and decoder.views.plain:
            # They are kept already: nothing is copied but, where they are some of them, the choice.
            every = len(decoder.indices) == len(images)
            kept: npt.NDArray[np.uint8] = (images if every else images[decoder.indices]).transpose(0, 3, 1, 2)[:, None]
            self.facts["hash"] = [content_hash(images[i]) for i in decoder.indices.tolist()]
            self.facts["height"], self.facts["width"], self.facts["state"] = *decoder.size, READ
            return kept
        pixels = np.empty((len(self.facts), *decoder.row_shape), np.uint8)
        for chunk, decoded in self._decoded(np.arange(len(self.facts))):
            pixels[chunk] = decoded.pixels.numpy()
        return pixels

    def _on_disk(self, files: list[Path], *, with_pixels: bool) -> "Kept | None":
        """Add what is missing; another process that wants the same waits, and finds it done."""
        folder = cache_folder() / _key(self.decoder, files, with_pixels=with_pixels)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                rows = self._add_missing(folder, _identities(files), self._row if with_pixels else 0)
            if not with_pixels:
                return None
            shape = (int(rows.max()) + 1, *self.decoder.row_shape)
            return Kept(np.memmap(folder / "pixels", np.uint8, "r", shape=shape), rows)
        except OSError as error:
            if with_pixels:
                raise UserError(
                    f"The cache '{folder}' cannot be used: {error.strerror or error}. Set UPRIGHT_CACHE to a folder "
                    "with room, or decode files whenever they are wanted: --data.cache none."
                ) from error
            # The facts are small; they are found out again the next time.
            for _ in self._decoded(np.flatnonzero(self.facts["state"] == 0)):
                pass
            return None

    def _add_missing(self, folder: Path, identities: list[int], row: int) -> Indices:
        """The row of every image; ``row`` is how many bytes of pixels are kept of each."""
        path = folder / "facts"
        known = np.fromfile(path, FACTS) if path.is_file() else self.facts[:0]
        if row:
            # Somebody who wants room may have deleted the large file.
            there = (folder / "pixels").stat().st_size // row if (folder / "pixels").is_file() else 0
            if there < len(known):
                known = known[:there]
                # Else the facts would again be taken for true as soon as the large file has grown.
                os.truncate(path, known.nbytes)
        # What could not be read is tried again: it may have been the disk.
        row_of = {int(known[r]["identity"]): int(r) for r in np.flatnonzero(known["state"] == READ)}
        rows = np.array([row_of.get(identity, -1) for identity in identities], np.int64)
        missing = np.flatnonzero(rows < 0)
        self.facts[rows >= 0] = known[rows[rows >= 0]]
        # What a process that was killed had not finished comes first.
        free = itertools.chain(np.flatnonzero(known["state"] != READ).tolist(), itertools.count(len(known)))
        rows[missing] = list(itertools.islice(free, len(missing)))
        if not len(missing):
            return rows
        room = shutil.disk_usage(folder).free
        if (needed := len(missing) * row) > room:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB are needed and {room / 1e9:.1f} GB are free")
        # Written, not mapped: a full disk is then an error, and not the end of the process.
        with _opened(path) as facts, _opened(folder / "pixels") if row else nullcontext() as pixels:
            for chunk, decoded in self._decoded(missing):
                self.facts["identity"][chunk] = [identities[position] for position in chunk]
                if pixels:
                    _write(pixels, rows[chunk], decoded.pixels.numpy())
                    os.fsync(pixels.fileno())
                # Only what is there is said to be there.
                _write(facts, rows[chunk], self.facts[chunk])
        return rows


def _identities(files: list[Path]) -> list[int]:
    """64 bits for each file as it is now."""
    found = []
    for file in files:
        try:
            status = file.stat()
            # Two files that change places keep their times of change; their numbers and status do not.
            state = f"{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0{status.st_ino}"
        except OSError:
            # A link to nothing, say: decoding names it.
            state = ""
        digest = blake2b(f"{file}\0{state}".encode(errors="surrogateescape"), digest_size=8)
        found.append(int.from_bytes(digest.digest(), "little"))
    return found


def _key(decoder: Decoder, files: list[Path], *, with_pixels: bool) -> str:
    """One folder per dataset and way of decoding."""
    spec, views, images = decoder.spec, type(decoder.views), type(decoder.images)
    pixels = [decoder.row_shape, spec.resize, f"{views.__module__}.{views.__qualname__}", decoder.views.names]
    decoding = [spec.channels, spec.background, f"{images.__module__}.{images.__qualname__}"]
    key = [FORMAT, os.path.commonpath(files), decoding, pixels if with_pixels else None]
    return blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process fills '{folder}'; waiting for it ...", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _opened(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")


def _write(file: BinaryIO, rows: Indices, values: npt.NDArray[Any]) -> None:
    """Put ``values`` into their ``rows``, neighbours at once."""
    first = 0
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        file.seek(int(run[0]) * values[0].nbytes)
        file.write(np.ascontiguousarray(values[first : first + len(run)]).tobytes())
        first += len(run)
    file.flush()


def to_tensor(images: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 ``(B, H, W, C)`` to float ``(B, C, H, W)`` in [0, 255]."""
    return torch.tensor(images).permute(0, 3, 1, 2).float()
