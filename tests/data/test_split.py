import itertools

import numpy as np
import pytest

from upright.data.digits import Digits
from upright.data.split import (
    SplitManifest,
    content_hash,
    describe_duplicates,
    first_occurrences,
    stratified_part,
    stratified_split,
)
from upright.errors import UprightError

LABELS = np.repeat([0, 1, 2], [100, 50, 20])
FRACTIONS = {"val": 0.1, "test": 0.2}


def test_every_image_is_in_one_split_and_every_class_has_its_share() -> None:
    splits = stratified_split(LABELS, FRACTIONS, seed=0)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(170))
    for name, share in {"train": 0.7, **FRACTIONS}.items():
        counts = np.bincount(LABELS[splits[name]])
        assert np.abs(counts - share * np.array([100, 50, 20])).max() <= 1, name


def test_the_split_depends_on_the_seed() -> None:
    first, again, other = (stratified_split(LABELS, FRACTIONS, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["test"], other["test"])


@pytest.mark.parametrize(
    ("labels", "fractions", "text"),
    [
        ([0, 1] * 50, {"val": 0.5, "test": 0.5}, "leave a part for training"),
        ([0, 1] * 50, {"val": 0.0, "test": 0.5}, "above 0"),
        ([0] * 50 + [1], FRACTIONS, "51 images of 2 classes cannot be split"),
        (
            [0] * 50 + [1, 1],
            FRACTIONS,
            r"by val 0.1, test 0.2: too few images of '1' \(2\)\. Every class needs at least 10",
        ),
    ],
)
def test_refuses(labels: list[int], fractions: dict[str, float], text: str) -> None:
    with pytest.raises(UprightError, match=text):
        stratified_split(labels, fractions, seed=0)


def image(value: int) -> np.ndarray:
    return np.full((4, 6, 1), value, np.uint8)


def test_the_hash_depends_on_pixels_and_shape() -> None:
    assert content_hash(image(1)) == content_hash(image(1))
    assert len({content_hash(i) for i in (image(1), image(2), image(1).reshape(6, 4, 1))}) == 3


def test_the_digest_depends_on_the_images_of_each_split() -> None:
    def manifest(train: list[int], test: list[int]) -> SplitManifest:
        splits = {"train": np.array(train), "test": np.array(test)}
        return SplitManifest.of("x.X", splits, np.array([0, 0, 0, 1, 0]), np.arange(5) * 7, ["a", "b"])

    one = manifest([1, 2], [3])
    assert one.counts == {"train": {"a": 2}, "test": {"b": 1}} and one.to_dict()["source"] == "x.X"
    assert one.digest == manifest([2, 1], [3]).digest
    backwards = SplitManifest.of(
        "x.X", {"test": np.array([3]), "train": np.array([1, 2])}, np.zeros(5, int), np.arange(5) * 7, ["a", "b"]
    )
    assert backwards.digest == one.digest
    assert one.digest != manifest([1, 3], [2]).digest
    assert one.digest != manifest([1, 2], [4]).digest


def test_folds_are_equal_disjoint_parts_without_the_test_images() -> None:
    splits = [stratified_split(LABELS, {"test": 0.2}, seed=0, folds=4, fold=fold) for fold in range(4)]
    parts = [part["val"] for part in splits]
    assert len({part["test"].tobytes() for part in splits}) == 1
    assert sorted(np.concatenate([*parts, splits[0]["test"]])) == list(range(170))
    assert max(map(len, parts)) - min(map(len, parts)) <= 3
    for part in splits:
        assert sorted(np.concatenate(list(part.values()))) == list(range(170))
        assert (np.bincount(LABELS[part["val"]]) >= [19, 9, 4]).all()


def test_more_folds_than_images_of_a_class_are_refused() -> None:
    with pytest.raises(
        UprightError, match=r"by test 0\.2, folds 30: too few images of '2' \(20\)\. Every class needs at least 38"
    ):
        stratified_split(LABELS, {"test": 0.2}, seed=0, folds=30)


def test_a_larger_part_contains_a_smaller_one_and_all_have_every_class() -> None:
    parts = [set(stratified_part(LABELS, fraction, seed=0).tolist()) for fraction in (0.001, 0.1, 0.5, 1.0)]
    assert [len(part) for part in parts] == [3, 17, 85, 170]
    assert all(small <= large for small, large in itertools.pairwise(parts))
    assert {LABELS[i] for i in parts[0]} == {0, 1, 2}


def test_duplicates_are_reported() -> None:
    splits = {"train": np.array([0, 1, 2]), "val": np.array([3]), "test": np.array([4, 5])}
    hashes, labels = np.array([10, 11, 12, 13, 12, 11]), np.array([0, 0, 1, 1, 0, 0])
    names = list("uvwxyz")
    assert describe_duplicates(splits, labels, np.arange(6), ["a", "b"], names) == []
    assert describe_duplicates(splits, labels, hashes, ["a", "b"], names) == [
        "2 of the 3 images in 'train' are in 'test' too, for example 'v' and 'z'.",
        "1 images have a duplicate in another class, for example 'w' (b) and 'y' (a).",
    ]


def test_first_occurrences() -> None:
    first, place = first_occurrences(np.array([5, 3, 5, 9, 3]))
    assert first.tolist() == [0, 1, 3] and place.tolist() == [0, 1, 0, 2, 1]


def test_folds_and_parts_depend_on_the_seed() -> None:
    folds = [stratified_split(LABELS, {"test": 0.2}, seed=seed, folds=4)["val"].tolist() for seed in (0, 0, 1)]
    parts = [stratified_part(LABELS, 0.3, seed).tolist() for seed in (0, 0, 1)]
    for first, again, other in (folds, parts):
        assert first == again != other


@pytest.mark.parametrize(
    ("options", "digest"),
    [
        ({}, "56ffd85ab6c1c5bdba26c25f0e8af9c6805b5a3ec43c38fe8c057a07bd9e1d3e"),
        ({"folds": 5, "fold": 2}, "fa764d6043ba9908f2ad61059f4d5fc6a3981308169763137827119d935e1133"),
        ({"train_fraction": 0.1}, "a6b09a3d2c5fb76c53ac28eb3bc4b3ce5db973778cb274b234d03337500ee75b"),
        ({"size": 16, "margin": 0}, "2c5951c3acb628da67f21da3bf4176845ce0ff26b33b56923143d649e020a5b6"),
    ],
    ids=str,
)
def test_digests_equal_those_in_old_checkpoints(options: dict[str, object], digest: str) -> None:
    assert Digits(**options).manifest.digest == digest
