"""Any dataset whose rows hold a question and a short answer, by the names of its columns."""

from collections.abc import Mapping
from typing import Any

from r1zero.tasks import columns
from r1zero.tasks.columns import Columns
from r1zero.tasks.problem import Problem


def problem(place: str, row: Mapping[str, Any], source: str, named: Columns) -> Problem:
    """The problem that one row holds.

    Args:
        place: where the row stands, for errors.
        row: its columns.
        source: what `Problem.source` says.
        named: the columns; ``question`` and ``answer`` where the recipe names none, and no worked solution.

    Raises:
        DatasetError: when the row has no question, no gold, or not the worked solution that is asked for.
    """
    asked_in, answered_in = named.question or "question", named.answer or "answer"
    question, gold = columns.text(row, [asked_in]), columns.gold(row, [answered_in])
    if question is None:
        raise columns.missing(place, "question", [asked_in], row, "question_column")
    if gold is None:
        raise columns.missing(place, "gold", [answered_in], row, "answer_column")
    columns.refuse_gsm8k_form(place, gold)
    solution = columns.text(row, [named.solution]) if named.solution else ""
    if solution is None:
        raise columns.missing(place, "solution", [str(named.solution)], row, "solution_column")
    return Problem(question, gold, source, solution)
