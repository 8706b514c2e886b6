"""The trainer as the plan starts it, for real, under each accelerate config: two processes on a CPU, two steps."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import hardware, plan, recipe
from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.training.conftest import QUIET, data, model, write_recipe  # noqa: F401 - fixtures

pytestmark = pytest.mark.timeout(900)  # a machine that tests five other things is ten times slower
LIMIT_S = 300
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_target_modules": "all-linear"}
# With a reference model and gradient checkpointing, which are what differs most between the ways to distribute.
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 16,
    "gradient_checkpointing": True,
    "beta": 0.1,
    "eval_count": 0,
}


def run(where: Path, nodes: int, keys: dict[str, Any], model: Path, data: Path) -> list[dict[str, Any]]:  # noqa: F811
    """Start what the plan says, on this machine for all its nodes; the metrics of the steps.

    The recipe is planned for machines without a GPU, at whose addresses this one answers.
    """
    path = write_recipe(where / "recipe.yaml", model, data, **COMMON, **keys)
    ports = hardware.free_ports(3)
    here = hardware.assumed(f"{nodes}x0", ports)
    here = replace(here, nodes=tuple(replace(node, address=hardware.LOOPBACK) for node in here.nodes))
    folder = RunFolder(where / "run").create()
    planned = plan.make(recipe.load(path), here, folder.path, PROJECT)
    folder.recipe.write_text(yaml.safe_dump(planned.recipe.resolved()))
    hidden = ("WANDB_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    logs = [where / each.name for each in planned.trainers]
    started = [
        subprocess.Popen(
            each.argv,
            cwd=where,
            env={**inherited, **QUIET, "CUDA_VISIBLE_DEVICES": "", **dict(each.env)},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for each, log in zip(planned.trainers, logs, strict=True)
    ]
    try:
        codes = [each.wait(LIMIT_S) for each in started]
    finally:
        for each in started:
            each.terminate()  # accelerate then ends the processes that it started
        for each in started:
            each.wait(LIMIT_S)
    assert codes == [0] * nodes, "".join(log.read_text()[-3000:] for log in logs)
    assert folder.model.is_dir()
    return [line for line in folder.read_metrics() if line["kind"] == "step"]


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("cpu", {}),
        ("ddp", {}),
        ("ddp", LORA),
        ("zero2", {"bf16": True}),
        ("zero2", LORA),
        ("zero3", {"bf16": True}),
        ("zero3", LORA),
        pytest.param("zero3_offload", {}, marks=pytest.mark.soak),  # DeepSpeed compiles its Adam: two minutes
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "fp32",
)
def test_two_steps(config: str, keys: dict[str, Any], tmp_path: Path, model: Path, data: Path) -> None:  # noqa: F811
    steps = run(tmp_path, 1, {"accelerate_config": config, "cpu_processes": 1 + (config != "cpu"), **keys}, model, data)
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["kl"] >= 0 for line in steps)
    assert all(line["grad_norm"] > 0 for line in steps)


def test_two_nodes_are_one_run(tmp_path: Path, model: Path, data: Path) -> None:  # noqa: F811
    """A process on each, here both on this machine, through torch's own launcher; the same under DDP and ZeRO-2."""
    found = {}
    for config in ("ddp", "zero2"):
        (tmp_path / config).mkdir()
        found[config] = run(tmp_path / config, 2, {"accelerate_config": config}, model, data)
    for ddp, zero2 in zip(found["ddp"], found["zero2"], strict=True):
        assert ddp["reward"] == zero2["reward"]
        assert ddp["grad_norm"] == pytest.approx(zero2["grad_norm"], rel=1e-3)
