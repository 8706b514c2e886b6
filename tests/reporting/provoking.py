"""Runs of the tiny recipe that are made ill, each in one way, and runs that are well.

``python -m tests.reporting.provoking NAME FOLDER`` makes one in FOLDER/NAME and keeps what the doctor reads of it in
tests/reporting/recorded/NAME, which `test_doctor.py` looks at.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1zero.reporting import doctor
from r1zero.run_folder import RunFolder, read_json
from tests.conftest import PROJECT

RECIPE = Path("recipes/tiny/arithmetic_grpo.yaml")
RECORDED = Path(__file__).parent / "recorded"
KEPT = ("completions/mean_length", "clip_ratio/region_mean")
LEFT_OUT = ("time", "epoch", "num_tokens", "step_time", "seconds_left", "rewards/", "completions/m", "clip_ratio/")
LIMIT_S = 900.0
DATA = "problems.jsonl"
TINY = "$(python -m r1zero.tiny)"
SHORT = {"max_steps": 12, "eval_on_start": "false", "eval_count": 0, "report_to": "none", "save_strategy": "no"}
LORA = {"use_peft": "true", "lora_r": 8, "lora_target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
OWN = "tests.reporting.odd_rewards"


@dataclass(frozen=True)
class Provoked:
    """One run.

    >>> Provoked("clipped", {"max_completion_length": 12}).overrides()[:2]
    ['--max_completion_length', '12']

    Attributes:
        finding: what the doctor has to name first; None for a run that is well.
        keys: laid over the tiny recipe and `SHORT`.
        golds: of the problems "What is n + (n + 10)?", in turn; empty: the recipe's own problems.
        starts_from: the run of this table that left the model it starts from.
    """

    finding: str | None
    keys: Mapping[str, object] = field(default_factory=dict)
    golds: tuple[str, ...] = ()
    starts_from: str = ""

    def overrides(self) -> list[str]:
        words: list[str] = []
        for key, value in {**self.keys, **{k: v for k, v in SHORT.items() if k not in self.keys}}.items():
            words += [f"--{key}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


_LOGARITHMS = r"\ln(2+" * 10 + "3" + ")" * 10  # takes longer to tell from a number than an answer is given
RUNS: dict[str, Provoked] = {
    # What is ill.
    "unparsed": Provoked("unparsed", {"prompt_template": "abel"}),
    "clipped": Provoked("clipped", {"max_completion_length": 12}),
    "learning_rate_too_high": Provoked("learning_rate_too_high", {"learning_rate": 1.5e-2, "max_steps": 20}),
    "learning_rate_times_10": Provoked("learning_rate_too_high", {"learning_rate": 1.5e-3, "max_steps": 40}),
    "zero_reward": Provoked("zero_reward", {"reward_funcs": f"{OWN}:nothing"}),
    "never_right": Provoked("never_right", {"task": "dataset"}, golds=("9999",)),
    "frozen": Provoked("frozen", {**LORA, "learning_rate": 1e-12}),
    "warming_up": Provoked("frozen", {"warmup_steps": 1_000_000}),
    "too_hot": Provoked("too_hot", {"temperature": 4.0}),
    "too_cold": Provoked("too_cold", {"temperature": 0.01}),
    "zero_spread": Provoked("zero_spread", {"task": "dataset"}, golds=("SUM", *["9999"] * 7)),
    "verifier_timeouts": Provoked("verifier_timeouts", {"task": "dataset"}, golds=("SUM", _LOGARITHMS, "SUM", "SUM")),
    "trainer_bound": Provoked(
        "trainer_bound", {"num_iterations": 8, "learning_rate": 1e-5, "warmup_steps": 0, "max_steps": 24}
    ),
    "length_explosion": Provoked(
        "length_explosion",
        {"reward_funcs": f"{OWN}:length", "max_completion_length": 100, "max_steps": 40, "learning_rate": 3e-4},
    ),
    "server_bound": Provoked("server_bound", {"generation_kwargs": '{"use_cache": false}'}),
    "grading_slow": Provoked("grading_slow", {"reward_funcs": ("correctness", f"{OWN}:slow")}),
    "publish_slow": Provoked(
        "publish_slow", {"use_vllm": "true", "vllm_mode": "server", "per_device_train_batch_size": 8}
    ),
    "reward_hacked": Provoked("reward_hacked", {"reward_funcs": f"{OWN}:ends_in_seven", "max_steps": 30}),
    "nan": Provoked("nan", {"learning_rate": 1e25, "num_iterations": 2, "warmup_steps": 0}),
    "infinite_reward": Provoked("nan", {"reward_funcs": f"{OWN}:growing"}),
    "entropy_collapse": Provoked(
        "entropy_collapse",
        {"entropy_coef": -20.0, "learning_rate": 5e-4, "lr_scheduler_type": "constant", "max_steps": 30},
    ),
    "stale": Provoked(
        "stale", {"num_iterations": 8, "learning_rate": 3e-4, "lr_scheduler_type": "constant", "max_steps": 16}
    ),
    "no_progress": Provoked("no_progress", {"learning_rate": 5e-7, "max_steps": 40}),
    "too_easy": Provoked("too_easy", {"temperature": 0.8}, starts_from="healthy_longer"),
    "evaluation_flat": Provoked(
        "evaluation_flat", {"max_steps": 20, "eval_count": 4, "eval_samples": 1, "eval_on_start": "true"}
    ),
    # What is well.
    "healthy_seed_1": Provoked(None, {"seed": 1, "max_steps": 40, "eval_count": 100, "eval_on_start": "true"}),
    "healthy_lora": Provoked(
        None,
        {"seed": 2, **LORA, "lora_r": 32, "lora_alpha": 64, "learning_rate": 2e-3, "max_steps": 40},
    ),
    "healthy_groups_of_16": Provoked(None, {"seed": 3, "num_generations": 16, "max_steps": 40}),
    "healthy_twice_with_kl": Provoked(
        None, {"seed": 4, "num_iterations": 2, "beta": 0.01, "learning_rate": 1e-4, "max_steps": 40}
    ),
    "healthy_longer": Provoked(None, {"seed": 5, "max_steps": 100, "eval_count": 50, "eval_on_start": "true"}),
}


def write_problems(folder: Path, golds: tuple[str, ...]) -> None:
    """Sums whose golds are these, in turn; SUM stands for the right one."""
    rows = [
        {"question": f"What is {n} + {n + 10}?", "answer": golds[n % len(golds)].replace("SUM", str(2 * n + 10))}
        for n in range(10, 90)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(name: str, folder: Path) -> list[str]:
    """The words that make the run in `folder`/`name`, without the Python before them."""
    run = RUNS[name]
    words = ["launch/run.py", str(RECIPE), "--output_dir", str(folder / name), *run.overrides()]
    if run.golds:
        words += ["--dataset_name", str(folder / DATA), "--dataset_test_split", "train"]
    if "use_vllm" in run.keys:  # vLLM wants a folder
        words += ["--model_name_or_path", TINY]
    if run.starts_from:
        words += ["--model_name_or_path", str(folder / run.starts_from / "model")]
    return words


def make(name: str, folder: Path) -> RunFolder:
    """Make the run anew."""
    words = command(name, folder)
    if TINY in words:
        made = subprocess.run([sys.executable, "-m", "r1zero.tiny"], capture_output=True, text=True, check=True)
        words[words.index(TINY)] = made.stdout.split()[-1]
    if RUNS[name].golds:
        write_problems(folder, RUNS[name].golds)
    shutil.rmtree(folder / name, ignore_errors=True)
    hidden = ("WANDB_", "CUDA_VISIBLE_DEVICES", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=PROJECT,
        env={**env, **quiet},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if not (folder / name / "metrics.jsonl").is_file():
        raise AssertionError(done.stdout[-2000:] + done.stderr[-4000:])
    return RunFolder(folder / name)


def record(name: str, folder: Path) -> Path:
    """Keep what the doctor reads of a run, and no more digits than that takes."""
    kept, run = RECORDED / name, RunFolder(folder / name)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    lines = [
        {key: _short(value) for key, value in line.items() if key in KEPT or not key.startswith(LEFT_OUT)}
        for line in run.read_metrics()
        if line["kind"] in ("step", "evaluation")
    ]
    (kept / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = run.recipe.read_text().replace(f"{folder}/", "")
    (kept / "recipe.yaml").write_text(re.sub(r"(?m)^(model_name_or_path: )/.*/", r"\1", text))
    if (read_json(run.summary) or {}).get("outcome") == "failed":
        shutil.copyfile(run.summary, kept / "summary.json")
    return kept


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def readme() -> str:
    """recorded/README.md."""
    commands = "".join(f"{name:<24}{' '.join(['python', *command(name, Path('RUNS'))])}\n" for name in RUNS)
    return f"""# What the doctor read of these runs

Each is a run of the tiny recipe that was made ill in one way, or a healthy one, and was made by the command beside it,
on two CPU cores; the golds of RUNS/problems.jsonl are in tests/reporting/provoking.py. `python -m
tests.reporting.provoking NAME RUNS` makes it again and records it here: its recipe and the lines of its steps and
evaluations, to four digits and without what no rule reads.

```text
{commands}```
"""


if __name__ == "__main__":
    made = make(sys.argv[1], Path(sys.argv[2]))
    record(sys.argv[1], Path(sys.argv[2]))
    print(*doctor.last_lines(made.path), sep="\n")
