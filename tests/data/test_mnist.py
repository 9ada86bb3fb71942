import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats import idx, write_emnist, write_idx
from upright.data.emnist import CLASSES, EMNIST
from upright.data.mnist import KMNIST, MNIST, FashionMNIST, read_idx
from upright.errors import UprightError

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture
def root(small_data: Path, tmp_path: Path) -> Path:
    """Copy the small MNIST, with two compressed files and two others."""
    for name in FILES:
        array = read_idx(small_data / f"mnist/{name}.gz")
        write_idx(tmp_path / (name if "labels" in name else f"{name}.gz"), array)
    return tmp_path


@pytest.mark.parametrize("family", [MNIST, FashionMNIST, KMNIST])
def test_the_four_files_are_read_as_published(family: type[MNIST], root: Path) -> None:
    data = family(root=str(root), val_fraction=0.2)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 320, "val": 80, "test": 100}
    pixels, labels = (read_idx(next(root.glob(f"t10k-{kind}*"))) for kind in ("images", "labels"))
    samples = data.samples("test")[:]
    assert (samples.images[:, 0].numpy() == pixels).all() and (samples.labels.numpy() == labels).all()
    assert next(data.names("test")) == "test-00000" and set(data.names("val")) <= {f"train-{i:05d}" for i in range(400)}


def test_without_a_root_the_files_come_from_the_users_cache() -> None:
    data = MNIST()
    assert len(data.source.labels) == 500 and data.recipe["init_args"] == {}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not an IDX file"),
        (b"\x89PNG and so on", "is not an IDX file"),
        (struct.pack(">HBB2I", 0, 13, 2, 1, 1) + b"\0" * 4, "is not an IDX file of unsigned bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"\0" * 7, r"declares the shape \(2, 2, 2\), and holds 7"),
        (struct.pack(">HBB3I", 0, 8, 3, 2, 2, 2) + b"\0" * 9, "and holds 9 bytes: it is not complete"),
        (struct.pack(">HBB", 0, 8, 200), "is not an IDX file"),
        (gzip.compress(b"x" * 100, mtime=0)[:-4], "cannot be read"),
    ],
)
def test_foreign_and_truncated_files_are_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UprightError, match=text):
        read_idx(tmp_path / "x")


def test_a_truncated_file_is_refused(root: Path) -> None:
    path = root / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UprightError, match=r"t10k-images-idx3-ubyte.gz' cannot be read: .* download it again"):
        _ = MNIST(root=str(root)).source


@pytest.mark.parametrize(
    "labels", [np.zeros(99), np.full(100, 10), np.zeros((100, 1)), np.zeros(0), np.zeros((100, 28, 28))]
)
def test_labels_that_do_not_fit_are_refused(root: Path, labels: np.ndarray) -> None:
    write_idx(root / "t10k-labels-idx1-ubyte", labels)
    with pytest.raises(
        UprightError, match=r"The test files of '.*' do not fit together: .* got \(100, 28, 28, 1\) and"
    ):
        _ = MNIST(root=str(root)).source


@pytest.mark.parametrize("shape", [(100, 20, 20), (100,), (0, 28, 28), (100, 28, 28, 3)])
def test_images_of_another_shape_are_refused(root: Path, shape: tuple[int, ...]) -> None:
    write_idx(root / "t10k-images-idx3-ubyte", np.zeros(shape))
    with pytest.raises(UprightError, match=r"images of \(28, 28, 1\) and \(N,\) labels below 10 are needed, got"):
        _ = MNIST(root=str(root)).source


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UprightError, match=r"does not hold the four IDX files \(no train-images-idx3-ubyte.gz\)"):
        _ = MNIST(root=str(tmp_path)).source


def letter_l(count: int) -> np.ndarray:
    """Return images of the letter L, all different."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 4:24, 8:10] = 255
    images[:, 22:24, 8:16] = 255
    images[:, 0, :2] = np.stack([np.arange(count) // 200, np.arange(count) % 200], axis=1)
    return images


@pytest.fixture(params=sorted(CLASSES))
def emnist(request: pytest.FixtureRequest, tmp_path: Path) -> EMNIST:
    """Write an arrangement of EMNIST, with 20 images of each class for training and 2 for test, all of them an L."""
    count = len(CLASSES[request.param])
    images, labels = letter_l(count * 22), np.arange(count * 22, dtype=np.uint8) % count
    parts = {
        "train": (images[: count * 20], labels[: count * 20]),
        "test": (images[count * 20 :], labels[count * 20 :]),
    }
    write_emnist(tmp_path / "gzip.zip", request.param, parts)
    return EMNIST(split=request.param, root=str(tmp_path))


def test_emnist_is_transposed_and_its_labels_start_at_0(emnist: EMNIST) -> None:
    classes = emnist.spec.classes
    assert len(classes) == {"letters": 26, "balanced": 47, "byclass": 62, "bymerge": 47}.get(
        emnist.arguments["split"], 10
    )
    assert (emnist.source.images[..., 0] == letter_l(len(classes) * 22)).all()
    assert emnist.source.labels[: len(classes)] == list(range(len(classes)))
    assert emnist.source.splits == {
        "train": range(len(classes) * 20),
        "test": range(len(classes) * 20, len(classes) * 22),
    }
    assert len(emnist.splits["val"]) == len(classes) * 2


def test_the_classes_of_emnist() -> None:
    assert "".join(CLASSES["letters"]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert "".join(CLASSES["balanced"]) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    assert CLASSES["byclass"][10] == "A" and CLASSES["byclass"][61] == "z"


@pytest.mark.parametrize("folder", ["", "gzip"])
@pytest.mark.parametrize("compressed", [True, False])
def test_emnist_may_be_unpacked(folder: str, compressed: bool, small_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(small_data / "emnist/gzip.zip") as archive:
        for name in archive.namelist():
            if name.endswith(".gz"):
                content = archive.read(name)
                path = tmp_path / folder / name.removeprefix("gzip/").removesuffix("" if compressed else ".gz")
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content if compressed else gzip.decompress(content))
    ours, theirs = EMNIST(root=str(tmp_path)), EMNIST()
    assert (ours.source.images == theirs.source.images).all() and ours.source.labels == theirs.source.labels


def test_emnist_refuses(small_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UprightError, match=r"split must be one of letters, balanced, .*mnist; got 'letter'"):
        EMNIST(split="letter")
    with pytest.raises(
        UprightError, match=r"holds no gzip/emnist-digits-train-images-idx3-ubyte.gz: it is not the pub"
    ):
        _ = EMNIST(split="digits").source
    content = (small_data / "emnist/gzip.zip").read_bytes()
    (tmp_path / "gzip.zip").write_bytes(content[:1000])
    with pytest.raises(UprightError, match=r"gzip.zip' cannot be read: File is not a zip file"):
        _ = EMNIST(root=str(tmp_path)).source
    offset = content.index(b"train-images-idx3-ubyte.gz") + 2000
    (tmp_path / "gzip.zip").write_bytes(content[:offset] + b"other" + content[offset + 5 :])
    with pytest.raises(UprightError, match=r"train-images-idx3-ubyte.gz' cannot be read: Bad CRC-32"):
        _ = EMNIST(root=str(tmp_path)).source


def test_a_letter_label_of_0_is_refused(small_data: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(small_data / "emnist/gzip.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "emnist-letters-test-labels-idx1-ubyte").write_bytes(idx(np.zeros(100)))
    with pytest.raises(UprightError, match=r"labels below 26 are needed, got .* up to 255"):
        _ = EMNIST(root=str(tmp_path)).source
