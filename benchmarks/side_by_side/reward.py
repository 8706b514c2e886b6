"""The reward that both sides are given, and the notebook of what was rewarded.

With forced lengths it is a coin that the tokens toss: every group has spread, as at a good moment of a real run, and
no side can save itself work that the other has. With natural lengths it is correctness: r1zero's own verdict there,
and on stock's side the cheapest rule that is right for such data (the last number of the text is the gold), which can
only be to stock's advantage.
"""

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOTEBOOK = "R1ZERO_BENCHMARK_NOTEBOOK"  # a file; each process appends its number
NATURAL = "R1ZERO_BENCHMARK_NATURAL"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """A number for each completion; called as TRL calls reward functions."""
    if columns.get("trainer_state") is not None:  # r1zero also asks before training
        file = Path(f"{os.environ[NOTEBOOK]}.{os.environ.get('RANK', '0')}")
        with file.open("a", encoding="utf-8") as notebook:
            lengths = [len(ids) for ids in completion_ids]
            notebook.write(json.dumps({"time": time.time(), "lengths": lengths}) + "\n")
    if NATURAL not in os.environ:
        return [float(sum(ids) % 2) for ids in completion_ids]
    if "verdict" in columns:
        return [float(verdict == "correct") for verdict in columns["verdict"]]
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [float(_last_number(text) == gold) for text, gold in zip(texts, columns["answer"], strict=True)]


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None
