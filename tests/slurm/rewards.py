"""A reward that differs within a group, so that each step moves a policy that knows nothing."""

import time
from typing import Any


def spread(completions: list[str], **columns: Any) -> list[float]:
    return [(sum(map(ord, text)) % 11) / 11 for text in completions]


def unhurried(completions: list[str], **columns: Any) -> list[float]:
    """The same, slow enough for a signal to arrive within the step that it is meant for, or the one after it."""
    time.sleep(1)
    return spread(completions)
