"""Which image is in which split: seeded, stratified, never overlapping, and provable afterwards."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.model_selection import train_test_split

from upright.errors import UprightError
from upright.images import Pixels

Indices = npt.NDArray[np.int64]
SPLITS = ("train", "val", "test")


def stratified_split(labels: npt.ArrayLike, fractions: Mapping[str, float], seed: int) -> dict[str, Indices]:
    """Sorted indices per split: ``train`` gets what ``fractions`` leave, every class in its share.

    Args:
        labels: the class of every image.
        fractions: of all images, for every split but ``train``.
        seed: the same seed gives the same split.

    Raises:
        UprightError: if the fractions leave nothing, or a class is too small to be in every split.
    """
    if min(fractions.values()) <= 0 or sum(fractions.values()) >= 1:
        raise UprightError(f"Split fractions must be above 0 and leave a part for training, got {dict(fractions)}.")
    classes = np.asarray(labels)
    rest = np.arange(len(classes), dtype=np.int64)
    splits: dict[str, Indices] = {}
    try:
        for name, fraction in fractions.items():
            wanted = round(fraction * len(classes))
            rest, part = train_test_split(rest, test_size=wanted, stratify=classes[rest], random_state=seed)
            splits[name] = np.sort(part)
    except ValueError as error:
        raise UprightError(
            f"{len(classes)} images of {len(np.unique(classes))} classes cannot be split by {dict(fractions)}: {error}"
        ) from None
    splits["train"] = np.sort(rest)
    for name, part in splits.items():
        if missing := set(classes.tolist()) - set(classes[part].tolist()):
            raise UprightError(f"No image of class {sorted(missing)} in split '{name}': too few images of it.")
    return splits


def content_hash(pixels: Pixels) -> int:
    """64 bits of BLAKE2b over shape and pixels, as a signed integer."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


@dataclass(frozen=True)
class SplitManifest:
    """What was in each split: images per class, and the sorted content hashes of the decoded source images."""

    counts: dict[str, dict[str, int]]
    hashes: dict[str, torch.Tensor]

    @classmethod
    def of(cls, splits: Mapping[str, Iterable[tuple[Pixels, str]]]) -> "SplitManifest":
        """From every split's decoded images and class names."""
        counts: dict[str, dict[str, int]] = {}
        hashes: dict[str, torch.Tensor] = {}
        for name, images in splits.items():
            counts[name], found = {}, []
            for pixels, label in images:
                counts[name][label] = counts[name].get(label, 0) + 1
                found.append(content_hash(pixels))
            counts[name] = dict(sorted(counts[name].items()))
            hashes[name] = torch.tensor(sorted(found), dtype=torch.int64)
        return cls(counts, hashes)

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
        return {"counts": self.counts, "hashes": self.hashes, "digest": self.digest}
