"""A reward that differs within a group, so that each step moves a policy that knows nothing."""

from typing import Any


def spread(completions: list[str], **columns: Any) -> list[float]:
    return [(sum(map(ord, text)) % 11) / 11 for text in completions]
