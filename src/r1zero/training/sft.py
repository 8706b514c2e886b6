"""One trainer process of the cold start: supervised fine-tuning on worked solutions."""

import gc
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer
from trl import SFTTrainer, get_peft_config, get_quantization_config

from r1zero import model_facts
from r1zero.evaluation import ending
from r1zero.recipe import Recipe
from r1zero.tasks.selection import Selection
from r1zero.training import arguments, data
from r1zero.training.checkpoints import ResumableTrainer
from r1zero.training.session import finish, leaving_when_asked, session, without_printer


class SolutionTrainer(ResumableTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, recorded and resumable."""


def train(recipe: Recipe, chosen: Selection, folder: Path | None, project: Path, resume: Path | None = None) -> None:
    """Train on the solutions of the training split, save, measure."""
    began = time.monotonic()
    with session(recipe, folder, project) as recorder:
        model = model_facts.path_of(recipe.model)
        config = arguments.config_for(recipe, recorder.folder)
        model_config = arguments.model_config(recipe)
        tokenizer = AutoTokenizer.from_pretrained(
            model, revision=recipe["model_revision"], trust_remote_code=recipe["trust_remote_code"]
        )
        for note in chosen.notes:
            recorder.say(note)
        problems = data.within_limit(chosen.train, recipe, tokenizer)
        recorder.say(f"{len(problems)} worked solutions to learn from")
        trainer = SolutionTrainer(
            model=model,
            args=config,
            train_dataset=data.for_sft(problems, recipe),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
            quantization_config=get_quantization_config(model_config),
        )
        without_printer(trainer)
        trainer.begin_recording(recorder)
        trainer.watch_for(recipe.own.stop_on, recipe.resolved())
        with leaving_when_asked(recorder, trainer):
            trainer.resume(resume)
            trainer.stop_request.check()
            finish(recorder, trainer, began, {})
    # The weights are gone by now, and so are the process groups: the evaluation has the GPUs for itself.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if recorder.active and (recorder.folder.model / "tokenizer_config.json").is_file():
        recorder.phase("measuring after training")
        ending.measure(recipe, recorder.folder, project, recorder.say)
        recorder.phase("done")
