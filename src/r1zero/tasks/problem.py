"""The noun that every task produces, and the error of a dataset that does not hold it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One question with the one answer that counts as right.

    >>> Problem("What is 12 + 30?", gold="42", source="arithmetic/test")
    Problem(question='What is 12 + 30?', gold='42', source='arithmetic/test', solution='')

    Attributes:
        question: the text put to the model, without any prompt template.
        gold: the right answer, normalized as the task says (GSM8K: the text after ``####``, commas removed).
        source: dataset and split it came from, for per-source metrics.
        solution: a worked solution where the dataset has one; only the cold start reads it.
    """

    question: str
    gold: str
    source: str
    solution: str = ""


class DatasetError(Exception):
    """A dataset that cannot be had, or that does not hold what the task needs; the message names the row."""
