"""One trainer process of GRPO, from model to final score."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import get_peft_config, get_quantization_config

from r1zero import model_facts
from r1zero.recipe import Recipe
from r1zero.tasks.problem import Problem
from r1zero.tasks.selection import Selection
from r1zero.training import arguments, data, held_out
from r1zero.training.session import finish, session, without_printer
from r1zero.training.trainer import PolicyTrainer


def train(recipe: Recipe, chosen: Selection, folder: Path | None, project: Path) -> None:
    """Measure, train, measure, save."""
    began = time.monotonic()
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
        )
        without_printer(trainer)
        scores: dict[str, Any] = {}
        if test and recipe["eval_on_start"]:
            scores["before"] = asdict(held_out.measure(trainer, test, recipe.own, "measuring before training"))
        if test and recipe["eval_strategy"] == "steps":
            trainer.add_callback(_MeasureOnTheWay(trainer, test, recipe))
        trainer.train()
        if test:
            scores["after"] = asdict(held_out.measure(trainer, test, recipe.own, "measuring after training"))
        finish(recorder, trainer, began, {"held_out": scores})


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
