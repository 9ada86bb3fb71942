import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from upright.data import cache, image_files
from upright.data.folder import Folder
from upright.errors import UprightError, UserError
from upright.images import decode
from upright.warp import resize

COUNT = 60


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photographs of two classes and of many sizes, all different."""
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        file = tmp_path / "photos" / ("even" if number % 2 == 0 else "odd") / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        size = generator.integers(10, 40, 2)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPRIGHT_CACHE", str(tmp_path / "cache"))
    # Several chunks, so that something can happen between them.
    monkeypatch.setattr(cache, "CHUNK_BYTES", 10 * 12 * 12 * 3)
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of all decoded files."""
    names: list[str] = []

    def counting(path: Path, spec: object, max_pixels: int) -> object:
        names.append(Path(path).name)
        return decode(path, spec, max_pixels)

    monkeypatch.setattr(image_files, "decode", counting)
    return names


def folder(root: Path, **options: object) -> Folder:
    return Folder(root=str(root), size=12, **options)


def everything(data: Folder) -> list[torch.Tensor]:
    return [part for split in ("train", "val", "test") for part in data.samples(split)[:][:5]]


def check_disk_equals_memory(photos: Path) -> None:
    pairs = zip(everything(folder(photos, cache="disk")), everything(folder(photos, cache="memory")), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("angles", [(0,), (-30, 0, 30)])
@pytest.mark.parametrize(
    "options", [{"cache": "disk"}, {"cache": "none"}, {"cache": "disk", "num_workers": 2}], ids=str
)
def test_every_storage_returns_the_same_images(
    photos: Path, options: dict[str, object], angles: tuple[int, ...]
) -> None:
    expected = folder(photos, angles=angles, cache="memory")
    other = folder(photos, angles=angles, **options)
    assert other.manifest.digest == expected.manifest.digest
    assert all(torch.equal(a, b) for a, b in zip(everything(other), everything(expected), strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streamed_batches_are_the_same_for_any_number_of_workers(photos: Path, workers: int) -> None:
    def batches(**options: object) -> list[torch.Tensor]:
        data = folder(photos, batch_size=7, **options)
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        return [part for loader in loaders for batch in loader for part in batch[:5]]

    state = torch.get_rng_state()
    streamed = batches(cache="none", num_workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(streamed, batches(cache="memory"), strict=True))


def test_a_second_run_decodes_nothing(photos: Path, decoded: list[str]) -> None:
    first = everything(folder(photos, cache="disk"))
    assert len(decoded) == COUNT
    second = everything(folder(photos, cache="disk"))
    # Other splits of the same photos share the cache.
    folder(photos, cache="disk", folds=3, fold=1, train_fraction=0.5).samples("train")
    assert len(decoded) == COUNT
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_new_images_are_added_and_changed_ones_are_decoded_again(photos: Path, decoded: list[str]) -> None:
    _ = folder(photos, cache="disk").images
    decoded.clear()
    Image.new("RGB", (20, 20), (1, 2, 3)).save(photos / "even/new.png")
    Image.new("RGB", (20, 20), (4, 5, 6)).save(photos / "odd/001.png")
    (photos / "odd/003.png").unlink()
    changed = folder(photos, cache="disk")
    assert changed.images.readable.all() and sorted(decoded) == ["001.png", "new.png"]
    assert changed.manifest.digest == folder(photos, cache="memory").manifest.digest
    check_disk_equals_memory(photos)


def test_each_size_and_resize_rule_has_its_own_cache(photos: Path) -> None:
    for options in ({"size": 12}, {"size": 14}, {"size": 12, "resize": "crop"}, {"size": 12, "channels": 1}):
        disk, memory = (Folder(root=str(photos), cache=storage, **options) for storage in ("disk", "memory"))
        assert torch.equal(disk.samples("train")[:].images, memory.samples("train")[:].images)


def test_small_sets_stay_in_memory_and_large_ones_do_not(
    photos: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ = folder(photos).images
    assert not own_cache.exists()
    monkeypatch.setattr(cache, "MAX_MEMORY_BYTES", COUNT * 12 * 12 * 3 - 1)
    data = folder(photos)
    assert isinstance(data.images.pixels, cache.PixelFile)


def test_an_interrupted_run_continues_where_it_stopped(
    photos: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(path: Path, spec: object, max_pixels: int) -> object:
        if len(decoded) == 35:
            raise KeyboardInterrupt
        return counting(path, spec, max_pixels)

    counting = image_files.decode
    monkeypatch.setattr(image_files, "decode", stopping)
    with pytest.raises(KeyboardInterrupt):
        _ = folder(photos, cache="disk").images
    monkeypatch.setattr(image_files, "decode", counting)
    decoded.clear()
    check_disk_equals_memory(photos)
    # 30 were written, in chunks of 10.
    assert len(decoded) == 30 + COUNT


FILL = """
import sys
from upright.data import cache
from upright.data.folder import Folder
import time
cache.CHUNK_BYTES = 10 * 12 * 12 * 3
slow = cache.content_hash
cache.content_hash = lambda pixels: time.sleep(0.02) or slow(pixels)
data = Folder(root=sys.argv[1], size=12, cache="disk")
print(data.manifest.digest, int(data.samples("train")[:].images.sum()), flush=True)
"""


@pytest.mark.slow
def test_two_processes_wait_for_each_other_and_survive_a_killed_third(photos: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FILL, str(photos)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start()
    deadline = time.monotonic() + 60
    facts = Path(os.environ["UPRIGHT_CACHE"])
    while not (sum(f.stat().st_size for f in facts.glob("*/facts")) if facts.exists() else 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    both = [start(), start()]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    data = folder(photos, cache="memory")
    expected = f"{data.manifest.digest} {int(data.samples('train')[:].images.sum())}\n"
    assert [out for out, _ in answers] == [expected, expected]


def test_a_full_disk_is_an_error_and_leaves_a_valid_cache(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "disk_usage", lambda _: cache.shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(
            UprightError, match=r"cannot be used: 0.0 GB are needed and 0.0 GB are free.*--data.cache none"
        ):
            _ = folder(photos, cache="disk").images
    written = []

    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            written.append(content)
            if len(written) > 5:
                raise OSError(28, "No space left on device")
            return super().write(content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Full(path, mode))
        with pytest.raises(
            UprightError, match=r"No space left on device. Set UPRIGHT_CACHE to a folder with more space"
        ):
            _ = folder(photos, cache="disk").images
    check_disk_equals_memory(photos)


def test_the_large_file_may_be_deleted(photos: Path, own_cache: Path, decoded: list[str]) -> None:
    _ = folder(photos, cache="disk").images
    (file,) = own_cache.glob("*/pixels")
    file.unlink()
    assert int(folder(photos, cache="disk").samples("train")[:].images.sum()) > 0
    assert len(decoded) == 2 * COUNT


def test_a_cache_that_cannot_be_written_is_named(photos: Path, own_cache: Path) -> None:
    own_cache.write_text("a file")
    with pytest.raises(UprightError, match=r"The cache '.*/cache/.*' cannot be used: Not a directory"):
        _ = folder(photos, cache="disk").images


@pytest.mark.parametrize("storage", ["memory", "disk", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images(photos: Path, storage: str, workers: int) -> None:
    (photos / "even/000.png").write_bytes(b"")
    (photos / "odd/001.png").write_bytes((photos / "odd/001.png").read_bytes()[:200])
    options = {"cache": storage, "num_workers": workers}
    for _ in range(2):  # the second time, the cache on disk has the result
        with pytest.raises(UprightError, match=r"^'.*/(even/000|odd/001).png' [^\n]*--data.max_unreadable raises it.$"):
            _ = folder(photos, **options).images
    with pytest.raises(UprightError, match=r"The limit for unreadable images is 1;"):
        _ = folder(photos, max_unreadable=1, **options).images
    data = folder(photos, max_unreadable=2, **options)
    assert sum(map(len, data.splits.values())) == COUNT - 2
    assert data.remarks == [f"2 of {COUNT} images cannot be read and are left out, for example 'even/000.png'."]
    assert len(list(data.originals("val"))) == len(data.splits["val"]) == len(data.samples("val")[:].labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_while_it_is_streamed_is_named_in_one_line(photos: Path, workers: int) -> None:
    data = folder(photos, cache="none", num_workers=workers)
    loader = data.train_dataloader()
    for file in photos.glob("even/*"):
        file.unlink()
    with pytest.raises(UprightError, match=r"^'.*\.png' does not exist\.$"):
        list(loader)


LARGE = """
import resource, sys
from upright.data.folder import Folder
import torch
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), -1))
data = Folder(root=sys.argv[1], size=512, cache="disk", num_workers=0)
total = sum(int(batch.images.sum(dtype=torch.int64)) for batch in data.train_dataloader())
print(data.images.pixels.pixels.nbytes, total)
"""


@pytest.mark.slow
def test_a_set_larger_than_memory(tmp_path: Path) -> None:
    for number in range(3000):
        file = tmp_path / "large" / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 1 + number % 250).save(file)
        file.write_bytes(file.read_bytes() + number.to_bytes(2, "big"))
    limit = 1_000_000_000
    command = [sys.executable, "-c", LARGE, str(tmp_path / "large"), str(limit)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    size, total = map(int, process.stdout.split())
    assert size > 2 * limit and total > 0


def test_facts_without_their_pixels_are_never_used(photos: Path, own_cache: Path) -> None:
    _ = folder(photos, cache="disk").images
    (file,) = own_cache.glob("*/pixels")
    file.unlink()
    # It sorts first, so that every row belongs to another image now.
    Image.new("RGB", (20, 20), (9, 9, 9)).save(photos / "even/00.png")

    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            if "facts" in str(self.name):
                raise OSError(28, "No space left on device")
            return super().write(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Full(path, mode))
        with pytest.raises(UprightError, match="No space left"):
            _ = folder(photos, cache="disk").images
    check_disk_equals_memory(photos)


@pytest.mark.parametrize(("file", "tail"), [("pixels", 1000), ("facts", 11)])
def test_an_incomplete_row_of_a_killed_process_is_truncated(
    photos: Path, own_cache: Path, decoded: list[str], file: str, tail: int
) -> None:
    _ = folder(photos, cache="disk").images
    (path,) = own_cache.glob(f"*/{file}")
    path.write_bytes(path.read_bytes() + b"x" * tail)
    Image.new("RGB", (20, 20), (9, 9, 9)).save(photos / "even/00.png")
    decoded.clear()
    check_disk_equals_memory(photos)
    assert decoded[0] == "00.png" and len(decoded) == 1 + COUNT + 1


def test_two_exchanged_files_have_exchanged_pixels(photos: Path) -> None:
    one, other = photos / "even/000.png", photos / "odd/001.png"
    other.write_bytes(one.read_bytes()[:-3] + b"abc")
    for file in (one, other):
        os.utime(file, ns=(10**18, 10**18))
    Image.new("RGB", (20, 20), (9, 9, 9)).save(one.with_suffix(".bmp"))
    Image.new("RGB", (20, 20), (99, 9, 9)).save(other.with_suffix(".bmp"))
    one, other = one.with_suffix(".bmp"), other.with_suffix(".bmp")
    for file in (one, other):
        os.utime(file, ns=(10**18, 10**18))
    _ = folder(photos, cache="disk").images
    aside = photos / "aside"
    one.rename(aside), other.rename(one), aside.rename(other)
    check_disk_equals_memory(photos)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_with_another_size_or_time_is_decoded_again(photos: Path, decoded: list[str], change: str) -> None:
    _ = folder(photos, cache="disk").images
    decoded.clear()
    file = photos / "even/000.png"
    status = file.stat()
    if change == "size":
        file.write_bytes(file.read_bytes() + b"more")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    _ = folder(photos, cache="disk").images
    assert decoded == ["000.png"]


class Negative:
    """Another way of decoding."""

    def __init__(self, images: object) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return 255 - self.images[index]


class Inverted(Folder):
    def read(self):  # type: ignore[no-untyped-def]
        source = super().read()
        return replace(source, images=Negative(source.images))


def test_each_background_set_of_angles_and_decoder_has_its_own_cache(photos: Path) -> None:
    Image.new("RGBA", (16, 16), (50, 50, 50, 0)).save(photos / "even/clear.png")

    for cls, options in (
        (Folder, {"angles": (-30, 30)}),
        (Folder, {"angles": (-60, 60)}),
        (Folder, {"angles": (-60, 60), "padding": "border"}),
        (Folder, {"background": 200}),
        (Inverted, {}),
        (Folder, {}),
    ):
        memory, disk = (cls(root=str(photos), size=12, cache=storage, **options) for storage in ("memory", "disk"))
        assert all(torch.equal(a, b) for a, b in zip(everything(disk), everything(memory), strict=True)), options


def test_unreadable_images_are_tried_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path, spec: object, max_pixels: int) -> object:
        if Path(path).name == "007.png":
            raise UserError(f"'{path}' cannot be decoded: too many open files")
        return decode(path, spec, max_pixels)

    with monkeypatch.context() as patch:
        patch.setattr(image_files, "decode", failing)
        with pytest.raises(UprightError, match="too many open files"):
            _ = folder(photos, cache="disk").images
    assert folder(photos, cache="disk").images.readable.all()


def test_cached_pixels_are_rounded_not_truncated(photos: Path) -> None:
    data = folder(photos, cache="disk")
    originals = list(data.originals("test"))
    for original, cached in zip(originals, data.samples("test")[:].images, strict=True):
        exact = resize(torch.from_numpy(original.pixels).permute(2, 0, 1)[None].float(), 12, 12)
        assert (exact[0] - cached).abs().max() <= 0.501


def test_few_large_originals_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = peak = 0

    class Large(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def large(path: Path, spec: object, max_pixels: int) -> np.ndarray:
        nonlocal alive, peak
        alive, peak = alive + 1, max(peak, alive + 1)
        return decode(path, spec, max_pixels).view(Large)

    for number in range(20):
        file = tmp_path / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("L", (2100, 2000), number).save(file)
    monkeypatch.setattr(cache, "CHUNK_BYTES", 4 * 2**20)
    monkeypatch.setattr(cache, "content_hash", lambda pixels: int(pixels[0, 0, 0]))
    monkeypatch.setattr(image_files, "decode", large)
    _ = folder(tmp_path).images
    assert peak <= 3


def test_storage_none_needs_no_writable_folder(photos: Path, own_cache: Path) -> None:
    own_cache.write_text("a file")
    data = folder(photos, cache="none", num_workers=0)
    assert torch.equal(data.samples("val")[:].images, folder(photos, cache="memory").samples("val")[:].images)


def test_streamed_views_are_decoded_on_access(photos: Path, decoded: list[str]) -> None:
    data = folder(photos, cache="none", angles=(0, 30), num_workers=0)
    samples = data.samples("test")
    assert len(decoded) == COUNT
    _ = samples[:2]
    assert len(decoded) == COUNT + 1


def test_unreadable_images_are_left_out_of_declared_splits_too(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for label in ("a", "b"):
            for number in range(4):
                file = tmp_path / split / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), hash((split, label, number)) % 251).save(file)
    (tmp_path / "test/a/0.png").write_bytes(b"")
    data = folder(tmp_path, max_unreadable=9)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 8, "val": 8, "test": 7}
    for file in (tmp_path / "val").glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(UprightError, match="No image of split 'val' can be read"):
        _ = folder(tmp_path, max_unreadable=9).splits


def test_duplicates_stay_in_one_split_and_are_not_dropped(photos: Path) -> None:
    for number in range(0, 20, 2):
        (photos / f"even/copy {number}.png").write_bytes((photos / f"even/{number:03d}.png").read_bytes())
    data = folder(photos)
    assert sum(map(len, data.splits.values())) == COUNT + 10 and data.remarks == []


def test_a_dead_worker_is_an_error_of_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UprightError, match=r"A process that decodes images died .* processes with --data.num_workers"):
        _ = folder(photos, cache="memory", num_workers=1).images
