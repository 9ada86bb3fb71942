"""Datasets of the Hugging Face Hub, and local Parquet files in the Hub's layout."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from upright.data.cache import acquire_lock, cache_folder
from upright.data.download import absolute
from upright.data.parquet import read_columns, read_parquet
from upright.data.resized import ResizedImages, Row, class_name
from upright.data.source import Source
from upright.data.split import split_of
from upright.errors import ImageError, UserError, nearest, one_line
from upright.files import replacing_folder, write_text
from upright.images import ImageSpec, Pixels, decode

ROWS = 64
"""Rows of a Parquet file that are read at a time."""
BUFFER_BYTES = 2**20
SHARD = re.compile(r"(-\d+-of-\d+)?(-[0-9a-f]{16})?$")
"""End of the name of a Parquet file on the Hub, after the name of its split."""
COMMIT = re.compile(r"[0-9a-f]{40}")


class Columns(NamedTuple):
    """Columns of a table of images.

    Args:
        image: name of the column of images.
        has_struct: True for structs with a field ``bytes``, false for bytes.
        label: name of the column of labels.
        names: names of the classes, if the file holds them.
    """

    image: str
    has_struct: bool
    label: str
    names: tuple[str, ...] | None


class Hub(ResizedImages):
    """A dataset of the Hub with Parquet files, or a local folder of such files.

    Images are encoded files in a column of bytes, or of structs with ``bytes``. Labels are class numbers with names in
    the file (``ClassLabel``), text, or whole numbers. Splits are read from the names of the files or of their folders.
    The encoded images are copied to the cache once, so that each can be read alone.

    Args:
        name: ``owner/dataset`` on the Hub, a folder of Parquet files, or one Parquet file. A name of the Hub needs the
            package huggingface_hub.
        revision: branch, tag or commit on the Hub. Checkpoints record the commit.
        subset: folder of the files, if there are several, such as a configuration of the dataset.
        image: column of the images; by default the only one.
        label: column of the labels; by default the only one.
        **options: options of `ResizedImages`.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None = None,
        subset: str | None = None,
        image: str | None = None,
        label: str | None = None,
        **options: object,
    ) -> None:
        self._local = absolute(name) if absolute(name).exists() else None
        if self._local:
            if revision:
                raise UserError(f"revision '{revision}': '{name}' is a local path; only the Hub has revisions.")
            self.arguments["name"] = str(self._local)
        elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            raise UserError(f"'{name}' does not exist, and is not a name of the Hub such as owner/dataset.")
        else:
            revision = self.arguments["revision"] = _commit(name, revision)
        self._name, self._revision, self._subset = name, revision, subset
        self._image, self._label = image, label
        super().__init__(**options)  # type: ignore[arg-type]  # the base's own types

    @cached_property
    def _layout(self) -> tuple[dict[str, list[Path]], list[str]]:
        """The files of each split, and sentences about files that are left out."""
        if self._local and self._local.is_file():
            return {"": [self._local]}, []
        if self._local:
            files = sorted(path.relative_to(self._local).as_posix() for path in self._local.rglob("*.parquet"))
            names = [name for name in files if "/." not in f"/{name}"]
        else:
            names = _hub_files(self._name, str(self._revision))
        splits, remarks = _choose(names, self._subset, str(self._local or self._name))
        chosen = [name for part in splits.values() for name in part]
        folder = self._local or _download(self._name, str(self._revision), chosen)
        return {split: [folder / name for name in part] for split, part in splits.items()}, remarks

    @cached_property
    def _columns(self) -> Columns:
        return _find_columns(next(iter(self._layout[0].values()))[0], self._image, self._label)

    @cached_property
    def _labels_of_splits(self) -> dict[str, list[Any]]:
        """Labels by split, without splits that have none: the Hub marks missing labels by -1 or null."""
        labels = {}
        for split, files in self._layout[0].items():
            values: list[Any] = []
            for file in files:
                values += read_columns(file, [self._columns.label]).column(0).to_pylist()
            missing = [row for row, value in enumerate(values) if value is None or value == -1]
            if missing and len(missing) < len(values):
                raise UserError(
                    f"Row {missing[0]} of {self.where(split)} has no label, nor have {len(missing) - 1} more."
                )
            if values and not missing:
                labels[split] = values
        if not labels.keys() & {"", "train"}:
            raise UserError(f"'{self._name}' has no training images with labels; it has {sorted(self._layout[0])}.")
        return labels

    def classes(self) -> tuple[str, ...]:
        """Return the names in the file, else the training labels, sorted; whole numbers by their value."""
        if self._columns.names:
            return self._columns.names
        labels = self._labels_of_splits
        training = set(labels.get("train", labels.get("", [])))
        return tuple(class_name(str(value)) for value in sorted(training))

    def where(self, split: str) -> str:
        return f"split '{split}' of '{self._name}'"

    def read(self) -> Source:
        columns, (files, remarks), splits = self._columns, self._layout, self._labels_of_splits
        classes, rows = columns.names, list[Row]()
        for split, labels in splits.items():
            for number, label in enumerate(labels):
                name = classes[label] if classes and 0 <= label < len(classes) else class_name(str(label))
                place = f"Row {number} of {self.where(split)}"
                rows.append(Row(name, split, f"{split or 'row'}/{number:06d}", place))
        if unlabelled := [split for split in files if split not in splits]:
            remarks = [*remarks, f"Splits without labels are left out: {', '.join(unlabelled)}."]
        folder = _unpack([file for split in splits for file in files[split]], columns)
        images = _Encoded(folder, [row.name for row in rows], self.spec, self.max_pixels)
        return self.arrange(rows, images, remarks=remarks, fingerprint=f"{folder.name} {self.max_pixels}")


class _Encoded(Sequence[Pixels]):
    """Encoded images in one memory-mapped file. A pickle of it holds the path."""

    def __init__(self, folder: Path, names: list[str], spec: ImageSpec, max_pixels: int) -> None:
        self.folder, self._names, self.spec, self.max_pixels = folder, names, spec, max_pixels
        self.content = np.memmap(folder / "images", np.uint8, "r")
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")

    def __reduce__(self) -> tuple[Any, ...]:
        return _Encoded, (self.folder, self._names, self.spec, self.max_pixels)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # only one image at a time is used
        start = int(self.ends[index - 1]) if index else 0
        try:
            return decode(self.content[start : int(self.ends[index])].tobytes(), self.spec, self.max_pixels)
        except ImageError as error:
            raise ImageError(f"'{self._names[index]}': {error}") from None


def _choose(names: Iterable[str], subset: str | None, place: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return the Parquet files of each split, in order, and sentences about the others."""
    by_subset: dict[str, dict[str, list[str]]] = {}
    for name in sorted(name for name in names if name.endswith(".parquet")):
        path = PurePosixPath(name)
        folders, stem = list(path.parts[:-1]), SHARD.sub("", path.stem)
        if not re.search(r"[a-zA-Z]", stem) and folders:
            stem = folders.pop()  # refs/convert/parquet: subset/split/0000.parquet
        by_subset.setdefault("/".join(folders), {}).setdefault(stem.removeprefix("partial-"), []).append(name)
    if not by_subset:
        raise UserError(
            f"'{place}' has no Parquet files. The Hub converts most datasets: give revision refs/convert/parquet."
        )
    if subset is None and len(by_subset) > 1:
        raise UserError(f"'{place}' has several subsets: {', '.join(by_subset)}. Give one as subset (--data.subset).")
    if subset is not None and subset not in by_subset:
        raise UserError(f"'{place}' has no subset '{subset}', only {', '.join(by_subset)}.{nearest(subset, by_subset)}")
    stems = by_subset[subset] if subset is not None else next(iter(by_subset.values()))
    if not any(map(split_of, stems)):
        return {"": [name for part in stems.values() for name in part]}, []
    splits: dict[str, list[str]] = {}
    for stem, part in stems.items():
        if split := split_of(stem):
            splits.setdefault(split, []).extend(part)
    unused = [stem for stem in stems if not split_of(stem)]
    return splits, [f"Splits {', '.join(unused)} of '{place}' are left out."] if unused else []


def _find_columns(file: Path, image: str | None, label: str | None) -> Columns:
    """Find the columns of images and labels: by their options, else by the file's notes, else by their types."""
    schema = read_parquet(file, lambda pq: pq.read_schema(file))
    from pyarrow import types  # after the check that it is installed

    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    kinds = {field.name: field.type for field in schema}
    structs = {name for name, kind in kinds.items() if types.is_struct(kind) and kind.get_field_index("bytes") >= 0}
    images = {name for name, kind in kinds.items() if types.is_binary(kind) or types.is_large_binary(kind)} | structs
    label_types = (types.is_integer, types.is_string, types.is_large_string)
    labels = {name for name, kind in kinds.items() if any(is_type(kind) for is_type in label_types)}

    def one(option: str, feature: str, chosen: str | None, fitting: set[str]) -> str:
        noted = [name for name, each in features.items() if isinstance(each, dict) and each.get("_type") == feature]
        candidates = noted or sorted(fitting)
        if chosen in kinds or (chosen is None and len(candidates) == 1):
            return chosen or candidates[0]
        reason = f"no column '{chosen}'" if chosen is not None else f"{len(candidates)} columns of {option}s"
        raise UserError(
            f"'{file}' has {reason}; its columns are {', '.join(kinds)}. Give one as {option} (--data.{option})."
        )

    image, label = one("image", "Image", image, images), one("label", "ClassLabel", label, labels)
    if image not in images or label not in labels:
        raise UserError(
            f"'{file}': column '{image}' must hold bytes or structs with bytes, and '{label}' whole numbers or text; "
            f"they hold {kinds[image]} and {kinds[label]}."
        )
    names = features.get(label, {}).get("names")
    return Columns(image, image in structs, label, tuple(map(class_name, names)) if names else None)


def _unpack(files: list[Path], columns: Columns) -> Path:
    """Copy the encoded images of Parquet files to the cache, a few rows at a time, and return their folder."""
    states = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = blake2b(json.dumps([states, columns.image]).encode(), digest_size=12).hexdigest()
    folder, locks = cache_folder() / f"parquet-{key}", cache_folder() / "parquet-locks" / key
    try:
        locks.mkdir(parents=True, exist_ok=True)
        with acquire_lock(locks):
            if not folder.exists():
                with replacing_folder(folder) as new, (new / "images").open("wb") as images:
                    ends = [end for file in files for end in _copy_images(file, columns, images)]
                    np.save(new / "ends.npy", np.array(ends, np.int64))
    except OSError as error:
        raise UserError(
            f"The images of '{files[0].parent}' cannot be copied to '{folder}': {error.strerror or error}. Set "
            "UPRIGHT_CACHE to a folder with more space."
        ) from error
    return folder


def _copy_images(file: Path, columns: Columns, images: Any) -> Iterable[int]:
    """Append the images of one file, and yield the end of each."""
    # With these options memory holds some pages; without them, all pages of a row group, which may be the whole file.
    parquet = read_parquet(file, lambda pq: pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES))
    row = 0
    for batch in parquet.iter_batches(ROWS, columns=[columns.image]):
        column = batch.column(0)
        for value in column.field("bytes") if columns.has_struct else column:
            if (content := value.as_buffer() if value.is_valid else None) is None:
                raise UserError(f"Row {row} of '{file}' has no bytes of an image in column '{columns.image}'.")
            images.write(content)
            row += 1
            yield images.tell()


def _hub(name: str, call: Callable[[Any], Any]) -> Any:
    """Return ``call(huggingface_hub)``, with errors in one line."""
    try:
        import huggingface_hub  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(
            f"'{name}' is no local path, and a dataset of the Hub needs the package 'huggingface_hub': "
            "pip install 'upright[hub]'."
        ) from None
    try:
        return call(huggingface_hub)
    except Exception as error:  # a network makes the library raise anything
        raise UserError(
            f"Dataset '{name}' cannot be read from the Hub: {one_line(error, 300)} Check name and "
            "revision, or give a local folder of its Parquet files."
        ) from error


def _commit(name: str, revision: str | None) -> str:
    """Return the commit of a revision. A commit needs no network."""
    if revision and COMMIT.fullmatch(revision):
        return revision
    return str(_hub(name, lambda hub: hub.HfApi().dataset_info(name, revision=revision).sha))


def _hub_files(name: str, commit: str) -> list[str]:
    """Return the names of the files of a dataset, without a network those of a complete earlier download."""
    listing = cache_folder() / "hub" / f"{name.replace('/', '--')}-{commit}.json"
    if not listing.is_file():
        files = _hub(name, lambda hub: hub.HfApi().dataset_info(name, revision=commit).siblings)
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_text(listing, json.dumps([file.rfilename for file in files]))
    return list(json.loads(listing.read_text(encoding="utf-8")))


def _download(name: str, commit: str, files: list[str]) -> Path:
    """Download files of a dataset to the cache of huggingface_hub. Files that are there need no network."""
    paths = _hub(
        name, lambda hub: [hub.hf_hub_download(name, file, repo_type="dataset", revision=commit) for file in files]
    )
    return Path(paths[0]).parents[len(PurePosixPath(files[0]).parts) - 1]
