"""Task dataset: any rows by the names of their columns."""

import json
from pathlib import Path
from typing import Any

import pytest

from r1zero.tasks import sources
from r1zero.tasks.columns import Columns
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.sources import Source


def load(file: Path, row: dict[str, Any], columns: Columns = sources.GUESSED) -> list[Problem]:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(row) + "\n")
    return sources.load(Source("dataset", "train", str(file), columns=columns)).problems


def test_question_and_answer_are_the_columns_of_a_recipe_that_names_none(tmp_path: Path) -> None:
    row = {"question": "1+1?", "answer": 2, "problem": "not this", "solution": "nor this"}
    assert load(tmp_path / "sums.jsonl", row) == [Problem("1+1?", "2", "sums/train")]


def test_named_columns(tmp_path: Path) -> None:
    row = {"prompt": "1+1?", "target": "$2$", "cot": "One and one."}
    found = load(tmp_path / "easy sums" / "train.jsonl", row, Columns("prompt", "target", "cot"))
    assert found == [Problem("1+1?", "2", "easy_sums/train", "One and one.")]


@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"problem": "?", "answer": "1"}, Columns(), ["no question", "no column question", "question_column"]),
        ({"question": "?", "answer": ""}, Columns(), ["no gold", "column answer holds ''", "answer_column"]),
        ({"question": "?", "answer": True}, Columns(), ["no gold", "column answer holds True"]),
        ({"question": "?", "answer": "2\n#### 2"}, Columns(), ["GSM8K's form", "task gsm8k reads"]),
        (
            {"question": "?", "answer": "1"},
            Columns(solution="cot"),
            ["no solution", "no column cot", "solution_column"],
        ),
    ],
    ids=["no question", "empty gold", "no text", "gsm8k", "no solution"],
)
def test_a_row_without_a_problem_is_named(
    row: dict[str, Any], columns: Columns, words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError) as error:
        load(tmp_path / "sums.jsonl", row, columns)
    for word in ["sums.jsonl, line 1", *words]:
        assert word in str(error.value)
