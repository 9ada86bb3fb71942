"""CIFAR-10 and CIFAR-100: the binary version, which is what is downloaded, or the Python version without running it."""

import io
import pickle
import tarfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from upright.data.published import Part, Published
from upright.errors import UserError
from upright.images import ImageSpec

PIXELS = 3 * 32 * 32


class Version(NamedTuple):
    """One of the two ways in which CIFAR is published: the same files but for a suffix, in a folder, in an archive."""

    archive: str
    folder: str
    suffix: str


class CIFAR(Published):
    """Pictures of 32 x 32 RGB: 50,000 to train on, 10,000 to test (Krizhevsky 2009).

    Args:
        root: folder of what is published, packed or not: of the binary version (``cifar-*-binary.tar.gz``, or the
            ``.bin`` files in it) or of the Python version, of which only arrays and lists are read. By default the
            dataset's own in ``$UPRIGHT_DATA``, or in the user's cache where that variable is not set; the binary
            version is downloaded there once (170 MB), and its MD5 checked.
        **options: see `Published`.
    """

    versions: ClassVar[tuple[Version, Version]]
    """The binary and the Python one."""
    stems: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    """Names of the files, less the suffix: those to train on, those to test on."""
    label_bytes: ClassVar[int]
    """Before the pixels of each image in the binary version."""
    classes: tuple[str, ...]
    """In the order of the labels."""
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    """Of the training images, on the scale of 0 to 1: well-known numbers, declared, not measured here."""
    mirrors = ("https://www.cs.toronto.edu/~kriz",)

    @property
    @abstractmethod
    def label(self) -> tuple[int, str]:
        """Which of `label_bytes`, and the Python version's key."""

    @property
    def spec(self) -> ImageSpec:
        """RGB, 32 x 32."""
        return ImageSpec(3, 32, 32, self.classes, self.mean, self.std)

    def prepare_data(self) -> None:
        """Download the archive if nothing is there; Lightning calls it in one process."""
        self._place()

    def parts(self) -> tuple[Part, Part]:
        """What the files of one version hold."""
        version, place = self._place()
        names = [f"{stem}{version.suffix}" for stems in self.stems for stem in stems]
        contents = _members(place, version.folder, names) if place.is_file() else _files(place, names)
        read = self._records if version.suffix else self._batch
        found = [read(contents[name], f"{place}/{name}") for name in names]
        train = len(self.stems[0])
        for name, part in zip(names[:train], found, strict=False):
            if len(part.images) != len(found[0].images):
                raise UserError(
                    f"'{place}/{name}' holds {len(part.images)} pictures and {names[0]} {len(found[0].images)}: one of "
                    "them is not whole."
                )
        return _joined(found[:train]), _joined(found[train:])

    def _place(self) -> tuple[Version, Path]:
        """The folder that holds all files of a version, or the archive; downloaded if it may be and is not there."""
        for version in self.versions:
            for folder in (self.folder / version.folder, self.folder):
                if all((folder / f"{stem}{version.suffix}").is_file() for stems in self.stems for stem in stems):
                    return version, folder
        for version in self.versions:
            if archive := self.find(version.archive):
                return version, archive
        return self.versions[0], self.fetch(self.versions[0].archive)

    def _records(self, content: bytes, name: str) -> Part:
        """The binary version: for each image its labels, then 1,024 bytes each of red, green and blue, row by row."""
        size = self.label_bytes + PIXELS
        if not content or len(content) % size:
            raise UserError(f"'{name}' is not whole: {len(content)} bytes are not a number of records of {size}.")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        return Part(records[:, self.label_bytes :], records[:, self.label[0]])

    def _batch(self, content: bytes, name: str) -> Part:
        """The Python version: a pickle of Python 2, with ``data`` ``(N, 3072)`` and lists of labels."""
        try:
            batch = _Arrays(io.BytesIO(content), encoding="latin1").load()
            data, labels = batch["data"].array(), np.array(batch[self.label[1]])
        except Exception as error:  # a pickle that is not whole, or not one, leads to anything
            text = " ".join(str(error).split())[:200]
            raise UserError(f"'{name}' is not a file of CIFAR's Python version: {text}.") from None
        if data.shape != (labels.size, PIXELS) or labels.ndim != 1 or labels.dtype.kind != "i":
            raise UserError(
                f"'{name}' needs data (N, {PIXELS}) and N whole numbers as labels, got {data.shape} and "
                f"{labels.shape} of {labels.dtype}."
            )
        # A label that a byte cannot hold is none of ours: 255, which `read` refuses.
        return Part(data, np.where((labels >= 0) & (labels < 256), labels, 255).astype(np.uint8))


class CIFAR10(CIFAR):
    """Pictures of animals and vehicles in ten classes, 32 x 32 RGB: 50,000 to train on, 10,000 to test."""

    cached_as = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    versions = (
        Version("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin"),
        Version("cifar-10-python.tar.gz", "cifar-10-batches-py", ""),
    )
    checksums: ClassVar = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
    what = "cifar-10-binary.tar.gz, cifar-10-python.tar.gz or all files in one of them"
    stems = (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",))
    label_bytes = 1
    label = (0, "labels")


class CIFAR100(CIFAR):
    """Pictures in a hundred classes, 500 of each to train on and 100 to test, 32 x 32 RGB.

    Args:
        coarse: the twenty superclasses instead, of five classes each.
        root: see `CIFAR`.
        **options: see `Published`.
    """

    cached_as = "cifar100"
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    versions = (
        Version("cifar-100-binary.tar.gz", "cifar-100-binary", ".bin"),
        Version("cifar-100-python.tar.gz", "cifar-100-python", ""),
    )
    checksums: ClassVar = {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}
    what = "cifar-100-binary.tar.gz, cifar-100-python.tar.gz or all files in one of them"
    stems = (("train",), ("test",))
    label_bytes = 2

    def __init__(self, *, coarse: bool = False, root: str | None = None, **options: object) -> None:
        super().__init__(root=root, **options)  # type: ignore[arg-type]  # the base's own types
        self.coarse = coarse
        self.classes = tuple((COARSE if coarse else FINE).split())

    @property
    def label(self) -> tuple[int, str]:
        """The coarse one stands first."""
        return (0, "coarse_labels") if self.coarse else (1, "fine_labels")


# As they are published, in batches.meta.txt, fine_label_names.txt and coarse_label_names.txt.
FINE = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
COARSE = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices household_furniture
insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes large_omnivores_and_herbivores
medium_mammals non-insect_invertebrates people reptiles small_mammals trees vehicles_1 vehicles_2
"""


def _files(folder: Path, names: list[str]) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in names}
    except OSError as error:
        raise UserError(f"'{error.filename}' cannot be read: {error.strerror}.") from None


def _members(archive: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """The files ``folder/name`` of an archive, in one pass; nothing is unpacked onto the disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as packed:
            for member in packed:
                inside, _, name = member.name.removeprefix("./").rpartition("/")
                if inside == folder and name in names and (file := packed.extractfile(member)):
                    found[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"'{archive}' cannot be read: {error}. It may not be whole; bring it again.") from None
    if missing := [name for name in names if name not in found]:
        raise UserError(f"'{archive}' lacks {', '.join(f'{folder}/{name}' for name in missing)}.")
    return found


def _joined(parts: list[Part]) -> Part:
    """Channels last."""
    images, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
    return Part(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


class _Array:
    """What a pickle says of an array, as plain values: NumPy's own code for it never runs."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.columns_first, self.content = state

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        if self.dtype.name != "u1":
            raise ValueError(f"an array of bytes (u1) is needed, got {self.dtype.name}")
        values = np.frombuffer(self.content.encode("latin1"), np.uint8)
        return values.reshape(self.shape, order="F" if self.columns_first else "C")


class _Dtype:
    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and the like; one byte has none."""


class _Arrays(pickle.Unpickler):
    """Dictionaries, lists, numbers, strings and arrays of bytes; whatever else a pickle asks for is refused."""

    ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self.ADMITTED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None
