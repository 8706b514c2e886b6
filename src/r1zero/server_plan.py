"""What a policy server is started with, and how new policy versions reach it. Pure, but where a rounded base lies."""

from dataclasses import dataclass

from r1zero import memory, policy_server
from r1zero.batch import Batch
from r1zero.model_facts import FAMILIES, PROJECTIONS, ModelFacts
from r1zero.placement import Allocation, Placement
from r1zero.recipe import TINY_MODEL, Recipe
from r1zero.serving import CLEAN_COPY, FOLDED, SHARED_MEMORY

# Stands for the rounded base in the plan of a dry run, where a model of the hub has not been downloaded.
BASE_UNKNOWN = "FOLDER-THAT-R1ZERO.QUANTIZED_BASE-PRINTS"
MOST_SEQUENCES = 1024  # completions that a server generates at once; more would wait for each other
ENGINES = {"nccl": "nccl", "shared_memory": SHARED_MEMORY, "folded": FOLDED}  # vLLM's weight transfer, by route
# Between the server's own weights and the trainer's 4-bit ones (docs/log.md, "The guard, with the wrong base").
UNROUNDED_NATS = 0.61
SPARE_SEQUENCES = 4  # the launcher's watch and the trainer's probe ask while all others are in use


@dataclass(frozen=True)
class Route:
    """How a new policy version reaches the servers.

    >>> Route("folded", "gpu").clean_copy
    'gpu'

    Attributes:
        publish: "adapter", "folded", "nccl" or "shared_memory"; None without servers.
        clean_copy: where a server that folds keeps the base: "gpu" or "host"; None where none does.
        reasons: why so.
    """

    publish: str | None
    clean_copy: str | None = None
    reasons: tuple[str, ...] = ()


def publish_route(recipe: Recipe, placed: Placement) -> Route:
    """The route as far as it does not depend on memory: "adapter" is what `budget.route` may make "folded" of."""
    if not recipe.dedicated_server:
        return Route(None)
    asked = recipe.own.publish
    together = ""
    if placed.shared:
        together = "server and trainer share one GPU, where NCCL cannot join them (trl#3158)"
    elif not placed.trains_on_gpus:
        together = "the trainer has no GPU, and NCCL joins GPUs"
    elif placed.servers_per_gpu > 1:
        together = "NCCL cannot join two servers on one GPU"
    if asked == "nccl" and together:
        raise recipe.fault("publish", together, "use publish: shared_memory, or auto")
    if asked != "auto":
        return Route(asked, reasons=(f"publish {asked}: the recipe says so",))
    if recipe["use_peft"]:
        why = "publish adapter: use_peft is true, so the adapter alone goes to the server"
        return Route("adapter", reasons=(why,))
    if together:
        return Route("shared_memory", reasons=(f"publish shared_memory: all weights are trained, and {together}",))
    apart = "server and trainer have GPUs of their own"
    if not recipe.launches_server:
        apart = "the server is taken to have a GPU of its own (if not: publish: shared_memory)"
    return Route("nccl", reasons=(f"publish nccl: all weights are trained, and {apart}",))


def may_fold(recipe: Recipe, placed: Placement) -> bool:
    """Whether a server that is started here can add the recipe's adapters to its weights, model and memory aside.

    Not on a CPU: there each publish would pack all weights anew.
    """
    if not (recipe["use_peft"] and recipe.launches_server and all(each.gpus for each in placed.servers)):
        return False
    targets = recipe["lora_target_modules"] or ()
    known = all(name.rpartition(".")[2] in (*PROJECTIONS, "all-linear") for name in targets)
    return known and recipe.own.server_base != "vllm_4bit"


def check_model(recipe: Recipe, model: ModelFacts | None) -> None:
    """What only the model's configuration tells: modules that an adapter can have, heads that GPUs can share.

    Raises:
        RecipeError: when no server could serve it.
    """
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


def warnings(recipe: Recipe) -> tuple[str, ...]:
    """What is possible, and will hardly go well."""
    found = []
    if recipe.own.server_base == "unrounded" and recipe.own.probe_tolerance <= UNROUNDED_NATS:
        found.append(
            "server_base unrounded: the server's weights are not the trainer's 4-bit ones, which made "
            f"{UNROUNDED_NATS:g} nats of difference for Qwen2.5-3B; the guard stops the run above probe_tolerance "
            f"{recipe.own.probe_tolerance:g}"
        )
    budget, prompt = recipe.own.micro_batch_tokens, recipe.own.max_prompt_tokens
    completion = recipe["max_completion_length"] if recipe.own.method == "grpo" else None
    if budget is not None and prompt is not None and completion is not None and budget < prompt + completion:
        found.append(
            f"micro_batch_tokens {budget} is less than one sequence may have ({prompt} prompt + {completion} "
            f"completion = {prompt + completion} tokens): what is longer is a pass of its own"
        )
    return tuple(found)


def argv(
    recipe: Recipe,
    batch: Batch,
    placed: Placement,
    where: Allocation,
    model: ModelFacts | None,
    *,
    publish: str | None,
    utilization: float,
    kv_cache_gib: float | None,
    host: str,
    port: int,
) -> tuple[str, ...]:
    """The command of the server at `where`.

    Args:
        recipe: what is trained.
        batch: how many completions it will be asked for.
        placed: where everything is.
        where: its part of a node.
        model: facts of the model's shape, where they are known.
        publish: the route of new policy versions.
        utilization: its share of each of its GPUs.
        kv_cache_gib: for keys and values on each of them; None for what vLLM finds to be left of its share.
        host: address to listen on.
        port: TCP.
    """
    revision, rounded, cpu = recipe["model_revision"], serves_rounded_base(recipe), not where.gpus
    return policy_server.serve_argv(
        model=_rounded_base(recipe) if rounded else recipe.model,
        host=host,
        port=port,
        tensor_parallel_size=max(1, len(where.gpus)),
        gpu_memory_utilization=utilization,
        kv_cache_bytes=None if kv_cache_gib is None else int(kv_cache_gib * memory.GIB),
        max_model_len=context(recipe, model),
        max_num_seqs=sequences(batch, placed),
        dtype=recipe.served_dtype(cpu),
        trust_remote_code=recipe["trust_remote_code"],
        seed=recipe["seed"],
        weight_transfer=ENGINES.get(publish or ""),
        lora_rank=adapter_rank(recipe, publish),
        lora_target_modules=_adapter_modules(recipe, model),
        quantization="bitsandbytes" if recipe.own.server_base == "vllm_4bit" else None,
        enable_sleep_mode=bool(recipe["vllm_enable_sleep_mode"]),
        cpu=cpu,
        extra=("--revision", revision) if revision not in (None, "main") and not rounded else (),
    )


def env(recipe: Recipe, where: Allocation, route: Route) -> tuple[tuple[str, str], ...]:
    """The environment of the server at `where`."""
    four_bit = recipe.own.server_base == "vllm_4bit"
    variables = policy_server.serve_env(adapters=route.publish == "adapter", four_bit=four_bit, cpu=not where.gpus)
    return variables if route.clean_copy is None else (*variables, (CLEAN_COPY, route.clean_copy))


def serves_rounded_base(recipe: Recipe) -> bool:
    """Whether the server's base is the trainer's 4-bit one, rounded and then held in bf16."""
    return bool(recipe["load_in_4bit"]) and recipe.own.server_base == "rounded"


def adapter_rank(recipe: Recipe, publish: str | None) -> int | None:
    """The rank of the server's adapter slots; None where it has none."""
    return policy_server.served_lora_rank(recipe["lora_r"]) if publish == "adapter" else None


def sequences(batch: Batch, placed: Placement) -> int:
    """How many completions a server generates at once."""
    # On a GPU of its own, where memory does not matter, measuring then goes faster.
    least = 1 if placed.shared or not placed.trains_on_gpus else memory.DEFAULT_SEQUENCES
    return max(least + SPARE_SEQUENCES, generated(batch, placed))


def generated(batch: Batch, placed: Placement) -> int:
    """How many of them a round of generation, with the watch and the probe, can use."""
    return min(MOST_SEQUENCES, -(-batch.completions_per_generation // len(placed.servers))) + SPARE_SEQUENCES


def context(recipe: Recipe, model: ModelFacts | None) -> int | None:
    """Tokens that the server must hold for one sequence, and one that the probe makes it generate.

    None, where prompts have no limit: the model's own.
    """
    if recipe.own.max_prompt_tokens is None or recipe["max_completion_length"] is None:
        return None
    needed = int(recipe.own.max_prompt_tokens + recipe["max_completion_length"] + 1)
    return min(needed, model.context_length) if model and model.context_length else needed


def _rounded_base(recipe: Recipe) -> str:
    """The folder of the server's base. It is named by the content of the model, so that is looked at."""
    from r1zero import quantized_base

    settings = quantized_base.Settings.of(recipe)
    return str(quantized_base.folder(recipe.model, recipe["model_revision"], settings) or BASE_UNKNOWN)


def _adapter_modules(recipe: Recipe, model: ModelFacts | None) -> tuple[str, ...]:
    """The layers that the server's adapter slots cover: never the output layer, which would double a slot.

    Empty where they are not known: then vLLM's own choice, the output layer among them.
    """
    named = tuple(dict.fromkeys(name.rpartition(".")[2] for name in recipe["lora_target_modules"] or ()))
    if named and "all-linear" not in named:
        return named
    return PROJECTIONS if model is None or model.family in FAMILIES else ()
