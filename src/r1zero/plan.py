"""A recipe and the facts of the hardware become a plan: which process runs where, with which arguments, and why.

Pure: nothing is started or written, and nothing read but where a rounded base lies. Topology, process counts, batch
arithmetic, ports and memory exist here once; the launcher only carries the plan out, and ``--dry-run`` only prints it.
"""

import io
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from r1zero import memory, policy_server
from r1zero.hardware import Hardware
from r1zero.memory import Need
from r1zero.model_facts import FAMILIES, PROJECTIONS, ModelFacts
from r1zero.recipe import TINY_MODEL, Fault, Recipe, RecipeError
from r1zero.serving import PUBLISH_FOLDER, SHARED_MEMORY, TOKEN

WIDTH = 110
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
# Processes that run to their end before the trainer starts.
WHAT = {
    "model": "makes the embedded model where it is not cached, then ends",
    "preflight": "checks prompts and end tokens, then ends",
    "base": "rounds the weights to the trainer's 4 bits where they are not cached, then ends",
    "rehearsal": "looks at one batch of rollouts, then ends",
}
# On a CPU that something else uses too, OpenMP threads that spin for long while they wait make a step ten times slower.
CPU_ENV = (("GOMP_SPINCOUNT", "3000"),)
TRAINER_MEMORY = "R1ZERO_TRAINER_MEMORY_GIB"  # the environment variable that limits a trainer that shares its GPU
SHARE_UNSEEN = 0.3  # of a shared GPU for the server, where nothing can be estimated: TRL's own default
# Stands for the rounded base in the plan of a dry run, where a model of the hub has not been downloaded.
BASE_UNKNOWN = "FOLDER-THAT-R1ZERO.QUANTIZED_BASE-PRINTS"
SERVER_CONTEXT = 4096  # tokens that a sequence is taken to need where prompts have no limit
MOST_SEQUENCES = 1024  # completions that a server generates at once; more would wait for each other
SPARE_SEQUENCES = 4  # the launcher's watch and the trainer's probe ask while all others are in use
# What a person exports once before the lines by hand; the launcher makes both itself.
HAND_EXPORTS = (
    f'export {TOKEN}=$(python -c "import secrets; print(secrets.token_hex(32))")',
    f"export {PUBLISH_FOLDER}=$(mktemp -d /dev/shm/r1zero-XXXXXX)",
)


@dataclass(frozen=True)
class Process:
    """One process that the launcher starts and watches.

    >>> Process("trainer", ("accelerate", "launch", "launch/grpo.py"), gpus=(0,), log="logs/trainer.log").gpus
    (0,)

    Attributes:
        name: unique within the plan: "model", "server", or "server-0" where there are several, "trainer".
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
        servers: the policy servers that the launcher starts; none where the recipe has none, or names a running one.
        server_urls: where completions come from, in the order of `servers`; none: from inside the trainer.
        publish: how a new policy version reaches the servers: "adapter", "nccl" or "shared_memory"; None without them.
        rehearsal: looks at one batch of rollouts once the policy server is ready; None where there is none.
        trainer: ``accelerate launch`` of launch/grpo.py or launch/sft.py.
        trainer_processes: how many processes that is.
        accelerate_config: the file it is given.
        batch: the arithmetic of a step.
        memory: what is expected on each GPU, one line for a person each; empty where nothing is known.
        by_hand: shell lines that do the same without the launcher.
        reasons: why the plan is as it is, where the recipe left it open.
    """

    recipe: Recipe
    hardware: Hardware
    run_folder: Path
    preparations: tuple[Process, ...]
    servers: tuple[Process, ...]
    server_urls: tuple[str, ...]
    publish: str | None
    rehearsal: Process | None
    trainer: Process
    trainer_processes: int
    accelerate_config: Path
    batch: Batch
    memory: tuple[str, ...]
    by_hand: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def processes(self) -> tuple[Process, ...]:
        """In the order of their start."""
        rehearsal = (self.rehearsal,) if self.rehearsal else ()
        return (*self.preparations, *self.servers, *rehearsal, self.trainer)

    def render(self) -> str:
        """The plan as text that a person can check in ten seconds."""
        return _render(self)


@dataclass(frozen=True)
class Placement:
    """Who runs where.

    Attributes:
        servers: GPU indices of each policy server that the launcher starts; an empty tuple is a server on the CPU.
        trainer: GPU indices of the trainer; empty: on the CPU.
        reasons: why, where the recipe left it open.
    """

    servers: tuple[tuple[int, ...], ...]
    trainer: tuple[int, ...]
    reasons: tuple[str, ...]

    @property
    def shared(self) -> bool:
        """Whether server and trainer share a GPU."""
        return any(set(gpus) & set(self.trainer) for gpus in self.servers)


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
    place = _place(recipe, hardware)
    config, why_config = _accelerate_config(recipe, project, len(place.trainer))
    processes = max(1, len(place.trainer))
    batch = _batch(recipe, processes)
    _check_lengths(recipe, model)
    _check_model_is_servable(recipe, place, model)
    publish, why_publish = _publish_route(recipe, place)
    budget = _budget(recipe, hardware, place, batch, config.stem, model)
    # The first port of a server came first before there were several.
    serve_ports = (hardware.ports[0], *hardware.ports[3:])
    group_port, main_port = hardware.ports[1:3]

    recipe_file = run_folder / "recipe.yaml"
    preparations: list[Process] = []
    if recipe.model == TINY_MODEL:
        preparations.append(Process("model", (sys.executable, "-m", "r1zero.tiny"), CPU_ENV, log="logs/model.log"))
    rehearsal = None
    preflight = (sys.executable, "-m", "r1zero.preflight", "--config", str(recipe_file))
    if recipe.own.method == "grpo":
        preparations.append(Process("preflight", preflight, CPU_ENV, log="logs/preflight.log"))
    base = (sys.executable, "-m", "r1zero.quantized_base", "--config")
    if recipe.launches_server and _serves_rounded_base(recipe):
        preparations.append(Process("base", (*base, str(recipe_file)), gpus=place.trainer[:1], log="logs/base.log"))

    servers: tuple[Process, ...] = ()
    server_urls = tuple(recipe.running_server.split(",")) if recipe.running_server else ()
    if recipe.launches_server:
        servers = tuple(
            _server(recipe, batch, place, budget, model, publish, number, port)
            for number, port in zip(range(len(place.servers)), serve_ports, strict=False)
        )
        server_urls = tuple(f"http://127.0.0.1:{port}" for port in serve_ports[: len(servers)])
    if server_urls:
        looks = (*preflight, "--server", server_urls[0])
        rehearsal = Process("rehearsal", looks, CPU_ENV, log="logs/rehearsal.log")

    script = f"launch/{recipe.own.method}.py"
    settings = _trainer_settings(recipe, server_urls, group_port, publish)
    accelerate: tuple[str, ...] = ("--config_file", str(config), "--num_processes", str(processes))
    if processes > 1:
        accelerate = (*accelerate, "--main_process_port", str(main_port))
    limit = () if budget.trainer_limit is None else ((TRAINER_MEMORY, f"{budget.trainer_limit:.2f}"),)
    trainer_env = (*(() if place.trainer else CPU_ENV), *limit)
    trainer = Process(
        "trainer",
        (
            *(*ACCELERATE, *accelerate, str(project / script), "--config", str(recipe_file)),
            *("--run_folder", str(run_folder), *settings),
        ),
        env=(("TOKENIZERS_PARALLELISM", "false"), *trainer_env),
        gpus=place.trainer,
        log="logs/trainer.log",
    )
    hand_trainer = (
        *("accelerate", "launch", *accelerate, script, "--config", str(recipe.path), *recipe.overrides, *settings),
    )
    by_hand = list(HAND_EXPORTS) if servers else []
    for process in preparations:
        if process.name == "model":
            by_hand.append(_shell(process.argv, process.gpus, process.env))
        elif process.name == "base":
            by_hand.append(_shell((*base, str(recipe.path), *recipe.overrides), process.gpus, process.env))
    by_hand += [_shell(policy_server.by_hand(each.argv), each.gpus, each.env) for each in servers]
    by_hand.append(_shell(hand_trainer, place.trainer, trainer_env))
    return Plan(
        recipe=recipe,
        hardware=hardware,
        run_folder=run_folder,
        preparations=tuple(preparations),
        servers=servers,
        server_urls=server_urls,
        publish=publish,
        rehearsal=rehearsal,
        trainer=trainer,
        trainer_processes=processes,
        accelerate_config=config,
        batch=batch,
        memory=budget.lines,
        by_hand=tuple(by_hand),
        reasons=(*place.reasons, *why_publish, *budget.reasons, why_config),
    )


def _place(recipe: Recipe, hardware: Hardware) -> Placement:
    """GPU indices of servers and trainer: the trainer has the first ones, the servers the last."""
    own, here = recipe.own, hardware.gpus_per_node
    reasons = []
    if hardware.torch_cpu_only and here:
        reasons.append(f"{here} GPU(s) are here, but the installed torch is a CPU build, so none is used")
        here = 0
    if recipe.launches_server and here == 0:
        return _place_on_cpu(recipe, hardware, reasons)
    each = recipe["vllm_tensor_parallel_size"] if recipe.launches_server else 1
    server = 0
    if recipe.launches_server:
        server = own.server_gpus if own.server_gpus is not None else 0 if here == 1 else each
        if server == 0:
            return _place_on_one_gpu(recipe, here, reasons)
    trainer = own.trainer_gpus if own.trainer_gpus is not None else here - server
    wanted = f"server {server} + trainer {trainer} = {server + trainer} GPUs, {here} here"
    if server + trainer > here:
        key = "trainer_gpus" if own.trainer_gpus else "server_gpus"
        raise recipe.fault(key, wanted, "lower server_gpus or trainer_gpus, or run on a larger machine")
    if server % each:
        why = f"is not a multiple of vllm_tensor_parallel_size, {each} GPUs for each server"
        raise recipe.fault("server_gpus", why, f"use {max(1, round(server / each)) * each}, or change the latter")
    if recipe.launches_server and trainer < 1:
        key = "trainer_gpus" if own.trainer_gpus is not None else "server_gpus"
        why = f"{wanted}: nothing is left for the trainer"
        raise recipe.fault(key, why, "lower server_gpus; 0 lets server and trainer share one GPU")
    if recipe.uses_vllm and not recipe.dedicated_server:
        if trainer < 1:
            why = f"vLLM inside the trainer needs a GPU, the trainer has none ({here} here)"
            raise recipe.fault("use_vllm", why, "use_vllm: false generates with transformers, on a CPU too")
        reasons.append("completions are generated by vLLM inside the trainer (TRL's colocate): vllm_mode says so")
    if own.trainer_gpus is None and trainer > 1:
        reasons.append(f"trainer on {trainer} GPUs: all that are here{' but the servers’' if server else ''}")
    if recipe.own.method == "grpo" and not recipe.uses_vllm:
        reasons.append("completions are generated inside the trainer: use_vllm is false")
    if server > each:
        reasons.append(f"{server // each} servers: {server} GPUs, {each} for each")
    if server + trainer < here:
        reasons.append(f"{here - server - trainer} of {here} GPUs stay idle")
    groups = tuple(tuple(range(first, first + each)) for first in range(here - server, here, each))
    return Placement(groups, tuple(range(trainer)), tuple(reasons))


def _place_on_cpu(recipe: Recipe, hardware: Hardware, reasons: list[str]) -> Placement:
    if not hardware.cpu_server:
        why = "the policy server is vLLM on a GPU, and no GPU is here"
        remedy = (
            "run on a machine with GPUs, install vLLM's CPU build with python -m r1zero.serving.cpu_build, "
            "or --use_vllm false to generate in the trainer"
        )
        raise recipe.fault("use_vllm", why, remedy)
    for key in ("server_gpus", "trainer_gpus"):
        if getattr(recipe.own, key):
            raise recipe.fault(key, "no GPU is here", f"leave {key} out: server and trainer then run on the CPU")
    if recipe["vllm_tensor_parallel_size"] > 1:
        raise recipe.fault("vllm_tensor_parallel_size", "no GPU is here", "1 on a CPU")
    return Placement(((),), (), (*reasons, "policy server on the CPU: vLLM's CPU build is installed, no GPU is here"))


def _place_on_one_gpu(recipe: Recipe, here: int, reasons: list[str]) -> Placement:
    own = recipe.own
    asked = "server_gpus is 0" if own.server_gpus is not None else "only one is here"
    if own.trainer_gpus is not None and own.trainer_gpus != 1:
        why = f"server and trainer share one GPU ({asked}), so the trainer is one process"
        raise recipe.fault("trainer_gpus", why, "use trainer_gpus: 1, or give server_gpus of their own")
    if recipe["vllm_tensor_parallel_size"] > 1:
        why = f"server and trainer share one GPU ({asked})"
        raise recipe.fault("vllm_tensor_parallel_size", why, "use 1, or give server_gpus of their own")
    reasons.append(f"server and trainer share GPU 0: {asked}")
    if here > 1:
        reasons.append(f"{here - 1} of {here} GPUs stay idle")
    return Placement(((0,),), (0,), tuple(reasons))


def _publish_route(recipe: Recipe, place: Placement) -> tuple[str | None, tuple[str, ...]]:
    """How a new policy version reaches the servers, and why so."""
    if not recipe.dedicated_server:
        return None, ()
    asked = recipe.own.publish
    together = ""
    if place.shared:
        together = "server and trainer share one GPU, where NCCL cannot join them (trl#3158)"
    elif not place.trainer:
        together = "the trainer has no GPU, and NCCL joins GPUs"
    if asked == "nccl" and together:
        raise recipe.fault("publish", together, "use publish: shared_memory, or auto")
    if asked != "auto":
        return asked, (f"publish {asked}: the recipe says so",)
    if recipe["use_peft"]:
        return "adapter", ("publish adapter: use_peft is true, so the adapter alone goes to the server",)
    if together:
        return "shared_memory", (f"publish shared_memory: all weights are trained, and {together}",)
    apart = "server and trainer have GPUs of their own"
    if not recipe.launches_server:
        apart = "the server is taken to have a GPU of its own (if not: publish: shared_memory)"
    return "nccl", (f"publish nccl: all weights are trained, and {apart}",)


def _check_model_is_servable(recipe: Recipe, place: Placement, model: ModelFacts | None) -> None:
    """What only the model's configuration tells: modules that an adapter can have, heads that GPUs can share."""
    if recipe.launches_server and recipe.model == TINY_MODEL:
        why = "the embedded model has no folder before it is made, and vLLM wants one"
        remedy = "python -m r1zero.tiny makes it and prints its folder: give that"
        raise recipe.fault("model_name_or_path", why, remedy)
    if model is None or not recipe.dedicated_server:
        return
    targets = recipe["lora_target_modules"]
    if recipe["use_peft"] and targets and model.family in FAMILIES:
        known = (*PROJECTIONS, "all-linear")
        unknown = [name for name in targets if name.rpartition(".")[2] not in known]
        if unknown:
            why = f"{', '.join(unknown)}: no projection of a {model.family} model, so vLLM could not serve the adapter"
            raise recipe.fault("lora_target_modules", why, f"of these: {', '.join(PROJECTIONS)}; or all-linear")
    each = recipe["vllm_tensor_parallel_size"]
    if recipe.launches_server and model.shape and model.shape.heads % each:
        fitting = [str(n) for n in range(1, each) if model.shape.heads % n == 0]
        why = f"the model's {model.shape.heads} attention heads cannot be divided among {each} GPUs"
        raise recipe.fault("vllm_tensor_parallel_size", why, f"use {' or '.join(fitting)}")


@dataclass(frozen=True)
class Budget:
    """Memory as it is planned.

    Attributes:
        utilization: the share of each of its GPUs that a server gets.
        trainer_limit: GiB that the trainer's allocator is held to; None: it is not.
        lines: for the plan's text.
        reasons: what is close, and what was chosen.
    """

    utilization: float
    trainer_limit: float | None = None
    lines: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


def _budget(
    recipe: Recipe, hardware: Hardware, place: Placement, batch: Batch, accelerate: str, model: ModelFacts | None
) -> Budget:
    """How much of each GPU the servers and the trainer get.

    Raises:
        RecipeError: where they clearly cannot fit, with the arithmetic.
    """
    _check_sharing_keys(recipe, place)
    given = recipe.library.get("vllm_gpu_memory_utilization")
    gpus = hardware.nodes[0].gpus if place.trainer else ()
    card = min((gpu.memory_gib for gpu in gpus), default=0.0)
    limit = recipe.own.gpu_memory_limit
    if limit is not None and limit > card:
        raise recipe.fault("gpu_memory_limit", f"the GPU has {card:g} GiB", "lower it, or leave it out")
    if not card or model is None or model.shape is None or recipe.own.method != "grpo":
        return _budget_unseen(recipe, place, card, model)
    shape, inside = model.shape, not recipe.uses_vllm
    train = memory.trainer(
        shape,
        recipe,
        processes=batch.processes,
        accelerate=accelerate,
        generated=batch.completions_per_generation // batch.processes if inside else 0,
    )
    if not place.servers:
        return _budget_of_trainer(recipe, place, train, card)
    sequences = _server_sequences(batch, place)
    least, most = (
        memory.server(
            shape,
            context=_server_context(recipe, model) or SERVER_CONTEXT,
            completions=completions,
            sequences=sequences,
            rank=_adapter_rank(recipe),
            tensor_parallel=len(place.servers[0]),
            four_bit=recipe.own.server_base == "vllm_4bit",
            reserve_gib=reserve,
        )
        for completions, reserve in ((-(-sequences // 4), 0.0), (sequences, memory.SERVER_RESERVE_GIB))
    )
    if place.shared:
        return _budget_shared(recipe, least, most, train, card)
    share = 0.9 if given is None else given
    room, needed = share * card, least.total - memory.SERVER_BEYOND_SHARE_GIB
    if needed > memory.CLEARLY * room:
        why = (
            f"a server needs {needed:.1f} GiB of each of its GPUs ({least.text()}), "
            f"its share of {share:g} of {card:g} GiB is {room:.1f}"
        )
        key = "vllm_gpu_memory_utilization" if given is not None else "vllm_tensor_parallel_size"
        raise recipe.fault(key, why, "more GPUs for each server (vllm_tensor_parallel_size), or a larger share")
    alone = _budget_of_trainer(recipe, place, train, card)
    reasons = list(alone.reasons)
    if needed > memory.CLOSE * room:
        reasons.append(f"close: a server needs {needed:.1f} GiB of the {room:.1f} that it gets")
    kv_cache = room - needed + dict(least.parts)["KV cache"]
    parts = Need((*(part for part in least.parts if part[0] in ("weights", "adapter slots")), ("KV cache", kv_cache)))
    lines = [*alone.lines]
    for gpus_of_one in place.servers:
        lines.append(f"GPU {_list(gpus_of_one)} ({card:g}): server {room:.1f}: {parts.text()} + workspace")
    return Budget(share, None, tuple(lines), tuple(reasons))


def _check_sharing_keys(recipe: Recipe, place: Placement) -> None:
    for key, value in (
        ("gpu_memory_limit", recipe.own.gpu_memory_limit),
        ("vllm_enable_sleep_mode", recipe.dedicated_server and recipe["vllm_enable_sleep_mode"]),
    ):
        if value and not place.shared:
            why = "server and trainer share no GPU here, so it would have no effect"
            raise recipe.fault(key, why, f"leave {key} out, or server_gpus: 0 to share one GPU")


def _budget_unseen(recipe: Recipe, place: Placement, card: float, model: ModelFacts | None) -> Budget:
    """Where the GPU's memory or the model's shape is not known: what the recipe says, else a fixed share."""
    given = recipe.library.get("vllm_gpu_memory_utilization")
    if not place.shared:
        return Budget(0.9 if given is None else given)
    if not card:
        unknown = "the GPU does not say how much memory it has"
    elif model is None:
        unknown = "the model's shape is not known before it is downloaded, which a dry run does not do"
    else:
        unknown = f"the weights of a model of type {model.family} are not counted here"
    limit = recipe.own.gpu_memory_limit
    if limit is None:
        share = SHARE_UNSEEN if given is None else given
        why = "the recipe says so" if given is not None else unknown
        return Budget(share, reasons=(f"vLLM's share of the GPU: {share:g}, {why}",))
    if given is None:
        why = f"it cannot be divided: {unknown}"
        raise recipe.fault("gpu_memory_limit", why, "add vllm_gpu_memory_utilization, the server's share of the GPU")
    left = limit - given * card - memory.SERVER_BEYOND_SHARE_GIB
    return Budget(given, _trainer_limit(recipe, left))


def _budget_of_trainer(recipe: Recipe, place: Placement, train: Need, card: float) -> Budget:
    """The trainer on GPUs of its own, with vLLM inside it where TRL's colocate mode is asked for."""
    if recipe.uses_vllm and not recipe.dedicated_server:
        train = Need((*train.parts, ("vLLM inside", recipe["vllm_gpu_memory_utilization"] * card)))
    room = memory.USABLE * card
    if train.total > memory.CLEARLY * room:
        why = f"the trainer needs {train.total:.1f} GiB of a GPU ({train.text()}), {room:.1f} are there"
        raise recipe.fault("per_device_train_batch_size", why, _smaller(recipe))
    close = train.total > memory.CLOSE * room
    reasons = (f"close: the trainer needs {train.total:.1f} of {room:.1f} GiB; {_smaller(recipe)}",) if close else ()
    line = f"GPU {_list(place.trainer)} ({card:g}): trainer {train.total:.1f}: {train.text()}"
    return Budget(0.9, None, (line,), reasons)


def _budget_shared(recipe: Recipe, least: Need, most: Need, train: Need, card: float) -> Budget:
    """Server and trainer on one GPU: the trainer gets what it needs, the server the rest."""
    sleep = bool(recipe["vllm_enable_sleep_mode"])
    limit = recipe.own.gpu_memory_limit
    room = memory.USABLE * card if limit is None else limit
    given = recipe.library.get("vllm_gpu_memory_utilization")
    if given is not None:
        fixed = given * card - (least.total - memory.SERVER_BEYOND_SHARE_GIB)
        if fixed < 0 and given * card * memory.CLEARLY < least.total - memory.SERVER_BEYOND_SHARE_GIB:
            why = f"is {given * card:.1f} of {card:g} GiB, the server needs {least.total:.1f}: {least.text()}"
            raise recipe.fault("vllm_gpu_memory_utilization", why, "raise it, or leave it out for the plan to choose")
        least = most = Need((*least.parts, ("more KV cache", max(0.0, fixed))), least.resting)
    needed = memory.least_needed(least, train, sleep=sleep)
    if needed > memory.CLEARLY * room:
        why = (
            f"server and trainer do not fit on one GPU: {needed:.1f} GiB needed, {room:.1f} there\n"
            f"      server   {least.total:5.1f} = {least.text()}\n"
            f"      trainer  {train.total:5.1f} = {train.text()}"
        )
        key = "gpu_memory_limit" if limit is not None else "per_device_train_batch_size"
        asleep = not sleep and memory.least_needed(least, train, sleep=True) <= memory.CLOSE * room
        also = "vllm_enable_sleep_mode: true, " if asleep else ""
        raise recipe.fault(key, why, f"{also}{_smaller(recipe)}; or server_gpus of their own")
    chosen = memory.share(least, most, train, card_gib=card, available_gib=room, sleep=sleep)
    reasons = []
    if needed > memory.CLOSE * room:
        reasons.append(f"close: server and trainer need {needed:.1f} of {room:.1f} GiB; {_smaller(recipe)}")
    short = chosen.server_gib < most.total - 0.05
    if sleep:
        reasons.append("the server sleeps while the trainer works: vllm_enable_sleep_mode is true")
    elif short:
        why = "beside the trainer there is no room for more; vllm_enable_sleep_mode: true would make some"
        reasons.append(f"the server has KV cache for a part of its completions at a time: {why}")
    else:
        reasons.append("the server stays awake while the trainer works: both fit, and waking up costs time")
    if given is None:
        reasons.append(
            f"vLLM's share of the GPU: {chosen.utilization:g}, with room for the completions of a generation"
        )
    shown = Need((*least.parts, ("more KV cache", chosen.server_gib - least.total))) if short else most
    lines = (
        f"GPU 0 ({card:g}{f', held to {limit:g}' if limit is not None else ''}): "
        f"server {chosen.server_gib:.1f} + trainer {train.total:.1f} = {chosen.server_gib + train.total:.1f}",
        f"  server: {shown.text()}",
        f"  trainer: {train.text()}",
    )
    trainer_limit = None if limit is None else _trainer_limit(recipe, chosen.trainer_gib)
    utilization = chosen.utilization if given is None else given
    return Budget(utilization, trainer_limit, lines, tuple(reasons))


def _trainer_limit(recipe: Recipe, left_gib: float) -> float:
    """GiB for the trainer's allocator, which does not count the CUDA context."""
    limit = left_gib - memory.TRAINER_CONTEXT_GIB
    if limit <= 0:
        why = f"the server takes all of it, {-limit:.1f} GiB are missing before the trainer has any"
        raise recipe.fault("gpu_memory_limit", why, "raise it, or lower vllm_gpu_memory_utilization")
    return limit


def _smaller(recipe: Recipe) -> str:
    """What makes a trainer need less, and the same step."""
    if recipe["per_device_train_batch_size"] > 1:
        less = "a smaller per_device_train_batch_size with as much more gradient_accumulation_steps"
    else:
        less = "a smaller max_completion_length or max_prompt_tokens"
    return less if recipe["gradient_checkpointing"] else f"gradient_checkpointing: true, or {less}"


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


def _server(
    recipe: Recipe,
    batch: Batch,
    place: Placement,
    budget: Budget,
    model: ModelFacts | None,
    publish: str | None,
    number: int,
    port: int,
) -> Process:
    gpus, revision = place.servers[number], recipe["model_revision"]
    rounded, cpu = _serves_rounded_base(recipe), not gpus
    argv = policy_server.serve_argv(
        model=_rounded_base(recipe) if rounded else recipe.model,
        host="127.0.0.1",
        port=port,
        tensor_parallel_size=max(1, len(gpus)),
        gpu_memory_utilization=budget.utilization,
        max_model_len=_server_context(recipe, model),
        max_num_seqs=_server_sequences(batch, place),
        dtype=recipe.served_dtype(cpu),
        trust_remote_code=recipe["trust_remote_code"],
        seed=recipe["seed"],
        weight_transfer={"nccl": "nccl", "shared_memory": SHARED_MEMORY}.get(publish or ""),
        lora_rank=_adapter_rank(recipe),
        lora_target_modules=_adapter_modules(recipe, model),
        quantization="bitsandbytes" if recipe.own.server_base == "vllm_4bit" else None,
        enable_sleep_mode=bool(recipe["vllm_enable_sleep_mode"]),
        cpu=cpu,
        extra=("--revision", revision) if revision not in (None, "main") and not rounded else (),
    )
    name = "server" if len(place.servers) == 1 else f"server-{number}"
    return Process(
        name,
        argv,
        policy_server.serve_env(adapters=publish == "adapter", four_bit=recipe.own.server_base == "vllm_4bit", cpu=cpu),
        gpus,
        log=f"logs/{name}.log",
    )


def _serves_rounded_base(recipe: Recipe) -> bool:
    """Whether the server's base is the trainer's 4-bit one, rounded and then held in bf16."""
    return bool(recipe["load_in_4bit"]) and recipe.own.server_base == "rounded"


def _rounded_base(recipe: Recipe) -> str:
    """The folder of the server's base. It is named by the content of the model, so that is looked at."""
    from r1zero import quantized_base

    settings = quantized_base.Settings.of(recipe)
    return str(quantized_base.folder(recipe.model, recipe["model_revision"], settings) or BASE_UNKNOWN)


def _adapter_rank(recipe: Recipe) -> int | None:
    """The rank of the server's adapter slots; None where no adapter is served."""
    return policy_server.served_lora_rank(recipe["lora_r"]) if recipe["use_peft"] else None


def _adapter_modules(recipe: Recipe, model: ModelFacts | None) -> tuple[str, ...]:
    """The layers that the server's adapter slots cover: never the output layer, which would double a slot.

    Empty where they are not known: then vLLM's own choice, the output layer among them.
    """
    named = tuple(dict.fromkeys(name.rpartition(".")[2] for name in recipe["lora_target_modules"] or ()))
    if named and "all-linear" not in named:
        return named
    return PROJECTIONS if model is None or model.family in FAMILIES else ()


def _completions_of_a_server(batch: Batch, place: Placement) -> int:
    """One generation's share of each server."""
    return -(-batch.completions_per_generation // len(place.servers))


def _server_sequences(batch: Batch, place: Placement) -> int:
    """How many completions a server generates at once."""
    share = min(MOST_SEQUENCES, _completions_of_a_server(batch, place))
    # On a GPU of its own, where memory does not matter, measuring then goes faster.
    least = 1 if place.shared or not place.trainer else memory.DEFAULT_SEQUENCES
    return max(least, share) + SPARE_SEQUENCES


def _server_context(recipe: Recipe, model: ModelFacts | None) -> int | None:
    """Tokens that the server must hold for one sequence, and one that the probe makes it generate.

    None, where prompts have no limit: the model's own.
    """
    if recipe.own.max_prompt_tokens is None or recipe["max_completion_length"] is None:
        return None
    context = int(recipe.own.max_prompt_tokens + recipe["max_completion_length"] + 1)
    return min(context, model.context_length) if model and model.context_length else context


def _trainer_settings(
    recipe: Recipe, server_urls: tuple[str, ...], group_port: int, publish: str | None
) -> tuple[str, ...]:
    """What the plan knows and the recipe could not: addresses and the route. As overrides."""
    if publish is None:
        return ()
    route = ("--publish", publish)
    if not recipe.launches_server:
        return route
    return ("--vllm_server_base_url", ",".join(server_urls), "--vllm_group_port", str(group_port), *route)


def _list(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _shell(argv: tuple[str, ...], gpus: tuple[int, ...], env: tuple[tuple[str, str], ...]) -> str:
    variables = [f"{name}={shlex.quote(value)}" for name, value in env]
    if gpus:
        variables.insert(0, f"CUDA_VISIBLE_DEVICES={_list(gpus)}")
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
        if process in plan.servers:
            url = plan.server_urls[plan.servers.index(process)]
            ports, what = url.rpartition(":")[2], "vllm serve, this machine only"
        elif process in (*plan.preparations, plan.rehearsal):
            what = WHAT[process.name]
        table.add_row(process.name, node.host, _list(process.gpus) or "none", ports, what)
    for url in plan.server_urls if not plan.servers else ():
        table.add_row("server", "-", "-", "-", f"already running at {url}, not ours to stop")
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
    if plan.memory:
        console.print("Memory: expected on each GPU, GiB")
    for line in plan.memory:
        console.print(f"  {line}", soft_wrap=True)
    for reason in plan.reasons:
        console.print(f"Because: {reason}", soft_wrap=True)
    console.print(f"Everything goes to {plan.run_folder}", soft_wrap=True)
    console.print("  recipe.yaml plan.txt versions.json status.json metrics.jsonl summary.json")
    console.print("  logs/ rollouts/ checkpoints/ model/")
    console.print("The same by hand:")
    for line in plan.by_hand:
        console.print(f"  {line}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
