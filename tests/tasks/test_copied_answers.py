"""What a policy finds that nobody wants it to learn: the calculation left undone, the question given back."""

import pytest

from r1zero.tasks.verifier import Verdict, Verifier

CORRECT, WRONG, UNPARSED = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSED


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("18", CORRECT),
        ("18.00", CORRECT),
        ("$18", CORRECT),
        ("18 dollars", CORRECT),
        ("x = 18", CORRECT),
        (r"\frac{36}{2}", CORRECT),
        ("1.8e1", CORRECT),
        ("9*2", UNPARSED),
        ("16 - 3 + 5", UNPARSED),
        (r"\sqrt{324}", UNPARSED),
        ("x = 9*2", UNPARSED),
        ("2(9)", UNPARSED),
        ("eighteen", UNPARSED),
        ("17", WRONG),
    ],
)
def test_where_numbers_are_asked_for_a_calculation_is_none(answer: str, verdict: Verdict) -> None:
    with Verifier(answer_format="tagged", numbers=True) as verifier:
        assert verifier.grade([f"<answer>{answer}</answer>"], ["18"])[0].verdict is verdict


@pytest.mark.parametrize(
    ("question", "gold", "answer", "verdict"),
    [
        (r"Compute $\dbinom{31}{28}$.", "4495", r"\dbinom{31}{28}", WRONG),
        (r"Compute $\dbinom{31}{28}$.", "4495", r"\binom{31}{28}", WRONG),
        (r"Compute $\dbinom{31}{28}$.", "4495", "4495", CORRECT),
        ("Find $513^2 - 487^2$.", "26000", "513^2-487^2", WRONG),
        ("Find $513^2 - 487^2$.", "26000", "26,000", CORRECT),
        (r"Write $\frac{3}{20}$ as a decimal.", "0.15", r"\frac{3}{20}", WRONG),
        ("Factor $ab+5b+2a+10$.", "(a+5)(b+2)", "ab+5b+2a+10", WRONG),
        ("Factor $ab+5b+2a+10$.", "(a+5)(b+2)", "(b+2)(a+5)", CORRECT),
        # What the question names may be the answer.
        (r"Which is larger, $\sqrt{53}$ or 7?", r"\sqrt{53}", r"\sqrt{53}", CORRECT),
        ("Which is larger, 1000 or 999?", "1000", "1000", CORRECT),
        ("If 120 of 240 came, how many came?", "120.0", "120", CORRECT),
        ("Solve for $x$.", "x", "x", CORRECT),
    ],
)
def test_an_expression_that_is_copied_from_the_question_is_no_answer(
    question: str, gold: str, answer: str, verdict: Verdict
) -> None:
    with Verifier() as verifier:
        completion = rf"\boxed{{{answer}}}"
        assert verifier.grade([completion], [gold], [question])[0].verdict is verdict
        assert verifier.grade([completion], [gold])[0].verdict is CORRECT  # nobody said what was asked


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac12", r"\sin 30^\circ", CORRECT),
        (r"\frac12", r"\cos 60^{\circ}", CORRECT),
        (r"\sin 30^\circ", r"\frac12", CORRECT),
        (r"\sqrt3", r"\tan 60^\circ", CORRECT),
        (r"\sin 30^\circ", r"\sin 30", WRONG),
        (r"\sin 30", r"\sin 30^\circ", WRONG),
        ("30", r"30^\circ", CORRECT),
        ("10", "10_2", WRONG),
        ("5", r"\$5\%", UNPARSED),
        ("18", "18 km/h", CORRECT),
        ("3", r"\underline{3}", CORRECT),
    ],
)
def test_degrees_bases_and_units(gold: str, answer: str, verdict: Verdict) -> None:
    with Verifier() as verifier:
        assert verifier.grade([rf"\boxed{{{answer}}}"], [gold])[0].verdict is verdict
