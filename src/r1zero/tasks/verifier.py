"""Gold against answer: one of four verdicts, never a bare number."""

from dataclasses import dataclass
from enum import StrEnum

from r1zero.tasks.answers import tagged_answer


class Verdict(StrEnum):
    """What became of a completion's answer. The four are counted apart: only the first is worth a reward."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Graded:
    """A completion's answer and its verdict.

    >>> grade("... <answer>42</answer>", gold="42")
    Graded(answer='42', verdict=<Verdict.CORRECT: 'correct'>)
    """

    answer: str | None
    verdict: Verdict


def grade(completion: str, gold: str, remove_commas: bool = True) -> Graded:
    """R1RL's rule: the answer is right when its text equals the gold's (src/r1rl/datasets/gsm8k.py).

    R1RL removes thousands commas from the gold only; here they go from both, so that 1,042 is 1042.
    """
    answer = tagged_answer(completion, remove_commas)
    if answer is None:
        return Graded(None, Verdict.UNPARSED)
    return Graded(answer, Verdict.CORRECT if answer == gold else Verdict.WRONG)
