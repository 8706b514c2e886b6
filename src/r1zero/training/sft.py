"""One trainer process of the cold start: supervised fine-tuning on worked solutions."""

import time
from pathlib import Path

from transformers import AutoTokenizer
from trl import SFTTrainer, get_peft_config, get_quantization_config

from r1zero import model_facts
from r1zero.recipe import Recipe
from r1zero.tasks.selection import Selection
from r1zero.training import arguments, data
from r1zero.training.session import finish, session, without_printer
from r1zero.training.trainer import Clock, StepRecorder


def train(recipe: Recipe, chosen: Selection, folder: Path | None, project: Path, resume: Path | None = None) -> None:
    """Train on the solutions of the training split, save."""
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
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=data.for_sft(problems, recipe),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
            quantization_config=get_quantization_config(model_config),
        )
        without_printer(trainer)
        trainer.add_callback(StepRecorder(recorder, Clock()))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        finish(recorder, trainer, began, {})
