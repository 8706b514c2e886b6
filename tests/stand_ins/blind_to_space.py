"""A reward function of a recipe under test. Where it is loaded nobody looks for room before a checkpoint is written, so
that writing itself meets the end of the disk, in whichever file and process that comes."""

from pathlib import Path
from typing import Any

from r1zero import checkpoints

_begin = checkpoints.begin


def _begin_blindly(checkpoint: Path, needed: int) -> Path:
    return _begin(checkpoint, 0)


checkpoints.begin = _begin_blindly


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Differs within a group, so that each step moves the policy."""
    return [(sum(map(ord, text)) % 11) / 11 for text in completions]
