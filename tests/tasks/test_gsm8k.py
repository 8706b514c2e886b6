"""GSM8K from a folder: what a row becomes, how a broken one is named, and the real data whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1zero.tasks import gsm8k as task
from r1zero.tasks import load_problems
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.verifier import Verdict, grade

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


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_folder_in_each_form_gives_the_same_problems(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"train.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    else:
        file.write_text(jsonl(*ROWS))
    assert load_problems("gsm8k", "train", str(tmp_path)) == PROBLEMS


def test_commas_stay_in_the_gold_where_the_recipe_says_so(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(jsonl(*ROWS))
    assert [p.gold for p in load_problems("gsm8k", "train", str(tmp_path), remove_commas=False)] == ["24", "1,234"]


def test_the_last_mark_holds_the_gold_and_blank_lines_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n" + jsonl({"question": "?", "answer": "Not #### 1 but\n#### -2"}) + "  \n")
    assert load_problems("gsm8k", "test", str(tmp_path)) == [Problem("?", "-2", "gsm8k/test", "Not #### 1 but")]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    row = {"question": "One\u2028two?", "answer": "#### 3"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_problems("gsm8k", "train", str(tmp_path))[0].question == "One\u2028two?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (jsonl(ROWS[0], {"question": "1+1?", "answer": "2"}), ["train row 2", "no gold after ####", "'2'"]),
        (jsonl(ROWS[0], {"question": "1+1?", "answer": "two ####  "}), ["train row 2", "no gold after ####"]),
        (
            jsonl({"problem": "1+1?", "answer": "#### 2"}),
            ["row 1", "columns question and answer", "['problem', 'answer']"],
        ),
        (jsonl(ROWS[0], 7), ["train row 2", "needs the columns question and answer", "has 7"]),
        (jsonl(ROWS[0], None), ["train row 2", "needs the columns question and answer", "has None"]),
        (jsonl(ROWS[0]) + '{"question": "cut of\n', ["train.jsonl, line 2", "is not JSON"]),
        ("", ["split train is empty"]),
    ],
    ids=["no mark", "nothing after it", "other columns", "a number", "null", "broken line", "empty"],
)
def test_a_broken_file_is_named_with_its_row(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(DatasetError) as error:
        load_problems("gsm8k", "train", str(tmp_path))
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_a_folder_without_the_split_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(jsonl(*ROWS))
    with pytest.raises(DatasetError, match=r"has no test\.jsonl, test\.json or test\.parquet"):
        load_problems("gsm8k", "test", str(tmp_path))


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'gsm9k' is not one of arithmetic, gsm8k"):
        load_problems("gsm9k", "train", None)


def test_the_hub_without_a_network_names_the_way_round_it(tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment once, at import. Through the default dataset."""
    code = "from r1zero.tasks import load_problems; load_problems('gsm8k', 'train', None)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("r1zero.tasks.problem.DatasetError: openai/gsm8k: cannot be loaded (")
    assert "name a local folder with train.jsonl and test.jsonl: --dataset_name FOLDER" in last


def test_the_hub_is_asked_for_its_main_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert task.load("train") == PROBLEMS
    assert asked == [(("openai/gsm8k", "main"), {"split": "train"})]


@pytest.mark.parametrize("remove_commas", [True, False])
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_the_real_data_is_whole_and_every_gold_is_right_by_its_own_grading(
    split: str, count: int, remove_commas: bool, gsm8k: Path
) -> None:
    problems = load_problems("gsm8k", split, str(gsm8k), remove_commas)
    assert len(problems) == count
    for problem in problems:
        assert problem.gold and problem.question and problem.solution
        assert "<<" not in problem.solution and "####" not in problem.solution
        assert problem.source == f"gsm8k/{split}"
        graded = grade(f"<answer>{problem.gold}</answer>", problem.gold, remove_commas)
        assert (graded.answer, graded.verdict) == (problem.gold, Verdict.CORRECT)
    assert any("," in problem.gold for problem in problems) != remove_commas
