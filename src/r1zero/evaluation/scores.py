"""Scores with the interval that chance allows. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Score:
    """A mean over questions with its 95 % interval.

    >>> mean_score([[1, 0], [1, 1], [0, 0], [1, 0]])
    Score(mean=0.5, low=0.188, high=0.812, questions=4, samples=2)

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


def mean_score(outcomes: Sequence[Sequence[float]]) -> Score:
    """Mean of k samples over n questions, with a 95 % interval that treats each question as a cluster.

    Samples of one question are not independent, so the standard error comes from the spread of the question means
    (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, section 2.2). It is turned into an effective number of
    trials p(1-p)/se^2, and that into a Wilson score interval (Wilson 1927), which stays inside [0, 1] and does not
    shrink to nothing when every answer is right (Korn and Graubard 1998 do the same for survey clusters).

    Args:
        outcomes: shape (n questions, k samples), each 1 for correct and 0 for not.
    """
    n = len(outcomes)
    means = [sum(row) / len(row) for row in outcomes]
    p = sum(means) / n
    variance = sum((m - p) ** 2 for m in means) / (n - 1) / n if n > 1 else 0.0
    trials = min(p * (1 - p) / variance, sum(len(row) for row in outcomes)) if variance > 0 else float(n)
    centre = (p + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    half = Z95 / (1 + Z95**2 / trials) * math.sqrt(p * (1 - p) / trials + Z95**2 / (4 * trials**2))
    return Score(
        mean=round(p, 4),
        low=round(max(0.0, centre - half), 3),
        high=round(min(1.0, centre + half), 3),
        questions=n,
        samples=len(outcomes[0]),
    )
