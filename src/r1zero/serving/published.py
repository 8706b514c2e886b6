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


def safetensors_file(name: str) -> Path:
    """The file of that name in the publish folder.

    Raises:
        PermissionError: when it is not inside, or is called otherwise.
    """
    path = published(name)
    if path is None or path.suffix != ".safetensors":
        raise PermissionError(f"{name!r} is not a safetensors file inside the folder that {PUBLISH_FOLDER} names")
    return path
