r"""Competition mathematics: MATH (Hendrycks et al. 2021, arXiv:2103.03874) and what is published in forms like it.

Each publisher names the columns otherwise. The question is in ``problem`` or ``question``, after ``context`` where
there is one (OlympiadBench); the gold in ``answer`` (MATH-500, AIME, AMC), ``final_answer`` (OlympiadBench), or in the
last ``\boxed{}`` of ``solution`` (MATH, Minerva). Golds stay LaTeX.
"""

import re
from collections.abc import Mapping
from typing import Any

from r1zero.tasks import columns
from r1zero.tasks.boxes import closing_brace
from r1zero.tasks.columns import Columns
from r1zero.tasks.problem import DatasetError, Problem

QUESTION = ("problem", "question")
ANSWER = ("answer", "final_answer")
SOLUTION = ("solution",)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{])")


def problem(place: str, row: Mapping[str, Any], source: str, named: Columns) -> Problem:
    """The problem that one row holds.

    Args:
        place: where the row stands, for errors.
        row: its columns.
        source: what `Problem.source` says.
        named: columns that the recipe names, read instead of those above.

    Raises:
        DatasetError: when the row has no question or no gold.
    """
    asked_in = (named.question,) if named.question else QUESTION
    question = columns.text(row, asked_in)
    if question is None:
        raise columns.missing(place, "question", asked_in, row, "question_column")
    context = columns.text(row, ("context",))
    if context and not named.question:
        question = f"{context}\n\n{question}"
    worked_in = (named.solution,) if named.solution else SOLUTION
    solution = columns.text(row, worked_in)
    if solution is None and named.solution:
        raise columns.missing(place, "solution", worked_in, row, "solution_column")
    answered_in = (named.answer,) if named.answer else ANSWER
    gold = columns.gold(row, answered_in)
    if gold is None and not named.answer and solution is not None:
        gold = last_box(solution)
        if gold is None:
            raise DatasetError(
                f"{place}: no gold: no column {' or '.join(ANSWER)} holds one, and {worked_in[0]} has no \\boxed{{}}; "
                "name the column that holds it with answer_column"
            )
    if gold is None:
        raise columns.missing(place, "gold", answered_in, row, "answer_column")
    columns.refuse_gsm8k_form(place, gold)
    return Problem(question, gold, source, solution or "")


def level(row: Mapping[str, Any]) -> int | None:
    """The difficulty of a problem, 1 to 5 in MATH: from 3, "3" or "Level 3"; None where it is not given ("Level ?")."""
    found = re.fullmatch(r"(?:level\s*)?(\d+)(?:\.0)?", str(row.get("level")).strip(), re.IGNORECASE)
    return int(found[1]) if found else None


def last_box(solution: str) -> str | None:
    r"""What the last ``\boxed{}`` of a solution holds, None where there is none, or where its braces never close.

    >>> last_box(r"So $x=\boxed{\frac{1}{2}}$."), last_box(r"\boxed 7"), last_box("7")
    ('\\frac{1}{2}', '7', None)
    """
    found = list(_BOX.finditer(solution))
    if not found:
        return None
    if found[-1][1] != "{":
        return found[-1][1]
    end = closing_brace(solution, found[-1].end())
    return None if end is None else solution[found[-1].end() : end - 1].strip() or None
