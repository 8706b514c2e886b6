"""Which experiment trackers a run reports to. Nothing here asks a question, needs a login or stops a run.

Weights & Biases is on when the user has it configured, one run per run folder; without a network it goes on offline.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

INIT_TIMEOUT_S = 30.0


def chosen(asked: str | list[str] | None) -> list[str]:
    """The trackers in use: those the recipe names, else wandb where it is configured, else none."""
    if asked is None or asked == "all":
        return ["wandb"] if _wandb_configured() else []
    names = [asked] if isinstance(asked, str) else list(asked)
    return [name for name in names if name != "none"]


def start_wandb(run_folder: Path, config: dict[str, Any]) -> str:
    """Open the W&B run of this run folder; the same folder always means the same W&B run.

    Returns:
        A line that says where it is, or that it is offline.
    """
    import wandb

    settings: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "r1zero"),
        "id": run_folder.name,
        "name": run_folder.name,
        "resume": "allow",
        "dir": str(run_folder),
        "config": config,
    }
    try:
        run = wandb.init(**settings, settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True))
    except (wandb.errors.Error, OSError) as error:
        why = " ".join(str(error).split())[:200]
        wandb.teardown()  # its service still holds the id of the run that did not start
        run = wandb.init(**settings, mode="offline", settings=wandb.Settings(silent=True))
        return (
            f"Weights & Biases cannot be reached ({why}); offline: `wandb sync {run.settings.sync_dir}` sends it later"
        )
    return f"Weights & Biases: {run.url or 'offline, ' + str(run.settings.sync_dir)}"


def _wandb_configured() -> bool:
    if importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
