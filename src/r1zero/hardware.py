"""What is here: nodes, GPUs, memory and free ports. Read once, so that the plan can be a pure function. No torch."""

import os
import re
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from r1zero import policy_server

LOOPBACK = "127.0.0.1"
MOST_SERVERS_PER_GPU = 4  # of the recipe's servers_per_gpu, each with a port of its own
# Bytes that a container may use, of cgroups v2 and v1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Gpu:
    """One GPU as ``nvidia-smi`` names it.

    >>> Gpu("NVIDIA A10", 22.5)
    Gpu(name='NVIDIA A10', memory_gib=22.5)
    """

    name: str
    memory_gib: float


@dataclass(frozen=True)
class Node:
    """One machine and the GPUs on it that this process may use.

    >>> Node("gpu07", (Gpu("NVIDIA A10", 22.5),), ports=(29500,), address="10.0.0.7").address
    '10.0.0.7'

    Attributes:
        host: its name, for people.
        gpus: in the order of their indices.
        ports: TCP ports that were free on it when it was looked at.
        address: under which the other nodes reach it.
        memory_gib: of the host, as much of it as this process may use; None: not known.
    """

    host: str
    gpus: tuple[Gpu, ...] = ()
    ports: tuple[int, ...] = ()
    address: str = LOOPBACK
    memory_gib: float | None = None


@dataclass(frozen=True)
class Hardware:
    """The machines of a run.

    >>> hardware = assumed("1x2:80", ports=(29500, 29501, 29502, 29503))
    >>> len(hardware.nodes), hardware.gpus_per_node
    (1, 2)

    Attributes:
        nodes: this machine, or those that the run is spread over; the first one is where the launcher runs.
        torch_cpu_only: the installed torch is a CPU build, whatever GPUs there are.
        cpu_server: vLLM's CPU build is installed, so that a policy server can run without a GPU.
        deepspeed: the version of DeepSpeed that is installed; None: not known.
    """

    nodes: tuple[Node, ...]
    torch_cpu_only: bool = False
    cpu_server: bool = False
    deepspeed: str | None = None

    @property
    def ports(self) -> tuple[int, ...]:
        """Those of the first node."""
        return self.nodes[0].ports

    @property
    def gpus_per_node(self) -> int:
        return min(len(node.gpus) for node in self.nodes)


class HardwareError(Exception):
    """The machine could not be read, or the text that describes one is not understood."""


def detect() -> Hardware:
    """Look at this machine."""
    return of_nodes((this_node(),))


def this_node() -> Node:
    """This machine alone. Whoever joins several sets the address under which the others reach it."""
    gpus = _visible(_nvidia_smi(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Node(socket.gethostname(), gpus, free_ports(_ports_needed(len(gpus))), memory_gib=_host_memory_gib())


def of_nodes(nodes: tuple[Node, ...]) -> Hardware:
    """`nodes` as one hardware; all are taken to have the packages that are installed here."""
    return Hardware(
        nodes,
        torch_cpu_only=(_version("torch") or "").endswith("+cpu"),
        cpu_server=policy_server.cpu_server_available(),
        deepspeed=_version("deepspeed"),
    )


def assumed(text: str, ports: tuple[int, ...] | None = None) -> Hardware:
    """Hardware described as ``NODESxGPUS[:GIB]``, to plan for a machine that one is not on: ``4x8:80``.

    Raises:
        HardwareError: when the text has another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x(\d+)(?::(\d+(?:\.\d+)?))?", text)
    if match is None:
        raise HardwareError(f"--hardware {text}: write NODESxGPUS or NODESxGPUS:GIB, for example 1x2 or 4x8:80")
    nodes, gpus, memory = int(match[1]), int(match[2]), float(match[3] or 80)
    name = "assumed GPU"
    node_gpus = tuple(Gpu(name, memory) for _ in range(gpus))
    chosen = ports if ports else free_ports(_ports_needed(gpus))
    names = [f"node{number}" for number in range(nodes)]
    return Hardware(tuple(Node(name, node_gpus, chosen, name if nodes > 1 else LOOPBACK) for name in names))


def _ports_needed(gpus: int) -> int:
    """Two for the trainer's processes and the weights on their way, and one for each policy server there can be."""
    return 2 + max(1, MOST_SERVERS_PER_GPU * gpus)


def free_ports(count: int, host: str = LOOPBACK) -> tuple[int, ...]:
    """`count` TCP ports that are free now. All are held at once while choosing, so that no two are the same."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((host, 0))
        return tuple(int(each.getsockname()[1]) for each in sockets)


def _nvidia_smi() -> tuple[tuple[str, str, Gpu], ...]:
    """(index, uuid, GPU) of every NVIDIA GPU; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in found.splitlines() if line.count(",") == 3]
    return tuple((index, uuid, Gpu(name, _gib(mib))) for index, uuid, name, mib in rows)


def _host_memory_gib() -> float | None:
    """The host's memory, or the container's where that is less."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (OSError, ValueError):
        return None
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            sizes.append(int(limit.read_text(encoding="ascii")))
    return round(min(sizes) / 2**30, 1)


def _gib(mib: str) -> float:
    """MiB as nvidia-smi prints them; 0 for its [N/A], of GPUs that share the host's memory."""
    try:
        return round(float(mib) / 1024, 1)
    except ValueError:
        return 0.0


def _visible(gpus: tuple[tuple[str, str, Gpu], ...], visible: str | None) -> tuple[Gpu, ...]:
    """Those of `gpus` that CUDA_VISIBLE_DEVICES lets through, in its order; like CUDA, up to the first unknown one."""
    if visible is None:
        return tuple(gpu for _, _, gpu in gpus)
    chosen = []
    for entry in (entry.strip() for entry in visible.split(",")):
        match = [gpu for index, uuid, gpu in gpus if entry == index or (entry and uuid.startswith(entry))]
        if not match:
            break
        chosen.append(match[0])
    return tuple(chosen)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
