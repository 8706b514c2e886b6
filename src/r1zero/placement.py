"""Who runs where: policy servers and trainer processes on the GPUs of one node or several, or on their CPUs. Pure.

On one node the servers have the last GPUs. On several they have whole nodes, the last ones, or as many of the last
GPUs on each node; the trainer has the rest, equally many processes on each of its nodes, as accelerate wants it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from r1zero.hardware import Hardware
from r1zero.recipe import Recipe


@dataclass(frozen=True)
class Allocation:
    """A part of one node.

    >>> Allocation(1, (6, 7)).gpus
    (6, 7)

    Attributes:
        node: index into the hardware's nodes.
        gpus: indices on that node; empty: its CPU.
    """

    node: int
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Who runs where.

    >>> Placement((Allocation(1, (0, 1)),), (Allocation(0, (0, 1)),), processes_per_node=2).processes
    2

    Attributes:
        servers: one for each policy server that the launcher starts; several may have the same GPU.
        trainers: one for each node that has trainer processes; the first is the first node's.
        processes_per_node: trainer processes on each of these, one a GPU.
        reasons: why, where the recipe left it open.
    """

    servers: tuple[Allocation, ...]
    trainers: tuple[Allocation, ...]
    processes_per_node: int
    reasons: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """Trainer processes on all nodes."""
        return self.processes_per_node * len(self.trainers)

    @property
    def trains_on_gpus(self) -> bool:
        return bool(self.trainers[0].gpus)

    @property
    def servers_per_gpu(self) -> int:
        """How many policy servers each of their GPUs has; 1 where there are none."""
        return max((self.servers.count(each) for each in self.servers), default=1)

    @property
    def shared(self) -> bool:
        """Whether server and trainer share a GPU."""
        trainers = {(each.node, gpu) for each in self.trainers for gpu in each.gpus}
        return any((each.node, gpu) in trainers for each in self.servers for gpu in each.gpus)

    @property
    def on_one_node(self) -> bool:
        """Whether nothing of the run is on any node but the first."""
        return all(each.node == 0 for each in (*self.servers, *self.trainers))


def counted(count: int, one: str, several: str = "") -> str:
    """A number with its noun.

    >>> counted(1, "process", "processes"), counted(3, "GPU")
    ('1 process', '3 GPUs')
    """
    return f"{count} {one if count == 1 else several or one + 's'}"


def place(recipe: Recipe, hardware: Hardware) -> Placement:
    """Servers and trainer on `hardware`.

    Raises:
        RecipeError: when they cannot be placed, with the arithmetic and the nearest values that can.
    """
    own, nodes = recipe.own, len(hardware.nodes)
    here, reasons = hardware.gpus_per_node, []
    if here < max(len(node.gpus) for node in hardware.nodes):
        reasons.append(f"of each node {counted(here, 'GPU')} can be used: the smallest one has no more")
    if hardware.torch_cpu_only and here:
        reasons.append(
            f"no GPU is used of {here} that {'is' if here == 1 else 'are'} here: the installed torch is a CPU build"
        )
        here = 0
    if here == 0 or (own.trainer_gpus == 0 and not recipe.launches_server):
        return _on_cpus(recipe, hardware, here, reasons)
    if recipe.servers_per_gpu > 1 and not recipe.launches_server:
        why = "the policy server runs already (vllm_server_base_url)"
        raise recipe.fault("servers_per_gpu", why, "leave it out, and name all servers in vllm_server_base_url")
    if nodes > 1 and recipe.servers_per_gpu > 1:
        why = "on several nodes all weights travel over NCCL, which cannot join two servers on one GPU"
        raise recipe.fault("servers_per_gpu", why, "1, or one node, which is enough for a model that gains by it")
    if own.cpu_processes != 1:
        why = f"the trainer runs on GPUs, {here} on each node, so it would have no effect"
        raise recipe.fault("cpu_processes", why, "leave it out, or trainer_gpus: 0 to train on the CPU")
    if nodes > 1:
        return _over_nodes(recipe, nodes, here, reasons)
    return _on_one_node(recipe, here, reasons)


def _on_cpus(recipe: Recipe, hardware: Hardware, here: int, reasons: list[str]) -> Placement:
    """All of it on CPUs: trainers on each node, or where there is a policy server on all but the last."""
    nodes, each = len(hardware.nodes), recipe.own.cpu_processes
    if each < 1:
        raise recipe.fault("cpu_processes", "must be at least 1", "2 is as many as two nodes or two cores can use")
    servers: tuple[Allocation, ...] = ()
    if recipe.launches_server:
        _check_server_on_cpu(recipe, hardware)
        servers = (Allocation(nodes - 1),)
        where = f"the CPU of {hardware.nodes[-1].host}, the last node" if nodes > 1 else "the CPU"
        reasons.append(f"policy server on {where}: vLLM's CPU build is installed, no GPU is here")
    elif here == 0 and recipe.own.trainer_gpus:
        why = f"server 0 + trainer {recipe.own.trainer_gpus} = {recipe.own.trainer_gpus} GPUs, 0 here"
        raise recipe.fault("trainer_gpus", why, "leave it out to train on the CPU, or run on a machine with GPUs")
    if recipe.uses_vllm and not recipe.dedicated_server:
        why = f"vLLM inside the trainer needs a GPU, the trainer has none ({here} here)"
        raise recipe.fault("use_vllm", why, "use_vllm: false generates with transformers, on a CPU too")
    trainer_nodes = nodes - 1 if servers and nodes > 1 else nodes
    if trainer_nodes * each > 1:
        where = f" on each of {trainer_nodes} nodes" if trainer_nodes > 1 else ""
        reasons.append(f"trainer on CPUs: {counted(each, 'process', 'processes')}{where}, cpu_processes says so")
    if recipe.own.method == "grpo" and not recipe.uses_vllm:
        reasons.append("completions are generated inside the trainer: use_vllm is false")
    if here:
        reasons.append(f"{here * nodes} of {here * nodes} GPUs stay idle")
    return Placement(servers, tuple(map(Allocation, range(trainer_nodes))), each, tuple(reasons))


def _check_server_on_cpu(recipe: Recipe, hardware: Hardware) -> None:
    if not hardware.cpu_server:
        why = "the policy server is vLLM on a GPU, and no GPU is here"
        remedy = (
            "run on a machine with GPUs, install vLLM's CPU build with python -m r1zero.serving.cpu_build, "
            "or --use_vllm false to generate in the trainer"
        )
        raise recipe.fault("use_vllm", why, remedy)
    own = recipe.own
    for key, asked in (
        ("server_gpus", own.server_gpus),
        ("trainer_gpus", own.trainer_gpus),
        ("servers_per_gpu", recipe.servers_per_gpu > 1),
    ):
        if asked:
            raise recipe.fault(key, "no GPU is here", f"leave {key} out: server and trainer then run on the CPU")
    if recipe["vllm_tensor_parallel_size"] > 1:
        raise recipe.fault("vllm_tensor_parallel_size", "no GPU is here", "1 on a CPU")


def _on_one_node(recipe: Recipe, here: int, reasons: list[str]) -> Placement:
    """The trainer has the first GPUs, the servers the last."""
    own = recipe.own
    each = recipe["vllm_tensor_parallel_size"] if recipe.launches_server else 1
    server = 0
    if recipe.launches_server:
        server = own.server_gpus if own.server_gpus is not None else 0 if here == 1 else each
        if server == 0:
            return _on_one_gpu(recipe, here, reasons)
    trainer = own.trainer_gpus if own.trainer_gpus is not None else here - server
    wanted = f"server {server} + trainer {trainer} = {counted(server + trainer, 'GPU')}, {here} here"
    if own.trainer_gpus is None and server >= here:
        wanted = f"servers take {counted(server, 'GPU')}, {here} here"
    # Where the recipe leaves server_gpus open, it is one server, as large as this says.
    servers_key = "vllm_tensor_parallel_size" if own.server_gpus is None and each > 1 else "server_gpus"
    if server + trainer > here:
        key = "trainer_gpus" if own.trainer_gpus and servers_key == "server_gpus" else servers_key
        raise recipe.fault(key, wanted, f"lower {servers_key} or trainer_gpus, or run on a larger machine")
    if server % each:
        why = f"is not a multiple of vllm_tensor_parallel_size, {each} GPUs for each server"
        raise recipe.fault("server_gpus", why, f"use {max(1, round(server / each)) * each}, or change the latter")
    if trainer < 1:
        key = "trainer_gpus" if own.trainer_gpus is not None else servers_key
        why = f"{wanted}: nothing is left for the trainer"
        raise recipe.fault(key, why, f"lower {servers_key}; server_gpus: 0 lets server and trainer share one GPU")
    if own.trainer_gpus is None and trainer > 1:
        reasons.append(f"trainer on {trainer} GPUs: all that are here{' but the servers’' if server else ''}")
    reasons += _generation_reasons(recipe, server, each)
    if server + trainer < here:
        reasons.append(f"{here - server - trainer} of {here} GPUs stay idle")
    servers = _servers([0], range(here - server, here), each) * recipe.servers_per_gpu
    return Placement(servers, (Allocation(0, tuple(range(trainer))),), trainer, tuple(reasons))


def _on_one_gpu(recipe: Recipe, here: int, reasons: list[str]) -> Placement:
    own = recipe.own
    asked = "server_gpus is 0" if own.server_gpus is not None else "only one is here"
    if own.trainer_gpus is not None and own.trainer_gpus != 1:
        why = f"server and trainer share one GPU ({asked}), so the trainer is one process"
        raise recipe.fault("trainer_gpus", why, "use trainer_gpus: 1, or give server_gpus of their own")
    if recipe["vllm_tensor_parallel_size"] > 1:
        why = f"server and trainer share one GPU ({asked})"
        raise recipe.fault("vllm_tensor_parallel_size", why, "use 1, or give server_gpus of their own")
    several = recipe.servers_per_gpu
    reasons.append(f"{'server' if several == 1 else f'{several} servers'} and trainer share GPU 0: {asked}")
    if here > 1:
        reasons.append(f"{here - 1} of {here} GPUs stay idle")
    return Placement((Allocation(0, (0,)),) * several, (Allocation(0, (0,)),), 1, tuple(reasons))


def _over_nodes(recipe: Recipe, nodes: int, here: int, reasons: list[str]) -> Placement:
    """Servers on whole nodes, the last ones, or on as many of the last GPUs of each node."""
    each = recipe["vllm_tensor_parallel_size"] if recipe.launches_server else 1
    whole, split = _server_share(recipe, nodes, here, each) if recipe.launches_server else (0, 0)
    server_nodes = range(nodes - whole, nodes) if whole else range(nodes)
    servers = _servers(server_nodes, range(0 if whole else here - split, here), each)
    server = sum(len(one.gpus) for one in servers)
    if whole:
        left_open = "" if recipe.own.server_gpus is not None else ": the choice where server_gpus is empty"
        reasons.append(f"policy servers have the last {whole} of {nodes} nodes, whole{left_open}")
    elif split:
        reasons.append(f"policy servers have the last {split} of {here} GPUs on each of {nodes} nodes")
    count, per_node = _trainer_share(recipe, nodes - whole, here - split, server, nodes * here)
    reasons.append(f"trainer on {count} x {per_node} GPUs")
    reasons += _generation_reasons(recipe, server, each)
    if server + count * per_node < nodes * here:
        reasons.append(f"{nodes * here - server - count * per_node} of {nodes * here} GPUs stay idle")
    gpus = tuple(range(per_node))
    return Placement(servers, tuple(Allocation(node, gpus) for node in range(count)), per_node, tuple(reasons))


def _server_share(recipe: Recipe, nodes: int, here: int, each: int) -> tuple[int, int]:
    """Nodes that are the servers' alone, else GPUs of each node that are; one of the two is 0."""
    usable = {nodes * split: (0, split) for split in range(each, here, each)}
    if here % each == 0:
        usable |= {whole * here: (whole, 0) for whole in range(1, nodes)}
    if not usable:
        fitting = [str(n) for n in range(1, here + 1) if here % n == 0]
        why = f"a server lies on one node, and {each} GPUs do not divide the {here} of each node"
        raise recipe.fault("vllm_tensor_parallel_size", why, f"use {' or '.join(fitting)}")
    asked = recipe.own.server_gpus
    wanted = asked if asked is not None else here if here in usable else min(usable)
    if wanted in usable:
        return usable[wanted]
    if wanted == 0:
        why = f"server and trainer share a GPU on one node only, and {nodes} are here"
    elif wanted >= nodes * here:
        why = f"{nodes} nodes x {here} GPUs = {nodes * here}: nothing is left for the trainer"
    else:
        groups = f", in groups of {each}" if each > 1 else ""
        why = (
            f"{wanted} GPUs are neither whole nodes ({wanted} / {here} = {wanted / here:g}) "
            f"nor as many on each of {nodes} nodes ({wanted} / {nodes} = {wanted / nodes:g}{groups})"
        )
    raise recipe.fault("server_gpus", why, f"use {_nearest(wanted, usable)}, or leave it out for a whole node")


def _trainer_share(recipe: Recipe, nodes: int, left: int, server: int, here: int) -> tuple[int, int]:
    """Nodes with trainer processes, and how many on each: the fewest nodes that hold what is asked for, evenly."""
    wanted = recipe.own.trainer_gpus
    if wanted is None:
        return nodes, left
    for count in range(1, nodes + 1):
        if wanted and wanted % count == 0 and wanted // count <= left:
            return count, wanted // count
    usable = {count * each for count in range(1, nodes + 1) for each in range(1, left + 1)}
    if server + wanted > here:
        why = f"server {server} + trainer {wanted} = {server + wanted} GPUs, {here} here"
    elif wanted == 0:
        why = "the trainer needs a GPU beside a policy server that has some"
    else:
        why = (
            f"there are {counted(left, 'GPU')} on each of {counted(nodes, 'node')} for the trainer, and {wanted} are "
            "not equally many on some of them"
        )
    raise recipe.fault("trainer_gpus", why, f"use {_nearest(wanted, usable)}, or leave it out for all {nodes * left}")


def _nearest(wanted: int, usable: Iterable[int]) -> str:
    """The largest usable value below `wanted` and the smallest above."""
    below = [value for value in usable if value < wanted]
    above = [value for value in usable if value > wanted]
    return " or ".join(str(value) for value in (*([max(below)] if below else []), *([min(above)] if above else [])))


def _servers(nodes: Iterable[int], gpus: range, each: int) -> tuple[Allocation, ...]:
    """Servers of `each` GPUs on the `gpus` of each of `nodes`."""
    firsts = range(gpus.start, gpus.stop, each)
    return tuple(Allocation(node, tuple(range(first, first + each))) for node in nodes for first in firsts)


def _generation_reasons(recipe: Recipe, server: int, each: int) -> list[str]:
    several = recipe.servers_per_gpu
    if server and several > 1:
        return [f"{server * several} servers: {several} on each of {counted(server, 'GPU')}, servers_per_gpu says so"]
    if server > each:
        return [f"{server // each} servers: {server} GPUs, {each} for each"]
    if recipe.own.method != "grpo" or recipe.dedicated_server:
        return []
    if recipe.uses_vllm:
        return ["completions are generated by vLLM inside the trainer (TRL's colocate): vllm_mode says so"]
    return ["completions are generated inside the trainer: use_vllm is false"]
