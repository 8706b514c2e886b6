"""GSM8K from a folder: what a row becomes, how a broken one is named, and the real data whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1zero.tasks import load_problems
from r1zero.tasks.problem import DatasetError, Problem

ROWS = [
    {"question": "Half of 48?", "answer": "Half is 48/2 = <<48/2=24>>24 clips.\n#### 24"},
    {"question": "A thousand and 234?", "answer": "Together $<<1000+234=1234>>1,234.\n####  1,234 "},
]
PROBLEMS = [
    Problem("Half of 48?", "24", "gsm8k/train", "Half is 48/2 = 24 clips."),
    Problem("A thousand and 234?", "1234", "gsm8k/train", "Together $1,234."),
]


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_what_a_row_becomes(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(jsonl(*ROWS))
    assert load_problems("gsm8k", "train", str(tmp_path)) == PROBLEMS


def test_commas_stay_in_the_gold_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(jsonl(*ROWS))
    assert [p.gold for p in load_problems("gsm8k", "train", str(tmp_path), remove_commas=False)] == ["24", "1,234"]


def test_the_last_mark_holds_the_gold_and_blank_lines_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n" + jsonl({"question": "?", "answer": "Not #### 1 but\n#### -2"}) + "  \n")
    assert load_problems("gsm8k", "test", str(tmp_path)) == [Problem("?", "-2", "gsm8k/test", "Not #### 1 but")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            jsonl(ROWS[0], {"question": "1+1?", "answer": "2"}),
            ["train.jsonl, line 2", "no gold after ####", "'2'", "task dataset"],
        ),
        (jsonl(ROWS[0], {"question": "1+1?", "answer": "two ####  "}), ["line 2", "no gold after ####"]),
        (
            jsonl({"problem": "1+1?", "answer": "#### 2"}),
            ["line 1", "needs the columns question and answer", "['problem', 'answer']", "task math or dataset"],
        ),
        (jsonl({"question": None, "answer": "#### 2"}), ["line 1", "needs the columns question and answer"]),
    ],
    ids=["no mark", "nothing after it", "other columns", "no question"],
)
def test_a_row_that_holds_no_problem_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(DatasetError) as error:
        load_problems("gsm8k", "train", str(tmp_path))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'gsm9k' is not one of arithmetic, gsm8k, math, dataset"):
        load_problems("gsm9k", "train", None)


@pytest.mark.parametrize("remove_commas", [True, False])
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_the_real_data_is_whole(split: str, count: int, remove_commas: bool, gsm8k: Path) -> None:
    problems = load_problems("gsm8k", split, str(gsm8k), remove_commas)
    assert len(problems) == count
    for problem in problems:
        assert problem.gold and problem.question and problem.solution
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert problem.source == f"gsm8k/{split}"
    assert any("," in problem.gold for problem in problems) != remove_commas
