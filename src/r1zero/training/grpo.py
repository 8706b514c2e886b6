"""One trainer process of GRPO, from model to final score."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import get_peft_config, get_quantization_config

from r1zero import batch, model_facts
from r1zero.evaluation.scores import Score
from r1zero.plan import TRAINER_MEMORY
from r1zero.recipe import Recipe
from r1zero.run_folder import RunFolder
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.tasks.problem import Problem
from r1zero.tasks.selection import Selection
from r1zero.training import arguments, data, held_out
from r1zero.training.generation import PolicyServer, ServerSettings
from r1zero.training.session import finish, keep_best, leaving_when_asked, session, without_printer
from r1zero.training.trainer import PolicyTrainer

PROBED_TOKENS = 512


def train(recipe: Recipe, chosen: Selection, folder: Path | None, project: Path, resume: Path | None = None) -> None:
    """Measure, train, measure, save; from the checkpoint `resume` on, where there is one."""
    began = time.monotonic()
    _hold_memory()
    reward_functions = recipe.reward_functions()
    with session(recipe, folder, project) as recorder, recipe.verifier() as verifier:
        if torch.cuda.is_available():
            verifier.begin()  # processors are to spare here, and the first step that needs algebra would wait for it
        model = model_facts.path_of(recipe.model)
        if recipe.own.micro_batch_tokens is not None:
            batch.check_packing(recipe, model_facts.read(model, recipe["model_revision"], download=True))
        config = arguments.config_for(recipe, recorder.folder)
        model_config = arguments.model_config(recipe)
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=recipe["model_revision"], padding_side="left", trust_remote_code=recipe["trust_remote_code"]
        )
        for note in chosen.notes:
            recorder.say(note)
        problems = data.within_limit(chosen.train, recipe, tokenizer)
        test = _held_out(chosen.test, recipe, tokenizer)
        recorder.say(f"{len(problems)} problems to train on, {len(test)} to measure on")
        trainer = PolicyTrainer(
            model=model,
            reward_funcs=reward_functions,
            args=config,
            train_dataset=data.for_grpo(problems, recipe),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
            quantization_config=get_quantization_config(model_config),
            recorder=recorder,
            verifier=verifier,
            stop_strings=recipe.own.stop_strings or (),
            alerts={"unparsed": recipe.own.alert_unparsed, "timed_out": recipe.own.alert_timed_out},
            server=_server(recipe, recorder.folder, problems, tokenizer),
            seed_rollouts=recipe.own.seed_rollouts,
            max_staleness=recipe.own.max_staleness,
            micro_batch_tokens=recipe.own.micro_batch_tokens,
        )
        with contextlib.closing(trainer):
            without_printer(trainer)
            trainer.watch_for(recipe.own.stop_on, recipe.resolved())
            measurements = _Measurements(trainer, test, recipe)
            with leaving_when_asked(recorder, trainer):
                measurements.before_training(resume)
                trainer.at_step_end = measurements.on_the_way
                trainer.resume(resume)
                trainer.stop_request.check()
                measurements.after_training()
                finish(recorder, trainer, began, {"held_out": measurements.scores})


def _hold_memory() -> None:
    """Take no more of the GPU than the plan gives the trainer, so that it fails here and not in the server."""
    limit = os.environ.get(TRAINER_MEMORY)
    if limit and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(limit) * 2**30 / total))


def _server(
    recipe: Recipe, folder: RunFolder, problems: list[Problem], tokenizer: Any
) -> Callable[..., PolicyServer] | None:
    """What makes the trainer's side of the policy servers; None where there are none."""
    if recipe.running_server is None:
        return None
    own = recipe.own
    settings = ServerSettings(
        urls=tuple(recipe.running_server.split(",")),
        token=os.environ.get(TOKEN),
        publish_folder=Path(os.environ.get(PUBLISH_FOLDER) or folder.path / "publish"),
        route=_route(recipe),
        group_port=recipe["vllm_group_port"],
        dtype=getattr(torch, recipe.served_dtype(cpu=not torch.cuda.is_available())),
        generation_timeout=own.generation_timeout,
        publish_timeout=own.publish_timeout,
        probe_tolerance=own.probe_tolerance,
        evidence=folder.path / "probe.json",
        sleep=bool(recipe["vllm_enable_sleep_mode"]),
    )
    return functools.partial(PolicyServer, settings, _probed(problems, recipe, tokenizer))


def _route(recipe: Recipe) -> str:
    """The plan has decided; by hand nobody has."""
    if recipe.own.publish != "auto":
        return recipe.own.publish
    return "adapter" if recipe["use_peft"] else "nccl" if torch.cuda.is_available() else "shared_memory"


def _probed(problems: list[Problem], recipe: Recipe, tokenizer: Any) -> list[list[int]]:
    """Prompts with their golds, some `PROBED_TOKENS` in all: the same in every process and after every restart."""
    sequences: list[list[int]] = []
    for problem in problems:
        if sum(map(len, sequences)) >= PROBED_TOKENS:
            break
        sequences.append(data.prompt_ids(problem, recipe, tokenizer) + list(tokenizer(problem.gold)["input_ids"]))
    return sequences


def _held_out(problems: list[Problem], recipe: Recipe, tokenizer: Any) -> list[Problem]:
    """Those of the test problems that are measured; none where the recipe measures nothing."""
    return held_out.subset(data.within_limit(problems, recipe, tokenizer), recipe.own.eval_count) if problems else []


class _Measurements:
    """What is measured on held-out problems, and when: each once, also by a run that stopped meanwhile and was resumed.

    Attributes:
        scores: before and after training, as far as they are known.
    """

    def __init__(self, trainer: PolicyTrainer, problems: list[Problem], recipe: Recipe) -> None:
        self._trainer, self._problems, self._recipe = trainer, problems, recipe
        self._every = recipe["eval_steps"] or trainer.args.logging_steps if recipe["eval_strategy"] == "steps" else None
        lines = [line for line in trainer.recorder.folder.read_metrics() if line["kind"] == "evaluation"]
        self._recorded = {line["step"]: {each.name: line[each.name] for each in fields(Score)} for line in lines}
        self.scores: dict[str, Any] = {}

    def before_training(self, resume: Path | None) -> None:
        """Measure what the model can do before it is trained; a run that is resumed looks up what was measured then."""
        if not self._problems or not self._recipe["eval_on_start"]:
            return
        if resume is None and 0 not in self._recorded:
            self.scores["before"] = self._measure("measuring before training")
        elif 0 in self._recorded:
            self.scores["before"] = self._recorded[0]

    def on_the_way(self, step: int) -> None:
        """Measure where the recipe says so; the last step is measured after training anyway."""
        trainer = self._trainer
        if not self._problems or self._every is None or step % self._every or step >= trainer.state.max_steps:
            return
        if trainer.resumed_at == step and step in self._recorded:
            return
        with trainer.clock.stopped():
            score = self._measure(f"measuring at step {step}")
            self._keep(score)
        trainer.recorder.phase("training", step, trainer.state.max_steps, trainer.recorder.seconds_left)

    def after_training(self) -> None:
        if self._problems:
            self.scores["after"] = self._measure("measuring after training")
            self._keep(self.scores["after"])

    def _measure(self, label: str) -> dict[str, Any]:
        return asdict(held_out.measure(self._trainer, self._problems, self._recipe.own, label))

    def _keep(self, score: dict[str, Any]) -> None:
        if self._recipe.own.keep_best:
            keep_best(self._trainer.recorder, self._trainer, score)
