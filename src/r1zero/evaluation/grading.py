"""From completions to graded completions to the scores of one model on one benchmark.

The completions of a benchmark are graded in one order and in batches of one size, and what timed out beside others is
asked once more alone: so grading them again gives the same verdicts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from r1zero.evaluation import scores
from r1zero.evaluation.protocol import Protocol
from r1zero.tasks.mathematics import equivalence
from r1zero.tasks.mathematics.values import Unreadable
from r1zero.tasks.verifier import Graded, NeedsAlgebra, Verdict

BATCH = 512
Row = dict[str, Any]  # one completion, with the columns of `results.SCHEMA`


def grade(rows: Sequence[Row], protocol: Protocol, numbers: bool) -> list[Row]:
    """The rows with answer and verdict; what they said before is not looked at.

    Args:
        rows: completions with question and gold.
        protocol: by which they are graded.
        numbers: whether every answer has to be a plain number.
    """
    graded: list[Graded] = []
    with protocol.verifier(numbers) as verifier:
        for at in range(0, len(rows), BATCH):
            graded += verifier.grade(*_columns(rows[at : at + BATCH]))
    for at in [at for at, each in enumerate(graded) if each.verdict is Verdict.TIMED_OUT]:
        with protocol.verifier(numbers) as verifier:  # another one: a verifier remembers what it has decided
            graded[at] = verifier.grade(*_columns(rows[at : at + 1]))[0]
    return [
        {**row, "answer": each.answer, "verdict": each.verdict.value} for row, each in zip(rows, graded, strict=True)
    ]


def score(rows: Sequence[Row]) -> dict[str, Any]:
    """The scores of one model on one benchmark.

    Args:
        rows: graded completions of all questions, as many of each.

    Returns:
        mean, low, high, questions, samples; pass_at_k and majority with their intervals; shares and mean length.
    """
    by_question = _by_question(rows)
    outcomes = [[float(row["verdict"] == Verdict.CORRECT) for row in each] for each in by_question]
    samples = len(outcomes[0])
    found: dict[str, Any] = asdict(scores.mean_score(outcomes))
    found["pass_at_k"] = {
        str(k): _interval([[scores.pass_at_k(int(sum(each)), samples, k)] for each in outcomes])
        for k in _powers_of_two(samples)
    }
    found["majority"] = _interval([[_majority(each)] for each in by_question]) if samples > 2 else None
    found["correct_questions"] = sum(any(each) for each in outcomes)
    for verdict in Verdict:
        found[verdict.value] = sum(row["verdict"] == verdict for row in rows) / len(rows)
    found["clipped"] = sum(bool(row["clipped"]) for row in rows) / len(rows)
    found["mean_length"] = sum(row["length"] for row in rows) / len(rows)
    return found


def difference(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """How much better the second model is on the same questions."""
    pairs = [
        [[float(row["verdict"] == Verdict.CORRECT) for row in each] for each in _by_question(rows)]
        for rows in (before, after)
    ]
    return asdict(scores.difference(*pairs))


def _columns(rows: Sequence[Row]) -> tuple[list[str], list[str], list[str]]:
    return [row["completion"] for row in rows], [row["gold"] for row in rows], [row["question"] for row in rows]


def _by_question(rows: Sequence[Row]) -> list[list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["index"], []).append(row)
    return [found[index] for index in sorted(found)]


def _powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*powers, samples] if samples > 1 else []


def _interval(outcomes: Sequence[Sequence[float]]) -> Mapping[str, float]:
    """A value for each question, between 0 and 1, as a mean with its interval."""
    mean, low, high = scores.interval(np.asarray(outcomes))
    return {"mean": round(mean, 4), "low": round(low, 3), "high": round(high, 3)}


def _majority(rows: Sequence[Row]) -> float:
    """Equal answers vote together; two expressions that only algebra could compare count as two."""
    known: list[str] = []
    votes: list[int | None] = []
    right: int | None = None
    for row in rows:
        if row["verdict"] == Verdict.CORRECT:  # all of them are the gold
            if right is None:
                right = len(known)
                known.append("")
            votes.append(right)
        elif row["answer"] is None or row["verdict"] != Verdict.WRONG:
            votes.append(None)
        else:
            at = next((at for at, each in enumerate(known) if at != right and _same(each, row["answer"])), len(known))
            if at == len(known):
                known.append(row["answer"])
            votes.append(at)
    return scores.majority(votes, right)


def _same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return equivalence.same(one, other, _without_algebra)
    except (NeedsAlgebra, Unreadable, ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
        return False


def _without_algebra(one: str, other: str) -> bool:
    raise NeedsAlgebra
