"""Answers through policy servers of our own: vLLM on GPUs, or its CPU build.

One server, or one on each GPU, holds one base. Adapters are served as they are, each under a name of its own; other
whole weights of the same shape are laid into the running server through shared memory, which spares its start. What
ends a completion goes with each request, so that it is the model's own whatever the server was started with.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1zero import owned_servers, policy_server
from r1zero.evaluation.asking import Answered, Ask, Completion, OnProgress
from r1zero.evaluation.models import Candidate, rounded_base, shape
from r1zero.hardware import Hardware, free_ports
from r1zero.plan import CPU_ENV, Process
from r1zero.policy_client import PolicyClient, Rollout, Ticket
from r1zero.run_folder import read_json
from r1zero.serving import PUBLISH_FOLDER, SHARED_MEMORY, TOKEN, VERSION_HEADER
from r1zero.supervisor import Supervisor

CLIENTS = 4  # for each, as many connections as a client has: a greedy answer is one sequence a connection
PROMPTS_AT_A_TIME = 32  # in one ticket; progress is told by ticket
MOST_SEQUENCES = {False: 1024, True: 64}  # that a server makes at once, by whether it is on the CPU
ROUND_PROMPT_TOKENS = 64  # the server's context is rounded up to these, for a stable compilation cache
LOOK_S = 0.2
SPARE_BYTES = 2**28


@dataclass(frozen=True)
class Settings:
    """How servers are run.

    Attributes:
        tensor_parallel: GPUs that share one copy of a model.
        gpu_memory_utilization: share of each GPU's memory.
        dtype: of the weights; None: bfloat16 on GPUs, float32 on the CPU.
        exact: the same answers each time: kernels that do not depend on what else is in the batch, and a seed a prompt.
        ready_timeout_s: until the first token.
        silence_timeout_s: without a token, before a server counts as failed.
        timeout_s: for all answers of one model.
    """

    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    dtype: str | None = None
    exact: bool = False
    ready_timeout_s: float = 900.0
    silence_timeout_s: float = 60.0
    timeout_s: float = 12 * 3600.0


class ServerEngine:
    """Starts servers for one base after the other; leave it with `with`, and nothing stays.

    Args:
        folder: where the logs go.
        hardware: of this machine.
        settings: how servers are run.
        seed: of the sampling.
    """

    def __init__(self, folder: Path, hardware: Hardware, settings: Settings, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._gpus = 0 if hardware.torch_cpu_only else hardware.gpus_per_node
        self._supervisor = Supervisor(folder)
        self._folder = folder
        self._started = 0
        self._stack = ExitStack()

    def __enter__(self) -> "ServerEngine":
        self._stack.enter_context(self._supervisor)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def cpu(self) -> bool:
        return self._gpus == 0

    def description(self) -> dict[str, Any]:
        """What generated, for the result."""
        settings = self._settings
        dtype = settings.dtype or ("float32" if self.cpu else "bfloat16")
        return {"engine": "vllm", "device": "cpu" if self.cpu else "gpu", "dtype": dtype, "exact": settings.exact}

    def answer(self, asks: Sequence[Ask], on_progress: OnProgress) -> Iterator[Answered]:
        """See `asking.Engine`.

        Raises:
            ProcessFailed: a server ended, or fell silent.
            PolicyServerError: a server refused, or did not answer in time.
        """
        for group in _groups(asks):
            by_model: dict[Candidate, list[Ask]] = defaultdict(list)
            for ask in group:
                by_model[ask.candidate].append(ask)
            with self._servers(group, on_progress) as served:
                for candidate, own in by_model.items():
                    on_progress(f"loading {candidate.label}", 0, 0)
                    name = served.load(candidate)
                    yield from self._answers(served, name, own, on_progress)

    @contextmanager
    def _servers(self, group: Sequence[Ask], on_progress: OnProgress) -> Iterator["_Served"]:
        """The servers of one group: started, watched while it is asked, stopped."""
        settings, first = self._settings, group[0].candidate
        adapters = [ask.candidate.adapter for ask in group if ask.candidate.adapter is not None]
        update = not adapters and len({ask.candidate for ask in group}) > 1
        base = self._base(first, on_progress)
        longest = max(len(ids) + limit for ask in group for ids, limit in zip(ask.prompt_ids, ask.limits, strict=True))
        width = settings.tensor_parallel
        places = [tuple(range(at, at + width)) for at in range(0, self._gpus - width + 1, width)] or [()]
        ports = free_ports(len(places))
        shared = owned_servers.environment(self._supervisor, self._folder)
        servers: dict[str, str] = {}
        for gpus, port in zip(places, ports, strict=True):
            name = f"server-{self._started}"
            self._started += 1
            argv = policy_server.serve_argv(
                model=base,
                port=port,
                tensor_parallel_size=width,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                max_model_len=self._context(longest, first),
                max_num_seqs=min(MOST_SEQUENCES[self.cpu], max(16, sum(ask.completions for ask in group))),
                dtype=self.description()["dtype"],
                trust_remote_code=first.trust_remote_code,
                seed=self._seed,
                weight_transfer=SHARED_MEMORY if update else None,
                lora_rank=max(map(_rank, adapters)) if adapters else None,
                lora_target_modules=_modules(adapters),
                max_loras=1,
                cpu=self.cpu,
                extra=("--revision", first.revision) if first.revision and not first.rounded else (),
            )
            env = [*policy_server.serve_env(adapters=bool(adapters), cpu=self.cpu), *(CPU_ENV if self.cpu else ())]
            if settings.exact and not self.cpu:
                env.append(("VLLM_BATCH_INVARIANT", "1"))
            self._supervisor.start(Process(name, argv, tuple(env), gpus, log=f"logs/{name}.log"), shared)
            servers[name] = f"http://127.0.0.1:{port}"
        try:
            owned_servers.wait_until_all_ready(
                servers,
                self._supervisor,
                token=shared[TOKEN],
                deadline_s=settings.ready_timeout_s,
                check=self._supervisor.check,
                say=_nothing_to_say,
                now=lambda text: on_progress(text, 0, 0),
            )
            with _Served(list(servers.values()), shared, settings, base) as served, self._watch(servers, served):
                yield served
        finally:
            self._supervisor.end(list(servers))

    @contextmanager
    def _watch(self, servers: dict[str, str], served: "_Served") -> Iterator[None]:
        silence_s, publish_s = self._settings.silence_timeout_s, self._settings.ready_timeout_s
        with owned_servers.watched(servers, served.control, self._supervisor, silence_s, publish_s) as none_is_silent:

            def check() -> None:
                self._supervisor.check()
                none_is_silent()

            served.check = check
            yield

    def _answers(
        self, served: "_Served", model: str | None, asks: Sequence[Ask], on_progress: OnProgress
    ) -> Iterator[Answered]:
        """All asks of one model at once, so that the servers never run short; each as soon as it is complete."""
        tickets = [served.submit(ask, model, self._seeds(ask)) for ask in asks]
        done, total = 0, sum(ask.completions for ask in asks)
        for ask, parts in zip(asks, tickets, strict=True):
            found: dict[int, tuple[Completion, ...]] = {}
            for indices, client, ticket in parts:
                while not client.wait(ticket, LOOK_S):
                    served.check()
                    on_progress(f"{ask.candidate.label} on {ask.questions.title}", done, total)
                rollouts = client.collect(ticket)
                samples = ask.protocol.samples
                for at, index in enumerate(indices):
                    found[index] = tuple(_completion(ask, each) for each in rollouts[at * samples : (at + 1) * samples])
                done += len(rollouts)
            yield Answered(ask, tuple(found[index] for index in range(len(ask.prompt_ids))))

    def _seeds(self, ask: Ask) -> list[int] | None:
        """A seed for each question's first sample, with room for those that follow; None where none is wanted."""
        if not self._settings.exact or ask.protocol.greedy:
            return None
        return [(self._seed * 1_000_003 + index) * 4096 % 2**62 for index in range(len(ask.prompt_ids))]

    def _context(self, longest: int, candidate: Candidate) -> int:
        """Positions that the server makes room for: one more than the longest, which the watch asks for."""
        from r1zero import model_facts

        wanted = -(-(longest + 1) // ROUND_PROMPT_TOKENS) * ROUND_PROMPT_TOKENS
        facts = model_facts.read(candidate.base, candidate.revision, download=True)
        limit = facts.context_length if facts else None
        return wanted if limit is None else min(wanted, limit)

    def _base(self, candidate: Candidate, on_progress: OnProgress) -> str:
        """What the servers load: for an adapter that was trained on 4 bits, that rounded base; made where it is not."""
        if not candidate.rounded:
            return candidate.base
        on_progress("rounding the base to the trainer's 4 bits", 0, 0)
        return rounded_base(candidate)


class _Served:
    """Running servers of one base, and what they hold.

    Attributes:
        control: a client for the watch, and for loading.
        check: raises where a server has failed.
    """

    def __init__(self, urls: Sequence[str], shared: dict[str, str], settings: Settings, base: str) -> None:
        token, publish = shared[TOKEN], Path(shared[PUBLISH_FOLDER])
        self._stack = ExitStack()
        self._clients = [PolicyClient(urls, token, generation_timeout_s=settings.timeout_s) for _ in range(CLIENTS)]
        self.control = PolicyClient(
            urls,
            token,
            generation_timeout_s=settings.silence_timeout_s,
            control_timeout_s=settings.silence_timeout_s / 3,
        )
        self._publish, self._timeout_s = publish, settings.ready_timeout_s
        self._holds, self._version, self._met = base, 0, False
        self._adapter: str | None = None
        self._turn = 0
        self.check: Callable[[], None] = _nothing_to_check

    def __enter__(self) -> "_Served":
        for client in (*self._clients, self.control):
            self._stack.enter_context(client)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def load(self, candidate: Candidate) -> str | None:
        """Make the servers hold this model; returns the name it is asked by, None for the base."""
        if candidate.adapter is not None:
            return self._load_adapter(candidate.adapter)
        if candidate.base != self._holds and not candidate.rounded:
            self._load_weights(Path(candidate.base))
            self._holds = candidate.base
        return None

    def submit(
        self, ask: Ask, model: str | None, seeds: list[int] | None
    ) -> list[tuple[list[int], PolicyClient, Ticket]]:
        """Ask for all completions of an ask; the longest prompts of a limit first, so that no long one is left last."""
        protocol = ask.protocol
        by_limit: dict[int, list[int]] = defaultdict(list)
        for index, limit in enumerate(ask.limits):
            by_limit[limit].append(index)
        parts = []
        for limit, indices in by_limit.items():
            stop = ask.stop.for_vllm() if ask.stop else {}
            sampling = {
                "max_tokens": limit,
                "temperature": protocol.temperature,
                "top_p": protocol.top_p,
                # All that the model's generation settings could say otherwise.
                **{"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True},
                **stop,
                "stop_token_ids": sorted({*ask.end_ids, *stop.get("stop_token_ids", ())}),
            }
            for at in range(0, len(indices), PROMPTS_AT_A_TIME):
                some = indices[at : at + PROMPTS_AT_A_TIME]
                client = self._clients[self._turn % CLIENTS]
                self._turn += 1
                ticket = client.submit(
                    [ask.prompt_ids[index] for index in some],
                    sampling,
                    protocol.samples,
                    model,
                    seeds=None if seeds is None else [seeds[index] for index in some],
                    logprobs=False,
                )
                parts.append((some, client, ticket))
        return parts

    def _load_adapter(self, adapter: Path) -> str:
        name = f"policy-{self._version}"
        self._version += 1
        _copy(adapter, self._publish / name, ("adapter_config.json", "adapter_model.safetensors"))
        if self._adapter is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": self._adapter})
            shutil.rmtree(self._publish / self._adapter)
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(self._publish / name)})
        self._adapter = name
        return name

    def _load_weights(self, folder: Path) -> None:
        """Whole weights, one file at a time, so that shared memory need not hold a model."""
        if not self._met:
            self._post("/init_weight_transfer_engine", {"init_info": {}})
            self._met = True
        self._version += 1
        self._post("/start_weight_update", {})
        for file in _weight_files(folder):
            _copy(folder, self._publish, (file.name,))
            try:
                self._post("/update_weights", {"update_info": {"files": [file.name]}})
            finally:
                (self._publish / file.name).unlink(missing_ok=True)
        self._post("/finish_weight_update", {}, {VERSION_HEADER: str(self._version)})
        self._post("/reset_prefix_cache", None)

    def _post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> None:
        bodies = None if body is None else [body] * len(self.control.base_urls)
        self.control.control_all("POST", path, bodies, headers, timeout_s=self._timeout_s)


def _nothing_to_check() -> None:
    """Before the watch begins."""


def _nothing_to_say(_: str) -> None:
    """An evaluation says how far it is, and that is enough."""


def _groups(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Those that one start of the servers can answer, in the order in which they come."""
    with_adapters = {_base_key(ask.candidate) for ask in asks if ask.candidate.adapter is not None}
    groups: dict[Any, list[Ask]] = defaultdict(list)
    for ask in asks:
        candidate = ask.candidate
        key = _base_key(candidate)
        loads_from_files = Path(candidate.base).is_dir() and not candidate.rounded
        if key not in with_adapters and loads_from_files and _weight_files(Path(candidate.base)):
            key = ("shape", shape(candidate.base))
        groups[key].append(ask)
    return list(groups.values())


def _base_key(candidate: Candidate) -> Any:
    return candidate.base, candidate.revision, candidate.rounded


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def _rank(adapter: Path) -> int:
    return int(read_json(adapter / "adapter_config.json")["r"])


def _modules(adapters: Sequence[Path]) -> tuple[str, ...]:
    """The layers that the adapters change; empty where one does not name them."""
    named: set[str] = set()
    for adapter in adapters:
        targets = read_json(adapter / "adapter_config.json")["target_modules"]
        if not isinstance(targets, list):
            return ()
        named |= {target.rpartition(".")[2] for target in targets}
    return tuple(sorted(named))


def _completion(ask: Ask, rollout: Rollout) -> Completion:
    return ask.finished(rollout.completion_ids, rollout.clipped)


def _copy(source: Path, place: Path, names: Sequence[str]) -> None:
    place.mkdir(exist_ok=True)
    needed = sum((source / name).stat().st_size for name in names)
    free = shutil.disk_usage(place).free
    if free < needed + SPARE_BYTES:
        why = f"{place} has {free / 2**30:.1f} GiB free and {needed / 2**30:.1f} are to be laid there"
        raise OSError(f"{why}: make room (in a container, give /dev/shm more), or evaluate these models one by one")
    for name in names:
        shutil.copyfile(source / name, place / name)
        (place / name).chmod(0o600)
