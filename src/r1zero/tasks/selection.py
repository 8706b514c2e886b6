"""The problems that a run trains on and measures on: the one place where both are chosen, for launcher and trainer.

In this order: levels, decontamination, problems that two parts of a mixture share, the mixture's draw, the order.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1zero.tasks import columns, competition, mixture, rows, sources
from r1zero.tasks.decontamination import MeasuredQuestions, Overlap
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.sources import Loaded, Source

if TYPE_CHECKING:
    from r1zero.recipe import Recipe


@dataclass(frozen=True)
class Selection:
    """What a run trains on and what it measures on.

    Attributes:
        train: the training problems, in the order in which TRL's sampler numbers them.
        test: every problem of the measured sources; which of them are measured is eval_count's matter.
        notes: what was chosen and what was left out, a line each, to be printed.
    """

    train: list[Problem]
    test: list[Problem]
    notes: tuple[str, ...]


def of(recipe: "Recipe") -> Selection:
    """Choose the problems of a run; the same recipe and data give the same, in every process.

    Raises:
        DatasetError: when data cannot be had, a row holds no problem, or nothing is left to train on.
    """
    own = recipe.own
    notes: list[str] = []
    trained = sources.trained_on(recipe)
    parts = []
    for source in trained:
        loaded = sources.load(source, own.remove_commas)
        notes += _count_notes(source, loaded)
        parts.append(loaded.problems)
    test = [each for source in sources.measured_on(recipe) for each in sources.load(source, own.remove_commas).problems]
    if own.decontaminate_ngram:
        asked = [problem.question for problem in test] + _further_questions(recipe)
        if asked:
            parts, note = _decontaminated(parts, asked, own.decontaminate_ngram)
            notes.append(note)
    order_seed = own.shuffle_seed
    if recipe.mixture is not None:
        parts, note = _mixed(trained, parts, recipe["seed"])
        notes.append(note)
        if order_seed is None:
            order_seed = recipe["seed"]  # else the sources would follow one another wherever TRL does not shuffle
    train = [problem for part in parts for problem in part]
    if order_seed is not None:
        random.Random(order_seed).shuffle(train)
    return Selection(train, test, tuple(notes))


def needs_download(recipe: "Recipe") -> bool:
    """Whether some of the data is neither on this machine nor made by the task itself."""
    named = [source.dataset_name for source in (*sources.trained_on(recipe), *sources.measured_on(recipe))]
    if recipe.own.decontaminate_ngram:
        named += [name for name, _, _ in sources.kept_apart_from(recipe)]
    return any(name is not None and rows.local(name) is None for name in named)


def _count_notes(source: Source, loaded: Loaded) -> list[str]:
    if loaded.of_other_levels is None:
        return []
    levels = ", ".join(map(str, source.levels or ()))
    total = len(loaded.problems) + loaded.of_other_levels
    return [f"levels: {len(loaded.problems)} of {total} problems of {source.label} have level {levels}"]


def _further_questions(recipe: "Recipe") -> list[str]:
    """The questions of the datasets that the recipe keeps the training problems apart from."""
    named = recipe.own.question_column
    looked_in = (*competition.QUESTION, named) if named else competition.QUESTION
    questions = []
    for name, split, config in sources.kept_apart_from(recipe):
        for place, row in rows.read(name, split, config, "decontaminate_against"):
            question = columns.text(row, looked_in)
            if question is None:
                raise columns.missing(place, "question", looked_in, row, "question_column")
            questions.append(question)
    return questions


def _decontaminated(
    parts: Sequence[Sequence[Problem]], measured: Sequence[str], ngram: int
) -> tuple[list[list[Problem]], str]:
    """The parts without the problems that repeat a measured question, and what to say of it."""
    questions = MeasuredQuestions(measured, ngram)
    kept: list[list[Problem]] = []
    dropped: list[tuple[Problem, Overlap]] = []
    for part in parts:
        overlaps = [(problem, questions.overlap(problem.question)) for problem in part]
        kept.append([problem for problem, overlap in overlaps if overlap is None])
        dropped += [(problem, overlap) for problem, overlap in overlaps if overlap is not None]
    total = sum(map(len, parts))
    share = f"with one of {len(measured)} measured questions"
    if not dropped:
        return kept, f"decontamination: none of {total} training problems shares {ngram} words in a row {share}"
    problem, overlap = dropped[0]
    example = f"{problem.source} {_short(problem.question)} has {overlap.words!r} as {_short(overlap.measured)}"
    note = f"decontamination: left out {len(dropped)} of {total} training problems that share {ngram} words in a row "
    for part, left in zip(parts, kept, strict=True):
        if not left:
            raise DatasetError(
                f"decontaminate_ngram = {ngram}: every one of the {len(part)} problems of {part[0].source} shares that "
                f"many words in a row {share}; the first: {example}; train on other data, or set "
                "decontaminate_ngram: 0 where that is wanted"
            )
    return kept, f"{note}{share}, the first: {example}"


def _mixed(trained: Sequence[Source], parts: Sequence[Sequence[Problem]], seed: int) -> tuple[list[list[Problem]], str]:
    """What each part gives, and what to say of it. A question that two parts hold stays in the first of them."""
    seen: set[str] = set()
    distinct: list[list[Problem]] = []
    for part in parts:
        distinct.append([problem for problem in part if problem.question not in seen])
        seen |= {problem.question for problem in part}
    for source, own in zip(trained, distinct, strict=True):
        if not own:
            raise DatasetError(f"mixture: every problem of {source.label} is in a part before it; leave it out")
    drawn = mixture.draw(distinct, [source.weight for source in trained], seed)
    total = sum(map(len, drawn))
    shares = [
        f"{len(chosen)} of {len(part)} from {source.label} ({len(chosen) / total:.0%})"
        for source, part, chosen in zip(trained, distinct, drawn, strict=True)
    ]
    twice = sum(map(len, parts)) - sum(map(len, distinct))
    repeated = f"; {twice} were in a part before theirs" if twice else ""
    return drawn, f"mixture: {total} problems, {', '.join(shares)}{repeated}"


def _short(question: str) -> str:
    words = " ".join(question.split())
    return repr(words if len(words) <= 80 else words[:77] + "...")
