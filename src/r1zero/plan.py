"""A recipe and the facts of the hardware become a plan: which process runs where, with which arguments, and why.

Pure: nothing is read, started or written. Topology, process counts, batch arithmetic and ports exist here once; the
launcher only carries the plan out, and ``--dry-run`` only prints it.
"""

import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from r1zero import policy_server
from r1zero.hardware import Hardware
from r1zero.model_facts import ModelFacts
from r1zero.recipe import TINY_MODEL, Fault, Recipe, RecipeError

WIDTH = 110
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
# Processes that run to their end before the trainer starts.
WHAT = {
    "model": "makes the embedded model where it is not cached, then ends",
    "preflight": "checks prompts and end tokens, then ends",
    "rehearsal": "looks at one batch of rollouts, then ends",
}
# On a CPU that something else uses too, OpenMP threads that spin for long while they wait make a step ten times slower.
CPU_ENV = (("GOMP_SPINCOUNT", "3000"),)


@dataclass(frozen=True)
class Process:
    """One process that the launcher starts and watches.

    >>> Process("trainer", ("accelerate", "launch", "launch/grpo.py"), gpus=(0,), log="logs/trainer.log").gpus
    (0,)

    Attributes:
        name: unique within the plan: "model", "server", "trainer".
        argv: the exact command, no shell.
        env: variables set on top of the launcher's own; never a secret.
        gpus: indices on its node that the process may see; empty hides every GPU from it.
        node: index into the hardware's nodes.
        log: file for stdout and stderr, relative to the run folder.
    """

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = field(default=())
    gpus: tuple[int, ...] = ()
    node: int = 0
    log: str = ""


@dataclass(frozen=True)
class Batch:
    """How many prompts and completions an optimizer step takes, and how that arises from the recipe's keys.

    >>> batch = Batch(processes=2, per_device=16, accumulation=4, group=8, steps_per_generation=4, iterations=1)
    >>> batch.samples_per_step, batch.prompts_per_step
    (128, 16)

    Attributes:
        processes: trainer processes, one a GPU.
        per_device: samples in one forward and backward pass of one process (``per_device_train_batch_size``).
        accumulation: such passes in one optimizer step (``gradient_accumulation_steps``).
        group: completions of one prompt (``num_generations``); 1 for the cold start.
        steps_per_generation: passes that one round of generation feeds.
        iterations: how often each completion is learned from (``num_iterations``).
    """

    processes: int
    per_device: int
    accumulation: int
    group: int
    steps_per_generation: int
    iterations: int

    @property
    def samples_per_step(self) -> int:
        return self.processes * self.per_device * self.accumulation

    @property
    def prompts_per_step(self) -> int:
        return self.samples_per_step // self.group

    @property
    def completions_per_generation(self) -> int:
        return self.processes * self.per_device * self.steps_per_generation


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, before it does.

    Attributes:
        recipe: what is trained.
        hardware: on what.
        run_folder: where everything lands.
        preparations: processes that run to their end, one after the other, before the rest.
        server: the policy server that the launcher starts; None where the recipe has none, or names a running one.
        server_url: where completions come from; None: from inside the trainer.
        rehearsal: looks at one batch of rollouts once the policy server is ready; None where there is none.
        trainer: ``accelerate launch`` of launch/grpo.py or launch/sft.py.
        trainer_processes: how many processes that is.
        accelerate_config: the file it is given.
        batch: the arithmetic of a step.
        by_hand: shell lines that do the same without the launcher.
        reasons: why the plan is as it is, where the recipe left it open.
    """

    recipe: Recipe
    hardware: Hardware
    run_folder: Path
    preparations: tuple[Process, ...]
    server: Process | None
    server_url: str | None
    rehearsal: Process | None
    trainer: Process
    trainer_processes: int
    accelerate_config: Path
    batch: Batch
    by_hand: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def processes(self) -> tuple[Process, ...]:
        """In the order of their start."""
        return (*self.preparations, *(each for each in (self.server, self.rehearsal) if each), self.trainer)

    def render(self) -> str:
        """The plan as text that a person can check in ten seconds."""
        return _render(self)


def make(recipe: Recipe, hardware: Hardware, run_folder: Path, project: Path, model: ModelFacts | None = None) -> Plan:
    """The plan for `recipe` on `hardware`.

    Args:
        recipe: checked, as `recipe.load` returns it.
        hardware: as `hardware.detect` found it.
        run_folder: where the run will be written; need not exist.
        project: the folder that holds launch/ and accelerate_configs/.
        model: facts of the model's shape, where they are known.

    Raises:
        RecipeError: when the recipe cannot run on this hardware, with the arithmetic.
    """
    if len(hardware.nodes) > 1:
        why = f"{len(hardware.nodes)} nodes are here, and plans over several nodes are not built yet"
        raise RecipeError(str(recipe.path), [Fault("nodes", len(hardware.nodes), why, "ask Slurm for one node")])
    server_gpus, trainer_gpus, reasons = _place(recipe, hardware)
    config, why_config = _accelerate_config(recipe, project, len(trainer_gpus))
    processes = max(1, len(trainer_gpus))
    batch = _batch(recipe, processes)
    _check_lengths(recipe, model)
    serve_port, group_port, main_port = hardware.ports[:3]

    preparations: tuple[Process, ...] = ()
    if recipe.model == TINY_MODEL:
        preparations = (Process("model", (sys.executable, "-m", "r1zero.tiny"), CPU_ENV, log="logs/model.log"),)

    rehearsal = None
    if recipe.own.method == "grpo":
        preflight = (sys.executable, "-m", "r1zero.preflight", "--config", str(run_folder / "recipe.yaml"))
        preparations = (*preparations, Process("preflight", preflight, CPU_ENV, log="logs/preflight.log"))
    server, server_url = None, recipe.running_server
    if recipe.launches_server:
        server_url = f"http://127.0.0.1:{serve_port}"
        server = _server(recipe, batch, server_gpus, serve_port)
    if server_url is not None and recipe.own.method == "grpo":
        rehearsal = Process("rehearsal", (*preflight, "--server", server_url), CPU_ENV, log="logs/rehearsal.log")

    script = f"launch/{recipe.own.method}.py"
    settings = _trainer_settings(recipe, server_url, group_port)
    accelerate: tuple[str, ...] = ("--config_file", str(config), "--num_processes", str(processes))
    if processes > 1:
        accelerate = (*accelerate, "--main_process_port", str(main_port))
    trainer = Process(
        "trainer",
        (
            *(*ACCELERATE, *accelerate, str(project / script), "--config", str(run_folder / "recipe.yaml")),
            *("--run_folder", str(run_folder), *settings),
        ),
        env=(("TOKENIZERS_PARALLELISM", "false"), *(() if trainer_gpus else CPU_ENV)),
        gpus=trainer_gpus,
        log="logs/trainer.log",
    )
    hand_trainer = (
        *("accelerate", "launch", *accelerate, script, "--config", str(recipe.path), *recipe.overrides, *settings),
    )
    by_hand = [_shell(process.argv, process.gpus, process.env) for process in preparations if process.name == "model"]
    if server:
        by_hand.append(_shell(policy_server.by_hand(server.argv), server_gpus, server.env))
    by_hand.append(_shell(hand_trainer, trainer_gpus, () if trainer_gpus else CPU_ENV))
    return Plan(
        recipe=recipe,
        hardware=hardware,
        run_folder=run_folder,
        preparations=preparations,
        server=server,
        server_url=server_url,
        rehearsal=rehearsal,
        trainer=trainer,
        trainer_processes=processes,
        accelerate_config=config,
        batch=batch,
        by_hand=tuple(by_hand),
        reasons=(*reasons, why_config),
    )


def _place(recipe: Recipe, hardware: Hardware) -> tuple[tuple[int, ...], tuple[int, ...], list[str]]:
    """GPU indices of the server and of the trainer: the trainer has the first ones, the server the last."""
    own, here = recipe.own, hardware.gpus_per_node
    reasons = []
    if hardware.torch_cpu_only and here:
        reasons.append(f"{here} GPU(s) are here, but the installed torch is a CPU build, so none is used")
        here = 0
    if recipe.launches_server and here == 0:
        why = "the policy server is vLLM on a GPU, and no GPU is here"
        raise recipe.fault(
            "use_vllm", why, "run on a machine with GPUs, or --use_vllm false to generate in the trainer"
        )
    server = (own.server_gpus or 1) if recipe.launches_server else 0
    trainer = own.trainer_gpus if own.trainer_gpus is not None else here - server
    wanted = f"server {server} + trainer {trainer} = {server + trainer} GPUs, {here} here"
    if server + trainer > here:
        key = "trainer_gpus" if own.trainer_gpus else "server_gpus"
        raise recipe.fault(key, wanted, "lower server_gpus or trainer_gpus, or run on a larger machine")
    if recipe.launches_server and trainer < 1:
        why = f"{wanted}: nothing is left for the trainer, and weights cannot go over NCCL within one GPU (trl#3158)"
        raise recipe.fault("vllm_mode", why, "with one GPU: --vllm_mode colocate, and no server_gpus")
    if recipe.uses_vllm and not recipe.dedicated_server and trainer < 1:
        why = f"vLLM inside the trainer needs a GPU, the trainer has none ({here} here)"
        raise recipe.fault("use_vllm", why, "use_vllm: false generates with transformers, on a CPU too")
    if own.trainer_gpus is None and trainer > 1:
        reasons.append(f"trainer on {trainer} GPUs: all that are here{' but the server’s' if server else ''}")
    if recipe.own.method == "grpo" and not recipe.uses_vllm:
        reasons.append("completions are generated inside the trainer: use_vllm is false")
    if server + trainer < here:
        reasons.append(f"{here - server - trainer} of {here} GPUs stay idle")
    return tuple(range(here - server, here)), tuple(range(trainer)), reasons


def _accelerate_config(recipe: Recipe, project: Path, trainer_gpus: int) -> tuple[Path, str]:
    """The accelerate config file, and why this one."""
    folder = project / "accelerate_configs"
    asked = recipe.own.accelerate_config
    if asked is None:
        name = "cpu" if trainer_gpus == 0 else "single_gpu" if trainer_gpus == 1 else "ddp"
        return folder / f"{name}.yaml", f"accelerate config {name}: the trainer has {trainer_gpus} GPU(s)"
    path = Path(asked) if asked.endswith((".yaml", ".yml")) else folder / f"{asked}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise recipe.fault(
            "accelerate_config", "no such accelerate config", f"one of: {known}; or a file ending in .yaml"
        )
    if trainer_gpus == 0 and path.stem != "cpu":
        why = "the trainer has no GPU"
        raise recipe.fault("accelerate_config", why, "leave it out here, or run on a machine with GPUs")
    if trainer_gpus > 1 and path.stem in ("cpu", "single_gpu"):
        why = f"is for one process, the trainer has {trainer_gpus} GPUs"
        raise recipe.fault("accelerate_config", why, "use ddp, zero2 or zero3, or trainer_gpus: 1")
    return path, f"accelerate config {path.stem}: the recipe says so"


def _batch(recipe: Recipe, processes: int) -> Batch:
    """TRL's arithmetic (GRPOConfig.__post_init__), done here so that it fails before a model is loaded."""
    per_device, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    if recipe.own.method != "grpo":
        return Batch(processes, per_device, accumulation, group=1, steps_per_generation=accumulation, iterations=1)
    group = recipe["num_generations"]
    one_pass = processes * per_device
    asked, passes = recipe["generation_batch_size"], recipe["steps_per_generation"]
    if asked is not None:
        if asked % one_pass:
            why = f"is not a multiple of {per_device} per device x {processes} process(es) = {one_pass}"
            raise recipe.fault("generation_batch_size", why, f"use {max(1, round(asked / one_pass)) * one_pass}")
        passes = asked // one_pass
    elif passes is None:
        passes = accumulation
    together = one_pass * passes
    if together % group:
        divisors = [str(n) for n in range(2, together + 1) if together % n == 0][:8]
        why = (
            f"{per_device} per device x {processes} process(es) x {passes} pass(es) a generation = {together} "
            f"completions, not a multiple of {group}"
        )
        options = f"use num_generations {' or '.join(divisors)}" if divisors else "raise per_device_train_batch_size"
        raise recipe.fault("num_generations", why, options)
    if (one_pass * accumulation) % group:
        why = f"an optimizer step takes {one_pass * accumulation} completions, which is not whole groups of {group}"
        raise recipe.fault("num_generations", why, "make per_device x processes x accumulation a multiple of it")
    return Batch(processes, per_device, accumulation, group, passes, recipe["num_iterations"])


def _check_lengths(recipe: Recipe, model: ModelFacts | None) -> None:
    if model is None or model.context_length is None or recipe.own.method != "grpo":
        return
    prompt, completion = recipe.own.max_prompt_tokens or 1, recipe["max_completion_length"]
    if completion is not None and prompt + completion > model.context_length:
        limit = recipe.own.max_prompt_tokens or "(at least 1)"
        why = (
            f"max_prompt_tokens {limit} + {completion} = {prompt + completion} tokens, "
            f"the model has {model.context_length} positions"
        )
        raise recipe.fault("max_completion_length", why, f"at most {model.context_length - prompt}, or another model")


def _server(recipe: Recipe, batch: Batch, gpus: tuple[int, ...], port: int) -> Process:
    revision = recipe["model_revision"]
    argv = policy_server.serve_argv(
        model=recipe.model,
        host="127.0.0.1",
        port=port,
        tensor_parallel_size=len(gpus),
        # TRL's default of 0.3 is for a GPU shared with the trainer; this one has its own.
        gpu_memory_utilization=recipe.library.get("vllm_gpu_memory_utilization", 0.9),
        max_model_len=_server_context(recipe),
        max_num_seqs=max(256, min(1024, batch.completions_per_generation)),
        dtype="float16" if recipe["fp16"] else "bfloat16",
        trust_remote_code=recipe["trust_remote_code"],
        seed=recipe["seed"],
        extra=("--revision", revision) if revision not in (None, "main") else (),
    )
    return Process("server", argv, policy_server.serve_env(), gpus, log="logs/server.log")


def _server_context(recipe: Recipe) -> int | None:
    """Tokens that the server must hold for one sequence. None, where prompts have no limit: the model's own."""
    if recipe.own.max_prompt_tokens is None or recipe["max_completion_length"] is None:
        return None
    return int(recipe.own.max_prompt_tokens + recipe["max_completion_length"])


def _trainer_settings(recipe: Recipe, server_url: str | None, group_port: int) -> tuple[str, ...]:
    """What the plan knows and the recipe could not: addresses. As overrides, in TRL's own keys."""
    if not recipe.launches_server or server_url is None:
        return ()
    return ("--vllm_server_base_url", server_url, "--vllm_group_port", str(group_port))


def _shell(argv: tuple[str, ...], gpus: tuple[int, ...], env: tuple[tuple[str, str], ...]) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in env]
    if gpus:
        variables.insert(0, f"CUDA_VISIBLE_DEVICES={','.join(map(str, gpus))}")
    words = ["python" if word == sys.executable else word for word in argv]
    return " ".join([*variables, shlex.join(words)])


def _render(plan: Plan) -> str:
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False)
    recipe, batch = plan.recipe, plan.batch
    console.print(f"Plan for {recipe.path}: {recipe.own.method} of {recipe.model} on {recipe.own.task}", soft_wrap=True)
    node = plan.hardware.nodes[0]
    gpus = f"{len(node.gpus)} x {node.gpus[0].name} ({node.gpus[0].memory_gib:g} GiB)" if node.gpus else "no GPU"
    console.print(f"Hardware: {node.host}, {gpus}", soft_wrap=True)

    table = Table(box=None, pad_edge=False, header_style="")
    for column in ("process", "node", "GPUs", "port", "what"):
        table.add_column(column, overflow="fold")
    for process in plan.processes:
        ports, what = "-", f"{plan.trainer_processes} process(es), accelerate {plan.accelerate_config.stem}"
        if process is plan.server:
            assert plan.server_url is not None  # noqa: S101 - a plan with a server has its address
            ports, what = plan.server_url.rpartition(":")[2], "vllm serve, this machine only"
        elif process in (*plan.preparations, plan.rehearsal):
            what = WHAT[process.name]
        table.add_row(process.name, node.host, ",".join(map(str, process.gpus)) or "none", ports, what)
    if plan.server is None and plan.server_url:
        table.add_row("server", "-", "-", "-", f"already running at {plan.server_url}, not ours to stop")
    console.print(table)

    arithmetic = f"{batch.per_device} per device x {batch.processes} process(es) x {batch.accumulation} accumulation"
    if recipe.own.method == "grpo":
        console.print(
            f"Optimizer step: {arithmetic} = {batch.samples_per_step} completions "
            f"= {batch.prompts_per_step} prompts x {batch.group} generations"
        )
        console.print(
            f"Generation: {batch.completions_per_generation} completions at a time, each learned from "
            f"{batch.iterations} time(s), at most {recipe['max_completion_length']} tokens each"
        )
    else:
        console.print(f"Optimizer step: {arithmetic} = {batch.samples_per_step} worked solutions")
    steps = f"{recipe['max_steps']} steps" if recipe["max_steps"] > 0 else f"{recipe['num_train_epochs']:g} epoch(s)"
    console.print(f"Length: {steps}")
    for reason in plan.reasons:
        console.print(f"Because: {reason}", soft_wrap=True)
    console.print(f"Everything goes to {plan.run_folder}", soft_wrap=True)
    console.print("  recipe.yaml plan.txt versions.json status.json metrics.jsonl summary.json")
    console.print("  logs/ rollouts/ checkpoints/ model/")
    console.print("The same by hand:")
    for line in plan.by_hand:
        console.print(f"  {line}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
