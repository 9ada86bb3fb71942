"""CIFAR-10 and CIFAR-100: the binary version, or the Python version without running its pickles."""

import io
import pickle
import tarfile
import zlib
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from upright.data.published import LabelledImages, Published, read_file, unreadable
from upright.errors import UserError, one_line

IMAGE_BYTES = 3 * 32 * 32


class Version(NamedTuple):
    """One of the two published versions: an archive, the folder in it, and the suffix of the files."""

    archive: str
    folder: str
    suffix: str


class CIFAR(Published):
    """Images of 32 x 32 RGB: 50,000 for training, 10,000 for test (Krizhevsky 2009).

    Args:
        root: folder of an archive or of its files, in the binary version (``cifar-*-binary.tar.gz``) or in the Python
            version. The pickles of the Python version are not run: only arrays and lists are read. By default the
            binary version is downloaded once (170 MB), and its MD5 is checked. It is stored in the dataset's folder in
            ``$UPRIGHT_DATA``, or in the user's cache if that variable is not set.
        **options: options of `Published`.
    """

    shape = (32, 32, 3)
    versions: ClassVar[tuple[Version, Version]]
    """The binary and the Python version."""
    stems: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]]
    """Names of the training files and of the test files, without the suffix."""
    label_bytes: ClassVar[int]
    """Number of labels before the pixels of each image in the binary version."""
    address = "https://www.cs.toronto.edu/~kriz"

    @property
    @abstractmethod
    def label(self) -> tuple[int, str]:
        """Index of the label among `label_bytes`, and its key in the Python version."""

    def parts(self) -> tuple[LabelledImages, LabelledImages]:
        version, path = self._find_version()
        names = [f"{stem}{version.suffix}" for stems in self.stems for stem in stems]
        if path.is_file():
            contents = _read_members(path, version.folder, names)
        else:
            contents = {name: read_file(path / name) for name in names}
        read = self._read_records if version.suffix else self._read_batch
        batches = [read(contents[name], f"{path}/{name}") for name in names]
        train = len(self.stems[0])
        for name, batch in zip(names, batches[:train], strict=False):
            if len(batch.images) != len(batches[0].images):
                raise UserError(
                    f"'{path}/{name}' has {len(batch.images)} images and {names[0]} has {len(batches[0].images)}: one "
                    "of them is not complete."
                )
        return _concatenate(batches[:train]), _concatenate(batches[train:])

    def _find_version(self) -> tuple[Version, Path]:
        """Return a version and its path: a folder with all of its files, else an archive, downloaded if missing."""
        for version in self.versions:
            for folder in (self.folder / version.folder, self.folder):
                if all((folder / f"{stem}{version.suffix}").is_file() for stems in self.stems for stem in stems):
                    return version, folder
        for version in self.versions:
            if archive := self.find(version.archive):
                return version, archive
        return self.versions[0], self.fetch(self.versions[0].archive)

    def _read_records(self, content: bytes, name: str) -> LabelledImages:
        """Read a binary file: for each image its labels, then 1,024 bytes each of red, green and blue, row by row."""
        size = self.label_bytes + IMAGE_BYTES
        if not content or len(content) % size:
            raise UserError(f"'{name}' is not complete: {len(content)} bytes are not a number of records of {size}.")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        return LabelledImages(records[:, self.label_bytes :], records[:, self.label[0]])

    def _read_batch(self, content: bytes, name: str) -> LabelledImages:
        """Read a Python file: a pickle of Python 2, with ``data`` ``(N, 3072)`` and lists of labels."""
        try:
            batch = _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
            data, labels = batch["data"].array(), np.array(batch[self.label[1]])
        except Exception as error:  # a truncated or foreign pickle may raise any error
            text = one_line(error, 200)
            raise UserError(f"'{name}' is not a file of CIFAR's Python version: {text}.") from None
        if data.shape != (labels.size, IMAGE_BYTES) or labels.ndim != 1 or labels.dtype.kind != "i":
            raise UserError(
                f"'{name}' needs data (N, {IMAGE_BYTES}) and N integers as labels, got {data.shape} and "
                f"{labels.shape} of {labels.dtype}."
            )
        # A label that is no byte becomes 255, which `Published.read` refuses.
        return LabelledImages(data, np.where((labels >= 0) & (labels < 256), labels, 255).astype(np.uint8))


class CIFAR10(CIFAR):
    """Images of animals and vehicles in ten classes, 32 x 32 RGB: 50,000 for training, 10,000 for test."""

    cached_as = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    versions = (
        Version("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin"),
        Version("cifar-10-python.tar.gz", "cifar-10-batches-py", ""),
    )
    checksums: ClassVar = {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}
    wanted_files = "cifar-10-binary.tar.gz, cifar-10-python.tar.gz or all files in one of them"
    stems = (tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",))
    label_bytes = 1
    label = (0, "labels")


class CIFAR100(CIFAR):
    """Images in a hundred classes, 32 x 32 RGB: 500 of each for training, 100 of each for test.

    Args:
        coarse: use the twenty superclasses, of five classes each.
        root: folder of the published files, as in `CIFAR`.
        **options: options of `Published`.
    """

    cached_as = "cifar100"
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    versions = (
        Version("cifar-100-binary.tar.gz", "cifar-100-binary", ".bin"),
        Version("cifar-100-python.tar.gz", "cifar-100-python", ""),
    )
    checksums: ClassVar = {"cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8"}
    wanted_files = "cifar-100-binary.tar.gz, cifar-100-python.tar.gz or all files in one of them"
    stems = (("train",), ("test",))
    label_bytes = 2

    def __init__(self, *, coarse: bool = False, root: str | None = None, **options: object) -> None:
        super().__init__(root=root, **options)  # type: ignore[arg-type]  # the base's own types
        self.coarse = coarse
        self.classes = tuple((COARSE if coarse else FINE).split())

    @property
    def label(self) -> tuple[int, str]:
        return (0, "coarse_labels") if self.coarse else (1, "fine_labels")


# Names and order are those of fine_label_names.txt and coarse_label_names.txt in the archive.
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


def _read_members(archive: Path, folder: str, names: list[str]) -> dict[str, bytes]:
    """Read the files ``folder/name`` of an archive in one pass, without unpacking it onto the disk."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as members:
            for member in members:
                parent, _, name = member.name.removeprefix("./").rpartition("/")
                if parent == folder and name in names and (file := members.extractfile(member)):
                    contents[name] = file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise unreadable(archive, error) from None
    if missing := [f"{folder}/{name}" for name in names if name not in contents]:
        raise UserError(f"'{archive}' lacks {', '.join(missing)}.")
    return contents


def _concatenate(batches: list[LabelledImages]) -> LabelledImages:
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return LabelledImages(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


class _ArrayState:
    """The state of a NumPy array or dtype in a pickle. NumPy's own code does not run."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        _, shape, dtype, columns_first, content = self.state
        if dtype.arguments[0] != "u1":
            raise ValueError(f"an array of bytes (u1) is needed, got {dtype.arguments[0]}")
        values = np.frombuffer(content.encode("latin1"), np.uint8)
        return values.reshape(shape, order="F" if columns_first else "C")


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler of dictionaries, lists, numbers, strings and arrays of bytes, which refuses all other classes."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name in ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"):
            return _ArrayState
        raise pickle.UnpicklingError(f"it contains the class {name}")
