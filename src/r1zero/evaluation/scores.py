"""Scores with the interval that chance allows. No torch.

What is measured is the mean over the questions that a benchmark could have asked: questions are the sample, and the
completions of one question belong together (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 2.2).
docs/evaluation.md says where each formula comes from and how often its interval held the truth in simulation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Z95 = 1.959964
PRIOR_ANSWERS = 4.0  # right or wrong questions, whichever are fewer, at which what is measured outweighs the model
_MEANS, _CORRELATIONS = 48, 32  # grid of the model; finer ones change the third digit of a design effect


@dataclass(frozen=True)
class Score:
    """A mean over questions with its 95 % interval.

    >>> mean_score([[1, 0], [1, 1], [0, 0], [1, 0]])
    Score(mean=0.5, low=0.192, high=0.808, questions=4, samples=2)

    Attributes:
        mean: share of correct completions, every question weighing the same.
        low: lower end of the interval.
        high: upper end.
        questions: how many questions.
        samples: completions a question.
    """

    mean: float
    low: float
    high: float
    questions: int
    samples: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Difference:
    """How much better the second of two models is on the same questions, with its 95 % interval.

    >>> difference([[0], [0], [1], [1]] * 10, [[1], [0], [1], [1]] * 10)
    Difference(mean=0.25, low=0.11, high=0.374, questions=40)

    Attributes:
        mean: of the second less that of the first.
        low: lower end of the interval; above 0 the second is better than chance explains.
        high: upper end.
        questions: that both were asked.
    """

    mean: float
    low: float
    high: float
    questions: int

    def __str__(self) -> str:
        return f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def mean_score(outcomes: Sequence[Sequence[float]]) -> Score:
    """Mean of k samples over n questions, with a 95 % interval that treats each question as a cluster.

    Samples of one question are not independent: they are worth as many independent ones as their number divided by the
    design effect, the variance of the mean over what it were with independent samples (Kish 1965). That effective
    number goes into Wilson's score interval (Wilson 1927), which stays inside [0, 1] and is no point when every answer
    is right; so do Korn and Graubard 1998 and Franco et al. 2019 for survey clusters. How the design effect is
    estimated says `design_effect`.

    Args:
        outcomes: shape (n questions, k samples), each from 0 for wrong to 1 for correct.
    """
    values = np.asarray(outcomes, dtype=float)
    mean, low, high = interval(values)
    return Score(
        mean=round(mean, 4), low=round(low, 3), high=round(high, 3), questions=len(values), samples=values.shape[1]
    )


def interval(values: Any) -> tuple[float, float, float]:
    """(mean, low, high) of outcomes in [0, 1], shape (n questions, k samples); see `mean_score`."""
    means = values.mean(axis=1)
    mean = float(means.mean())
    trials = np.array([values.size / design_effect(values)])
    low, high = wilson(np.array([mean]), trials)
    return mean, float(low[0]), float(high[0])


def design_effect(values: Any) -> float:
    """The variance of the mean over what it were with independent samples, n k of them; from 1 to about k.

    Measured by the spread of the question means, it is far too small where few questions are answered at all, or few
    are missed: 30 questions at 3 % say nothing on how much those that are right belong together, and intervals then
    held the truth in 80 of 100 cases. So it is the mean of two, weighted by how many questions there are to learn it
    from: what was measured, and what the beta-binomial model expects with nothing known beforehand (Beta(1/2, 1/2) for
    the mean and for the correlation of two samples of a question).

    Args:
        values: outcomes, shape (n questions, k samples).
    """
    k, means = values.shape[1], values.mean(axis=1)
    return float(design_effects(means[None], k, bool(np.isin(values, (0.0, 1.0)).all()))[0])


def design_effects(means: Any, k: int, counted: bool = True) -> Any:
    """`design_effect` of many measurements at once.

    Args:
        means: of each question, shape (measurements, n questions).
        k: samples a question.
        counted: whether these are shares of k that are right or wrong, which the beta-binomial model is about.

    Returns:
        Shape (measurements,).
    """
    n = means.shape[1]
    mean = means.mean(axis=1)
    chance = mean * (1 - mean)
    if n == 1:
        return np.full(len(means), float(k))
    variance = means.var(axis=1, ddof=1) / n
    varies = chance > 1e-12
    # All alike: as if each question had one sample.
    measured = np.where(varies, np.maximum(variance / np.where(varies, chance, 1.0) * n * k, 1.0), float(k))
    if k == 1:
        return np.where(varies, n / (n - 1), 1.0)
    if not counted:
        return measured
    expected = 1 + (k - 1) * _expected_correlations(np.rint(means * k).astype(int), k)
    known = n * np.minimum(mean, 1 - mean)
    return (known * measured + PRIOR_ANSWERS * expected) / (known + PRIOR_ANSWERS)


def wilson(mean: Any, trials: Any) -> tuple[Any, Any]:
    """Ends of Wilson's 95 % interval for a share `mean` of `trials`, which need not be whole; both arrays."""
    centre = (mean + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    half = Z95 / (1 + Z95**2 / trials) * np.sqrt(mean * (1 - mean) / trials + Z95**2 / (4 * trials**2))
    # Rounding must not leave the mean outside.
    return np.clip(centre - half, 0.0, mean), np.clip(centre + half, mean, 1.0)


def difference(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Difference:
    """Mean of `after` less mean of `before` over the same questions in the same order, with a 95 % interval.

    From the two models' own intervals and the correlation of their question means, so that it is never a point and
    never leaves [-1, 1] (Newcombe 1998, Statistics in Medicine 17:2635, method 10; Zou and Donner 2008 in general).
    Questions that both find hard make it narrower than two separate scores.

    Args:
        before: outcomes of the first model, shape (n questions, k samples).
        after: of the second; its k may be another.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} questions cannot be paired with {len(second)}")
    one, two = interval(first), interval(second)
    shared = correlation(first.mean(axis=1), second.mean(axis=1))
    mean, low, high = paired(one, two, shared)
    return Difference(round(mean, 4), round(low, 3), round(high, 3), len(first))


def paired(one: tuple[Any, Any, Any], two: tuple[Any, Any, Any], shared: Any) -> tuple[Any, Any, Any]:
    """(mean, low, high) of the second less the first, from (mean, low, high) of each and their correlation."""
    below_one, above_one = one[0] - one[1], one[2] - one[0]
    below_two, above_two = two[0] - two[1], two[2] - two[0]
    mean = two[0] - one[0]
    down = np.sqrt(np.maximum(below_two**2 - 2 * shared * below_two * above_one + above_one**2, 0))
    up = np.sqrt(np.maximum(above_two**2 - 2 * shared * above_two * below_one + below_one**2, 0))
    return mean, np.maximum(mean - down, -1.0), np.minimum(mean + up, 1.0)


def correlation(one: Any, two: Any) -> Any:
    """Of the question means of two models; 0 where one of them does not vary. Over the last axis."""
    a, b = one - one.mean(axis=-1, keepdims=True), two - two.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.where(scale > 1e-12, (a * b).sum(axis=-1) / np.where(scale > 1e-12, scale, 1.0), 0.0)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The chance that k of the samples hold a correct one, without bias (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    >>> pass_at_k(1, 4, 2), pass_at_k(0, 4, 2), pass_at_k(3, 4, 2)
    (0.5, 0.0, 1.0)

    Args:
        correct: samples that are right.
        samples: all of them.
        k: drawn from these without putting back; at most `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be told from {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(answers: Sequence[int | None], right: int | None) -> float:
    """Whether the answer that most samples of a question gave is right; where several lead, the chance of one of them.

    >>> majority([0, 1, 1, None], 1), majority([0, 1], 1), majority([None], None)
    (1.0, 0.5, 0.0)

    Args:
        answers: of each sample, equal answers by equal numbers; None for no answer, which has no vote.
        right: the number of the correct answer; None where nobody gave it.
    """
    votes: dict[int, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    leading = [answer for answer, count in votes.items() if count == max(votes.values())]
    return 1.0 / len(leading) if right is not None and right in leading else 0.0


def _expected_correlations(counts: Any, k: int) -> Any:
    """What the beta-binomial model expects of the correlation of two samples of a question, given what was counted.

    Args:
        counts: correct samples of each question, shape (measurements, n questions).
        k: samples a question.

    Returns:
        Shape (measurements,).
    """
    logarithms, correlations = _beta_binomial(k)
    seen = np.stack([(counts == count).sum(axis=1) for count in range(k + 1)], axis=1).astype(float)
    expected = []
    for some in np.array_split(seen, max(1, len(seen) // 512)):  # bounds the memory
        likelihood = (some @ logarithms.reshape(k + 1, -1)).reshape(-1, _MEANS, _CORRELATIONS)
        weights = np.exp(likelihood - likelihood.max(axis=(1, 2), keepdims=True)).sum(axis=1)
        expected.append((weights * correlations).sum(axis=1) / weights.sum(axis=1))
    return np.concatenate(expected)


@lru_cache(maxsize=8)
def _beta_binomial(k: int) -> tuple[Any, Any]:
    """Logarithm of the chance of 0 to k correct samples, shape (k + 1, means, correlations), and the correlations.

    Means and correlations are evenly spaced in the scale in which Beta(1/2, 1/2) is even, arcsine of the root.
    """

    def even(count: int) -> Any:
        return np.sin((np.arange(count) + 0.5) / count * np.pi / 2) ** 2

    means, correlations = even(_MEANS), even(_CORRELATIONS)
    # Beta(a, b) around a mean m has the correlation 1 / (a + b + 1).
    size = 1 / correlations - 1
    a, b = means[:, None] * size, (1 - means)[:, None] * size
    counts = np.arange(k + 1.0)[:, None, None]
    ways = _log_gamma(np.array(k + 1.0)) - _log_gamma(counts + 1) - _log_gamma(k - counts + 1)
    with_counts = _log_gamma(a + counts) + _log_gamma(b + k - counts) - _log_gamma(a + b + k)
    return ways + with_counts - (_log_gamma(a) + _log_gamma(b) - _log_gamma(a + b)), correlations


_log_gamma = np.vectorize(math.lgamma, otypes=[float])
