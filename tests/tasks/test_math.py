"""Task math: question and gold from each published form, the level filter, and the real benchmarks whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1zero.tasks import load_problems, sources
from r1zero.tasks.columns import Columns
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.sources import Source
from tests.conftest import DATA


def write(folder: Path, *found: dict[str, Any], split: str = "train") -> str:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(folder)


def problem_of(folder: Path, row: dict[str, Any], columns: Columns = sources.GUESSED) -> Problem:
    source = Source("math", "train", write(folder, row), columns=columns)
    return sources.load(source).problems[0]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": "\\frac{1}{2}"}, "\\frac{1}{2}"),
        ({"answer": 27.0}, "27"),
        ({"answer": 27}, "27"),
        ({"answer": 0.25}, "0.25"),
        ({"answer": 1.5e-07}, "0.00000015"),
        ({"answer": 0}, "0"),
        ({"answer": "025"}, "025"),
        ({"answer": " 7 "}, "7"),
        ({"answer": "$x+1$"}, "x+1"),
        ({"answer": "$$x+1$$"}, "x+1"),
        ({"answer": "\\(x+1\\)"}, "x+1"),
        ({"answer": "$(-\\infty, 0)$."}, "(-\\infty, 0)"),
        ({"answer": "\\$18"}, "\\$18"),
        ({"answer": "\\$18 and \\$20"}, "\\$18 and \\$20"),
        ({"answer": "$x$ or $y$"}, "$x$ or $y$"),
        ({"answer": "1,234"}, "1,234"),
        ({"final_answer": ["$2n$"]}, "2n"),
        ({"final_answer": ["$69$,$84$"]}, "69, 84"),
        ({"final_answer": ["$2$", "3"]}, "2, 3"),
        ({"final_answer": ["1,3,5"]}, "1,3,5"),
        ({"answer": None, "final_answer": ["4"]}, "4"),
        ({"answer": "", "solution": "It is \\boxed{4}."}, "4"),
        ({"solution": "First \\boxed{1}, then \\boxed{\\frac{1}{\\sqrt{2}}} it is."}, "\\frac{1}{\\sqrt{2}}"),
        ({"solution": "\\boxed{\\left\\{1, 2\\right\\}}"}, "\\left\\{1, 2\\right\\}"),
        ({"solution": "\\boxed{\\left\\{1\\right.}"}, "\\left\\{1\\right."),
        ({"solution": "\\fbox{6}"}, "6"),
        ({"solution": "\\boxed 7"}, "7"),
        ({"answer": "5", "solution": "\\boxed{6}"}, "5"),
    ],
    ids=str,
)
def test_where_the_gold_is_and_what_becomes_of_it(row: dict[str, Any], gold: str, tmp_path: Path) -> None:
    assert problem_of(tmp_path, {"problem": "?", **row}).gold == gold


@pytest.mark.parametrize(
    ("row", "question"),
    [
        ({"problem": "A?"}, "A?"),
        ({"question": "B?"}, "B?"),
        ({"problem": "A?", "question": "B?"}, "A?"),
        ({"problem": None, "question": "B?"}, "B?"),
        ({"question": "B?", "context": None}, "B?"),
        ({"question": "B?", "context": "Let $n=1$."}, "Let $n=1$.\n\nB?"),
    ],
    ids=str,
)
def test_where_the_question_is(row: dict[str, Any], question: str, tmp_path: Path) -> None:
    assert problem_of(tmp_path, {"answer": "1", **row}).question == question


def test_named_columns_are_read_instead(tmp_path: Path) -> None:
    row = {"problem": "A?", "answer": "1", "solution": "S", "prompt": "P?", "target": "$2$", "steps": ["T", "U"]}
    named = Columns("prompt", "target", "steps")
    assert problem_of(tmp_path, row, named) == Problem("P?", "2", "math/train", "T")


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"text": "?", "answer": "1"}, Columns(), ["no question", "no column problem or question", "question_column"]),
        ({"problem": [{"role": "user"}], "answer": "1"}, Columns(), ["no question", "column problem holds [{'role'"]),
        ({"problem": "?"}, Columns(), ["no gold", "no column answer or final_answer", "answer_column"]),
        ({"problem": "?", "answer": None}, Columns(), ["no gold", "column answer holds None"]),
        ({"problem": "?", "answer": float("nan")}, Columns(), ["no gold", "column answer holds nan"]),
        ({"problem": "?", "final_answer": ["1", ""]}, Columns(), ["no gold", "final_answer holds ['1', '']"]),
        ({"problem": "?", "solution": "It is 4."}, Columns(), ["no gold", "solution has no \\boxed{}"]),
        ({"problem": "?", "solution": "It is \\boxed{4"}, Columns(), ["no gold", "solution has no \\boxed{}"]),
        ({"problem": "?", "answer": "It is 2.\n#### 2"}, Columns(), ["GSM8K's form", "task gsm8k"]),
        (
            {"problem": "?", "answer": "1"},
            Columns(answer="gold"),
            ["no gold", "no column gold", "['problem', 'answer']"],
        ),
        ({"problem": "?", "answer": "1"}, Columns(solution="steps"), ["no solution", "no column steps"]),
    ],
    ids=[
        *("no question", "chat messages", "no gold", "null gold", "gold not a number", "empty member", "no box"),
        *("open box", "gsm8k", "no such column", "no such solution"),
    ],
)
def test_a_row_without_a_problem_is_named(
    row: dict[str, Any], columns: Columns, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as error:
        problem_of(tmp_path, row, columns)
    for word in ["train.jsonl, line 1", *words]:
        assert word in str(error.value)


LEVELS = [
    {"problem": f"{level}?", "answer": "1", "level": level} for level in (1, "2", "Level 3", 4.0, "Level ?", None)
]


@pytest.mark.parametrize(
    ("levels", "kept", "others"),
    [((3, 4, 5), ["Level 3?", "4.0?"], 4), ((1, 2), ["1?", "2?"], 4), (None, [f"{r['level']}?" for r in LEVELS], None)],
)
def test_levels_in_each_spelling(levels: Any, kept: list[str], others: int | None, tmp_path: Path) -> None:
    loaded = sources.load(Source("math", "train", write(tmp_path, *LEVELS), levels=levels))
    assert [problem.question for problem in loaded.problems] == kept
    assert loaded.of_other_levels == others


def test_levels_that_nobody_asked_for_need_no_column(tmp_path: Path) -> None:
    folder = write(tmp_path, {"problem": "?", "answer": "1"})
    assert len(sources.load(Source("math", "train", folder, levels=(3, 4, 5))).problems) == 1
    with pytest.raises(DatasetError, match=r"line 1: levels = \[3\] needs a column level.*leave levels out"):
        sources.load(Source("math", "train", folder, levels=(3,), levels_asked=True))


def test_levels_that_no_problem_has_name_those_there_are(tmp_path: Path) -> None:
    folder = write(tmp_path, *LEVELS)
    with pytest.raises(DatasetError, match=r"none of 6 problems has a level of \[7\], they have 1, 2, 4.0, Level 3"):
        sources.load(Source("math", "train", folder, levels=(7,)))


@pytest.mark.parametrize(
    ("name", "count", "golds", "with_solution"),
    [
        ("math500", 500, ["\\left( 3, \\frac{\\pi}{2} \\right)", "p - q", "\\frac{14}{3}"], 500),
        ("aime24", 30, ["204", "113", "371"], 30),
        ("amc23", 40, ["27", "36", "45"], 0),
        ("minerva_math", 272, ["1.6", "4.5e33", "41.8"], 272),
        ("olympiadbench", 675, ["2", "\\frac{1}{2 n+2}", "2^{1009}"], 675),
    ],
)
def test_the_real_benchmarks_are_whole(name: str, count: int, golds: list[str], with_solution: int) -> None:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not at {folder}; set R1ZERO_TEST_DATA")
    problems = load_problems("math", "test", str(folder))
    assert len(problems) == count
    assert [problem.gold for problem in problems[:3]] == golds
    assert all(problem.question and problem.gold for problem in problems)
    assert sum(bool(problem.solution) for problem in problems) == with_solution
