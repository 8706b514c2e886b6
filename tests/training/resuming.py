"""Runs that are killed, resumed and compared, as a person would start them by hand."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from r1zero import hardware
from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.training.conftest import QUIET, without_times

LIMIT_S = 480  # of one run, where many share the cores
# A window feeds 6 steps, and 10 problems make one window of 6 with 4 left over: step 4 is in the middle of a window,
# between 4 and 8 lies the end of an epoch, and of a turn through all problems.
EXACT = {
    "num_generations": 8,
    "steps_per_generation": 3,
    "num_iterations": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 4,
    "max_completion_length": 24,
    "eval_count": 0,
    "beta": 0.02,
}
LORA = {"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
WAYS = {"single": ("cpu", 1), "ddp": ("ddp", 2), "zero2": ("zero2", 2), "zero3": ("zero3", 2)}


def command(way: str, recipe: Path, folder: Path, *words: object, script: Path | None = None) -> list[str]:
    config, processes = WAYS[way]
    argv: list[Any] = [sys.executable, "-m", "accelerate.commands.launch"]
    argv += ["--config_file", PROJECT / "accelerate_configs" / f"{config}.yaml", "--num_processes", processes]
    argv += ["--num_machines", 1, "--mixed_precision", "no", "--main_process_port", hardware.free_ports(1)[0]]
    argv += [script or PROJECT / "launch" / "grpo.py", "--config", recipe, "--run_folder", folder, *words]
    return [str(word) for word in argv]


def begin(argv: list[str], folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    hidden = ("WANDB_", "TENSORBOARD_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    env = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    env |= {**QUIET, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as log:
        return subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)


def run(way: str, recipe: Path, folder: Path, *words: object, code: int = 0, script: Path | None = None) -> RunFolder:
    """To its end."""
    with begin(command(way, recipe, folder, *words, script=script), folder) as started:
        try:
            found = started.wait(LIMIT_S)
        finally:
            kill(started)
    assert found == code, (folder / "log").read_text()[-6000:]
    return RunFolder(folder)


def kill(started: "subprocess.Popen[str]") -> None:
    """The launcher and every trainer process at once, as when a machine goes down."""
    if started.poll() is None:
        parent = psutil.Process(started.pid)
        for each in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    started.wait()


def until(what: Any, started: "subprocess.Popen[str]", folder: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert started.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-6000:]
        time.sleep(0.02)


def as_killed_after(done: RunFolder, step: int, folder: Path) -> Path:
    """A copy of a finished run as it was when it had written the checkpoint of `step` and made one step more."""
    copied = RunFolder(folder)
    checkpoint = copied.checkpoints / f"checkpoint-{step}"
    shutil.copytree(done.checkpoints / checkpoint.name, checkpoint)
    with done.metrics.open() as lines, copied.metrics.open("w") as kept:
        for line in lines:
            kept.write(line)
            if f'"step": {step + 1},' in line:
                kept.write('{"kind": "step", "ti')  # what a killed writer leaves
                break
    return checkpoint


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()}


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Bit for bit the same model, and the same metrics but for times."""
    expected, found = weights(one.model), weights(other.model)
    assert expected and expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert differing == []
    assert steps(other) == steps(one)


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    return [without_times(line) for line in folder.read_metrics() if line["kind"] == "step"]
