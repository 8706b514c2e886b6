"""Scores: values that are known in closed form, and intervals that hold what they promise."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from r1zero.evaluation import scores
from r1zero.evaluation.scores import Z95, Score, difference, majority, mean_score, pass_at_k

ACCURACIES = (0.02, 0.035, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.965, 0.98)
SPREADS = (0.0, 0.1, 0.3, 0.6, 0.9)  # correlation of two samples of a question


def roots(p: float, n: float) -> tuple[float, float]:
    """The ends of Wilson's interval, as the two roots of (p - x)^2 = z^2 x (1 - x) / n."""
    a, b, c = 1 + Z95**2 / n, -(2 * p + Z95**2 / n), p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize(("right", "n"), [(1, 2), (3, 10), (13, 200), (199, 200), (700, 1319)])
def test_one_sample_a_question_is_wilsons_interval(right: int, n: int) -> None:
    """With n - 1 trials: the spread of a sample has n - 1 degrees of freedom."""
    score = mean_score([[1.0]] * right + [[0.0]] * (n - right))
    low, high = roots(right / n, n - 1)
    assert score == Score(round(right / n, 4), round(low, 3), round(high, 3), n, 1)


def test_the_example_of_its_docstring() -> None:
    assert mean_score([[1, 0], [1, 1], [0, 0], [1, 0]]) == Score(0.5, 0.192, 0.808, questions=4, samples=2)


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("right", [0.0, 1.0])
def test_all_alike_is_no_certainty(right: float, samples: int) -> None:
    score = mean_score([[right] * samples] * 50)
    assert score.mean == right and (score.low if right == 0 else score.high) == right
    assert 0.02 < score.high - score.low < 0.1


def test_one_question_is_hardly_evidence() -> None:
    score = mean_score([[1, 1, 1, 0]])
    assert score.mean == 0.75
    assert score.high - score.low > 0.7


def test_samples_of_one_question_that_agree_count_as_one() -> None:
    """300 of 600 right: 600 independent answers, or 150 questions of which each is always right or always wrong."""
    apart = mean_score([[1], [0]] * 300)
    spread = mean_score([[1, 0, 1, 0]] * 75 + [[1, 1, 0, 0]] * 74 + [[1, 0, 0, 0]])
    together = mean_score([[1] * 4, [0] * 4] * 75)
    assert together.high - together.low == pytest.approx(2 * (apart.high - apart.low), abs=0.004)
    assert spread.high - spread.low == pytest.approx(apart.high - apart.low, abs=0.003)


def test_the_order_of_questions_and_samples_is_nothing() -> None:
    outcomes = [[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert mean_score(outcomes) == mean_score([row[::-1] for row in outcomes[::-1]])


def test_a_score_as_a_person_reads_it() -> None:
    assert str(Score(0.3217, 0.28, 0.365, 200, 4)) == "32.2 % [28.0, 36.5]"


@pytest.mark.parametrize(("samples", "correct"), [(1, 1), (4, 1), (8, 0), (8, 3), (8, 8), (10, 9)])
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_one(samples: int, correct: int) -> None:
    right = [1] * correct + [0] * (samples - correct)
    for k in range(1, samples + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(correct, samples, k) == pytest.approx(sum(any(each) for each in subsets) / len(subsets))


def test_pass_at_k_has_no_bias() -> None:
    """The mean over questions of known chances is the closed form, 1 - (1 - p)^k."""
    rng = np.random.default_rng(0)
    chances = rng.beta(0.5, 1.0, 20_000)
    found = [pass_at_k(int(correct), 16, 4) for correct in rng.binomial(16, chances)]
    assert np.mean(found) == pytest.approx(np.mean(1 - (1 - chances) ** 4), abs=0.006)


def test_pass_at_more_than_was_sampled_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 cannot be told from 4 samples"):
        pass_at_k(1, 4, 5)


@pytest.mark.parametrize(
    ("answers", "right", "share"),
    [
        ([0, 0, 1], 0, 1.0),
        ([0, 1, 1], 0, 0.0),
        ([0, 1, None], 0, 0.5),
        ([0, 1, 2, 3], 3, 0.25),
        ([None, None, 0], 0, 1.0),
        ([None, None], None, 0.0),
        ([1, 1], None, 0.0),
    ],
)
def test_the_answer_of_most(answers: list[int | None], right: int | None, share: float) -> None:
    assert majority(answers, right) == share


def test_a_difference_on_the_same_questions_is_narrower_than_of_two_scores() -> None:
    rng = np.random.default_rng(0)
    hard = rng.beta(0.4, 0.6, (400, 1))
    before, after = ((rng.random((400, 4)) < hard * share).astype(int).tolist() for share in (0.8, 0.9))
    found = difference(before, after)
    one, two = mean_score(before), mean_score(after)
    apart = math.hypot(one.high - one.low, two.high - two.low)
    assert found.mean == pytest.approx(two.mean - one.mean, abs=1e-3)
    assert found.high - found.low < 0.6 * apart
    turned = difference(after, before)
    assert (turned.mean, turned.low, turned.high) == (-found.mean, -found.high, -found.low)


def test_a_difference_of_equal_models_is_no_certainty_and_needs_the_same_questions() -> None:
    same = difference([[0], [1]] * 20, [[0], [1]] * 20)
    assert same.mean == 0 and same.low <= 0 <= same.high
    assert difference([[0]] * 30, [[0]] * 30).high > 0.05
    with pytest.raises(ValueError, match="30 questions cannot be paired with 20"):
        difference([[0]] * 30, [[0]] * 20)


def coverage(
    n: int, k: int, spread: float, p: float, repeats: int, rng: Any, kind: str = "beta"
) -> tuple[float, float]:
    """How often the interval of a mean holds p, and that of a paired difference holds the true one."""
    chances = np.full((repeats, n), p)
    if spread and kind == "beta":
        chances = rng.beta(p * (1 / spread - 1), (1 - p) * (1 / spread - 1), (repeats, n))
    elif spread:  # each question is hopeless, or right with one and the same chance; for p above 1/2 turned round
        rare = min(p, 1 - p)
        chance = rare + spread * (1 - rare)
        chances = np.where(rng.random((repeats, n)) < rare / chance, chance, 0.0)
        chances = chances if p <= 0.5 else 1 - chances
    means = rng.binomial(k, chances) / k
    better = rng.binomial(k, 0.9 * chances + 0.05) / k
    sides = []
    for each in (means, better):
        low, high = scores.wilson(each.mean(axis=1), n * k / scores.design_effects(each, k))
        sides.append((each.mean(axis=1), low, high))
    _, low, high = scores.paired(sides[0], sides[1], scores.correlation(means, better))
    gain = 0.05 - 0.1 * p
    held = (sides[0][1] <= p) & (p <= sides[0][2])
    return float(held.mean()), float(((low <= gain) & (gain <= high)).mean())


@pytest.mark.parametrize("n", [30, 500])
@pytest.mark.parametrize("k", [1, 8, 32])
def test_the_interval_holds_the_truth_95_times_in_100(n: int, k: int) -> None:
    """A short form of the next: some accuracies and spreads, 400 repeats each."""
    rng = np.random.default_rng(n + k)
    spreads = (0.0, 0.3, 0.9) if k > 1 else (0.0,)
    accuracies = (0.05, 0.3, 0.95)
    held = [coverage(n, k, spread, p, 400, rng) for spread in spreads for p in accuracies]
    means, paired = zip(*held, strict=True)
    assert 0.935 <= np.mean(means) <= 0.97
    assert min(means) >= (0.9 if n == 30 else 0.92)
    assert np.mean(paired) >= 0.94 and min(paired) >= 0.91


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["beta", "two chances"])
@pytest.mark.parametrize("n", [30, 500, 1319])
@pytest.mark.parametrize("k", [1, 8, 32])
def test_the_interval_holds_the_truth_over_2000_repeats(n: int, k: int, kind: str) -> None:
    """Every accuracy and spread; printed as the table of docs/evaluation.md."""
    if k == 1 and kind != "beta":
        pytest.skip("one sample a question has no spread")
    rng = np.random.default_rng(n * 100 + k)
    cases = [(spread, p) for spread in (SPREADS if k > 1 else (0.0,)) for p in ACCURACIES if spread or kind == "beta"]
    held = [coverage(n, k, spread, p, 2000, rng, kind) for spread, p in cases]
    means, paired = (np.array(each) for each in zip(*held, strict=True))
    inside = ((means >= 0.93) & (means <= 0.97)).mean()
    print(
        f"\n| {n} | {k} | {kind} | {100 * means.mean():.1f} | {100 * means.min():.1f} to {100 * means.max():.1f} | "
        f"{inside:.0%} of {len(means)} | {100 * paired.mean():.1f} | {100 * paired.min():.1f} |"
    )
    assert 0.93 <= means.mean() <= 0.97
    if n >= 500:
        assert means.min() >= 0.93 and means.max() <= 0.975
    assert means.min() >= 0.905
    assert paired.mean() >= 0.94 and paired.min() >= 0.925
