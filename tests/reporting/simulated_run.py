"""A run folder with the true formats and made-up contents: as large as a real run, in seconds."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from r1zero.run_folder import RunFolder, append_json_line, write_json, write_text, write_yaml
from r1zero.training.recorder import ROLLOUT_SCHEMA

BEGAN = 1795288341.0
OF_A_GROUP = 8
STEP_S = 4.0
VERDICTS = ("correct", "wrong", "unparsed", "timed_out")
RECIPE = {
    "method": "grpo",
    "task": "gsm8k",
    "model_name_or_path": "org/model-0.5b",
    "answer_choice": "agreed",
    "learning_rate": 5e-6,
    "num_generations": OF_A_GROUP,
}
MANIFEST = {
    "time": "2026-11-21T19:12:21+0000",
    "argv": ["launch/run.py", "recipes/simplerl-zoo/qwen2.5-0.5b.yaml", "--learning_rate", "5e-6"],
    "host": "node7",
    "system": "Linux",
    "cpu_count": 32,
    "gpus": ["NVIDIA H200", "NVIDIA H200"],
    "python": "3.12.3",
    "packages": {"torch": "2.11.0", "trl": "1.16.0"},
    "git_commit": "0123456789abcdef",
    "git_dirty": True,
}


def write(
    path: Path,
    steps: int = 6,
    completions: int = 16,
    sentences: int = 12,
    evaluate_each: int = 0,
    manifest: Mapping[str, Any] = MANIFEST,
    recipe: Mapping[str, Any] = RECIPE,
) -> RunFolder:
    """A finished run of `steps` steps of `completions` completions of about `sentences` x 80 characters each."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    write_yaml(folder.recipe, recipe)
    write_json(folder.versions, manifest)
    write_text(
        folder.plan, "Plan for recipes/x.yaml: grpo of org/model-0.5b on gsm8k\nOptimizer step: 16 completions\n"
    )
    append_json_line(folder.metrics, {"kind": "phase", "time": BEGAN, "phase": "loading model and data"})
    append_json_line(folder.metrics, {"kind": "phase", "time": BEGAN + 5, "phase": "training"})
    chance = random.Random(0)
    pool = [_sentence(chance) for _ in range(3000)]
    with folder.metrics.open("a") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(step_line(step, steps)) + "\n")
            write_rollouts(folder.rollouts(step), step, _rows(chance, pool, step, steps, completions, sentences))
            if evaluate_each and step % evaluate_each == 0:
                file.write(json.dumps(evaluation_line(step, 0.2 + 0.5 * step / steps)) + "\n")
                rows = _rows(random.Random(1), pool, step, steps, 4 * completions, sentences)
                rows["prompt"] = [f"Question: held-out {at // 4}?\nAnswer:" for at in range(4 * completions)]
                write_rollouts(folder.rollouts(step, "test"), step, rows)
    write_json(folder.status, {"phase": "done", "done": 0, "total": 0, "seconds_left": None, "restarts": 0})
    write_json(folder.summary, {"outcome": "finished", "steps": steps, "seconds_in_all": 30 + STEP_S * steps})
    return folder


def step_line(step: int, steps: int) -> dict[str, Any]:
    """A line of metrics.jsonl as the trainer writes it, of a run that learns."""
    done = step / steps
    jitter = 0.02 * math.sin(7 * step)
    correct = 0.1 + 0.6 * done + jitter
    return {
        "kind": "step",
        "time": BEGAN + 10 + STEP_S * step,
        "step": step,
        "steps": steps,
        "loss": 0.01 * jitter,
        "grad_norm": 0.3 + jitter,
        "learning_rate": 5e-6 * (1 - done),
        "publish/seconds": 0.2,
        "publish/bytes": 1e9,
        "probe/difference": 0.004 + abs(jitter) / 100,
        "probe/difference_max": 0.05,
        "num_tokens": 20_000.0 * step,
        "completions/mean_length": 200 + 100 * done,
        "completions/min_length": 20.0,
        "completions/max_length": 512.0,
        "completions/clipped_ratio": 0.1 * (1 - done),
        "verdict/correct": correct,
        "verdict/wrong": 0.9 - correct,
        "verdict/unparsed": 0.09,
        "verdict/timed_out": 0.01,
        "source/gsm8k/train/reward": correct,
        "source/math/train/reward": correct / 2,
        "rewards/correctness/mean": correct,
        "rewards/correctness/std": 0.4,
        "rewards/format/mean": 0.5,
        "reward": correct,
        "reward_std": 0.4 - 0.2 * done,
        "frac_reward_zero_std": 0.3 * done,
        "kl": 0.01 * done,
        "entropy": 1.0 - 0.5 * done,
        "clip_ratio/region_mean": 0.0,
        "seconds/publish": 0.2,
        "seconds/generate": 1.8 + jitter,
        "seconds/grade": 0.05,
        "seconds/train": 1.9,
        "seconds/step": STEP_S,
        "idle/server": 1 - (1.8 + jitter) / STEP_S,
        "idle/trainer": (1.8 + jitter) / STEP_S,
        "memory/peak_gib": 43.0,
        "seconds_left": STEP_S * (steps - step),
    }


def evaluation_line(step: int, mean: float) -> dict[str, Any]:
    """A measurement on held-out problems."""
    return {
        "kind": "evaluation",
        "time": BEGAN + 11 + STEP_S * step,
        "step": step,
        "mean": mean,
        "low": mean - 0.04,
        "high": mean + 0.04,
        "questions": 200,
        "samples": 4,
        "temperature": 1.0,
        "seconds": 9.0,
    }


def write_rollouts(path: Path, step: int, rows: Mapping[str, Sequence[Any]]) -> None:
    """One file of completions; columns that `rows` lacks are filled in."""
    count = len(rows["completion"])
    verdicts = list(rows.get("verdict", ["wrong"] * count))
    rewards = [float(verdict == "correct") for verdict in verdicts]
    filled = {
        "step": [step] * count,
        "prompt": [f"Question: {at // OF_A_GROUP}?\nAnswer:" for at in range(count)],
        "gold": ["42"] * count,
        "answer": ["42" if verdict == "correct" else None for verdict in verdicts],
        "verdict": verdicts,
        "reward": rewards,
        "rewards": [[("correctness", reward)] for reward in rewards],
        "length": [max(1, len(text) // 4) for text in rows["completion"]],
        "clipped": [False] * count,
        "policy_version": [step - 1] * count,
        "source": ["gsm8k/train"] * count,
        **rows,
    }
    path.parent.mkdir(exist_ok=True)
    columns = [pa.array(filled[field.name], field.type) for field in ROLLOUT_SCHEMA]
    pq.write_table(pa.table(columns, schema=ROLLOUT_SCHEMA), path, compression="zstd")


def _sentence(chance: random.Random) -> str:
    a, b = chance.randrange(1000), chance.randrange(1000)
    words = chance.choice(["Then we add", "So the total is", "Next, carry", "That leaves", "The number of apples is"])
    return f"{words} {a} and {b}, which gives {a + b}, and {chance.getrandbits(40):x} is the remainder of it. "


def _rows(
    chance: random.Random, pool: Sequence[str], step: int, steps: int, count: int, sentences: int
) -> dict[str, list[Any]]:
    verdicts, texts = [], []
    for _ in range(count):
        correct = chance.random() < 0.1 + 0.6 * step / steps
        verdicts.append("correct" if correct else chance.choice(VERDICTS[1:]))
        look_back = "Wait, let me check that again. " if chance.random() < 0.3 * step / steps else ""
        body = "".join(chance.choices(pool, k=max(1, sentences + chance.randrange(-3, 4))))
        ending = "So \\boxed{42}." if correct else "So \\boxed{7}."
        texts.append(f"<think>{body}{look_back}</think> {ending}")
    return {
        "completion": texts,
        "verdict": verdicts,
        "answer": ["42" if verdict == "correct" else "7" if verdict == "wrong" else None for verdict in verdicts],
        "prompt": [f"Question: {step % 50} x {at // OF_A_GROUP}?\nAnswer:" for at in range(count)],
        "source": [("gsm8k/train", "math/train")[at // OF_A_GROUP % 2] for at in range(count)],
        "clipped": [at % 11 == 0 for at in range(count)],
    }
