"""A model made in seconds, runs that it began, and launch/evaluate.py called in this process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from r1zero.evaluation.command import main
from tests.conftest import PROJECT
from tests.training.conftest import data, model

__all__ = ["data", "model"]

RECIPE = {
    "method": "grpo",
    "task": "gsm8k",
    "prompt_template": "r1rl",
    "max_completion_length": 40,
    "eval_count": 8,
    "eval_samples": 4,
}


@dataclass(frozen=True)
class Evaluated:
    """What launch/evaluate.py answered."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return content

    def scores(self, model: str) -> dict[str, Any]:
        """Of a model on the only benchmark."""
        (found,) = [each["scores"] for each in self.result["evaluations"] if each["model"] == model]
        return dict(found)

    def rows(self, model: str) -> list[dict[str, Any]]:
        """The completions of a model on the only benchmark."""
        (found,) = [each["completions"]["file"] for each in self.result["evaluations"] if each["model"] == model]
        return list(pq.read_table(self.folder / found).to_pylist())


@pytest.fixture
def evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Evaluated]:
    """launch/evaluate.py with these words, in this process and without vLLM."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, into: str = "out", engine: str = "transformers") -> Evaluated:
        given = [str(word) for word in words]
        if "--rescore" not in given:
            given += ["--output_dir", into, "--engine", engine]
        try:
            code = main(PROJECT, given)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Evaluated(code, out, err, tmp_path / into)

    return call


@pytest.fixture(scope="session")
def benchmarks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as --data wants it: ten questions of the form of GSM8K, whose answer is always 7."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "gsm8k").mkdir()
    shutil.copy(data / "test.jsonl", folder / "gsm8k" / "test.jsonl")
    return folder


def make_run(folder: Path, model: Path, data: Path, adapter: bool = False, **keys: Any) -> Path:
    """A run folder with a checkpoint of step 5 and a final model, each further from the model that it began with."""
    more = {"use_peft": True, "lora_r": 8} if adapter else {}
    for place, distance in (("checkpoints/checkpoint-5", 0.02), ("model", 0.2)):
        made = AutoModelForCausalLM.from_pretrained(model)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            if adapter:
                made = get_peft_model(made, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
            for name, each in made.named_parameters():
                if "lora_" in name:
                    each.copy_(torch.randn_like(each) * 20 * distance)
                elif not adapter:
                    each.add_(torch.randn_like(each) * distance)
        made.save_pretrained(folder / place)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model / file, folder / place / file)
    recipe = {**RECIPE, "model_name_or_path": str(model), "dataset_name": str(data), **more, **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
