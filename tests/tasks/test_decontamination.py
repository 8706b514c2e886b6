"""Which training questions repeat a measured one, and which do not."""

import pytest

from r1zero.tasks import load_problems
from r1zero.tasks.decontamination import MeasuredQuestions

MEASURED = "A plane travels 1200 miles in 3 hours. At the same rate, how many additional hours would it take?"


@pytest.mark.parametrize(
    ("question", "shared"),
    [
        (MEASURED, "a plane travels 1200 miles"),
        ("Yesterday: “A PLANE travels\n 1200 miles”, they said.", "a plane travels 1200 miles"),
        ("It took 3 hours, at (the) same rate!", "3 hours at the same"),
        ("In 3 hours at another rate", None),
        ("A train travels 270 miles in 2 hours.", None),
        ("A plane travels", None),
        ("", None),
    ],
)
def test_five_words_in_a_row(question: str, shared: str | None) -> None:
    overlap = MeasuredQuestions([MEASURED], ngram=5).overlap(question)
    assert (overlap and overlap.words) == shared
    if overlap:
        assert overlap.measured == MEASURED


@pytest.mark.parametrize(
    ("question", "same"),
    [
        ("Compute $3-5$.", True),
        ("compute 3-5", True),
        ("Compute $3+5$.", False),
        ("Compute 3 - 5", False),
        ("Compute $3-5$ now.", False),
        ("Please compute $3-5$ and then, once that is done, double what you have found.", False),
    ],
)
def test_a_question_of_fewer_words_is_compared_whole(question: str, same: bool) -> None:
    assert (MeasuredQuestions(["Compute $3-5$."], ngram=13).overlap(question) is not None) == same


def test_signs_between_numbers_are_words() -> None:
    assert MeasuredQuestions(["What is 12 + 30?"], ngram=13).overlap("What is 12 - 30?") is None


@pytest.mark.parametrize(("ngram", "count"), [(8, 89), (10, 11), (13, 4)])
def test_gsm8k_train_against_test_as_the_default_was_chosen(ngram: int, count: int, gsm8k) -> None:
    measured = MeasuredQuestions((p.question for p in load_problems("gsm8k", "test", str(gsm8k))), ngram)
    train = load_problems("gsm8k", "train", str(gsm8k))
    assert sum(measured.overlap(problem.question) is not None for problem in train) == count
