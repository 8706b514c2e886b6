"""A recipe in the form that TRL takes: its own config objects, with the few values that the run decides."""

import os
from dataclasses import fields
from typing import Any

import torch
from trl import GRPOConfig, ModelConfig, SFTConfig

from r1zero.recipe import Recipe
from r1zero.reporting import trackers
from r1zero.run_folder import RunFolder


def config_for(recipe: Recipe, folder: RunFolder) -> GRPOConfig | SFTConfig:
    """The recipe's GRPOConfig or SFTConfig.

    The run decides where things go and how they are reported; it measures on held-out problems itself, so TRL's own
    evaluation stays off. bf16 is used where there is a GPU, unless the recipe says otherwise.
    """
    kind = GRPOConfig if recipe.own.method == "grpo" else SFTConfig
    names = {item.name for item in fields(kind)}
    values: dict[str, Any] = {key: value for key, value in recipe.library.items() if key in names}
    cuda = torch.cuda.is_available()
    values.setdefault("use_cpu", not cuda)
    if not values.get("fp16"):
        values.setdefault("bf16", cuda)
    values.setdefault("logging_steps", 1)
    values.setdefault("run_name", folder.path.name)
    values.setdefault("project", "r1zero")
    values.update(
        output_dir=str(folder.checkpoints),
        disable_tqdm=True,
        eval_strategy="no",
        eval_on_start=False,
        # The recorder reports to W&B itself, under the names of metrics.jsonl.
        report_to=[name for name in trackers.chosen(recipe.library.get("report_to")) if name != "wandb"],
    )
    values["model_init_kwargs"] = {**_model_init(recipe), **(values.get("model_init_kwargs") or {})}
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tensorboard"))
    return kind(**values)


def model_config(recipe: Recipe) -> ModelConfig:
    """The recipe's keys for adapter and quantization."""
    names = {item.name for item in fields(ModelConfig)}
    return ModelConfig(**{key: value for key, value in recipe.library.items() if key in names})


def _model_init(recipe: Recipe) -> dict[str, Any]:
    init: dict[str, Any] = {"dtype": recipe["dtype"], "trust_remote_code": recipe["trust_remote_code"]}
    for key, name in (("model_revision", "revision"), ("attn_implementation", "attn_implementation")):
        if recipe[key] is not None:
            init[name] = recipe[key]
    return init
