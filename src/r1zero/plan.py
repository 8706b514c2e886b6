"""A recipe and the facts of the hardware become a plan: which process runs where, with which arguments, and why.

Pure: nothing is started or written, and nothing read but where a rounded base lies and what an accelerate config says.
Topology, process counts, batch arithmetic, ports and memory exist here once, in `placement`, `batch`, `budget`,
`server_plan` and `accelerate_config`; the launcher only carries the plan out, and ``--dry-run`` only prints it.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from r1zero import accelerate_config, batch, budget, placement, plan_text, policy_server, server_plan
from r1zero.accelerate_config import AccelerateConfig
from r1zero.batch import Batch
from r1zero.budget import Budget
from r1zero.hardware import LOOPBACK, Hardware, Node
from r1zero.model_facts import ModelFacts
from r1zero.placement import Placement
from r1zero.recipe import TINY_MODEL, Recipe
from r1zero.server_plan import Route
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.tasks.verifier import WALL_SECONDS

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
# On a CPU that something else uses too, OpenMP threads that spin for long while they wait make a step ten times slower.
# And DeepSpeed, where it is installed, would look for a GPU and say so in every log.
CPU_ENV = (("GOMP_SPINCOUNT", "3000"), ("DS_ACCELERATOR", "cpu"))
# What a trainer on GPUs leaves to the CPU is small, and with a thread for each core it waits for all of them; torchrun
# does the same. An optimizer that is offloaded needs its threads.
GPU_ENV = (("OMP_NUM_THREADS", "1"),)
TRAINER_MEMORY = "R1ZERO_TRAINER_MEMORY_GIB"  # the environment variable that limits a trainer that shares its GPU
GROUP_ADDRESS = "R1ZERO_GROUP_ADDRESS"  # and the one with the address at which servers on other nodes meet it for NCCL
# What a person exports once before the lines by hand; the launcher makes both itself.
HAND_TOKEN = f'export {TOKEN}=$(python -c "import secrets; print(secrets.token_hex(32))")'
HAND_FOLDER = f"export {PUBLISH_FOLDER}=$(mktemp -d /dev/shm/r1zero-XXXXXX)"
HAND_SHARED_FOLDER = f'export {PUBLISH_FOLDER}=$(mktemp -d "$PWD/publish-XXXXXX")'


@dataclass(frozen=True)
class Process:
    """One process that the launcher starts and watches.

    >>> Process("trainer", ("accelerate", "launch", "launch/grpo.py"), gpus=(0,), log="logs/trainer.log").gpus
    (0,)

    Attributes:
        name: unique within the plan: "model", "server" or "trainer"; "server-0", "trainer-0" where there are several.
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
class Plan:
    """Everything that will happen, before it does.

    Attributes:
        recipe: what is trained.
        hardware: on what.
        run_folder: where everything lands.
        preparations: processes that run to their end on the first node, one after the other, before the rest.
        servers: the policy servers that the launcher starts; none where the recipe has none, or names a running one.
        server_urls: where completions come from, in the order of `servers`; none: from inside the trainer.
        publish: how a new policy version reaches the servers: "adapter", "folded", "nccl" or "shared_memory"; None
            without them.
        publish_in_run_folder: whether it is laid down in the run folder, since not all servers share the first node's
            memory.
        rehearsal: looks at one batch of rollouts once the policy server is ready; None where there is none.
        trainers: ``accelerate launch`` of launch/grpo.py or launch/sft.py, once on each node that has trainer
            processes; the first is on the first node and has the main process.
        trainer_processes: how many processes they start in all.
        accelerate_config: the file they are given.
        batch: the arithmetic of a step.
        memory: what is expected on each GPU, one line for a person each; empty where nothing is known.
        memory_unchecked: why nothing says whether it fits; None where that was looked at, or there is no GPU.
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
    publish_in_run_folder: bool
    rehearsal: Process | None
    trainers: tuple[Process, ...]
    trainer_processes: int
    accelerate_config: Path
    batch: Batch
    memory: tuple[str, ...]
    memory_unchecked: str | None
    by_hand: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def processes(self) -> tuple[Process, ...]:
        """In the order of their start."""
        rehearsal = (self.rehearsal,) if self.rehearsal else ()
        return (*self.preparations, *self.servers, *rehearsal, *self.trainers)

    @property
    def urls_of_servers(self) -> dict[str, str]:
        """The URL of each policy server that the launcher starts, by the name of its process."""
        return dict(zip((each.name for each in self.servers), self.server_urls, strict=True)) if self.servers else {}

    @property
    def nodes(self) -> tuple[int, ...]:
        """The nodes that have a process, as indices into the hardware's."""
        return tuple(sorted({process.node for process in self.processes}))

    def render(self) -> str:
        """The plan as text that a person can check in ten seconds."""
        return plan_text.render(self)


def make(recipe: Recipe, hardware: Hardware, run_folder: Path, project: Path, model: ModelFacts | None = None) -> Plan:
    """The plan for `recipe` on `hardware`.

    Args:
        recipe: checked, as `recipe.load` returns it.
        hardware: as `hardware.detect` found it, or the nodes of a job together.
        run_folder: where the run will be written; need not exist.
        project: the folder that holds launch/ and accelerate_configs/.
        model: facts of the model's shape, where they are known.

    Raises:
        RecipeError: when the recipe cannot run on this hardware, with the arithmetic.
    """
    placed = placement.place(recipe, hardware)
    config, why_config = accelerate_config.choose(recipe, project, hardware, placed)
    steps = batch.of(recipe, placed.processes)
    _check_lengths(recipe, model)
    batch.check_packing(recipe, model)
    server_plan.check_model(recipe, model)
    case = budget.with_engines(budget.Case(recipe, hardware, placed, steps, config, model))
    placed, route = case.placed, budget.route(case)
    publish = route.publish
    gives = budget.of(case, route)
    timeout, why_timeout = _collective_timeout(recipe, steps)

    recipe_file = run_folder / "recipe.yaml"
    preparations = _preparations(recipe, placed, recipe_file)
    servers = _servers(recipe, hardware, placed, steps, gives, model, route)
    server_urls = tuple(recipe.running_server.split(",")) if recipe.running_server else ()
    if servers:
        server_urls = tuple(f"http://{_value(each, '--host')}:{_value(each, '--port')}" for each in servers)
    rehearsal = None
    if server_urls:
        looks = (*_preflight(recipe_file), "--server", server_urls[0])
        rehearsal = Process("rehearsal", looks, CPU_ENV, log="logs/rehearsal.log")
    settings = _trainer_settings(recipe, hardware, server_urls, publish, timeout)
    trainers = _trainers(recipe, hardware, placed, config, gives, publish, run_folder, project, settings)
    return Plan(
        recipe=recipe,
        hardware=hardware,
        run_folder=run_folder,
        preparations=preparations,
        servers=servers,
        server_urls=server_urls,
        publish=publish,
        publish_in_run_folder=any(each.node for each in servers),
        rehearsal=rehearsal,
        trainers=trainers,
        trainer_processes=placed.processes,
        accelerate_config=config.path,
        batch=steps,
        memory=gives.lines,
        memory_unchecked=gives.unchecked,
        by_hand=_by_hand(recipe, hardware, preparations, servers, trainers, settings),
        reasons=(
            *placed.reasons,
            *route.reasons,
            *gives.reasons,
            *server_plan.warnings(recipe),
            why_config,
            *why_timeout,
        ),
    )


def _preparations(recipe: Recipe, placed: Placement, recipe_file: Path) -> tuple[Process, ...]:
    found: list[Process] = []
    if recipe.model == TINY_MODEL:
        found.append(Process("model", (sys.executable, "-m", "r1zero.tiny"), CPU_ENV, log="logs/model.log"))
    if recipe.own.method == "grpo":
        found.append(Process("preflight", _preflight(recipe_file), CPU_ENV, log="logs/preflight.log"))
    if recipe.launches_server and server_plan.serves_rounded_base(recipe):
        gpus = placed.trainers[0].gpus[:1]
        found.append(Process("base", (*_base(), str(recipe_file)), gpus=gpus, log="logs/base.log"))
    return tuple(found)


def _preflight(recipe_file: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "r1zero.preflight", "--config", str(recipe_file))


def _base() -> tuple[str, ...]:
    return (sys.executable, "-m", "r1zero.quantized_base", "--config")


def _servers(
    recipe: Recipe,
    hardware: Hardware,
    placed: Placement,
    steps: Batch,
    gives: Budget,
    model: ModelFacts | None,
    route: Route,
) -> tuple[Process, ...]:
    """They listen on this machine only, as long as nothing of the run is on another."""
    ports = [list(_server_ports(node)) for node in hardware.nodes]
    servers = []
    for number, where in enumerate(placed.servers):
        argv = server_plan.argv(
            recipe,
            steps,
            placed,
            where,
            model,
            publish=route.publish,
            utilization=gives.utilization,
            kv_cache_gib=gives.kv_cache_gib,
            host=LOOPBACK if placed.on_one_node else hardware.nodes[where.node].address,
            port=ports[where.node].pop(0),
        )
        name = "server" if len(placed.servers) == 1 else f"server-{number}"
        env = server_plan.env(recipe, where, route)
        servers.append(Process(name, argv, env, where.gpus, where.node, f"logs/{name}.log"))
    return tuple(servers)


def _server_ports(node: Node) -> tuple[int, ...]:
    """The second and third port of the first node are the trainer's, and the same ones stay free on the others."""
    return (node.ports[0], *node.ports[3:])


def _trainers(
    recipe: Recipe,
    hardware: Hardware,
    placed: Placement,
    config: AccelerateConfig,
    gives: Budget,
    publish: str | None,
    run_folder: Path,
    project: Path,
    settings: tuple[str, ...],
) -> tuple[Process, ...]:
    env = [("TOKENIZERS_PARALLELISM", "false")]
    if not placed.trains_on_gpus:
        env += CPU_ENV
    elif not config.offload:
        env += GPU_ENV
    if gives.trainer_limit is not None:
        env.append((TRAINER_MEMORY, f"{gives.trainer_limit:.2f}"))
    if publish == "nccl" and not placed.on_one_node:
        env.append((GROUP_ADDRESS, hardware.nodes[placed.trainers[0].node].address))
    script = (str(project / f"launch/{recipe.own.method}.py"), "--config", str(run_folder / "recipe.yaml"))
    trainers = []
    for rank, where in enumerate(placed.trainers):
        name = "trainer" if len(placed.trainers) == 1 else f"trainer-{rank}"
        flags = accelerate_config.flags(config, recipe, hardware, placed, rank)
        argv = (*ACCELERATE, *flags, *script, "--run_folder", str(run_folder), *settings)
        trainers.append(Process(name, argv, tuple(env), where.gpus, where.node, f"logs/{name}.log"))
    return tuple(trainers)


def _trainer_settings(
    recipe: Recipe, hardware: Hardware, server_urls: tuple[str, ...], publish: str | None, timeout: int | None
) -> tuple[str, ...]:
    """What the plan knows and the recipe could not: addresses, the route, how long to wait. As overrides."""
    settings: list[str] = []
    if publish is not None and recipe.launches_server:
        settings += ["--vllm_server_base_url", ",".join(server_urls), "--vllm_group_port", str(hardware.ports[1])]
    if publish is not None:
        settings += ["--publish", publish]
    if timeout is not None:
        settings += ["--ddp_timeout", str(timeout)]
    return tuple(settings)


def _collective_timeout(recipe: Recipe, steps: Batch) -> tuple[int | None, tuple[str, ...]]:
    """Seconds that a process must wait for the others at most, where TRL's default is too short; and why.

    While the main process generates, publishes, or one grades longer than the others, these wait in a collective. One
    that ends before would end the run although nothing is wrong.

    Raises:
        RecipeError: when the recipe's own ``ddp_timeout`` is shorter than that.
    """
    if steps.processes == 1 or recipe.own.method != "grpo":
        return None, ()
    own = recipe.own
    grading = steps.completions_per_process * WALL_SECONDS
    summands = [("grading", grading, f"{steps.completions_per_process} answers x {WALL_SECONDS:g}")]
    if recipe.dedicated_server:
        summands.insert(0, ("publish_timeout", own.publish_timeout, ""))
        summands.insert(0, ("generation_timeout", own.generation_timeout, ""))
    needed = sum(seconds for _, seconds, _ in summands)
    sum_text = " + ".join(f"{name} {seconds:g}{f' ({how})' if how else ''}" for name, seconds, how in summands)
    arithmetic = f"{sum_text} = {needed:g} s"
    if recipe["ddp_timeout"] >= needed:
        return None, ()
    if "ddp_timeout" in recipe.library:
        why = f"a process may have to wait longer for another: {arithmetic}"
        raise recipe.fault("ddp_timeout", why, "leave it out for the plan to choose, or shorten one of these")
    return int(needed) + 1, (f"ddp_timeout {int(needed) + 1}: {arithmetic}",)


def _by_hand(
    recipe: Recipe,
    hardware: Hardware,
    preparations: tuple[Process, ...],
    servers: tuple[Process, ...],
    trainers: tuple[Process, ...],
    settings: tuple[str, ...],
) -> tuple[str, ...]:
    """Shell lines that do the same, under the name of their node where there are several."""
    shared = any(each.node for each in servers)
    lines: list[tuple[int, str]] = []
    given = (str(recipe.path), *recipe.overrides)
    for process in preparations:
        if process.name == "model":
            lines.append((0, plan_text.shell(process.argv, process.gpus, process.env)))
        elif process.name == "base":
            lines.append((0, plan_text.shell((*_base(), *given), process.gpus, process.env)))
    lines += [(each.node, plan_text.shell(policy_server.by_hand(each.argv), each.gpus, each.env)) for each in servers]
    for each in trainers:
        flags = each.argv[len(ACCELERATE) : each.argv.index("--config") - 1]
        words = ("accelerate", "launch", *flags, f"launch/{recipe.own.method}.py", "--config", *given, *settings)
        env = tuple((name, value) for name, value in each.env if name != "TOKENIZERS_PARALLELISM")
        lines.append((each.node, plan_text.shell(words, each.gpus, env)))
    exports = [HAND_TOKEN, HAND_SHARED_FOLDER if shared else HAND_FOLDER] if servers else []
    several = len({node for node, _ in lines}) > 1
    if several and exports:
        exports.insert(0, "# once, in a folder that all nodes share; the same values on every node:")
    found, at = [*exports], -1
    for node, line in lines:
        if several and node != at:
            found.append(f"# on {hardware.nodes[node].host}:")
        found.append(line)
        at = node
    return tuple(found)


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


def _value(process: Process, flag: str) -> str:
    return process.argv[process.argv.index(flag) + 1]
