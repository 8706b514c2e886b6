"""A reward function that fails in the second trainer process alone, once that has begun to learn."""

import os
import time
from pathlib import Path
from typing import Any

calls: list[int] = []


def reward(completions: list[str], **columns: Any) -> list[float]:
    """R1ZERO_NOTES names a folder that is told when."""
    calls.append(len(completions))
    if os.environ.get("RANK") == "1" and len(calls) == 2:
        Path(os.environ["R1ZERO_NOTES"], "failed-at").write_text(str(time.time()))
        raise ValueError("the reward of rank 1 is broken")
    return [float(len(text) % 3) for text in completions]
