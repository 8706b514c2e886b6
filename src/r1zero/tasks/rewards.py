"""TRL-shaped reward functions over answers and verdicts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from r1zero.tasks.verifier import Verdict, grade

Completion = str | list[dict[str, str]]


def text_of(completion: Completion) -> str:
    """The text of a completion, in TRL's plain or conversational form."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


class CorrectnessReward:
    """1 for a correct answer, 0 otherwise; writes answer and verdict beside each completion.

    The reward of one completion depends on nothing but that completion and its gold.
    """

    __name__ = "correctness"  # the name under which TRL logs it

    def __init__(self, remove_commas: bool = True) -> None:
        self.remove_commas = remove_commas

    def __call__(
        self,
        completions: list[Completion],
        gold: list[str],
        log_extra: Callable[[str, list[Any]], None],
        log_metric: Callable[[str, float], None],
        **unused: Any,
    ) -> list[float]:
        graded = [grade(text_of(c), g, self.remove_commas) for c, g in zip(completions, gold, strict=True)]
        log_extra("answer", [each.answer for each in graded])
        log_extra("verdict", [each.verdict.value for each in graded])
        shares = Counter(each.verdict for each in graded)
        for verdict in Verdict:
            log_metric(f"verdict/{verdict.value}", shares[verdict] / len(graded))
        return [1.0 if each.verdict is Verdict.CORRECT else 0.0 for each in graded]
