"""Training problems that repeat what is measured on: found by n-grams of words, as GPT-3's data was (Brown et al. 2020,
arXiv:2005.14165, appendix C): lower-cased, split at white space, punctuation dropped, 13 words in a row.

Of GSM8K's 7,473 training problems 4 share 13 words in a row with one of the 1,319 test problems, and all 4 are the same
story with other names or numbers. At 10 words they are 11, at 8 (open-r1's choice) 89, and nearly all of those share a
phrase such as "how many hours a week does he spend". Hence 13.
"""

from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT_NGRAM = 13
# What is stripped from a word's ends. Signs such as + and - stay: without them 3 - 5 and 3 + 5 would be one question.
_PUNCTUATION = ".,;:!?\"'`()[]{}$\\…“”‘’"


@dataclass(frozen=True)
class Overlap:
    """What a training question shares with a measured one.

    Attributes:
        words: the shared words.
        measured: the measured question.
    """

    words: str
    measured: str


class MeasuredQuestions:
    """The questions measured on, ready to be compared with.

    >>> MeasuredQuestions(["How many eggs do 3 ducks lay?"], ngram=4).overlap("So how many eggs do they lay?").words
    'how many eggs do'
    """

    def __init__(self, questions: Iterable[str], ngram: int) -> None:
        """Take the n-grams of all questions; one of fewer than `ngram` words is kept whole."""
        self._ngram = ngram
        self._question_of: dict[tuple[str, ...], str] = {}
        for question in questions:
            for gram in self._grams(question):
                self._question_of.setdefault(gram, question)

    def overlap(self, question: str) -> Overlap | None:
        """The first n-gram of `question` that a measured one has too; one of fewer words is compared whole."""
        for gram in self._grams(question):
            if gram in self._question_of:
                return Overlap(" ".join(gram), self._question_of[gram])
        return None

    def _grams(self, question: str) -> Iterable[tuple[str, ...]]:
        found = words(question)
        last = max(len(found) - self._ngram, 0)
        return (tuple(found[at : at + self._ngram]) for at in range(last + 1))


def words(question: str) -> list[str]:
    """The words of a question, lower-cased, without the punctuation at their ends.

    >>> words("What is 12 + 30?")
    ['what', 'is', '12', '+', '30']
    """
    stripped = (word.strip(_PUNCTUATION) for word in question.lower().split())
    return [word for word in stripped if word]
