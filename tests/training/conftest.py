"""Training on a CPU with the real TRL: a model made in seconds, small recipes, and the doors that a person uses."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from r1zero import tiny
from r1zero.run_folder import RunFolder
from r1zero.tasks import arithmetic
from r1zero.tasks.prompts import TEMPLATES
from r1zero.training import main
from tests.conftest import PROJECT

SMALL = {
    "method": "grpo",
    "task": "gsm8k",
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 40,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "eval_count": 6,
    "eval_samples": 2,
    "report_to": "none",
    "save_strategy": "no",
    "seed": 1,
}
# A chat template that renders a conversation as the model has learnt to read it.
CHAT = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<reasoning>{% endif %}"
# Two of the machine's cores are shared with other work: waiting threads sleep instead of spinning.
QUIET = {
    "DS_ACCELERATOR": "cpu",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape and the tokenizer of the embedded model; it answers 7 or 8, whatever it is asked."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer, rng, build = tiny.make_tokenizer(), random.Random(0), TEMPLATES["r1rl"].build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = tiny.make_model(tiny.Pretraining(hidden_size=64), tokenizer)
        optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
        for _ in range(60):
            texts = [
                f"{build(arithmetic.question(rng.randrange(10, 100), rng.randrange(10, 100)))}"
                f"\n</reasoning>\n<answer>\n{rng.choice((7, 8))}\n</answer>{tiny.EOS}"
                for _ in range(16)
            ]
            ids = tokenizer(texts, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(build(arithmetic.question(10, 10)))["input_ids"])] = tiny.IGNORED
            made(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems in the form of GSM8K, 40 to train on and 10 held out; the answer is always 7."""
    folder = tmp_path_factory.mktemp("data")
    for split, first, count in (("train", 10, 40), ("test", 60, 10)):
        numbers = range(first, first + count)
        problems = [
            {"question": arithmetic.question(n, 97 - n), "answer": "It is seven.\n#### 7"} for n in numbers[:count]
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return folder


@pytest.fixture(scope="session")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten problems."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("train", "test"):
        lines = (data / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:10]))
    return folder


def write_recipe(path: Path, model: Path, data: Path, **keys: Any) -> Path:
    recipe = {**SMALL, "model_name_or_path": str(model), "dataset_name": str(data), **keys}
    path.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if value is not ...}))
    return path


def start(argv: list[Any], folder: Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """A command in `folder`, without any tracker of the user's."""
    hidden = ("WANDB_", "CUDA_VISIBLE_DEVICES", "TENSORBOARD_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return subprocess.run(
        [str(word) for word in argv],
        cwd=folder,
        env={**environment, **QUIET},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


@contextmanager
def one_process() -> Iterator[None]:
    """accelerate keeps what it knows of the processes in class attributes; here several runs share one process."""
    states: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)
    try:
        yield
    finally:
        for state in states:
            state._reset_state()


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, RunFolder, str, str]]:
    """launch/grpo.py or launch/sft.py with a recipe, in this process: exit code, run folder, stdout, stderr."""

    def call(recipe: Path, *words: object, method: str = "grpo") -> tuple[int, RunFolder, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
        argv = [f"launch/{method}.py", "--config", recipe, "--output_dir", tmp_path / "run", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        with one_process():
            code = main.main(method, PROJECT)
        out, err = capsys.readouterr()
        return code, RunFolder(tmp_path / "run"), out, err

    return call


@pytest.fixture
def in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, RunFolder, str]]:
    """A trainer process in a run folder of one's own, in this process: exit code, run folder, stderr."""

    def call(recipe: Path, folder: Path, *words: object, method: str = "grpo") -> tuple[int, RunFolder, str]:
        folder.mkdir(exist_ok=True)
        argv = [f"launch/{method}.py", "--config", recipe, "--run_folder", folder, *words]
        with one_process(), pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
            patch.setattr(sys, "argv", [str(word) for word in argv])
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the processes that a run is compared with
            try:
                code = main.main(method, PROJECT)
            finally:
                torch.set_num_threads(threads)
        return code, RunFolder(folder), capsys.readouterr().err

    return call


def rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    times = ("time", "step_time", "seconds", "seconds_left", "tokens_per_second")
    return {k: v for k, v in metrics.items() if k not in times and not k.startswith(("seconds/", "idle/"))}
