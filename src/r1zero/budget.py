"""Memory as it is planned: how much of each GPU the policy servers and the trainer get. Pure; `memory` estimates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from r1zero import memory, server_plan
from r1zero.accelerate_config import AccelerateConfig
from r1zero.batch import Batch
from r1zero.hardware import Hardware
from r1zero.memory import Need
from r1zero.model_facts import ModelFacts, ModelShape
from r1zero.placement import Allocation, Placement
from r1zero.recipe import TINY_MODEL, Recipe
from r1zero.server_plan import Route

SHARE_UNSEEN = 0.3  # of a shared GPU for the server, where nothing can be estimated: TRL's own default
SHARE_ALONE = 0.9  # of a GPU of its own: vLLM's default
SHOWN_ALONE = ("weights", "adapter slots", memory.COPY_ON_GPU, memory.COPY_ON_HOST)
MOST_NAMES = 4  # of nodes in a line
ENGINE_BOUND = 6e8  # weights up to which two engines on a GPU were 1.6 times as fast as one (docs/policy_server.md)
SERVER_CONTEXT = 4096  # tokens that a sequence is taken to need where prompts have no limit


@dataclass(frozen=True)
class Budget:
    """Memory as it is planned.

    Attributes:
        utilization: the share of each of its GPUs that a server gets.
        kv_cache_gib: what a server is told to take for keys and values, where others start on its GPU at the same time
            and vLLM's own measuring would take their memory for its own; else None.
        trainer_limit: GiB that the trainer's allocator is held to; None: it is not.
        lines: for the plan's text.
        reasons: what is close, and what was chosen.
        unchecked: why nothing says whether it fits; None where that was looked at, or there is no GPU.
    """

    utilization: float
    kv_cache_gib: float | None = None
    trainer_limit: float | None = None
    lines: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    unchecked: str | None = None


@dataclass(frozen=True)
class Case:
    """What memory is planned for: who runs where, on what hardware, with what batch and which model, if it is known."""

    recipe: Recipe
    hardware: Hardware
    placed: Placement
    batch: Batch
    config: AccelerateConfig
    model: ModelFacts | None


def of(case: Case, route: Route) -> Budget:
    """How much of each GPU the servers and the trainer get.

    Raises:
        RecipeError: where they clearly cannot fit, with the arithmetic.
    """
    recipe, hardware, placed = case.recipe, case.hardware, case.placed
    batch, config, model = case.batch, case.config, case.model
    _check_sharing_keys(recipe, placed)
    given = recipe.library.get("vllm_gpu_memory_utilization")
    card = _card(hardware, _used(placed))
    limit = recipe.own.gpu_memory_limit
    if limit is not None and limit > card:
        raise recipe.fault("gpu_memory_limit", f"the GPU has {card:g} GiB", "lower it, or leave it out")
    if not card or model is None or model.shape is None or recipe.own.method != "grpo":
        return replace(_unseen(recipe, placed, card, model), unchecked=_unchecked(recipe, placed, card, model))
    shape, inside = model.shape, not recipe.uses_vllm
    train = memory.trainer(
        shape,
        recipe,
        processes=batch.processes,
        zero_stage=config.zero_stage,
        offload=config.offload,
        generated=batch.completions_per_process if inside else 0,
    )
    if not placed.servers:
        return _of_trainer(recipe, hardware, placed, train, card)
    sequences = server_plan.sequences(batch, placed)
    least = _of_server(case, shape, route, -(-sequences // 4))
    most = _of_server(case, shape, route, sequences, memory.SERVER_RESERVE_GIB)
    several = placed.servers_per_gpu
    if placed.shared:
        return _on_shared_gpu(recipe, several, least.times(several), most.times(several), train, card)
    share = _share_alone(recipe, several, least, card, route)
    room, needed = share * card / several, least.total - least.resting
    if needed > memory.CLEARLY * room:
        why = (
            f"a server needs {needed:.1f} GiB of each of its GPUs ({least.text()}), "
            f"its share of {share / several:g} of {card:g} GiB is {room:.1f}"
        )
        key, remedy = "vllm_tensor_parallel_size", "more GPUs for each server (vllm_tensor_parallel_size)"
        if several > 1:
            key, remedy = "servers_per_gpu", "fewer of them"
        key = "vllm_gpu_memory_utilization" if given is not None else key
        raise recipe.fault(key, why, f"{remedy}, or a larger share")
    alone = _of_trainer(recipe, hardware, placed, train, card)
    reasons = list(alone.reasons)
    quarter = dict(least.parts)["KV cache"]  # of the completions that it may generate at once
    kv_cache = room - needed + quarter
    if quarter > kv_cache >= quarter / -(-sequences // 4):
        reasons.append(
            f"a server has {kv_cache:.1f} GiB for keys and values, a quarter of its completions at full length would "
            f"take {quarter:.1f}: fewer go at a time, the others wait; more server_gpus would be faster"
        )
    elif needed > memory.CLOSE * room:
        reasons.append(_tight("a server", needed, room, "more GPUs for each server (vllm_tensor_parallel_size)"))
    parts = Need((*(part for part in least.parts if part[0] in SHOWN_ALONE), ("KV cache", kv_cache)))
    whole = room + dict(least.parts)[_copy_label(route)]
    lines = [*alone.lines]
    for where in _gpu_texts(hardware, placed, list(dict.fromkeys(placed.servers))):
        each_server = "each server" if len(placed.servers) > 1 else "server"
        each_server = f"each of {several} servers" if several > 1 else each_server
        lines.append(f"{where} ({card:g}): {each_server} {whole:.1f}: {parts.text()} + workspace")
    return Budget(share / several, kv_cache if several > 1 else None, None, tuple(lines), tuple(reasons))


def route(case: Case) -> Route:
    """How a new policy version reaches the servers: adapters are folded where there is room for a clean copy.

    Raises:
        RecipeError: when the recipe's own route cannot work here.
    """
    recipe, placed, model = case.recipe, case.placed, case.model
    chosen = server_plan.publish_route(recipe, placed)
    asked = chosen.publish == "folded"
    if not asked and not (recipe.own.publish == "auto" and chosen.publish == "adapter"):
        return chosen
    if not recipe.launches_server:
        return chosen
    if not server_plan.may_fold(recipe, placed) or model is None or model.shape is None:
        if not asked:
            # The embedded model has no server; any other is downloaded by a real start.
            later = model is None and server_plan.may_fold(recipe, placed)
            return _said_too(chosen, "; whether it is folded is decided once the model is here") if later else chosen
        on_cpu = not all(each.gpus for each in placed.servers)
        unknown = "how large it is cannot be told" + (" before the model is downloaded" if model is None else "")
        why = "the servers have no GPU" if on_cpu else unknown
        return replace(chosen, clean_copy="host", reasons=(*chosen.reasons, f"clean copy of the base: host, {why}"))
    room = _Room(case, model.shape)
    said = "publish folded: the adapter alone goes to the server, which adds it to its weights"
    if asked:
        said = chosen.reasons[0]
    on_gpu, on_host = _size(room.copy_gib(pinned=False)), _size(room.copy_gib(pinned=True))
    if room.on_gpu():
        return Route(
            "folded", "gpu", (f"{said}; a clean copy of the adapted layers, {on_gpu}, is on the GPU: it fits",)
        )
    if room.on_host() or asked:
        why = f"{on_host} for each GPU, is in pinned host memory: the GPU has no room for it"
        return Route("folded", "host", (f"{said}; a clean copy of the adapted layers, {why}",))
    missing = f"; to fold it there is no room for a clean copy of the adapted layers, {on_gpu}"
    if room.host_might():
        missing += ", on the GPU, and how much the host has is not known with --hardware"
    return _said_too(chosen, missing)


def with_engines(case: Case) -> Case:
    """The same, with a second server on the GPU that a small model's server and trainer share, where both fit.

    Only where the recipe leaves that open, and not on a GPU of the servers' own: there all weights would travel by
    shared memory and no longer over NCCL.
    """
    recipe, placed, model = case.recipe, case.placed, case.model
    left_open = recipe.own.servers_per_gpu is None and "vllm_gpu_memory_utilization" not in recipe.library
    if not (left_open and recipe.launches_server and placed.shared) or recipe["vllm_enable_sleep_mode"]:
        return case
    if model is None or model.shape is None or model.shape.parameters > ENGINE_BOUND:
        return case
    size = f"{model.shape.parameters / 1e9:.2g} billion weights"
    why = f"2 servers on the GPU: what bounds a model of {size} is the processor thread of vLLM's engine"
    two = replace(case, placed=replace(placed, servers=placed.servers * 2, reasons=(*placed.reasons, why)))
    return two if _Room(two, model.shape).fits(route(two)) else case


def _said_too(route: Route, more: str) -> Route:
    """`route` with `more` behind its reason."""
    return replace(route, reasons=(route.reasons[0] + more, *route.reasons[1:]))


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 0.095 else f"{gib * 1024:.0f} MiB"


@dataclass(frozen=True)
class _Room:
    """What the servers, with a clean copy of the base or without, would need, and whether it is there."""

    case: Case
    shape: ModelShape

    def copy_gib(self, *, pinned: bool) -> float:
        """Of one GPU's server."""
        return _copy_gib(self.case.recipe, self.case.placed, self.shape, pinned=pinned)

    def on_gpu(self) -> bool:
        """Whether the GPU has it beside all the KV cache that a generation can use, and the trainer where it shares."""
        return self.fits(Route("folded", "gpu"))

    def on_host(self) -> bool:
        """Whether the hosts certainly have it, and the GPU the rest."""
        each = self.copy_gib(pinned=True)
        for node in {where.node for where in self.case.placed.servers}:
            copies = sum(len(where.gpus) for where in self.case.placed.servers if where.node == node)
            there = self.case.hardware.nodes[node].memory_gib
            if there is None or copies * each > memory.HOST_COPY_SHARE * there:
                return False
        return self.fits(Route("folded", "host"))

    def host_might(self) -> bool:
        """Whether only the host's memory, which nobody has said, keeps the copy from being there."""
        nodes = {where.node for where in self.case.placed.servers}
        unknown = any(self.case.hardware.nodes[node].memory_gib is None for node in nodes)
        return unknown and self.fits(Route("folded", "host"))

    def fits(self, route: Route) -> bool:
        """Whether the servers have room for all that they may generate at once, beside the trainer where they share."""
        recipe, placed = self.case.recipe, self.case.placed
        card = _card(self.case.hardware, _used(placed))
        if not card:
            return False
        completions = server_plan.generated(self.case.batch, placed)
        most = _of_server(self.case, self.shape, route, completions, memory.SERVER_RESERVE_GIB)
        most = most.times(placed.servers_per_gpu)
        given = recipe.library.get("vllm_gpu_memory_utilization")
        if given is not None:
            if most.total - most.resting > given * card:
                return False
            most = Need((("its share and beyond", given * card + most.resting),), most.resting)
        if not placed.shared:
            return most.total <= memory.USABLE * card
        train = memory.trainer(
            self.shape,
            recipe,
            processes=self.case.batch.processes,
            zero_stage=self.case.config.zero_stage,
            offload=self.case.config.offload,
        )
        limit = recipe.own.gpu_memory_limit
        room = memory.USABLE * card if limit is None else limit
        sleep = bool(recipe["vllm_enable_sleep_mode"])
        return memory.least_needed(most, train, sleep=sleep) <= memory.CLOSE * room


def _card(hardware: Hardware, nodes: set[int]) -> float:
    """Memory of the smallest GPU there; GiB, 0 where none is or none says."""
    return min((gpu.memory_gib for node in nodes for gpu in hardware.nodes[node].gpus), default=0.0)


def _used(placed: Placement) -> set[int]:
    """The nodes whose GPUs are used."""
    if not placed.trains_on_gpus:
        return set()
    return {each.node for each in (*placed.servers, *placed.trainers) if each.gpus}


def _copy_gib(recipe: Recipe, placed: Placement, shape: ModelShape, *, pinned: bool) -> float:
    ranks = len(placed.servers[0].gpus)
    return memory.clean_copy(shape, recipe["lora_target_modules"], tensor_parallel=ranks, pinned=pinned)


def _of_server(case: Case, shape: ModelShape, route: Route, completions: int, reserve_gib: float = 0.0) -> Need:
    """A server with KV cache for so many completions."""
    recipe, placed = case.recipe, case.placed
    beyond = memory.FOLDING_GIB if route.publish == "folded" else 0.0
    if route.clean_copy == "gpu":
        beyond += _copy_gib(recipe, placed, shape, pinned=False)
    return memory.server(
        shape,
        context=server_plan.context(recipe, case.model) or SERVER_CONTEXT,
        completions=completions,
        sequences=server_plan.sequences(case.batch, placed),
        rank=server_plan.adapter_rank(recipe, route.publish),
        clean_copy_gib=beyond,
        copy_label=_copy_label(route),
        tensor_parallel=len(placed.servers[0].gpus),
        four_bit=recipe.own.server_base == "vllm_4bit",
        reserve_gib=reserve_gib,
    )


def _copy_label(route: Route) -> str:
    return memory.COPY_ON_HOST if route.clean_copy == "host" else memory.COPY_ON_GPU


def _share_alone(recipe: Recipe, several: int, least: Need, card: float, route: Route) -> float:
    """vLLM's share of a GPU that servers have to themselves: clean copies lie beyond it, and each one's context."""
    given: float | None = recipe.library.get("vllm_gpu_memory_utilization")
    if given is not None or (several == 1 and route.publish != "folded"):
        return SHARE_ALONE if given is None else given
    return min(SHARE_ALONE, math.floor((memory.USABLE - several * least.resting / card) * 1000) / 1000)


def _check_sharing_keys(recipe: Recipe, placed: Placement) -> None:
    for key, value in (
        ("gpu_memory_limit", recipe.own.gpu_memory_limit),
        ("vllm_enable_sleep_mode", recipe.dedicated_server and recipe["vllm_enable_sleep_mode"]),
    ):
        if value and not placed.shared:
            why = "server and trainer share no GPU here, so it would have no effect"
            raise recipe.fault(key, why, f"leave {key} out, or server_gpus: 0 to share one GPU")


def _unseen(recipe: Recipe, placed: Placement, card: float, model: ModelFacts | None) -> Budget:
    """Where the GPU's memory or the model's shape is not known: what the recipe says, else a fixed share."""
    given, several = recipe.library.get("vllm_gpu_memory_utilization"), placed.servers_per_gpu
    if not card:
        unknown = "the GPU does not say how much memory it has"
    elif model is None:
        unknown = "the model's shape is not known before it is downloaded, which a dry run does not do"
    else:
        unknown = f"the weights of a model of type {model.family} are not counted here"
    if several > 1 and not (card and model is None):
        raise recipe.fault("servers_per_gpu", f"a GPU's memory cannot be divided among them: {unknown}", "use 1")
    if not placed.shared:
        return Budget((SHARE_ALONE if given is None else given) / several)
    limit = recipe.own.gpu_memory_limit
    if limit is None:
        share = SHARE_UNSEEN if given is None else given
        why = "the recipe says so" if given is not None else unknown
        return Budget(share / several, reasons=(f"vLLM's share of the GPU: {share:g}, {why}",))
    if given is None:
        why = f"it cannot be divided: {unknown}"
        raise recipe.fault("gpu_memory_limit", why, "add vllm_gpu_memory_utilization, the server's share of the GPU")
    left = limit - given * card - several * memory.SERVER_BEYOND_SHARE_GIB
    return Budget(given / several, trainer_limit=_trainer_limit(recipe, left))


def _unchecked(recipe: Recipe, placed: Placement, card: float, model: ModelFacts | None) -> str | None:
    """Why nothing says whether it fits; None where there is no GPU to fill, or the model is too small to fill one."""
    if not placed.trains_on_gpus or recipe.model == TINY_MODEL:
        return None
    if recipe.own.method != "grpo":
        return "it is not estimated for a cold start"
    if not card:
        return "the GPU does not say how much it has"
    if model is None:
        revision = recipe["model_revision"]
        words = f"{recipe.model} config.json" + (f" --revision {revision}" if revision not in (None, "main") else "")
        return f"{recipe.model}'s config.json is not here: hf download {words}"
    return f"the weights of a model of type {model.family} are not counted here"


def _tight(who: str, needed: float, room: float, remedy: str) -> str:
    """Of what is near the room that there is, or beyond it by less than an estimate is good to."""
    needs = "need" if " and " in who else "needs"
    if needed <= room:
        return f"close: {who} {needs} {needed:.1f} of {room:.1f} GiB; {remedy}"
    tried = "it is tried, since the estimate is good to a tenth or so"
    return f"over: {who} {needs} {needed:.1f} of {room:.1f} GiB; {tried}; if it fails: {remedy}"


def _of_trainer(recipe: Recipe, hardware: Hardware, placed: Placement, train: Need, card: float) -> Budget:
    """The trainer on GPUs of its own, with vLLM inside it where TRL's colocate mode is asked for."""
    if recipe.uses_vllm and not recipe.dedicated_server:
        train = Need((*train.parts, ("vLLM inside", recipe["vllm_gpu_memory_utilization"] * card)))
    room = memory.USABLE * card
    if train.total > memory.CLEARLY * room:
        why = f"the trainer needs {train.total:.1f} GiB of a GPU ({train.text()}), {room:.1f} are there"
        raise recipe.fault(_pass_key(recipe), why, _smaller(recipe))
    close = train.total > memory.CLOSE * room
    reasons = (_tight("the trainer", train.total, room, _smaller(recipe)),) if close else ()
    lines = (
        f"{where} ({card:g}): trainer {train.total:.1f}: {train.text()}"
        for where in _gpu_texts(hardware, placed, placed.trainers)
    )
    return Budget(SHARE_ALONE, lines=tuple(lines), reasons=reasons)


def _gpu_texts(hardware: Hardware, placed: Placement, wheres: Sequence[Allocation]) -> list[str]:
    """The GPUs of `wheres`, those of several by semicolons; nodes with the same ones have one text together."""
    groups: dict[int, list[str]] = {}
    for each in wheres:
        groups.setdefault(each.node, []).append(_list(each.gpus))
    nodes: dict[str, list[int]] = {}
    for node, gpus in groups.items():
        nodes.setdefault("GPU " + "; ".join(gpus), []).append(node)
    if placed.on_one_node:
        return list(nodes)
    return [f"{hosts(hardware, numbers)}, {text}" for text, numbers in nodes.items()]


def hosts(hardware: Hardware, numbers: Sequence[int]) -> str:
    """The names of some nodes, shortened where there are many.

    >>> from r1zero.hardware import assumed
    >>> hosts(assumed("8x1", (1, 2, 3)), range(6))
    'node0 ... node5'
    """
    names = [hardware.nodes[number].host for number in numbers]
    return ", ".join(names) if len(names) <= MOST_NAMES else f"{names[0]} ... {names[-1]}"


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _on_shared_gpu(recipe: Recipe, several: int, least: Need, most: Need, train: Need, card: float) -> Budget:
    """Server and trainer on one GPU: the trainer gets what it needs, the server the rest; `several` as they are one."""
    who = "server" if several == 1 else f"{several} servers"
    sleep = bool(recipe["vllm_enable_sleep_mode"])
    limit = recipe.own.gpu_memory_limit
    room = memory.USABLE * card if limit is None else limit
    given = recipe.library.get("vllm_gpu_memory_utilization")
    if given is not None:
        fixed = given * card - (least.total - least.resting)
        if fixed < 0 and given * card * memory.CLEARLY < least.total - least.resting:
            why = f"is {given * card:.1f} of {card:g} GiB, the server needs {least.total:.1f}: {least.text()}"
            raise recipe.fault("vllm_gpu_memory_utilization", why, "raise it, or leave it out for the plan to choose")
        least = most = Need((*least.parts, ("more KV cache", max(0.0, fixed))), least.resting)
    needed = memory.least_needed(least, train, sleep=sleep)
    if needed > memory.CLEARLY * room:
        why = (
            f"{who} and trainer do not fit on one GPU: {needed:.1f} GiB needed, {room:.1f} there\n"
            f"      {who:<8} {least.total:5.1f} = {least.text()}\n"
            f"      trainer  {train.total:5.1f} = {train.text()}"
        )
        key = "gpu_memory_limit" if limit is not None else _pass_key(recipe)
        asleep = not sleep and memory.least_needed(least, train, sleep=True) <= memory.CLOSE * room
        also = "vllm_enable_sleep_mode: true, " if asleep else ""
        raise recipe.fault(key, why, f"{also}{_smaller(recipe)}; or server_gpus of their own")
    chosen = memory.share(least, most, train, card_gib=card, available_gib=room, sleep=sleep)
    reasons = []
    if needed > memory.CLOSE * room:
        reasons.append(_tight("server and trainer", needed, room, _smaller(recipe)))
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
    kv_cache = min(_kv_cache(most), chosen.server_gib - least.total + _kv_cache(least)) / several
    shown = Need((*least.parts, ("more KV cache", chosen.server_gib - least.total))) if short else most
    lines = (
        f"GPU 0 ({card:g}{f', held to {limit:g}' if limit is not None else ''}): "
        f"{who} {chosen.server_gib:.1f} + trainer {train.total:.1f} = {chosen.server_gib + train.total:.1f}",
        f"  {who}: {shown.text()}",
        f"  trainer: {train.text()}",
    )
    trainer_limit = None if limit is None else _trainer_limit(recipe, chosen.trainer_gib)
    utilization = (chosen.utilization if given is None else given) / several
    return Budget(utilization, kv_cache if several > 1 else None, trainer_limit, lines, tuple(reasons))


def _kv_cache(need: Need) -> float:
    return sum(gib for what, gib in need.parts if what.endswith("KV cache"))


def _trainer_limit(recipe: Recipe, left_gib: float) -> float:
    """GiB for the trainer's allocator, which does not count the CUDA context."""
    limit = left_gib - memory.TRAINER_CONTEXT_GIB
    if limit <= 0:
        why = f"the server takes all of it, {-limit:.1f} GiB are missing before the trainer has any"
        raise recipe.fault("gpu_memory_limit", why, "raise it, or lower vllm_gpu_memory_utilization")
    return limit


def _pass_key(recipe: Recipe) -> str:
    """The key that says how large a pass is."""
    return "per_device_train_batch_size" if recipe.own.micro_batch_tokens is None else "micro_batch_tokens"


def _smaller(recipe: Recipe) -> str:
    """What makes a trainer need less, and the same step."""
    if recipe.own.micro_batch_tokens is not None:
        less = "a smaller micro_batch_tokens"
    elif recipe["per_device_train_batch_size"] > 1:
        less = "a smaller per_device_train_batch_size with as much more gradient_accumulation_steps"
    else:
        less = "a smaller max_completion_length or max_prompt_tokens"
    return less if recipe["gradient_checkpointing"] else f"gradient_checkpointing: true, or {less}"
