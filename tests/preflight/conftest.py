"""Small model folders without weights: the checks read tokenizer and configuration only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1zero import recipe as recipes
from r1zero import tiny
from r1zero.recipe import Recipe
from tests.conftest import PROJECT

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the embedded model's tokenizer, changed by `change`, and a configuration of these values."""

    def make(change: Callable[[Any], None] | None = None, **config: Any) -> Path:
        folder = tmp_path / "model"
        tokenizer = tiny.make_tokenizer()
        if change:
            change(tokenizer)
        tokenizer.save_pretrained(folder)
        values = {"model_type": "qwen3", "vocab_size": len(tokenizer), "max_position_embeddings": 512, **config}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


@pytest.fixture
def arithmetic() -> Callable[..., Recipe]:
    """The embedded model's recipe with another model and other keys."""

    def load(model: Path, *overrides: str) -> Recipe:
        recipe = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"
        return recipes.load(recipe, ["--model_name_or_path", str(model), *overrides])

    return load
