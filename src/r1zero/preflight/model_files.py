"""What the checks need of a model: its tokenizer and a few numbers, not its weights."""

from dataclasses import dataclass
from typing import Any

from r1zero import model_facts
from r1zero.recipe import Recipe


@dataclass(frozen=True)
class ModelFiles:
    """The small files of a model.

    Attributes:
        tokenizer: as transformers loads it.
        positions: the model was made for, prompt and completion together; None where it does not say.
        vocabulary: token ids that the model has.
        ends: token ids that end a completion: the tokenizer's end token and the model's own.
    """

    tokenizer: Any
    positions: int | None
    vocabulary: int
    ends: frozenset[int]


def read(recipe: Recipe) -> ModelFiles:
    """The files of the recipe's model, downloaded where they are not here.

    Raises:
        RecipeError: when they cannot be had or read.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # what it warns of belongs into no report
    model = model_facts.path_of(recipe.model)
    common = {"revision": recipe["model_revision"], "trust_remote_code": recipe["trust_remote_code"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **common)
        config = AutoConfig.from_pretrained(model, **common).get_text_config()
    except (OSError, ValueError, ImportError, KeyError) as error:  # what transformers raises for files it cannot use
        why = f"its tokenizer or configuration cannot be loaded: {' '.join(str(error).split())}"
        raise recipe.fault("model_name_or_path", why, "mend the folder, or name another model") from error
    try:
        ends = GenerationConfig.from_pretrained(model, revision=recipe["model_revision"]).eos_token_id
    except OSError:  # a model without generation_config.json
        ends = config.eos_token_id
    own = [ends] if isinstance(ends, int) else list(ends or ())
    return ModelFiles(
        tokenizer=tokenizer,
        positions=getattr(config, "max_position_embeddings", None),
        vocabulary=config.vocab_size,
        ends=frozenset([*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]),
    )
