"""The measurement with which a cold start ends: launch/evaluate.py on the run, in a process of its own. No torch.

A process of its own, since it may start a policy server where the trainer has just been: by then nothing of the trainer
but its process is left.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from r1zero.recipe import Recipe
from r1zero.run_folder import RunFolder, append_json_line, read_json, write_json

TIMEOUT_S = 4 * 3600.0
# What tells a process that it is one of several trainers.
TRAINER_ENV = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "GROUP_", "ROLE_", "FSDP_")


def measure(recipe: Recipe, folder: RunFolder, project: Path, say: Callable[[str], None]) -> None:
    """Measure the final model on what the recipe measures on: into ``evaluation/`` of the run, and into its summary.

    A measurement that fails is said and does not fail the run: the model is saved.

    Args:
        recipe: of the run; eval_count 0 measures nothing.
        folder: of the run, with its final model.
        project: the checkout.
        say: gets what is to be said, a line at a time.
    """
    if recipe.own.eval_count == 0:
        return
    place = folder.path / "evaluation"
    script = (project / "launch" / "evaluate.py").absolute()
    words = [sys.executable, str(script), str(folder.path.absolute()), "--output_dir", str(place.absolute())]
    env = {key: value for key, value in os.environ.items() if not key.startswith(TRAINER_ENV)}
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        why = done.stderr.strip().rpartition("\n")[2] if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"not finished after {TIMEOUT_S:g} s"
    result = read_json(place / "result.json")
    if why or result is None:
        say(f"it could not be measured: {why or 'no result'}; again with launch/evaluate.py {folder.path}")
        return
    score = result["evaluations"][0]["scores"]
    summary = read_json(folder.summary) or {}
    held_out = {key: score[key] for key in ("mean", "low", "high", "questions", "samples")}
    write_json(folder.summary, {**summary, "held_out": {"after": held_out}})
    line = {"kind": "evaluation", "time": time.time(), "step": summary.get("steps", 0), **held_out}
    append_json_line(folder.metrics, {**line, "seconds": result["seconds"], "clipped": score["clipped"]})
    say(f"held-out accuracy: {100 * score['mean']:.1f} % [{100 * score['low']:.1f}, {100 * score['high']:.1f}]")
