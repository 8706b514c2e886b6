"""The tables of `verdict_cases` against the verifier, and what must hold for each of their rows."""

import random
from collections.abc import Iterator

import pytest

from r1zero.tasks.verifier import Verdict, Verifier
from tests.tasks.verdict_cases import ANSWERS, CHOICES, EXACT, Completion, cases

FORMATS = {"math": "boxed", "gsm8k": "tagged"}
CASES = list(cases())


def name(case: Completion) -> str:
    end = r"}$."
    shown = case.completion.removeprefix(r"Let me see. So the answer is $\boxed{").removesuffix(end)
    return f"{case.group}: {shown[:60]} for {case.gold[:60]}"


@pytest.fixture(scope="module")
def verifiers() -> Iterator[dict[str, Verifier]]:
    """A verifier for each task."""
    with Verifier(answer_format="boxed") as math, Verifier(answer_format="tagged") as gsm8k:
        yield {"math": math, "gsm8k": gsm8k}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_verdict(case: Completion, verifiers: dict[str, Verifier]) -> None:
    found = verifiers[case.task].grade([case.completion], [case.gold])[0]
    assert found.verdict in case.verdicts, f"{case.completion!r} against {case.gold!r}: {found}"
    if not case.answered:
        assert found.answer is None
    if found.verdict in (Verdict.CORRECT, Verdict.WRONG):
        assert found.answer


def test_neither_order_nor_company_changes_a_verdict() -> None:
    cases = [case for case in CASES if case.task == "math"]
    verdicts: list[list[Verdict]] = []
    for batch in (cases, random.Random(0).sample(cases, len(cases))):
        with Verifier() as verifier:
            graded = verifier.grade([case.completion for case in batch], [case.gold for case in batch])
        of = {case: found.verdict for case, found in zip(batch, graded, strict=True)}
        verdicts.append([of[case] for case in cases])
    assert verdicts[0] == verdicts[1]


def test_every_gold_of_the_tables_reads_and_equals_itself() -> None:
    golds = sorted({row.gold for row in ANSWERS})
    with Verifier() as verifier:
        assert {gold: why for gold, why in zip(golds, verifier.check_golds(golds), strict=True) if why} == {}
        boxed = [rf"\boxed{{{gold}}}" for gold in golds]
        verdicts = [found.verdict for found in verifier.grade(boxed, golds)]
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict is not Verdict.CORRECT] == []


@pytest.mark.parametrize("gold", ["", " ", r"\text{}", r"\frac{1}{2", "nan", r"\frac{1}{0}", "{", "42 or so", "17=42"])
def test_a_broken_gold_is_told_from_a_good_one(gold: str) -> None:
    with Verifier() as verifier:
        good, bad = verifier.check_golds(["42", gold])
    assert good is None
    assert bad


@pytest.mark.parametrize("number", range(len(CHOICES)))
@pytest.mark.parametrize(("choice", "place"), [("agreed", 3), ("first", 4), ("last", 5)])
def test_answer_choice(number: int, choice: str, place: int) -> None:
    row = CHOICES[number]
    with Verifier(answer_format=FORMATS[row[0]], answer_choice=choice) as verifier:
        assert verifier.grade([row[1]], [row[2]])[0].verdict in row[place]


@pytest.mark.parametrize(("remove_commas", "place"), [(True, 2), (False, 3)])
def test_exact_match(remove_commas: bool, place: int) -> None:
    with Verifier(answer_format="tagged", answer_match="exact", remove_commas=remove_commas) as verifier:
        found = verifier.grade([row[0] for row in EXACT], [row[1] for row in EXACT])
    assert [row[:2] for row, one in zip(EXACT, found, strict=True) if one.verdict not in row[place]] == []
