import functools
import itertools
import operator

import numpy as np
import pytest
import torch

from upright.data.cache import PixelArray
from upright.data.loader import BatchLoader, Samples


def samples(count: int) -> Samples:
    pixels = PixelArray(np.zeros((count, 1, 1, 2, 2), np.uint8))
    return Samples(pixels, np.arange(count), torch.arange(count), torch.zeros(count, 1, 3, 3))


def seen(loader: BatchLoader) -> list[list[int]]:
    return [batch.position.tolist() for batch in loader]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[list[int]]:
        loader = BatchLoader(samples(20), 4, shuffle=True, seed=seed)
        loader.sampler.set_epoch(number)
        return seen(loader)

    assert epoch(0, 0) == epoch(0, 0)
    assert len({str(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_the_epoch_may_be_set_after_iter_is_called() -> None:
    late, early = (BatchLoader(samples(20), 4, shuffle=True) for _ in range(2))
    iterator = iter(late)
    late.sampler.set_epoch(5)
    early.sampler.set_epoch(5)
    assert [batch.position.tolist() for batch in iterator] == seen(early)


@pytest.mark.parametrize("handed_out", range(6))
def test_resumes_after_the_batches_that_were_handed_out(handed_out: int) -> None:
    loader, resumed = (BatchLoader(samples(23), 4, shuffle=True, seed=3) for _ in range(2))
    whole = seen(loader)
    state = BatchLoader(samples(23), 4, shuffle=True, seed=3)
    for _ in itertools.islice(state, handed_out):
        pass
    resumed.load_state_dict(state.state_dict())
    assert seen(resumed) == whole[handed_out:]
    assert resumed.state_dict() == state.state_dict() | {"position": 5}
    # Once only: what is asked for again is whole.
    assert seen(resumed) == whole


def test_a_state_of_an_epochs_end_is_not_for_the_next_epoch() -> None:
    loader, resumed = (BatchLoader(samples(23), 4, shuffle=True) for _ in range(2))
    # Lightning may end an epoch early (limit_train_batches).
    for _ in itertools.islice(loader, 2):
        pass
    resumed.load_state_dict(loader.state_dict())
    for one in (loader, resumed):
        one.sampler.set_epoch(1)
    assert seen(resumed) == seen(loader) and len(seen(loader)) == 5


def test_training_drops_what_does_not_fill_a_batch() -> None:
    loader = BatchLoader(samples(23), 4, shuffle=True)
    assert len(loader) == 5 and all(len(batch) == 4 for batch in seen(loader))


def test_a_training_set_smaller_than_a_batch_is_one_batch() -> None:
    assert sorted(seen(BatchLoader(samples(3), 64, shuffle=True))[0]) == [0, 1, 2]
    shared = [BatchLoader(samples(7), 64, shuffle=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(batch) for loader in shared for batch in seen(loader)] == [3, 3]


def test_evaluation_sees_every_sample_once_in_order() -> None:
    loader = BatchLoader(samples(10), 4, shuffle=False)
    assert seen(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(loader) == 3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_split(shuffle: bool, world: int) -> None:
    parts = [BatchLoader(samples(25), 4, shuffle=shuffle, seed=1, rank=rank, world_size=world) for rank in range(world)]
    found = [functools.reduce(operator.iadd, seen(part), []) for part in parts]
    together = sorted(functools.reduce(operator.iadd, found, []))
    assert len(together) == len(set(together))
    if shuffle:
        assert len({len(part) for part in parts}) == 1
        assert len(together) == 25 // (4 * world) * 4 * world
    else:
        assert together == list(range(25))


def test_a_state_that_was_loaded_is_kept_until_it_is_used() -> None:
    loader = BatchLoader(samples(23), 4, shuffle=True)
    loader.load_state_dict({"epoch": 0, "position": 3})
    assert loader.state_dict() == {"epoch": 0, "position": 3}


def test_workers_fetch_what_is_asked_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("upright.data.loader.fetch", lambda read, keys, workers: asked.append(workers) or iter(()))
    assert list(BatchLoader(samples(8), 4, shuffle=False, workers=3)) == [] and asked == [3]
