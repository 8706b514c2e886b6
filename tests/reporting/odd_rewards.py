"""Reward functions that make a run ill, in the ways that people's own do."""

import math
import time
from collections.abc import Sequence
from typing import Any


def nothing(completions: Sequence[str], **columns: Any) -> list[float]:
    """Looks for a form of answer that was never asked for."""
    return [float("####" in text) for text in completions]


def length(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Pays for every token, so that writing on and on is what pays best."""
    return [len(ids) / 100 for ids in completion_ids]


def ends_in_seven(answer: Sequence[str | None], **columns: Any) -> list[float]:
    """Pays for something that right answers happen to have one time in ten."""
    return [float(each is not None and each.strip().endswith("7")) for each in answer]


def growing(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """Pays so much for length that float32 cannot hold it from 35 tokens on."""
    return [math.exp(2.5 * len(ids)) for ids in completion_ids]


def slow(completions: Sequence[str], **columns: Any) -> list[float]:
    """Asks somebody far away, one completion after the other."""
    time.sleep(0.05 * len(completions))
    return [0.0] * len(completions)
