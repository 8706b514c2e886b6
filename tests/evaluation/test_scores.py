"""Scores: values that are known in closed form, and intervals that hold what they promise."""

import math

import numpy as np
import pytest

from r1zero.evaluation.scores import Z95, Score, mean_score


def wilson(p: float, n: float) -> tuple[float, float]:
    """The ends of Wilson's interval, as the two roots of (p - x)^2 = z^2 x (1 - x) / n."""
    a, b, c = 1 + Z95**2 / n, -(2 * p + Z95**2 / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("right", "n"), [(1, 2), (3, 10), (13, 200), (199, 200), (700, 1319)])
def test_one_sample_a_question_is_wilsons_interval(right: int, n: int) -> None:
    """With n - 1 trials: the spread of a sample has n - 1 degrees of freedom."""
    score = mean_score([[1.0]] * right + [[0.0]] * (n - right))
    low, high = wilson(right / n, n - 1)
    assert score == Score(round(right / n, 4), round(low, 3), round(high, 3), n, 1)


def test_the_example_of_its_docstring() -> None:
    assert mean_score([[1, 0], [1, 1], [0, 0], [1, 0]]) == Score(0.5, 0.188, 0.812, questions=4, samples=2)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_alike_is_no_certainty(right: float, samples: int) -> None:
    score = mean_score([[right] * samples] * 50)
    low, high = wilson(right, 50)
    assert score == Score(right, round(max(0.0, low), 3), round(min(1.0, high), 3), 50, samples)
    assert 0.05 < score.high - score.low < 0.1


def test_one_question_is_hardly_evidence() -> None:
    score = mean_score([[1, 1, 1, 0]])
    assert score.mean == 0.75
    assert score.high - score.low > 0.7


def test_samples_of_one_question_that_agree_count_as_one() -> None:
    """300 of 600 right: 600 independent answers, or 150 questions of which each is always right or always wrong."""
    apart = mean_score([[1], [0]] * 300)
    spread = mean_score([[1, 0, 1, 0]] * 75 + [[1, 1, 0, 0]] * 74 + [[1, 0, 0, 0]])
    together = mean_score([[1] * 4, [0] * 4] * 75)
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), abs=0.003)
    assert spread.high - spread.low == pytest.approx(apart.high - apart.low, abs=0.003)


def test_the_order_of_questions_and_samples_is_nothing() -> None:
    outcomes = [[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert mean_score(outcomes) == mean_score([row[::-1] for row in outcomes[::-1]])


def test_a_score_as_a_person_reads_it() -> None:
    assert str(Score(0.3217, 0.28, 0.365, 200, 4)) == "32.2 % [28.0, 36.5]"


@pytest.mark.parametrize("p", [0.03, 0.4, 0.95])
@pytest.mark.parametrize("alike", [None, 1.0], ids=["equally hard", "easy and hard"])
def test_the_interval_holds_the_truth_95_times_in_100(alike: float | None, p: float) -> None:
    """2000 measurements of 200 questions x 4; with `alike`, each question's chance is drawn from a Beta around p."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        chance = np.full(200, p) if alike is None else rng.beta(p * alike, (1 - p) * alike, 200)
        score = mean_score((rng.random((200, 4)) < chance[:, None]).astype(int).tolist())
        held += score.low <= p <= score.high
    assert 0.93 <= held / 2000 <= 0.97
