"""One trainer process of GRPO, from model to final score."""

import contextlib
import functools
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import get_peft_config, get_quantization_config

from r1zero import model_facts
from r1zero.plan import TRAINER_MEMORY
from r1zero.recipe import Recipe
from r1zero.run_folder import RunFolder
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.tasks.problem import Problem
from r1zero.tasks.selection import Selection
from r1zero.training import arguments, data, held_out
from r1zero.training.generation import PolicyServer, ServerSettings
from r1zero.training.session import finish, session, without_printer
from r1zero.training.trainer import PolicyTrainer

PROBED_TOKENS = 512


def train(recipe: Recipe, chosen: Selection, folder: Path | None, project: Path, resume: Path | None = None) -> None:
    """Measure, train, measure, save; from the checkpoint `resume` on, where there is one."""
    began = time.monotonic()
    _hold_memory()
    reward_functions = recipe.reward_functions()
    with session(recipe, folder, project) as recorder, recipe.verifier() as verifier:
        model = model_facts.path_of(recipe.model)
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
        )
        with contextlib.closing(trainer):
            without_printer(trainer)
            scores: dict[str, Any] = {}
            if test and recipe["eval_on_start"] and resume is None:
                scores["before"] = asdict(held_out.measure(trainer, test, recipe.own, "measuring before training"))
            if test and recipe["eval_strategy"] == "steps":
                trainer.add_callback(_MeasureOnTheWay(trainer, test, recipe))
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            if test:
                scores["after"] = asdict(held_out.measure(trainer, test, recipe.own, "measuring after training"))
            finish(recorder, trainer, began, {"held_out": scores})


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


class _MeasureOnTheWay(TrainerCallback):  # type: ignore[misc]
    """Measures every ``eval_steps`` steps; the last step is measured after training anyway."""

    def __init__(self, trainer: PolicyTrainer, problems: list[Problem], recipe: Recipe) -> None:
        self.trainer = trainer
        self.problems = problems
        self.recipe = recipe

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        every = self.recipe["eval_steps"] or args.logging_steps
        if state.global_step % every == 0 and state.global_step < state.max_steps:
            label = f"measuring at step {state.global_step}"
            with self.trainer.clock.stopped():
                held_out.measure(self.trainer, self.problems, self.recipe.own, label)
