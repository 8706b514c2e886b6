"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade-school word problems, the gold after ``####``."""

import re
from collections.abc import Mapping
from typing import Any

from r1zero.tasks.problem import DatasetError, Problem

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def problem(place: str, row: Mapping[str, Any], source: str, remove_commas: bool) -> Problem:
    """The problem that one row holds.

    Args:
        place: where the row stands, for errors.
        row: its columns; question and answer are read.
        source: what `Problem.source` says.
        remove_commas: turn a gold of 1,234 into 1234, as R1RL does.

    Raises:
        DatasetError: when a column is missing, or the answer has no gold.
    """
    if row.get("question") is None or row.get("answer") is None:
        raise DatasetError(
            f"{place}: task gsm8k needs the columns question and answer, there are {list(row)}; "
            "task math or dataset reads others"
        )
    worked, mark, gold = str(row["answer"]).rpartition("####")
    gold = gold.strip()
    if not mark or not gold:
        raise DatasetError(
            f"{place}: no gold after #### in answer {row['answer']!r}; task dataset takes the column answer as it is"
        )
    if remove_commas:
        gold = gold.replace(",", "")
    # The calculator annotations <<48/2=24>> are markup of the dataset's authors, not part of a solution.
    return Problem(str(row["question"]), gold, source, _CALCULATOR.sub("", worked).strip())
