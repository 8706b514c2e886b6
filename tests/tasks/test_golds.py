"""Every gold of every benchmark against itself, through the same door as a completion."""

import pytest

from r1zero.tasks import load_problems
from r1zero.tasks.verifier import Verdict, Verifier
from tests.conftest import DATA

# (folder, task, split): problems, and the golds that are not an answer in a notation that the verifier knows. Such a
# gold is matched only as it is written.
SETS: dict[tuple[str, str, str], tuple[int, set[str]]] = {
    ("gsm8k", "gsm8k", "test"): (1319, set()),
    ("gsm8k", "gsm8k", "train"): (7473, set()),
    ("math500", "math", "test"): (500, set()),
    ("aime24", "math", "test"): (30, set()),
    ("amc23", "math", "test"): (40, set()),
    ("minerva_math", "math", "test"): (
        272,
        {
            "np.arcsin(10/13)",  # Python
            # differential equations in dots and primes, which the parser drops
            r"y^{\prime}+r y-r x(t)=0",
            r"x^{\prime}+\frac{r}{V} x-r c=0",
            r"m l \ddot{\theta}(t)-m g \sin \theta(t)=f(t) \cos \theta(t)",
            r"x_{0} \cos (\omega t)+$ $\dot{x}_{0} \sin (\omega t) / \omega",
            # the sign of the sun as an index
            r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{0.007 c^{2} M_{\odot}^{6}} M^{6}",
        },
    ),
    ("olympiadbench", "math", "test"): (
        675,
        {
            # prose
            r"$f(x)=a x+b$, where $b$ is an arbitrary integer, "
            r"and $a$ is an arbitrary positive integer with $\mho(a)=0$",
        },
    ),
}


@pytest.mark.parametrize("key", SETS, ids=lambda key: f"{key[0]}-{key[2]}")
def test_every_gold_equals_itself(key: tuple[str, str, str]) -> None:
    folder, task, split = key
    count, exceptions = SETS[key]
    if not (DATA / folder).is_dir():
        pytest.skip(f"{folder} is not at {DATA}; set R1ZERO_TEST_DATA")
    golds = [problem.gold for problem in load_problems(task, split, str(DATA / folder))]
    with Verifier(answer_format="tagged" if task == "gsm8k" else "boxed") as verifier:
        completions = [f"<answer>\n{gold}\n</answer>" if task == "gsm8k" else f"\\boxed{{{gold}}}" for gold in golds]
        verdicts = [graded.verdict for graded in verifier.grade(completions, golds)]
        unread = {gold for gold, reason in zip(golds, verifier.check_golds(golds), strict=True) if reason}
    assert len(golds) == count
    assert verdicts == [Verdict.CORRECT] * count
    assert {gold.strip() for gold in unread} == exceptions


@pytest.mark.parametrize(
    ("gold", "why"),
    [
        ("", "nothing where an answer should be"),
        ("n/a, see solution", "words among values"),
        ("it depends on how one looks at it", "more than 6 words"),
        (r"\frac{1}{2", "never closed"),
        ("42 or so, depending", "words among values"),
        (r"\sum_{k=1}^n k", "command"),
    ],
)
def test_a_gold_that_no_answer_could_match_is_named_with_its_reason(gold: str, why: str) -> None:
    with Verifier() as verifier:
        (reason,) = verifier.check_golds([gold])
    assert reason is not None
    assert why in reason


def test_where_numbers_are_asked_for_words_and_expressions_are_none() -> None:
    golds = ["42", "-3.5", "1,234", "$7", "banana", "x", r"\frac{1}{2}", "1, 2", ""]
    reasons = Verifier().check_golds(golds, numbers=True)
    assert [reason is None for reason in reasons] == [True, True, True, True, False, False, True, False, False]


def test_exact_golds_need_a_text() -> None:
    assert Verifier(answer_match="exact").check_golds(["42", " "]) == [None, "is empty"]
