"""What every trainer process does before and after it trains, whichever method."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from r1zero import checkpoints, run_folder
from r1zero.recipe import Recipe
from r1zero.reporting import trackers
from r1zero.run_folder import RunFolder, read_json, write_json, write_yaml
from r1zero.training.checkpoints import ResumableTrainer
from r1zero.training.recorder import Recorder
from r1zero.training.stopping import Stopped

SETTLE_S = 0.2


@contextmanager
def session(recipe: Recipe, folder: Path | None, project: Path) -> Iterator[Recorder]:
    """The run folder and its recorder; at the end the processes leave together.

    Args:
        recipe: what is trained.
        folder: the run folder that the launcher made; None, started by hand: a new one is made here.
        project: the checkout, for its git commit.
    """
    _without_compiler()
    cpu = recipe.library.get("use_cpu", not torch.cuda.is_available())  # several processes on a CPU talk over gloo
    # The process group is made here, so the deadline of its collectives must come here too.
    state = PartialState(cpu=bool(cpu), timeout=timedelta(seconds=recipe["ddp_timeout"]))
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    recorder = Recorder(_agreed_folder(recipe, folder, state), state.is_main_process)
    if recorder.active and folder is None:
        write_yaml(recorder.folder.recipe, recipe.resolved())
        write_json(recorder.folder.versions, run_folder.versions(project))
        recorder.say(f"run folder: {recorder.folder.path}")
    if recorder.active and "wandb" in trackers.chosen(recipe.library.get("report_to")):
        recorder.tracker = trackers.WandbRun(recorder.folder.path, recorder.say)
        recorder.tracker.start(recipe.resolved())
    if recorder.active:
        checkpoints.remove_leftovers(recorder.folder.checkpoints)
    recorder.phase("loading model and data")
    try:
        yield recorder
    except BaseException:
        # When the process group goes, the other processes fail, and their end ends this one. Its own error is to be
        # said before that, so what takes time comes first.
        _close_tracker(recorder)
        raise
    finally:
        # Gloo's thread needs the GIL to drop its last collective; whoever then frees the process group holds the GIL
        # and waits for that thread, for ever (torch 2.13, ~ProcessGroupGloo under ~Reducer). So it is let finish first.
        time.sleep(SETTLE_S)
        state.destroy_process_group()
        _close_tracker(recorder)


def _close_tracker(recorder: Recorder) -> None:
    if recorder.tracker is not None:
        recorder.tracker.finish((read_json(recorder.folder.summary) or {}).get("outcome"))
        recorder.tracker = None


@contextmanager
def leaving_when_asked(recorder: Recorder, trainer: ResumableTrainer) -> Iterator[None]:
    """Where the run is asked to stop inside, it leaves a complete checkpoint, says so in its summary, and is done."""
    try:
        yield
    except Stopped as stopped:
        step, checkpoint = trainer.leave()
        lost = "; the weights after it are no numbers and were not kept" if trainer.weights_lost else ""
        recorder.stopped(step, checkpoint, f"{stopped}{lost}", stopped.summary)


def finish(recorder: Recorder, trainer: Any, began: float, summary: dict[str, Any]) -> None:
    """Save the final model and write how the run ended. A collective: saving gathers sharded weights."""
    recorder.phase("saving the model")
    _save(trainer, recorder.folder.model)
    if not recorder.active:
        return
    write_json(
        recorder.folder.summary,
        {
            "outcome": "finished",
            "steps": trainer.state.global_step,
            "seconds": round(time.monotonic() - began, 1),
            **summary,
            "model": str(recorder.folder.model),
        },
    )
    recorder.phase("done")


def keep_best(recorder: Recorder, trainer: Any, score: dict[str, Any]) -> None:
    """Keep the model in `RunFolder.best` where its mean is above that of the one kept there. A collective.

    The one before stays whole until the new one is.
    """
    best = recorder.folder.best
    kept = read_json(best / "best.json")
    better: list[bool] = [kept is None or score["mean"] > kept["mean"]]
    broadcast_object_list(better)  # one process looks: another might see the folder as it is being replaced
    if not better[0]:
        return
    aside, before = best.with_name(".best.partial"), best.with_name(".best.before")
    if recorder.active:
        for leftover in (aside, before):
            shutil.rmtree(leftover, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    _save(trainer, aside)
    if not recorder.active:
        return
    write_json(aside / "best.json", {"step": trainer.state.global_step, **score})
    if best.exists():
        best.rename(before)
    aside.rename(best)
    shutil.rmtree(before, ignore_errors=True)
    recorder.say(f"best so far: {100 * score['mean']:.1f} %, kept in {best}")


def _save(trainer: Any, place: Path) -> None:
    """Model and tokenizer. A collective: saving gathers sharded weights."""
    trainer.save_model(str(place))
    if trainer.accelerator.is_main_process:
        trainer.processing_class.save_pretrained(str(place))


def without_printer(trainer: Any) -> None:
    """Take out transformers' own printing of each step's metrics: the recorder says them in one line."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)


def _without_compiler() -> None:
    """Keep DeepSpeed on a CPU from compiling collectives of its own when it begins.

    All processes would compile the same at once, into one place, and those that wait there for the others' result find
    none when a compilation is killed, or wait for ever. Gloo does what is needed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _agreed_folder(recipe: Recipe, folder: Path | None, state: PartialState) -> RunFolder:
    if folder is not None:
        return RunFolder(folder)
    made: list[str] = [""]
    if state.is_main_process:
        path = run_folder.default_path(recipe.own.runs_dir, recipe.name, recipe["output_dir"])
        made = [str(RunFolder(path).create().path)]
    if state.num_processes > 1:
        broadcast_object_list(made)
    return RunFolder(Path(made[0]))
