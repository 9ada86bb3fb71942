import numpy as np
import pytest

from upright.data.split import SplitManifest, content_hash, stratified_split
from upright.errors import UprightError

LABELS = np.repeat([0, 1, 2], [100, 50, 20])
FRACTIONS = {"val": 0.1, "test": 0.2}


def test_every_image_once_and_every_class_in_its_share() -> None:
    splits = stratified_split(LABELS, FRACTIONS, seed=0)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(170))
    for name, share in {"train": 0.7, **FRACTIONS}.items():
        counts = np.bincount(LABELS[splits[name]])
        assert np.abs(counts - share * np.array([100, 50, 20])).max() <= 1, name


def test_the_seed_decides() -> None:
    first, again, other = (stratified_split(LABELS, FRACTIONS, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["test"], other["test"])


@pytest.mark.parametrize(
    ("labels", "fractions", "text"),
    [
        ([0, 1] * 50, {"val": 0.5, "test": 0.5}, "leave a part for training"),
        ([0, 1] * 50, {"val": 0.0, "test": 0.5}, "above 0"),
        ([0] * 50 + [1], FRACTIONS, "51 images of 2 classes cannot be split"),
        ([0] * 50 + [1, 1], FRACTIONS, r"of class|cannot be split"),
    ],
)
def test_refuses(labels: list[int], fractions: dict[str, float], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        stratified_split(labels, fractions, seed=0)


def image(value: int) -> np.ndarray:
    return np.full((4, 6, 1), value, np.uint8)


def test_the_hash_knows_pixels_and_shape() -> None:
    assert content_hash(image(1)) == content_hash(image(1))
    assert len({content_hash(i) for i in (image(1), image(2), image(1).reshape(6, 4, 1))}) == 3


def test_the_digest_knows_which_image_is_in_which_split() -> None:
    def manifest(train: list[int], test: list[int]) -> SplitManifest:
        return SplitManifest.of({"train": [(image(v), "a") for v in train], "test": [(image(v), "b") for v in test]})

    one = manifest([1, 2], [3])
    assert one.counts == {"train": {"a": 2}, "test": {"b": 1}}
    assert one.digest == manifest([2, 1], [3]).digest
    assert one.digest != manifest([1, 3], [2]).digest
    assert one.digest != manifest([1, 2], [4]).digest
