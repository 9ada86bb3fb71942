"""Which image is in which split: seeded, stratified, never overlapping, and provable afterwards."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import StratifiedKFold, train_test_split

from upright.errors import UserError
from upright.images import Pixels

Indices = npt.NDArray[np.int64]
SPLITS = ("train", "val", "test")


def stratified_split(
    labels: npt.ArrayLike, fractions: Mapping[str, float], seed: int, *, folds: int = 0, fold: int = 0
) -> dict[str, Indices]:
    """Sorted indices per split: ``train`` gets what the others leave, every class in its share.

    Args:
        labels: the class of every image.
        fractions: of all images, for every split but ``train``, in the order in which they are split off.
        seed: the same seed gives the same split.
        folds: when not 0, ``val`` is one of so many equal parts of what the other splits leave.
        fold: which one, from 0.

    Raises:
        UserError: if the fractions leave nothing, or a class is too small to be in every split.
    """
    if min(fractions.values(), default=0.5) <= 0 or sum(fractions.values()) >= 1:
        raise UserError(f"Split fractions must be above 0 and leave a part for training, got {dict(fractions)}.")
    classes = np.asarray(labels)
    rest = np.arange(len(classes), dtype=np.int64)
    splits: dict[str, Indices] = {}
    try:
        for name, fraction in fractions.items():
            wanted = round(fraction * len(classes))
            rest, part = train_test_split(rest, test_size=wanted, stratify=classes[rest], random_state=seed)
            splits[name] = np.sort(part)
        if folds:
            least = np.unique(classes[rest], return_counts=True)[1].min()
            if least < folds:
                raise ValueError(f"{folds} folds need so many images of every class, and one has {least}")
            parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(rest, classes[rest])
            train, val = list(parts)[fold]
            rest, splits["val"] = rest[train], np.sort(rest[val])
    except ValueError as error:
        by = dict(fractions) | ({"folds": folds} if folds else {})
        raise UserError(
            f"{len(classes)} images of {len(np.unique(classes))} classes cannot be split by {by}: {error}"
        ) from None
    splits["train"] = np.sort(rest)
    for name, part in splits.items():
        if missing := set(classes.tolist()) - set(classes[part].tolist()):
            raise UserError(f"No image of class {sorted(missing)} in split '{name}': too few images of it.")
    return splits


def first_copies(hashes: npt.NDArray[np.int64]) -> tuple[Indices, Indices]:
    """The first image of each content, sorted, and for every image the place in that list of its own content."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return first[order], place[inverse]


def stratified_part(labels: npt.ArrayLike, fraction: float, seed: int) -> Indices:
    """Sorted indices of ``fraction`` of the images of every class, at least one; a smaller part is in every larger."""
    classes = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(classes))
    parts = [order[classes[order] == label] for label in np.unique(classes)]
    return np.sort(np.concatenate([part[: max(1, round(fraction * len(part)))] for part in parts]))


def content_hash(pixels: Pixels) -> int:
    """64 bits of BLAKE2b over shape and pixels, as a signed integer."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class SplitManifest:
    """What was in each split: the dataset, images per class, and the sorted content hashes of the source images."""

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
        """From the indices of every split, and every image's label and content hash."""
        counts = {}
        for name, part in splits.items():
            found = np.bincount(labels[part], minlength=len(classes)).tolist()
            counts[name] = {label: count for label, count in sorted(zip(classes, found, strict=True)) if count}
        return cls(source, counts, {name: torch.from_numpy(np.sort(hashes[part])) for name, part in splits.items()})

    @property
    def digest(self) -> str:
        """SHA-256 over names and hashes: equal digests mean the same images in the same splits."""
        digest = hashlib.sha256()
        for name in sorted(self.hashes):
            digest.update(f"{name}:{len(self.hashes[name])}:".encode())
            digest.update(self.hashes[name].numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain data and tensors, for checkpoints."""
        return {"source": self.source, "counts": self.counts, "hashes": self.hashes, "digest": self.digest}


def copies(
    splits: Mapping[str, Indices],
    labels: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.int64],
    classes: Sequence[str],
    names: Sequence[str],
) -> list[str]:
    """What a user should know of images that are there more than once, in sentences; none where there are none."""
    remarks = []
    for a, b in itertools.combinations(splits, 2):
        if len(twice := np.flatnonzero(np.isin(hashes[splits[a]], hashes[splits[b]]))):
            one = splits[a][twice[0]]
            other = splits[b][hashes[splits[b]] == hashes[one]][0]
            remarks.append(
                f"{len(twice)} of the {len(splits[a])} images in '{a}' are in '{b}' too, for example '{names[one]}' "
                f"and '{names[other]}'."
            )
    used = np.concatenate(list(splits.values()))
    first, place = first_copies(hashes[used])
    differing = np.flatnonzero(labels[used] != labels[used][first][place])
    if len(differing):
        one, other = used[first[place[differing[0]]]], used[differing[0]]
        remarks.append(
            f"{len(differing)} images have a copy of another class, for example '{names[one]}' "
            f"({classes[labels[one]]}) and '{names[other]}' ({classes[labels[other]]})."
        )
    return remarks
