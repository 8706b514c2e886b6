"""Which prompt is asked when: each once before any is asked again, from any position on."""

import pytest
from trl.trainer.utils import RepeatSampler

from r1zero.training.sampler import WindowSampler


def epochs(count: int, window: int, number: int, seed: int = 7, **keys: object) -> list[list[int]]:
    """The prompts of each epoch, each window once and each prompt of it once."""
    sampler = WindowSampler(
        range(count), **{"group": 1, "window": window, "repeats": 1, "shuffle": True, "seed": seed, **keys}
    )
    found = []
    for epoch in range(number):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


@pytest.mark.parametrize(("count", "window"), [(40, 4), (10, 4), (7, 3), (5, 5), (3, 4), (1, 2), (13, 12)])
def test_no_prompt_is_asked_again_before_each_was_asked(count: int, window: int) -> None:
    row = [prompt for epoch in epochs(count, window, 9) for prompt in epoch]
    turns = [row[at : at + count] for at in range(0, len(row) - count + 1, count)]
    assert turns and all(sorted(turn) == list(range(count)) for turn in turns)
    assert count < 5 or len({tuple(turn) for turn in turns}) == len(turns)  # each in an order of its own


@pytest.mark.parametrize("shuffle", [True, False])
def test_where_nothing_is_left_over_the_order_is_that_of_trl(shuffle: bool) -> None:
    keys = {"shuffle": shuffle, "seed": 3}
    theirs = RepeatSampler(range(40), mini_repeat_count=8, batch_size=4, repeat_count=6, **keys)
    ours = WindowSampler(range(40), group=8, window=4, repeats=6, **keys)
    for epoch in range(3):
        ours.set_epoch(epoch)
        assert list(ours) == list(theirs)
    assert len(ours) == len(theirs)


def test_an_epoch_is_the_same_whatever_was_asked_before() -> None:
    alone = WindowSampler(range(10), group=2, window=3, repeats=2, shuffle=True, seed=1)
    alone.set_epoch(4)
    assert list(alone) == epochs(10, 3, 5, seed=1, group=2, repeats=2)[4]
    assert list(alone) == list(alone)
    assert epochs(10, 3, 5, seed=1) != epochs(10, 3, 5, seed=2)
