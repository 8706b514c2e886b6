"""Whether every right answer could be seen as right: golds that read, and equal themselves. No torch."""

from r1zero.preflight.findings import Finding
from r1zero.recipe import Recipe
from r1zero.tasks import sources
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.selection import Selection
from r1zero.tasks.verifier import Verdict, Verifier

SHOWN = 10
QUESTION_CHARACTERS = 60


def required(chosen: Selection, recipe: Recipe) -> list[Finding]:
    """What `check` finds in the problems of a run.

    Raises:
        DatasetError: where it finds a fault.
    """
    findings: list[Finding] = []
    with recipe.verifier() as verifier:
        for name, problems in (("train", chosen.train), ("test", chosen.test)):
            if problems:
                findings += check(name, problems, recipe, verifier)
    for finding in findings:
        if finding.level == "fault":
            raise DatasetError(f"{finding.text}\n    -> {finding.remedy}")
    return findings


def check(name: str, problems: list[Problem], recipe: Recipe, verifier: Verifier) -> list[Finding]:
    """Read the golds of `problems`, and grade each as a completion that gives it in the form that the recipe asks for.

    Args:
        name: what the problems are for, as in "train" or "test".
        problems: any number.
        recipe: for the form of an answer and for `max_unreadable_golds`.
        verifier: the run's own.
    """
    golds = [problem.gold for problem in problems]
    numeric = _with_numbers(recipe)
    reasons: list[str | None] = [None] * len(problems)
    for numbers in (True, False):
        own = [index for index, problem in enumerate(problems) if (problem.source in numeric) is numbers]
        for index, reason in zip(own, verifier.check_golds([golds[i] for i in own], numbers), strict=True):
            reasons[index] = reason
    template, answer_format = recipe.template, recipe.answer_format
    written = {gold: template.completion("", gold, answer_format) for gold in set(golds)}
    graded = verifier.grade([written[gold] for gold in golds], golds)
    bad = [
        (number, problem, reason or f"graded against itself it is {one.verdict.value}")
        for number, (problem, reason, one) in enumerate(zip(problems, reasons, graded, strict=True), start=1)
        if reason is not None or one.verdict is not Verdict.CORRECT
    ]
    if not bad:
        return [Finding("note", f"golds: all {len(problems)} {name} golds can be read, and equal themselves")]
    share = len(bad) / len(problems)
    allowed = recipe.own.max_unreadable_golds
    rows = "".join(
        f"\n      {problem.source} {number}: gold {problem.gold!r}: {reason}; {_start(problem.question)}"
        for number, problem, reason in bad[:SHOWN]
    )
    more = f"\n      and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    text = (
        f"golds: {len(bad)} of {len(problems)} {name} golds ({100 * share:.2g} %) cannot be read as one answer, "
        f"{100 * allowed:g} % may; a right answer to them would score 0{rows}{more}"
    )
    if share > allowed:
        return [
            Finding(
                "fault", text, "mend or leave out those rows, name another answer_column, or raise max_unreadable_golds"
            )
        ]
    return [Finding("warning", text, "mend or leave out those rows")]


def _with_numbers(recipe: Recipe) -> set[str]:
    """The sources whose golds are all plain numbers."""
    chosen = (*sources.trained_on(recipe), *sources.measured_on(recipe))
    return {source.label for source in chosen if source.task in ("gsm8k", "arithmetic")}


def _start(question: str) -> str:
    short = " ".join(question.split())
    return short if len(short) <= QUESTION_CHARACTERS else f"{short[:QUESTION_CHARACTERS]}..."
