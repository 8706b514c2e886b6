"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems, the gold after ``####``."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from r1zero.tasks.problem import DatasetError, Problem

HUB_ID = "openai/gsm8k"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def load(split: str, dataset_name: str = HUB_ID, remove_commas: bool = True) -> list[Problem]:
    """The problems of `split`, in the order of the dataset.

    Args:
        split: "train" (7,473) or "test" (1,319).
        dataset_name: the hub id, or a local folder with ``<split>.jsonl``, ``.json`` or ``.parquet``.
        remove_commas: turn a gold of 1,234 into 1234, as R1RL does.

    Raises:
        DatasetError: when the data is not there or a row has no gold; it names the row.
    """
    problems = []
    for number, row in enumerate(_rows(split, dataset_name), start=1):
        try:
            question, answer = row["question"], row["answer"]
        except (KeyError, TypeError) as error:
            raise DatasetError(
                f"{dataset_name}, {split} row {number}: needs the columns question and answer, has "
                f"{list(row) if isinstance(row, Mapping) else repr(row)[:100]}"
            ) from error
        worked, mark, gold = str(answer).rpartition("####")
        gold = gold.strip()
        if not mark or not gold:
            raise DatasetError(f"{dataset_name}, {split} row {number}: no gold after #### in answer {answer!r}")
        if remove_commas:
            gold = gold.replace(",", "")
        # The calculator annotations <<48/2=24>> are markup of the dataset's authors, not part of a solution.
        solution = _CALCULATOR.sub("", worked).strip()
        problems.append(Problem(str(question), gold, f"gsm8k/{split}", solution))
    if not problems:
        raise DatasetError(f"{dataset_name}: split {split} is empty")
    return problems


def _rows(split: str, dataset_name: str) -> Iterable[Mapping[str, Any]]:
    folder = Path(dataset_name).expanduser()
    if not folder.is_dir():
        import datasets

        try:
            rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(dataset_name, "main", split=split)
            return rows
        except Exception as error:  # the hub, the cache and the builders raise many kinds
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            remedy = "offline, name a local folder with train.jsonl and test.jsonl: --dataset_name FOLDER"
            raise DatasetError(f"{dataset_name}: cannot be loaded ({why}); {remedy}") from error
    for ending in ("jsonl", "json"):
        file = folder / f"{split}.{ending}"
        if file.is_file():
            return _json_lines(file)
    file = folder / f"{split}.parquet"
    if file.is_file():
        import pyarrow.parquet

        return list(pyarrow.parquet.read_table(file).to_pylist())
    raise DatasetError(f"{folder}: has no {split}.jsonl, {split}.json or {split}.parquet")


def _json_lines(file: Path) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{file}, line {number}: is not JSON ({error})") from error
