"""The door of one trainer process: arguments, then `grpo.train` or `sft.train`. Torch comes once they are right."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from r1zero import recipe as recipes
from r1zero.preflight import golds, prompts
from r1zero.preflight.findings import has_fault
from r1zero.recipe import Recipe, RecipeError
from r1zero.restarts import REFUSED, Refusal
from r1zero.tasks import selection
from r1zero.tasks.problem import DatasetError
from r1zero.tasks.selection import Selection

BEGIN = "R1ZERO_BEGIN"  # names a file: once it exists there is a policy server, and the trainer may begin
POLL_S = 0.1


def main(method: str, project: Path) -> int:
    """Run the trainer process of `method` with the arguments of the command line.

    Returns:
        0; 2 when the recipe or its data cannot run, `REFUSED` when going on would have been wrong.
    """
    parser = argparse.ArgumentParser(
        description=f"One {method} trainer process, as `accelerate launch` runs it. launch/run.py does the rest.",
        epilog="Any key of the recipe can be overridden: --key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="a recipe YAML")
    parser.add_argument("--run_folder", type=Path, help="where to write; made anew where it is not given")
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on from this checkpoint of the run")
    known, overrides = parser.parse_known_args()
    try:
        recipe = recipes.load(known.config, overrides)
        if recipe.own.method != method:
            raise recipe.fault("method", f"this is launch/{method}.py", f"start launch/{recipe.own.method}.py")
        if recipe.launches_server:
            why = "started by hand there is no launcher to start the policy server"
            remedy = (
                "start `vllm serve` and pass --vllm_server_base_url, or use launch/run.py, whose --dry-run shows both"
            )
            raise recipe.fault("vllm_mode", why, remedy)
        chosen = selection.of(recipe)
        # The launcher has looked already. By hand, the first of several processes looks for all.
        if (
            known.run_folder is None
            and method == "grpo"
            and os.environ.get("RANK", "0") == "0"
            and not _can_start(recipe, chosen)
        ):
            return 2
        train = _train(method)
        wait_for_servers()
        train(recipe, chosen, known.run_folder, project, known.resume)
    except (RecipeError, DatasetError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Refusal as error:
        sys.stderr.write(f"error: {error}\n")
        return REFUSED
    return 0


def _can_start(recipe: Recipe, chosen: Selection) -> bool:
    findings = golds.required(chosen, recipe)
    findings += prompts.look(recipe, chosen.train)
    for finding in findings:
        sys.stdout.write(finding.line() + "\n")
    return not has_fault(findings)


def wait_for_servers() -> None:
    """A launcher starts us while its servers start, to import side by side; where it dies it takes us along."""
    begin = os.environ.get(BEGIN)
    while begin is not None and not Path(begin).exists():
        time.sleep(POLL_S)


def _train(method: str) -> Callable[[Recipe, Selection, Path | None, Path, Path | None], None]:
    if method == "sft":
        from r1zero.training.sft import train as train_sft

        return train_sft
    from r1zero.training.grpo import train as train_grpo

    return train_grpo
