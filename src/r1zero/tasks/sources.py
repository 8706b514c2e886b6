"""Which datasets a recipe trains on and measures on, and the problems that each of them holds."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1zero.tasks import arithmetic, competition, dataset, gsm8k, rows
from r1zero.tasks.columns import Columns
from r1zero.tasks.problem import DatasetError, Problem

if TYPE_CHECKING:
    from r1zero.recipe import Recipe

TASKS = ("arithmetic", "gsm8k", "math", "dataset")
# Where a task's problems come from when the recipe names no dataset: to train on, to measure on.
TRAINED_ON = {"gsm8k": "openai/gsm8k", "math": "DigitalLearningGmbH/MATH-lighteval"}
MEASURED_ON = {"gsm8k": "openai/gsm8k", "math": "HuggingFaceH4/MATH-500"}
# The configuration of those when the recipe names none: GSM8K has two.
CONFIGS = {"openai/gsm8k": "main", "DigitalLearningGmbH/MATH-lighteval": "default", "HuggingFaceH4/MATH-500": "default"}
GUESSED = Columns()  # the recipe names none
SIMPLERL_LEVELS = (3, 4, 5)  # simpleRL-reason trains on these of MATH's levels 1 to 5


@dataclass(frozen=True)
class Source:
    """One split of one dataset, read as one task.

    >>> Source("gsm8k", "train", "openai/gsm8k").label
    'gsm8k/train'

    Attributes:
        task: one of `TASKS`.
        split: "train", "test", or what the dataset calls it.
        dataset_name: hub id, folder or file; None for arithmetic, which makes its own.
        config: the dataset's configuration, None for its only one.
        name: how metrics call it; empty: the task, for task dataset the last part of dataset_name.
        columns: those that the recipe names.
        levels: the levels of difficulty to keep, None for all.
        levels_asked: whether the recipe asked for the levels: then every row must have one. Otherwise a dataset without
            levels is taken whole.
        weight: its share in a mixture, relative to the others'.
        key: the recipe key that named the dataset, for errors.
    """

    task: str
    split: str
    dataset_name: str | None = None
    config: str | None = None
    name: str = ""
    columns: Columns = GUESSED
    levels: tuple[int, ...] | None = None
    levels_asked: bool = False
    weight: float = 1.0
    key: str = "dataset_name"

    @property
    def label(self) -> str:
        """What `Problem.source` says: name and split."""
        return f"{self.name or self._own_name}/{self.split}"

    @property
    def _own_name(self) -> str:
        return last_part(self.dataset_name) if self.task == "dataset" and self.dataset_name else self.task

    @property
    def place(self) -> tuple[str, str, str | None]:
        """What tells the rows of two sources apart: dataset, split, configuration."""
        return self.dataset_name or self.task, self.split, self.config


@dataclass(frozen=True)
class Loaded:
    """The problems of a source.

    Attributes:
        problems: in the dataset's order.
        of_other_levels: how many were left out for their level; None where levels were not looked at.
    """

    problems: list[Problem]
    of_other_levels: int | None = None


def load(source: Source, remove_commas: bool = True) -> Loaded:
    """The problems of a source.

    Args:
        source: which.
        remove_commas: drop thousands commas from the golds of gsm8k; the golds of others stay as they are.

    Raises:
        DatasetError: when the data cannot be had, or a row does not hold a problem; it names file, row and column.
    """
    if source.task == "arithmetic":
        return Loaded(arithmetic.load(source.split))
    problems: list[Problem] = []
    others: int | None = None
    seen: set[str] = set()
    for place, row in rows.read(str(source.dataset_name), source.split, source.config, source.key):
        if source.levels is not None and _has_level(row, place, source):
            others = others or 0
            if competition.level(row) not in source.levels:
                others += 1
                seen.add(str(row["level"]))
                continue
        problems.append(_problem(place, row, source, remove_commas))
    if not problems and others:
        raise DatasetError(
            f"{source.dataset_name}, split {source.split}: none of {others} problems has a level of "
            f"{list(source.levels or ())}, they have {', '.join(sorted(seen)[:8])}; name those you want with levels"
        )
    if not problems:
        raise DatasetError(f"{source.dataset_name}: split {source.split} is empty")
    return Loaded(problems, others)


def _problem(place: str, row: Mapping[str, Any], source: Source, remove_commas: bool) -> Problem:
    if source.task == "gsm8k":
        return gsm8k.problem(place, row, source.label, remove_commas)
    if source.task == "math":
        return competition.problem(place, row, source.label, source.columns)
    return dataset.problem(place, row, source.label, source.columns)


def _has_level(row: Mapping[str, Any], place: str, source: Source) -> bool:
    if "level" in row:
        return True
    if source.levels_asked:
        raise DatasetError(
            f"{place}: levels = {list(source.levels or ())} needs a column level, there are {list(row)}; "
            "leave levels out"
        )
    return False


def trained_on(recipe: "Recipe") -> tuple[Source, ...]:
    """The sources of the training problems: one, or those of the recipe's mixture."""
    if recipe.mixture is None:
        own = recipe.own
        levels = _levels(own.task, own.levels)
        name = recipe["dataset_name"] or TRAINED_ON.get(own.task)
        config = recipe["dataset_config"] or CONFIGS.get(name or "")
        source = Source(own.task, recipe["dataset_train_split"], name, config, "", _columns(own), *levels)
        return (source,)
    sources = []
    for entry in recipe.mixture:
        name = entry.dataset_name or TRAINED_ON.get(entry.task)
        config = entry.dataset_config or CONFIGS.get(name or "")
        levels = _levels(entry.task, entry.levels)
        sources.append(
            Source(entry.task, entry.split, name, config, "", _columns(entry), *levels, entry.weight, key="mixture")
        )
    return tuple(_distinct(sources))


def measured_on(recipe: "Recipe") -> tuple[Source, ...]:
    """The sources of the problems to measure on: none, what eval_task and eval_dataset_name say, else as in training.

    As in training means the test split of the same datasets, for each of a mixture; where a task brings its own
    dataset, the one that `MEASURED_ON` names. Levels are never filtered: a score is one of the whole test set.
    """
    own = recipe.own
    if own.eval_count == 0:
        return ()
    split = recipe["dataset_test_split"]
    trained = trained_on(recipe)
    as_trained = recipe.mixture is None and own.eval_task in (None, own.task)
    if own.eval_dataset_name is None and (as_trained or own.eval_task is None):
        measured = [_test_of(source, split) for source in trained]
        first = {source.place: source for source in reversed(measured)}
        return tuple(source for source in measured if first[source.place] is source)
    task = own.eval_task or own.task
    name = own.eval_dataset_name or MEASURED_ON.get(task)
    of_same_dataset = [source.config for source in trained if source.dataset_name == name]
    config = of_same_dataset[0] if of_same_dataset else CONFIGS.get(name or "")
    columns = _columns(own) if as_trained else GUESSED
    called = last_part(own.eval_dataset_name) if own.eval_dataset_name else ""
    return (Source(task, split, name, config, called, columns, key="eval_dataset_name"),)


def kept_apart_from(recipe: "Recipe") -> tuple[tuple[str, str, str | None], ...]:
    """(dataset_name, split, config) of decontaminate_against, where an entry is NAME or NAME:SPLIT."""
    places = []
    for entry in recipe.own.decontaminate_against or ():
        name, colon, split = entry.rpartition(":")
        if not colon or rows.local(entry) is not None:
            name, split = entry, "test"
        places.append((name, split, CONFIGS.get(name)))
    return tuple(places)


def last_part(dataset_name: str) -> str:
    """The last part of a hub id or path, as metrics can carry it; a file that is named for a split takes its folder's.

    >>> last_part("BytedTsinghua-SIA/DAPO-Math-17k"), last_part("data/aime24/test.jsonl"), last_part("~/my sums.jsonl")
    ('DAPO-Math-17k', 'aime24', 'my_sums')
    """
    path = Path(dataset_name)
    if path.suffix in rows.ENDINGS:
        path = (
            path.parent if path.stem in ("train", "test", "validation") and path.parent.name else path.with_suffix("")
        )
    return re.sub(r"[^\w.-]", "_", path.name) or "dataset"


def _columns(keys: Any) -> Columns:
    return Columns(keys.question_column, keys.answer_column, keys.solution_column)


def _levels(task: str, levels: Sequence[int] | None) -> tuple[tuple[int, ...] | None, bool]:
    """(levels to keep, whether the recipe asked for them)."""
    if levels is not None:
        return tuple(levels), True
    return (SIMPLERL_LEVELS if task == "math" else None), False


def _test_of(source: Source, split: str) -> Source:
    name, config = source.dataset_name, source.config
    if name is not None and name == TRAINED_ON.get(source.task) and name != MEASURED_ON[source.task]:
        name = MEASURED_ON[source.task]
        config = CONFIGS.get(name)
    return replace(source, split=split, dataset_name=name, config=config, levels=None, levels_asked=False)


def _distinct(sources: Sequence[Source]) -> list[Source]:
    """The same, each with a name of its own: its task, else the last part of its dataset, else that with a number."""
    names = [source._own_name for source in sources]
    for index, source in enumerate(sources):
        if Counter(source._own_name for source in sources)[names[index]] > 1 and source.dataset_name:
            names[index] = last_part(source.dataset_name)
    counts, seen = Counter(names), Counter[str]()
    for index, name in enumerate(names):
        if counts[name] > 1:
            seen[name] += 1
            names[index] = f"{name}-{seen[name]}"
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)]
