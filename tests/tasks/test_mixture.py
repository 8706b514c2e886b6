"""The shares of a mixture: as the weights say, as many as there are, no problem twice."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1zero.tasks import mixture
from r1zero.tasks.problem import DatasetError, Problem


@pytest.mark.parametrize(
    ("weights", "available", "counts"),
    [
        ([1], [7], [7]),
        ([1, 1], [100, 40], [40, 40]),
        ([3, 1], [100, 40], [100, 33]),
        ([0.3, 0.7], [3, 100], [3, 7]),  # exactly: in binary fractions 0.7 / 0.3 * 3 is a little below 7
        ([0.1, 0.2], [5, 10], [5, 10]),
        ([2, 1, 1], [10, 10, 3], [6, 3, 3]),
    ],
)
def test_counts(weights: list[float], available: list[int], counts: list[int]) -> None:
    assert mixture.counts(weights, available) == counts


PARTS = st.lists(st.tuples(st.floats(0.01, 100).map(lambda x: round(x, 2)), st.integers(1, 10_000)), min_size=1)


@given(PARTS)
def test_the_scarcest_part_gives_all_and_the_others_their_share_of_it(parts: list[tuple[float, int]]) -> None:
    weights, available = [part[0] for part in parts], [part[1] for part in parts]
    counts = mixture.counts(weights, available)
    assert all(0 <= count <= have for count, have in zip(counts, available, strict=True))
    assert any(count == have for count, have in zip(counts, available, strict=True))
    unit = min(have / weight for weight, have in zip(weights, available, strict=True))
    for weight, count in zip(weights, counts, strict=True):
        assert unit * weight - 1.001 < count < unit * weight + 0.001


def problems(name: str, count: int) -> list[Problem]:
    return [Problem(f"{name}{number}?", "1", f"{name}/train") for number in range(count)]


def test_the_seed_decides_which_problems_and_none_comes_twice() -> None:
    parts = [problems("a", 50), problems("b", 500)]
    first, again, other = (mixture.draw(parts, [1, 2], seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert [len(part) for part in first] == [50, 100]
    for drawn, part in zip(first, parts, strict=True):
        assert max(Counter(problem.question for problem in drawn).values()) == 1
        assert drawn == [problem for problem in part if problem in drawn]


def test_a_weight_that_gives_nothing_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"weight 0\.001 gives no problem to a part of 5; .*\[5, 0\]"):
        mixture.draw([problems("a", 5), problems("b", 5)], [1, 0.001], 0)
