"""The publish folder: the one place from which the policy server reads adapters and weights."""

import os
from pathlib import Path

from r1zero.serving import PUBLISH_FOLDER


def published(path: str) -> Path | None:
    """What lies there in the publish folder, links followed; None for a path that leads out of it.

    Args:
        path: absolute, or relative to the publish folder.
    """
    named = os.environ.get(PUBLISH_FOLDER, "")
    if not named or "\0" in path:
        return None
    folder = Path(named).resolve()
    inside = (folder / path).resolve()
    return inside if folder in inside.parents else None
