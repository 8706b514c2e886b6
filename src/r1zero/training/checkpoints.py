"""Checkpoints of a trainer, complete or absent, from which a run goes on as if it had never stopped.

transformers' Trainer writes model, optimizer, scheduler and random states of every rank, and leaves three things out:
what lies between two steps (TRL's generation window and where in it the trainer is, losses and metrics that are not
logged yet), whether what it wrote arrived, and a word where something is missing when it is read. Those are here.
"""

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.utils.data
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1zero import checkpoints
from r1zero.checkpoints import CheckpointError
from r1zero.reporting import trackers
from r1zero.training.alarm import StopAlarms
from r1zero.training.clock import Clock, StepRecorder
from r1zero.training.recorder import Recorder
from r1zero.training.stopping import StopRequest, any_rank
from r1zero.training.zero3 import restore_rotary_frequencies

PROGRESS = "progress_{}.pt"  # what lies between two steps, of each rank
CAUSE_S = 30.0  # the process that gave a checkpoint up has said why by then, and its end ends the others

# Several processes on a CPU are given the device "cpu:0", which torch.load, also transformers', cannot load to.
torch.serialization.register_package(
    5, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
)


class ResumableTrainer(Trainer):  # type: ignore[misc]
    """What a trainer of ours has in common with the others: it is recorded, can be stopped, and goes on exactly.

    Mixed in before TRL's trainer. `begin_recording` comes after `__init__`.

    Attributes:
        recorder: where metrics go.
        clock: where a step's time went.
        stop_request: whether somebody asked the run to stop.
        stop_alarms: what ends the run by itself; None: nothing.
        weights_lost: whether the weights are no numbers any more; looked at where ``stop_on`` names nan.
        at_step_end: called with each step once it is recorded and, where it is to be, saved; after a resume at first
            with the step that was resumed at. Training goes on when it returns.
    """

    recorder: Recorder
    clock: Clock
    stop_request: StopRequest
    stop_alarms: StopAlarms | None = None
    weights_lost = False
    _complete_step = 0  # the last step of which a complete checkpoint is there
    _complete: Path | None = None
    _resumed: Path | None = None
    _between: dict[str, Any]  # what lay between two steps when the last one had ended
    _random: dict[str, Any]
    _on_the_way = False  # whether gradients of an optimizer step that has not ended are being gathered
    _aside: Path | None = None
    _stopping = False
    at_step_end: Callable[[int], None] | None = None
    _ended_step = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        restore_rotary_frequencies(self.model)
        if getattr(self, "ref_model", None) is not None:
            restore_rotary_frequencies(self.ref_model)

    def begin_recording(self, recorder: Recorder) -> None:
        """Make each step known to `recorder`, and look at each step's end whether to stop."""
        self.recorder = recorder
        self.clock = Clock()
        self.stop_request = StopRequest(recorder.folder, self.accelerator)
        self._steps = StepRecorder(recorder, self.clock)
        self.add_callback(self._steps)
        self.add_callback(_StepEnds(self))
        handler = self.callback_handler
        handler.callbacks = trackers.guarded(handler.callbacks, self.args.report_to, recorder.say)
        self.args.report_to = []  # TRL writes to some by itself, also before they are open and after they are closed

    @property
    def resumed_at(self) -> int | None:
        """The step of the checkpoint that this process went on from; None where it began anew."""
        return None if self._resumed is None else checkpoints.step_of(self._resumed)

    # What a subclass adds.

    def between_steps(self) -> dict[str, Any]:
        """What else lies between two steps on this rank, of TRL's trainers: tensors and plain values."""
        metrics = {name: [_plain(value) for value in values] for name, values in self._metrics["train"].items()}
        return {"metrics": metrics, "tokens": _plain(self._total_train_tokens)}

    def restore_between_steps(self, between: Mapping[str, Any]) -> None:
        """Put back what `between_steps` gave."""
        self._metrics["train"].clear()
        self._metrics["train"].update(between["metrics"])
        self._total_train_tokens = between["tokens"]

    def under_way(self) -> dict[str, Any]:
        """What else `restore_between_steps` is to get back, and has to be waited for. A collective."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a run must have in common with the one that wrote its checkpoint, else the rest would be another run."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return {
            "processes": self.args.world_size,
            "sharding": f"ZeRO-{plugin.zero_stage}" if plugin else "none",
            "examples": len(self.train_dataset),
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
        }

    # Going on.

    def resume(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on where there is one. A collective.

        Raises:
            CheckpointError: on all ranks, when nothing can go on from it: named is what is missing or differs.
            Stopped: when the run was asked to stop at a place where a step is abandoned.
        """
        self._resumed = checkpoint
        if checkpoint is not None:
            self._complete, self._complete_step = checkpoint, self._require_whole(checkpoint)
        self.recorder.resumed(self._complete_step, checkpoint)
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def leave(self) -> tuple[int, Path | None]:
        """Leave a complete checkpoint of the state after the last optimizer step. A collective.

        Returns:
            That step, and the checkpoint; None before the first step. Of weights that may not be saved, the newest one
            that this process knows of.
        """
        step = self.state.global_step
        if step > 0 and self._complete_step != step and self._may_be_saved():
            self._stopping = True
            _set_random(self._random)
            self.state.num_input_tokens_seen = self._between["tokens_seen"]
            self._write(self.model, None)
        return step, self._complete if step > 0 else None

    def _require_whole(self, checkpoint: Path) -> int:
        """Look at every file, each rank at its share; returns the step."""
        step = 0
        try:
            manifest = checkpoints.read_manifest(checkpoint)
            step = int(manifest["step"])
            why = self._difference(checkpoint, manifest)
        except CheckpointError as error:
            why = str(error)
        why = next((each for each in gather_object([why]) if each), None)
        if why:
            raise CheckpointError(f"nothing can go on from {checkpoint}: {why}")
        return step

    def _difference(self, checkpoint: Path, manifest: Mapping[str, Any]) -> str | None:
        if checkpoint.name != f"checkpoint-{manifest['step']}":
            return f"{checkpoints.MANIFEST} is that of step {manifest['step']}"
        if not manifest["resumable"]:
            return checkpoints.not_resumable(manifest)
        if getattr(self.args, "sync_ref_model", False):
            return "with sync_ref_model the reference model moves too, and a checkpoint does not hold it"
        for name, here in self.facts().items():
            there = manifest["facts"].get(name)
            if there != here:
                return (
                    f"it was written with {name} {there}, and this run has {here}; go on with what it was written with"
                )
        files = checkpoints.entries_of(manifest)
        rank, world = self.args.process_index, self.args.world_size
        return checkpoints.first_difference(checkpoint, {name: files[name] for name in sorted(files)[rank::world]})

    def restore(self) -> None:
        """Put back what lies between two steps; called when the Trainer has restored all else and set up its own."""
        if self._resumed is None:
            return
        path = self._resumed / PROGRESS.format(self.args.process_index)
        self._between = torch.load(path, map_location=self.args.device, weights_only=True)
        self._tr_loss = torch.tensor(self._between["loss"], device=self.args.device)
        self._total_loss_scalar = self._between["total_loss"]
        self._globalstep_last_logged = self._between["last_logged"]
        self.clock.resume(self._between["clock"])
        self._steps.last_step = self._between["last_logged"]
        self.restore_between_steps(self._between["own"])
        self._end_step()

    def note(self) -> None:
        """Remember what a checkpoint of this moment, the end of a step, would hold beside weights and the like."""
        self._random = _random_states()
        self._between = {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "tokens_seen": self.state.num_input_tokens_seen,
            "clock": self.clock.state(),
            "own": self.between_steps(),
        }

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """At the end of each step, and once more at that of an epoch."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.note()
        if not self.control.should_training_stop:
            self._end_step()

    def _end_step(self) -> None:
        if self.at_step_end and self._ended_step != self.state.global_step:
            self._ended_step = self.state.global_step
            self.at_step_end(self._ended_step)

    def _run_epoch(self, *, train_dataloader: Any, epoch: int, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed where training had ended. transformers would make one more step before it looks.
            self.control.should_training_stop = True
            return
        # accelerate does not find the sampler under the batches that it skips in a process of several.
        sampler = _sampler_of(train_dataloader)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        super()._run_epoch(train_dataloader=train_dataloader, epoch=epoch, **kwargs)

    # Alarms.

    def watch_for(self, names: Sequence[str] | None, recipe: Mapping[str, Any]) -> None:
        """End the run by itself where one of these (``stop_on``) comes up; after `begin_recording`."""
        if names:
            self.stop_alarms = StopAlarms(names, recipe, self.recorder.folder)

    def look_at_alarms(self, metrics: Mapping[str, Any]) -> None:
        """End the run, with a checkpoint of this step, where one of ``stop_on`` has come up. A collective.

        Called when the step is on record, and before it is saved.
        """
        if self.stop_alarms is None or (self.control.should_training_stop and self._stopping):
            return
        finding = self.stop_alarms.look(metrics) if self.accelerator.is_main_process else None
        if any_rank(self.accelerator, finding is not None)[0]:
            if finding is not None:
                self.recorder.alert(self.state.global_step, f"stop_on {finding.name}: {finding.evidence}")
            self.stop_request.raise_alarm(finding)
            self._stopping = self.control.should_save = self.control.should_training_stop = True

    def _may_be_saved(self) -> bool:
        """Whether the weights are numbers, where ``stop_on`` watches that: what is kept is sound. A collective."""
        if self.stop_alarms is None or not self.stop_alarms.on_nan:
            return True
        shards = (getattr(each, "ds_tensor", each).detach() for each in self.model.parameters() if each.requires_grad)
        self.weights_lost = any_rank(self.accelerator, not all(bool(torch.isfinite(each).all()) for each in shards))[0]
        return not self.weights_lost

    # Writing.

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written: aside, while one is."""
        return str(self._aside) if self._aside else super()._get_output_dir(trial)  # type: ignore[no-any-return]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._may_be_saved():
            self.note()
            with self.clock.phase("save"):
                self._write(model, trial)

    def _write(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of this step, aside until it is complete. A collective.

        Raises:
            CheckpointError: when the disk has no room for it; others are as they were.
        """
        self._between["own"] |= self.under_way()
        step = self.state.global_step
        final = self.recorder.folder.checkpoints / f"checkpoint-{step}"
        place = checkpoints.aside(final)
        # What a run that stops leaves behind is complete, whatever else the recipe wants of its checkpoints.
        only_model, self.args.save_only_model = (
            self.args.save_only_model,
            self.args.save_only_model and not self._stopping,
        )
        needed = self._bytes_of_a_checkpoint()
        try:
            self._on_main_process(lambda: checkpoints.begin(final, needed))
            self._aside = place.parent
            super()._save_checkpoint(model, trial)
            torch.save(self._between, place / PROGRESS.format(self.args.process_index))
            self.accelerator.wait_for_everyone()
            rank, world = self.args.process_index, self.args.world_size
            own = checkpoints.entries(place, checkpoints.files_of(place)[rank::world], sync=True)
            files = dict(gather_object(list(own.items())))
            self._on_main_process(lambda: self._put_in_place(final, files))
        except CheckpointError:
            raise
        except Exception as error:
            free = shutil.disk_usage(final.parent).free
            written = checkpoints.bytes_in(place)
            if not checkpoints.out_of_space(error, free, needed - written):
                if place.exists():
                    raise
                time.sleep(CAUSE_S)
                raise checkpoints.given_up(final) from error
            # What was begun goes, so that there is room to say how the run ended.
            checkpoints.give_up(final)
            raise checkpoints.no_space(final, needed, free + written) from error
        finally:
            self._aside, self.args.save_only_model = None, only_model
        self._complete, self._complete_step = final, step

    def _put_in_place(self, final: Path, files: Mapping[str, checkpoints.Entry]) -> None:
        step, resumable = self.state.global_step, not self.args.save_only_model
        checkpoints.write_manifest(checkpoints.aside(final), step, resumable, self.facts(), files)
        checkpoints.put_in_place(final)
        checkpoints.rotate(final.parent, final, self.args.save_total_limit)

    def _bytes_of_a_checkpoint(self) -> int:
        """At least what a checkpoint takes, over all ranks."""
        parameters = list(self.model.parameters())
        trained = [each for each in parameters if each.requires_grad]
        only_adapter = hasattr(self.model, "peft_config")
        weights: int = sum(_numbers(each) * each.element_size() for each in (trained if only_adapter else parameters))
        window: int = sum(each.nbytes for each in _tensors(self._between["own"])) * self.args.world_size
        if self.args.save_only_model:
            return weights + checkpoints.SPARE_BYTES
        if self.is_deepspeed_enabled:
            # Its shards hold the weights once more, and float32 copies of them beside Adam's two moments.
            optimizer: int = weights + 12 * sum(map(_numbers, trained))
        else:
            optimizer = sum(each.nbytes for each in _tensors(self.optimizer.state_dict()["state"]))
        return weights + optimizer + window + checkpoints.SPARE_BYTES

    def _on_main_process(self, act: Callable[[], object]) -> None:
        """Let the main process act; where it fails, all ranks fail with the same message."""
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                act()
            except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
                failure = error
        said = [None if failure is None else str(failure)]
        if self.args.world_size > 1:
            broadcast_object_list(said)
        if failure is not None:
            raise failure
        if said[0] is not None:
            raise CheckpointError(said[0])


class _StepEnds(TrainerCallback):  # type: ignore[misc]
    """Where the Trainer says that training begins and that steps end."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.restore()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._on_the_way = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and "train_runtime" not in logs:
            self.trainer.look_at_alarms({"step": state.global_step, **logs})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._on_the_way = False
        if self.trainer.stop_request.asked():
            self.trainer._stopping = control.should_save = control.should_training_stop = True


def _sampler_of(dataloader: Any) -> Any:
    """The sampler of indices beneath what accelerate has wrapped around it."""
    batches = dataloader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def _random_states() -> dict[str, Any]:
    """Of every generator that training draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def _plain(value: Any) -> float | int | None:
    """A metric as a plain number."""
    return value.item() if isinstance(value, torch.Tensor) else value


def _numbers(parameter: Any) -> int:
    """How many numbers a parameter has; one that DeepSpeed has sharded says 0 itself."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _tensors(tree: Any) -> "list[torch.Tensor]":
    """All tensors in nested lists and dicts."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]
