import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats import cifar_batch, cifar_records, colours, write_tar
from upright.data.cifar import CIFAR10, CIFAR100
from upright.errors import UprightError

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES, TENS = colours(60, 10)
# All pixels of one image differ, so that rows, columns and colours cannot be confused.
IMAGES[0] = np.arange(3072).reshape(32, 32, 3) % 251
HUNDREDS, FINE = colours(300, 100)
COARSE = FINE // 5


def cifar10(kind: str) -> dict[str, bytes]:
    parts = {name: slice(10 * i, 10 * i + 10) for i, name in enumerate(BATCHES)}
    if kind == "bin":
        return {
            f"cifar-10-batches-bin/{name}.bin": cifar_records(IMAGES[part], TENS[part]) for name, part in parts.items()
        }
    return {f"cifar-10-batches-py/{name}": cifar_batch(IMAGES[part], labels=TENS[part]) for name, part in parts.items()}


def cifar100(kind: str) -> dict[str, bytes]:
    parts = {"train": slice(200), "test": slice(200, 300)}
    if kind == "bin":
        return {
            f"cifar-100-binary/{name}.bin": cifar_records(HUNDREDS[part], COARSE[part], FINE[part])
            for name, part in parts.items()
        }
    return {
        f"cifar-100-python/{name}": cifar_batch(HUNDREDS[part], coarse_labels=COARSE[part], fine_labels=FINE[part])
        for name, part in parts.items()
    }


def put(root: Path, members: dict[str, bytes], layout: str) -> None:
    """Write the members as an archive, with another file as in the published one, as its folder, or as its files."""
    if layout == "archive":
        folder = next(iter(members)).split("/")[0]
        name = {"cifar-10-batches-bin": "cifar-10-binary", "cifar-10-batches-py": "cifar-10-python"}.get(folder, folder)
        write_tar(root / f"{name}.tar.gz", {f"{folder}/readme.html": b"<html>"} | members)
        return
    for name, content in members.items():
        path = root / (name if layout == "folder" else Path(name).name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("layout", ["archive", "folder", "files"])
@pytest.mark.parametrize("kind", ["bin", "py"])
def test_both_versions_are_read_as_published(kind: str, layout: str, tmp_path: Path) -> None:
    put(tmp_path, cifar10(kind), layout)
    before = sorted(tmp_path.rglob("*"))
    source = CIFAR10(root=str(tmp_path)).source
    assert (source.images == IMAGES).all() and source.labels == TENS.tolist()
    assert source.splits == {"train": range(50), "test": range(50, 60)}
    assert source.names[0] == "train-00000" and source.names[59] == "test-00009"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", ["archive", "folder"])
@pytest.mark.parametrize("kind", ["bin", "py"])
@pytest.mark.parametrize("coarse", [False, True])
def test_cifar100_has_a_hundred_classes_or_twenty(kind: str, layout: str, coarse: bool, tmp_path: Path) -> None:
    put(tmp_path, cifar100(kind), layout)
    data = CIFAR100(root=str(tmp_path), coarse=coarse)
    assert (data.source.images == HUNDREDS).all()
    assert data.source.labels == (COARSE if coarse else FINE).tolist()
    assert len(data.spec.classes) == (20 if coarse else 100)


def test_the_classes_are_the_published_ones() -> None:
    fine, coarse = CIFAR100().spec.classes, CIFAR100(coarse=True).spec.classes
    assert (fine[0], fine[43], fine[99]) == ("apple", "lion", "worm") and list(fine) == sorted(fine)
    assert (coarse[0], coarse[9], coarse[19]) == ("aquatic_mammals", "large_man-made_outdoor_things", "vehicles_2")
    assert CIFAR10().spec.classes[3] == "cat"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "test_batch.bin' is not complete: 0 bytes"),
        (cifar_records(IMAGES[50:], TENS[50:])[:-1], "is not complete: 30729 bytes are not a number of records"),
        (cifar_records(IMAGES[50:], TENS[50:] + 1), r"do not fit together: .* labels below 10 are needed, .* up to 10"),
        (cifar_records(IMAGES[50:], TENS[50:], TENS[50:]), "30740 bytes are not a number of records of 3073"),
    ],
)
def test_invalid_binary_files_are_refused(content: bytes, text: str, tmp_path: Path) -> None:
    put(tmp_path, cifar10("bin") | {"cifar-10-batches-bin/test_batch.bin": content}, "folder")
    with pytest.raises(UprightError, match=text):
        _ = CIFAR10(root=str(tmp_path)).source


class Attack:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return self.path.write_text, ("run",)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for attack in (Attack(victim), {"data": Attack(victim), "labels": [1]}):
        put(tmp_path, cifar10("py") | {"cifar-10-batches-py/test_batch": pickle.dumps(attack, protocol=2)}, "folder")
        with pytest.raises(
            UprightError, match=r"test_batch' is not a file of CIFAR's Python version: it contains the class "
        ):
            _ = CIFAR10(root=str(tmp_path)).source
        assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a file of CIFAR's Python version: Ran out of input"),
        (
            cifar_batch(IMAGES[50:], labels=TENS[50:])[:-5000],
            "is not a file of CIFAR's Python version: pickle data was",
        ),
        (b"a text\n", "is not a file of CIFAR's Python version"),
        (cifar_batch(IMAGES[50:], fine_labels=TENS[50:]), "is not a file of CIFAR's Python version: 'labels'"),
        (cifar_batch(IMAGES[50:], labels=TENS[51:]), r"needs data \(N, 3072\) and N .* got \(10, 3072\) and \(9,\)"),
        (cifar_batch(IMAGES[50:, :16], labels=TENS[50:]), r"got \(10, 1536\) and"),
        (cifar_batch(IMAGES[50:], labels=TENS[50:].astype(int) - 300), "labels below 10 are needed, .* up to 255"),
        (cifar_batch(IMAGES[50:], labels=TENS[50:]).replace(b"u1", b"i4"), r"array of bytes \(u1\) is needed, got i4"),
        (pickle.dumps({"data": [1], "labels": [1]}, 2), "is not a file of CIFAR's Python version"),
    ],
)
def test_invalid_python_files_are_refused(content: bytes, text: str, tmp_path: Path) -> None:
    put(tmp_path, cifar10("py") | {"cifar-10-batches-py/test_batch": content}, "folder")
    with pytest.raises(UprightError, match=text):
        _ = CIFAR10(root=str(tmp_path)).source


def test_incomplete_archives_are_refused(tmp_path: Path) -> None:
    put(tmp_path, cifar10("bin"), "archive")
    path = tmp_path / "cifar-10-binary.tar.gz"
    content = path.read_bytes()
    for part, text in (
        (content[:-300], "ended before|unexpected end"),
        (b"", "empty file"),
        (b"x" * 500, "not a gzip"),
    ):
        path.write_bytes(part)
        with pytest.raises(UprightError, match=rf"cifar-10-binary.tar.gz' cannot be read: .*({text}).*download it"):
            _ = CIFAR10(root=str(tmp_path)).source
    members = cifar10("bin")
    del members["cifar-10-batches-bin/data_batch_3.bin"]
    put(tmp_path, members, "archive")
    with pytest.raises(UprightError, match=r"binary.tar.gz' lacks cifar-10-batches-bin/data_batch_3.bin\."):
        _ = CIFAR10(root=str(tmp_path)).source


def test_other_members_of_an_archive_are_not_unpacked(tmp_path: Path) -> None:
    """Links and paths that lead out of the archive are not followed: nothing is unpacked."""
    path = tmp_path / "mine/cifar-10-binary.tar.gz"
    put(tmp_path / "mine", cifar10("bin"), "archive")
    with tarfile.open(path) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    write_tar(path, {"../escaped": b"x", "/escaped": b"x", "cifar-10-batches-bin/other.bin": b"x"} | members)
    assert len(CIFAR10(root=str(tmp_path / "mine")).source.labels) == 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"] and len(list((tmp_path / "mine").iterdir())) == 1


def test_a_folder_without_all_files_is_refused(tmp_path: Path) -> None:
    put(tmp_path, cifar10("bin"), "folder")
    (tmp_path / "cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(
        UprightError, match=r"does not hold cifar-10-binary.tar.gz, cifar-10-python.tar.gz or all files"
    ):
        _ = CIFAR10(root=str(tmp_path)).source


def test_a_batch_truncated_between_two_images_is_refused(tmp_path: Path) -> None:
    members = cifar10("bin")
    name = "cifar-10-batches-bin/data_batch_3.bin"
    members[name] = members[name][: 7 * 3073]
    put(tmp_path, members, "folder")
    with pytest.raises(UprightError, match=r"data_batch_3.bin' has 7 images and data_batch_1.bin has 10: one"):
        _ = CIFAR10(root=str(tmp_path)).source
