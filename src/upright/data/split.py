"""Splits: seeded, stratified, without overlap, and identified by the content of their images."""

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split

from upright.errors import UserError
from upright.images import LISTED_CLASSES, Pixels
from upright.runtime.task import JOIN

Indices = npt.NDArray[np.int64]
SPLITS = ("train", "val", "test")
SPELLINGS = {
    split: re.compile(rf"(?:images?|data)?(?:{words})(?:set|data|dataset|images?|split)?")
    for split, words in {
        "train": "train|training", "val": "val|valid|validation|dev", "test": "test|testing"
    }.items()
}  # fmt: skip
"""Usual spellings of each split in lower case, without digits and punctuation."""


def split_of(name: str) -> str | None:
    """Return the split that a name stands for, such as ``val`` for ``Validation`` or ``valid_set``, or None."""
    letters = re.sub(r"[\W\d_]+", "", name.casefold())
    return next((split for split, spelling in SPELLINGS.items() if spelling.fullmatch(letters)), None)


def stratified_split(
    labels: npt.ArrayLike,
    fractions: Mapping[str, float],
    seed: int,
    *,
    folds: int = 0,
    fold: int = 0,
    classes: Sequence[str] = (),
) -> dict[str, Indices]:
    """Return sorted indices per split, with the same share of every class in each; ``train`` gets the rest.

    ``fractions`` of all images are split off in their order. With ``folds``, ``val`` is one of this many equal parts of
    the remaining images, and ``fold`` its number, from 0. ``classes`` are names for messages.

    Raises:
        UserError: if the fractions leave nothing, or a class is too small for all splits.
    """
    if min(fractions.values(), default=0.5) <= 0 or sum(fractions.values()) >= 1:
        raise UserError(f"Split fractions must be above 0 and leave a part for training, got {dict(fractions)}.")
    numbers = np.asarray(labels)
    rest = np.arange(len(numbers), dtype=np.int64)
    splits: dict[str, Indices] = {}
    try:
        for name, fraction in fractions.items():
            size = round(fraction * len(numbers))
            rest, splits[name] = train_test_split(rest, test_size=size, stratify=numbers[rest], random_state=seed)
        if folds:
            if np.unique(numbers[rest], return_counts=True)[1].min() < folds:
                raise ValueError
            parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(rest, numbers[rest])
            train, val = list(parts)[fold]
            rest, splits["val"] = rest[train], rest[val]
        splits["train"] = rest
        if any(len(np.unique(numbers[part])) < len(np.unique(numbers)) for part in splits.values()):
            raise ValueError
    except ValueError:  # scikit-learn names no class; the smallest one has too few images
        by = [f"{name} {fraction}" for name, fraction in fractions.items()] + ([f"folds {folds}"] if folds else [])
        rest_fraction = 1 - sum(fractions.values())
        least = math.ceil(max([1 / fraction for fraction in (*fractions.values(), rest_fraction / max(folds, 1))]))
        kinds, counts = np.unique(numbers, return_counts=True)
        smallest = [
            f"'{classes[kind] if classes else kind}' ({count})"
            for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)
            if count < max(least, counts.min() + 1)
        ]
        raise UserError(
            f"{len(numbers)} images of {len(kinds)} classes cannot be split by {', '.join(by)}: too few images of "
            f"{', '.join(smallest[:LISTED_CLASSES])}. Every class needs at least {least}. Add images, raise the "
            "smallest fraction, remove the class, or split the images yourself."
        ) from None
    return {name: np.sort(part) for name, part in splits.items()}


def first_occurrences(hashes: npt.NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Return the sorted indices of the first image of each content, and for every image its place in that list."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return np.sort(first), np.searchsorted(np.sort(first), first[inverse])


def stratified_part(labels: npt.ArrayLike, fraction: float, seed: int) -> Indices:
    """Return sorted indices of ``fraction`` of every class, at least one each. A larger fraction contains a smaller."""
    classes = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(classes))
    parts = [order[classes[order] == label] for label in np.unique(classes)]
    return np.sort(np.concatenate([part[: max(1, round(fraction * len(part)))] for part in parts]))


def content_hash(pixels: Pixels) -> int:
    """Return 64 bits of BLAKE2b over shape and pixels, as a signed integer."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).data)
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class SplitManifest:
    """Content of the splits.

    Args:
        source: class of the dataset.
        counts: images per class, by split.
        hashes: sorted content hashes of the source images, by split.
    """

    source: str
    counts: dict[str, dict[str, int]]
    hashes: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        source: str,
        splits: Mapping[str, Indices],
        labels: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.int64],
        classes: Sequence[str],
    ) -> "SplitManifest":
        """Build the manifest from the indices of every split, and the label and content hash of every image."""
        counts = {}
        for name, part in splits.items():
            several = labels.ndim == 2  # classes per image
            per_class = (labels[part].sum(0) if several else np.bincount(labels[part], minlength=len(classes))).tolist()
            counts[name] = {label: count for label, count in sorted(zip(classes, per_class, strict=True)) if count}
        return cls(source, counts, {name: torch.from_numpy(np.sort(hashes[part])) for name, part in splits.items()})

    @property
    def digest(self) -> str:
        """SHA-256 over names and hashes. Equal digests mean the same images in the same splits."""
        digest = hashlib.sha256()
        for name in sorted(self.hashes):
            digest.update(f"{name}:{len(self.hashes[name])}:".encode())
            digest.update(self.hashes[name].numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data and tensors, for checkpoints."""
        return asdict(self) | {"digest": self.digest}


def label_text(label: Any, classes: Sequence[str]) -> str:
    """Return an index as the name of its class; of 0 and 1 for each class, the names with 1."""
    return JOIN.join(itertools.compress(classes, label)) if np.ndim(label) else classes[label]


def describe_duplicates(
    splits: Mapping[str, Indices],
    labels: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.int64],
    classes: Sequence[str],
    names: Sequence[str],
) -> list[str]:
    """Return one sentence per pair of splits that share images, and one about duplicates with different labels."""
    remarks = []
    for a, b in itertools.combinations(splits, 2):
        shared = splits[a][np.isin(hashes[splits[a]], hashes[splits[b]])]
        if len(shared):
            other = splits[b][hashes[splits[b]] == hashes[shared[0]]][0]
            remarks.append(
                f"{len(shared)} of the {len(splits[a])} images in '{a}' are in '{b}' too, for example "
                f"'{names[shared[0]]}' and '{names[other]}'."
            )
    used = np.concatenate(list(splits.values()))
    first, place = first_occurrences(hashes[used])
    originals = used[first[place]]
    differing = np.flatnonzero((labels[used] != labels[originals]).reshape(len(used), -1).any(axis=1))
    if len(differing):
        one, other = originals[differing[0]], used[differing[0]]
        remarks.append(
            f"{len(differing)} images have a duplicate in another class, for example '{names[one]}' "
            f"({label_text(labels[one], classes)}) and '{names[other]}' ({label_text(labels[other], classes)})."
        )
    return remarks
