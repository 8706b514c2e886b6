"""Rows from files, folders and the hub: the same rows in each form, and what is said where they cannot be had."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1zero.tasks import load_problems, rows
from r1zero.tasks.problem import DatasetError

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "One\u2028two?", "answer": "3"}]


def jsonl(*found: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)


def write(file: Path, found: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(found), file)
    else:
        file.write_text(jsonl(*found), encoding="utf-8")


def read(dataset: Path, split: str = "train", config: str | None = None) -> list[Any]:
    return [row for _, row in rows.read(str(dataset), split, config)]


@pytest.mark.parametrize(
    "name",
    ["train.jsonl", "train.json", "train.parquet", "data/train.jsonl", "data/train.parquet"],
)
def test_a_folder_in_each_form_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    write(tmp_path / "test.jsonl", [{"question": "?", "answer": "!"}])
    assert read(tmp_path) == ROWS


@pytest.mark.parametrize("folder", ["", "data"])
def test_shards_are_read_in_their_order_and_no_other_splits(folder: str, tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        write(tmp_path / folder / f"train-0000{number}-of-00002.parquet", [row])
    write(tmp_path / folder / "test-00000-of-00001.parquet", [{"question": "?", "answer": "!"}])
    assert read(tmp_path) == ROWS
    assert read(tmp_path, "test") == [{"question": "?", "answer": "!"}]


def test_a_configuration_is_the_folder_of_that_name(tmp_path: Path) -> None:
    write(tmp_path / "main" / "train-00000-of-00001.parquet", ROWS)
    write(tmp_path / "socratic" / "train-00000-of-00001.parquet", ROWS[:1])
    assert read(tmp_path, config="main") == ROWS
    assert read(tmp_path, config="socratic") == ROWS[:1]
    with pytest.raises(DatasetError, match=r"has no train\.jsonl.*it holds main, socratic; .*dataset_config"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["sums.jsonl", "sums.json", "sums.parquet"])
def test_a_file_is_read_whole_whatever_the_split(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    assert read(tmp_path / name, "train") == read(tmp_path / name, "test") == ROWS


def test_a_json_file_may_be_one_list(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps(ROWS, indent=2))
    assert read(tmp_path) == ROWS


def test_each_row_comes_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n" + jsonl(ROWS[0]) + "  \n" + jsonl(ROWS[1]), encoding="utf-8")
    write(tmp_path / "test.parquet", ROWS)
    file = tmp_path / "train.jsonl"
    assert [place for place, _ in rows.read(str(tmp_path), "train")] == [f"{file}, line 2", f"{file}, line 4"]
    assert [place for place, _ in rows.read(str(tmp_path), "test")][1] == f"{tmp_path / 'test.parquet'}, row 2"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.jsonl", jsonl(ROWS[0], 7), ["train.jsonl, line 2", "holds 7", "columns"]),
        ("train.jsonl", jsonl(ROWS[0], None), ["train.jsonl, line 2", "holds None"]),
        ("train.jsonl", jsonl(ROWS[0]) + '{"question": "cut of\n', ["train.jsonl, line 2", "is not JSON"]),
        ("train.json", "[1,", ["train.json", "is not JSON"]),
        ("train.json", "[1]", ["train.json, row 1", "holds 1"]),
        ("train.jsonl", b"\xff\xfe", ["train.jsonl", "cannot be read", "utf-8"]),
        ("train.parquet", b"PAR1", ["train.parquet", "cannot be read as parquet"]),
        ("test.jsonl", "", ["has no train.jsonl, train.json, train.parquet or train-*.parquet", "it holds test.jsonl"]),
    ],
    ids=["a number", "null", "broken line", "broken list", "list of numbers", "not UTF-8", "not parquet", "no split"],
)
def test_a_broken_file_is_named_with_its_place(name: str, content: Any, words: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DatasetError) as error:
        read(tmp_path)
    for word in [str(tmp_path), *words]:
        assert word in str(error.value)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="split train is empty"):
        load_problems("gsm8k", "train", str(tmp_path))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sums.csv").write_text("question,answer\n")
    with pytest.raises(DatasetError, match=r"sums\.csv: is not one of \.jsonl, \.json, \.parquet"):
        read(tmp_path / "sums.csv")


def test_the_same_rows_are_told_by_their_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    (tmp_path / "again").symlink_to(tmp_path)
    folder, file = (str(tmp_path), "train", None), (str(tmp_path / "again" / "train.jsonl"), "test", None)
    assert rows.same_rows(folder, file)
    assert not rows.same_rows((str(tmp_path), "test", None), file)
    assert rows.same_rows(("a/b", "train", None), ("a/b", "train", None))
    assert not rows.same_rows(("a/b", "train[:90%]", None), ("a/b", "train[90%:]", None))
    assert not rows.same_rows(("a/b", "train", "one"), ("a/b", "train", "two"))


@pytest.mark.parametrize(
    ("task", "split", "asked"),
    [
        ("gsm8k", "train", ("openai/gsm8k", "main")),
        ("gsm8k", "test", ("openai/gsm8k", "main")),
        ("math", "train", ("DigitalLearningGmbH/MATH-lighteval", "default")),
        ("math", "test", ("HuggingFaceH4/MATH-500", "default")),
    ],
)
def test_the_hub_is_asked_for_a_tasks_own_dataset(
    task: str, split: str, asked: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2" if task == "gsm8k" else "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [problem.gold for problem in load_problems(task, split)] == ["2"]
    assert calls == [(asked, {"split": split})]


def test_the_hub_without_a_network_names_the_way_round_it(tmp_path: Path) -> None:
    """In a process of its own: the hub library reads its environment once, at import."""
    code = "from r1zero.tasks import load_problems; load_problems('gsm8k', 'train')"
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
    assert last.startswith("r1zero.tasks.problem.DatasetError: openai/gsm8k: split train cannot be loaded (")
    assert "name a local folder with train.jsonl in it: --dataset_name FOLDER" in last
