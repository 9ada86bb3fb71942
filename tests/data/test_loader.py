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


def positions(loader: BatchLoader) -> list[list[int]]:
    return [batch.position.tolist() for batch in loader]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int) -> list[list[int]]:
        loader = BatchLoader(samples(20), 4, shuffle=True, seed=seed)
        loader.sampler.set_epoch(number)
        return positions(loader)

    assert epoch(0, 0) == epoch(0, 0)
    assert len({str(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_the_epoch_may_be_set_after_iter_is_called() -> None:
    late, early = (BatchLoader(samples(20), 4, shuffle=True) for _ in range(2))
    iterator = iter(late)
    late.sampler.set_epoch(5)
    early.sampler.set_epoch(5)
    assert [batch.position.tolist() for batch in iterator] == positions(early)


@pytest.mark.parametrize("delivered", range(6))
def test_resumes_after_the_delivered_batches(delivered: int) -> None:
    loader, resumed = (BatchLoader(samples(23), 4, shuffle=True, seed=3) for _ in range(2))
    all_batches = positions(loader)
    state = BatchLoader(samples(23), 4, shuffle=True, seed=3)
    for _ in itertools.islice(state, delivered):
        pass
    resumed.load_state_dict(state.state_dict())
    assert positions(resumed) == all_batches[delivered:]
    assert resumed.state_dict() == state.state_dict() | {"position": 5}
    # The state is used once: the next iteration is complete.
    assert positions(resumed) == all_batches


def test_the_next_epoch_ignores_the_state_of_an_epochs_end() -> None:
    loader, resumed = (BatchLoader(samples(23), 4, shuffle=True) for _ in range(2))
    # Lightning may end an epoch early (limit_train_batches).
    for _ in itertools.islice(loader, 2):
        pass
    resumed.load_state_dict(loader.state_dict())
    for one in (loader, resumed):
        one.sampler.set_epoch(1)
    assert positions(resumed) == positions(loader) and len(positions(loader)) == 5


def test_training_drops_an_incomplete_batch() -> None:
    loader = BatchLoader(samples(23), 4, shuffle=True)
    assert len(loader) == 5 and all(len(batch) == 4 for batch in positions(loader))


def test_a_training_set_smaller_than_a_batch_is_one_batch() -> None:
    assert sorted(positions(BatchLoader(samples(3), 64, shuffle=True))[0]) == [0, 1, 2]
    shared = [BatchLoader(samples(7), 64, shuffle=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert [len(batch) for loader in shared for batch in positions(loader)] == [3, 3]


def test_evaluation_yields_every_sample_once_in_order() -> None:
    loader = BatchLoader(samples(10), 4, shuffle=False)
    assert positions(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(loader) == 3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_split(shuffle: bool, world: int) -> None:
    parts = [BatchLoader(samples(25), 4, shuffle=shuffle, seed=1, rank=rank, world_size=world) for rank in range(world)]
    shares = [functools.reduce(operator.iadd, positions(part), []) for part in parts]
    together = sorted(functools.reduce(operator.iadd, shares, []))
    assert len(together) == len(set(together))
    if shuffle:
        assert len({len(part) for part in parts}) == 1
        assert len(together) == 25 // (4 * world) * 4 * world
    else:
        assert together == list(range(25))


def test_a_loaded_state_is_returned_until_it_is_used() -> None:
    loader = BatchLoader(samples(23), 4, shuffle=True)
    loader.load_state_dict({"epoch": 0, "position": 3})
    assert loader.state_dict() == {"epoch": 0, "position": 3}


def test_the_number_of_workers_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    workers_used = []
    monkeypatch.setattr(
        "upright.data.loader.fetch", lambda read, arguments, workers: workers_used.append(workers) or iter(())
    )
    assert list(BatchLoader(samples(8), 4, shuffle=False, workers=3)) == [] and workers_used == [3]
