"""Which accelerate config the trainer runs under, and the words that ``accelerate launch`` is given with it.

The file says how processes share the model; how many there are, on how many machines, where they meet and in which
precision they compute is the plan's, on the command line.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from r1zero.hardware import Hardware
from r1zero.placement import Placement, counted
from r1zero.recipe import Recipe

# From, up to but without, ZeRO stage, why. With 0.18.2 on two CPU processes and two accumulated passes the gradients
# that our own check saw were 67 % off; 0.19.3 and 0.19.8 were right (DeepSpeed#7697, #7718, trl#4540, accelerate#3877).
# DeepSpeed#8224 (wrong in bf16 where a submodule is used twice in one pass) does not concern GRPO's single pass.
BAD_DEEPSPEED = (
    ((0, 17, 6), (0, 18, 3), 2, "loses the gradients of all but the last accumulated pass (DeepSpeed#7718)"),
)
GOOD_DEEPSPEED = "0.19.8"  # what the tests run with


# In which weights are whole, or DeepSpeed's to gather, when they are published and saved.
KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED")


@dataclass(frozen=True)
class AccelerateConfig:
    """What a plan must know of an accelerate config.

    >>> AccelerateConfig(Path("accelerate_configs/zero3.yaml"), zero_stage=3).name
    'zero3'

    Attributes:
        path: the file.
        for_one_process: it cannot start several.
        on_cpu: it hides the GPUs from the trainer.
        zero_stage: DeepSpeed's; 0 where it is not used.
        offload: whether DeepSpeed keeps weights and optimizer state in the host's memory.
    """

    path: Path
    for_one_process: bool = False
    on_cpu: bool = False
    zero_stage: int = 0
    offload: bool = False

    @property
    def name(self) -> str:
        return self.path.stem


def choose(recipe: Recipe, project: Path, hardware: Hardware, placed: Placement) -> tuple[AccelerateConfig, str]:
    """The config of `recipe`, and why this one.

    Raises:
        RecipeError: when there is no such file, it cannot run what is placed, or DeepSpeed here trains wrongly.
    """
    asked, folder = recipe.own.accelerate_config, project / "accelerate_configs"
    what = _trainer_text(placed)
    if asked is None:
        name = "ddp" if placed.processes > 1 else "single_gpu" if placed.trains_on_gpus else "cpu"
        return read(folder / f"{name}.yaml", recipe), f"accelerate config {name}: the trainer has {what}"
    path = Path(asked) if asked.endswith((".yaml", ".yml")) else folder / f"{asked}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise recipe.fault(
            "accelerate_config", "no such accelerate config", f"one of: {known}; or a file ending in .yaml"
        )
    config = read(path, recipe)
    if placed.processes > 1 and config.for_one_process:
        fewer = "trainer_gpus: 1" if placed.trains_on_gpus else "cpu_processes: 1"
        why = f"is for one process, the trainer has {what}"
        raise recipe.fault("accelerate_config", why, f"use ddp, zero2 or zero3, or {fewer}")
    if placed.trains_on_gpus and config.on_cpu:
        why = f"hides the GPUs, and the trainer has {what}"
        raise recipe.fault("accelerate_config", why, "leave it out, or trainer_gpus: 0 to train on the CPU")
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe[key] and config.zero_stage == 3:
            # It runs (two CPU processes, transformers 5.17), but its first gradient's norm was 2 % off ZeRO-2's.
            why = f"ZeRO-3 shards weights, and each process loads quantized ones whole (accelerate_config {asked})"
            raise recipe.fault(key, why, "use zero2 or ddp, or drop it")
    _check_deepspeed(recipe, config, hardware.deepspeed)
    return config, f"accelerate config {config.name}: the recipe says so"


def read(path: Path, recipe: Recipe) -> AccelerateConfig:
    """What the file at `path` says.

    Raises:
        RecipeError: when it cannot be read, or names no way to distribute that is known here.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        deepspeed = dict(content.get("deepspeed_config") or {})
        given = deepspeed.get("deepspeed_config_file")
        zero = json.loads(Path(given).read_text(encoding="utf-8")).get("zero_optimization", {}) if given else deepspeed
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        what = " ".join(str(error).split())
        raise recipe.fault("accelerate_config", f"{path} cannot be read: {what}", "mend the file") from error
    kind = str(content.get("distributed_type", "NO"))
    if kind not in KINDS:
        why = f"{path} has distributed_type {kind}, which is not supported"
        raise recipe.fault("accelerate_config", why, f"one of {', '.join(KINDS)}; zero3 shards all there is to shard")
    uses_deepspeed = kind == "DEEPSPEED"
    return AccelerateConfig(
        path,
        for_one_process=kind == "NO",
        on_cpu=content.get("use_cpu") is True,
        zero_stage=int(zero.get("stage", zero.get("zero_stage", 2))) if uses_deepspeed else 0,
        offload=uses_deepspeed and _offloads(zero),
    )


def flags(
    config: AccelerateConfig, recipe: Recipe, hardware: Hardware, placed: Placement, rank: int
) -> tuple[str, ...]:
    """The words of ``accelerate launch`` on the trainer's node number `rank`.

    DeepSpeed's own launchers for several machines want ssh or a hostfile; "standard" is torch's, which needs neither:
    each machine is started with its rank and finds the first one's address and port.
    """
    machines = len(placed.trainers)
    first = hardware.nodes[placed.trainers[0].node]
    words = ["--config_file", str(config.path), "--num_processes", str(placed.processes)]
    words += ["--num_machines", str(machines), "--mixed_precision", precision(recipe, placed.trains_on_gpus)]
    if machines > 1:
        words += ["--machine_rank", str(rank), "--main_process_ip", first.address]
    if placed.processes > 1 or config.zero_stage:
        words += ["--main_process_port", str(first.ports[2])]
    if machines > 1 and config.zero_stage:
        words += ["--deepspeed_multinode_launcher", "standard"]
    return tuple(words)


def precision(recipe: Recipe, on_gpus: bool) -> str:
    """In what the trainer computes: "bf16", "fp16" or "no", as `training.arguments` tells TRL.

    accelerate would take it from its file, whatever the recipe says, and DeepSpeed refuses to differ from TRL.
    """
    if recipe["fp16"]:
        return "fp16"
    bf16 = recipe.library.get("bf16", on_gpus)
    return "bf16" if bf16 else "no"


def _offloads(zero: dict[str, Any]) -> bool:
    devices = (zero.get("offload_param_device"), dict(zero.get("offload_param") or {}).get("device"))
    return any(device not in (None, "none") for device in devices)


def _trainer_text(placed: Placement) -> str:
    if placed.trains_on_gpus:
        return counted(placed.processes, "GPU")
    return f"{placed.processes} processes on CPUs" if placed.processes > 1 else "no GPU"


def _check_deepspeed(recipe: Recipe, config: AccelerateConfig, version: str | None) -> None:
    if version is None or not config.zero_stage:
        return
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    for first, fixed, stage, why in BAD_DEEPSPEED:
        if config.zero_stage == stage and first <= numbers < fixed:
            fixed_in = ".".join(map(str, fixed))
            remedy = f"pip install deepspeed=={GOOD_DEEPSPEED} (right from {fixed_in} on), or accelerate_config: zero3"
            raise recipe.fault("accelerate_config", f"DeepSpeed {version}, installed here, {why}", remedy)
