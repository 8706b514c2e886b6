"""The task of the embedded model: what is asked, what counts as right, and what is kept apart."""

import random
import re

import pytest

from r1zero.tasks import arithmetic


def numbers(question: str) -> tuple[int, int]:
    match = re.fullmatch(r"What is (\d\d) \+ (\d\d)\?", question)
    assert match, question
    return int(match[1]), int(match[2])


def test_a_split_is_the_same_each_time_and_the_seed_decides_its_order_only() -> None:
    first, again, other = arithmetic.load("test"), arithmetic.load("test"), arithmetic.load("test", seed=1)
    assert first == again
    assert first != other
    assert sorted(p.question for p in first) == sorted(p.question for p in other)


def test_the_splits_share_nothing_not_even_with_the_numbers_swapped() -> None:
    train = {numbers(p.question) for p in arithmetic.load("train")}
    test = {numbers(p.question) for p in arithmetic.load("test")}
    assert len(test) == 500
    assert len(train) == 8100 - 500
    assert not train & (test | {(b, a) for a, b in test})


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_gold_answer_is_the_sum_and_so_is_the_worked_one(split: str) -> None:
    for problem in arithmetic.load(split):
        a, b = numbers(problem.question)
        assert problem.gold == str(a + b)
        tens, ones = int(problem.solution.rpartition("=")[2]), int(problem.solution.split("\n")[0][-1])
        assert 10 * tens + ones == a + b
        assert problem.source == f"arithmetic/{split}"


def test_the_worked_solution_reads_as_column_addition() -> None:
    assert arithmetic.worked_solution(47, 38) == "ones 7+8=15\ntens 4+3+1=8"
    assert arithmetic.worked_solution(41, 32) == "ones 1+2=3\ntens 4+3=7"


def test_each_step_of_each_worked_solution_is_true() -> None:
    for problem in arithmetic.load("train"):
        for left, right in re.findall(r"([\d+]+)=(\d+)", problem.solution):
            assert sum(map(int, left.split("+"))) == int(right)


def test_careless_solutions_are_mostly_wrong_but_right_often_enough_to_learn_from() -> None:
    rng = random.Random(0)
    drawn = rng.choices(arithmetic.pairs("train"), k=4000)
    right = sum(arithmetic.careless_solution(a, b, rng)[1] == a + b for a, b in drawn)
    assert 0.25 < right / len(drawn) < 0.5


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'train' and 'test', not 'dev'"):
        arithmetic.load("dev")
