"""The benchmarks of the seeds: where each comes from, how its rows are read, and what was read exactly.

A local folder holds each as ``<name>/test.jsonl`` in the form of its first publisher; the hub has copies of most that
differ in a row or two. The hash of what was read stands in every result: only equal ones may be compared.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from r1zero.recipe import TAGGED_TASKS
from r1zero.tasks import rows, sources
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.sources import Source

SUBSET_SEED = 20261121  # which questions a count draws: the same as for measuring while a run trains
OWN = "own"  # what the recipe of the run measures on


@dataclass(frozen=True)
class Benchmark:
    """One published set of questions.

    >>> BENCHMARKS["aime24"].hub
    'HuggingFaceH4/aime_2024'

    Attributes:
        name: on the command line, and of its folder.
        title: in a table.
        task: how its rows are read, see `sources.TASKS`.
        hub: dataset on the hub.
        config: of that dataset.
        split: of that dataset; a local folder has the split test.
    """

    name: str
    title: str
    task: str
    hub: str
    config: str | None = None
    split: str = "test"


@dataclass(frozen=True)
class Questions:
    """The questions of one benchmark as they were read.

    Attributes:
        name: of the benchmark.
        title: in a table.
        task: whose rules its answers follow.
        source: the folder, file or hub dataset.
        problems: those that are asked, in the order of the data.
        of: how many there are.
        sha256: of question and gold of those that are asked.
    """

    name: str
    title: str
    task: str
    source: str
    problems: tuple[Problem, ...]
    of: int
    sha256: str

    @property
    def numbers(self) -> bool:
        """Whether every answer has to be a plain number."""
        return self.task in TAGGED_TASKS


# Rows: GSM8K 1,319 (Cobbe et al. 2021); MATH-500 500 (Lightman et al. 2023); AIME 2024 30; AMC 2023 40; Minerva 272
# (Lewkowycz et al. 2022); OlympiadBench 675 in Qwen2.5-Math's selection, 674 on the hub (He et al. 2024).
BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark("gsm8k", "GSM8K", "gsm8k", "openai/gsm8k", "main"),
        Benchmark("math500", "MATH-500", "math", "HuggingFaceH4/MATH-500", "default"),
        Benchmark("aime24", "AIME 2024", "math", "HuggingFaceH4/aime_2024", None, "train"),
        Benchmark("amc23", "AMC 2023", "math", "math-ai/amc23"),
        Benchmark("minerva_math", "Minerva", "math", "math-ai/minervamath"),
        Benchmark("olympiadbench", "OlympiadBench", "math", "math-ai/olympiadbench"),
    )
}


def read(name: str, data: str | None = None, count: int | None = None) -> Questions:
    """The questions of a benchmark.

    Args:
        name: one of `BENCHMARKS`.
        data: a folder with ``<name>/test.jsonl`` in it; None: the hub.
        count: so many of them, the same draw every time; None: all.

    Raises:
        DatasetError: when the data cannot be had, or a row does not hold a problem.
    """
    known = BENCHMARKS[name]
    if data is None:
        source = Source(known.task, known.split, known.hub, known.config, known.name)
    else:
        folder = Path(data).expanduser()
        place = folder if folder.is_file() or (folder / "test.jsonl").is_file() else folder / name
        if rows.local(str(place)) is None:
            held = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
            raise DatasetError(f"--data {data}: holds no {name}/test.jsonl; it holds {', '.join(held) or 'nothing'}")
        source = Source(known.task, "test", str(place), None, known.name)
    problems = sources.load(source).problems
    return of_problems(name, known.title, known.task, str(source.dataset_name), problems, count)


def of_problems(
    name: str, title: str, task: str, source: str, problems: Sequence[Problem], count: int | None = None
) -> Questions:
    """Questions that somebody else has read; `count` of them are asked, all where it is None."""
    chosen = subset(problems, count)
    content = json.dumps([[each.question, each.gold] for each in chosen]).encode()
    return Questions(name, title, task, source, tuple(chosen), len(problems), hashlib.sha256(content).hexdigest())


def subset(problems: Sequence[Problem], count: int | None) -> list[Problem]:
    """`count` of the problems, a fixed draw; all where there are no more, or `count` is None."""
    if count is None or count >= len(problems):
        return list(problems)
    return random.Random(SUBSET_SEED).sample(list(problems), count)
