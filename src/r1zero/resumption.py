"""Which run goes on when the launcher starts, and which of its keys may be other ones from then on."""

from pathlib import Path

from r1zero import recipe as recipes
from r1zero.recipe import Fault, Recipe, RecipeError
from r1zero.run_folder import RunFolder, read_json
from r1zero.slurm import Job

# What says how a run is carried out, watched and kept, and not what is learned.
MAY_CHANGE = frozenset(
    {
        *("server_ready_timeout", "server_silence_timeout", "generation_timeout", "publish_timeout"),
        *("max_restarts", "max_requeues", "preemption_grace", "stop_on"),
        *("save_steps", "save_total_limit", "logging_steps", "report_to", "runs_dir"),
        *("gpu_memory_limit", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "publish", "server_gpus"),
        "servers_per_gpu",
        *("gradient_checkpointing", "dataloader_num_workers"),
    }
)


def recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe that the run in `path` goes on with: its own, with those keys laid over it that may change.

    Raises:
        RecipeError: when there is no such run, or another key would change.
    """
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        why, remedy = "is no run folder: it has no recipe.yaml", "name one, such as runs/X-20261121-093000"
        raise RecipeError(str(path), [Fault("resume", str(path), why, remedy)])
    if (read_json(folder.summary) or {}).get("outcome") == "finished":
        why = "has finished: there is nothing to go on with"
        raise RecipeError(str(path), [Fault("resume", str(path), why, "start another run; its model is in model/")])
    was = recipes.load(folder.recipe)
    now = recipes.load(folder.recipe, overrides)
    before, after = was.resolved(), now.resolved()
    if now["output_dir"]:
        after["output_dir"] = now["output_dir"]
    other = [key for key in after if key not in MAY_CHANGE and after[key] != before.get(key)]
    if other:
        remedy = f"leave it out, or start another run; these may change: {', '.join(sorted(MAY_CHANGE))}"
        faults = [
            Fault(key, after[key], f"this run began with {before.get(key)!r}, and would be another one", remedy)
            for key in other
        ]
        raise RecipeError(str(path), faults)
    return now


def folder(recipe: Recipe, named: Path | None, job: Job | None) -> Path | None:
    """The run folder to go on in; None where the run is a new one.

    Args:
        recipe: of the run.
        named: the folder that was given by hand.
        job: of Slurm, which finds its own folder again after a requeue.
    """
    if named is not None or job is None or not job.restarts:
        return named
    path = Path(recipe["output_dir"] or Path(recipe.own.runs_dir) / f"{recipe.name}-{job.name}")
    return path if RunFolder(path).recipe.is_file() else None
