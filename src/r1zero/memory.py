"""The GPU memory that a trainer and a policy server need, estimated before either starts. Pure arithmetic, no torch.

What can be counted is counted from the model's shape and the recipe's lengths. What cannot (workspaces, CUDA graphs,
what the allocator leaves unused) is a constant that was measured once; each says where. So an estimate is good to about
a tenth, and only what is beyond it by more than `CLEARLY` is refused.
"""

import math
from dataclasses import dataclass

from r1zero.model_facts import PROJECTIONS, ModelShape
from r1zero.recipe import Recipe

GIB = 1024**3
CLEARLY = 1.15  # an estimate that exceeds what is there by more than this factor cannot fit
CLOSE = 0.95  # above this share of what is there, the plan says that it is close
USABLE = 0.98  # what nvidia-smi calls a card's memory and what CUDA can hand out of it: 140.4 and 139.8 GiB on an H200

# The policy server: vLLM 0.26 on an H200 (140.4 GiB), Qwen2.5-3B in bf16 with adapter slots of rank 64. At a share of
# 0.075, which is 10.5 GiB, 97k tokens of KV cache were left and 13.2 GiB were in use. So within its share it needs
# 1.2 GiB besides weights, adapters and KV cache (0.4 of that are logits), and 2.6 GiB more (CUDA context and graphs).
SERVER_WORKSPACE_GIB = 0.8
SERVER_BEYOND_SHARE_GIB = 2.6
SERVER_RESERVE_GIB = 1.0  # of workspace, where there is room: it differs between versions of vLLM
SERVER_LOGIT_BYTES = 12  # of one sequence and one word: logits, log-probabilities and their sorted copy, in fp32
ADAPTER_SLOTS = 2  # the version in use and the next one
DEFAULT_SEQUENCES = 256  # vLLM's max_num_seqs
BF16, FP32 = 2, 4

# The trainer: bytes of one token in one layer that the backward pass needs. Measured on an H200, Qwen2.5-3B, NF4 and
# LoRA on seven projections, without gradient checkpointing: 7.6 GB for each 1,006 tokens, of which 1.8 MB a token were
# logits, which TRL's fused head no longer keeps.
ACTIVATION_BYTES_OF_HIDDEN = 16
ACTIVATION_BYTES_OF_INTERMEDIATE = 12
RECOMPUTED_LAYERS = 2  # with gradient checkpointing: one layer's activations, and as much again for their gradients
TRAINER_CONTEXT_GIB = 0.6  # CUDA context and cuBLAS workspaces
ALLOCATOR_SLACK = 0.1  # share of the allocator's memory that lies between blocks
# TRL's fused head (trl/kernels/chunked_logprob.py) holds one tile of logits at a time, and its gradient.
HEAD_TILE_TOKENS, HEAD_TILE_WORDS = 4096, 32768
PROMPT_WITHOUT_LIMIT = 512  # tokens that a prompt is taken to have where max_prompt_tokens is not given
# accelerate_configs' DeepSpeed: buckets of 5e8 elements in bf16, and at most 1e9 gathered parameters in ZeRO-3.
ZERO_BUCKETS_GIB = 2 * 5e8 * BF16 / GIB
ZERO3_GATHERED_GIB = 1e9 * BF16 / GIB


@dataclass(frozen=True)
class Need:
    """The memory of one process on one GPU, in parts.

    >>> Need((("weights", 5.75), ("KV cache", 0.5))).text()
    'weights 5.8 + KV cache 0.5'

    Attributes:
        parts: what needs it, and GiB.
        resting: GiB that stay while the other process works: a trainer between two steps.
    """

    parts: tuple[tuple[str, float], ...]
    resting: float = 0.0

    @property
    def total(self) -> float:
        """GiB."""
        return sum(gib for _, gib in self.parts)

    def text(self) -> str:
        """The parts in one line; those that round to nothing are left out."""
        return " + ".join(f"{what} {gib:.1f}" for what, gib in self.parts if gib >= 0.05)


def server(
    shape: ModelShape,
    *,
    context: int,
    completions: int,
    sequences: int,
    rank: int | None = None,
    tensor_parallel: int = 1,
    four_bit: bool = False,
    reserve_gib: float = 0.0,
) -> Need:
    """What one GPU of a policy server needs.

    Args:
        shape: the model's.
        context: tokens of prompt and completion together.
        completions: whose KV cache it holds at once.
        sequences: that it may generate at once (``--max-num-seqs``), each with a row of logits.
        rank: of the adapter slots; None where it serves no adapter.
        tensor_parallel: GPUs that share the model.
        four_bit: whether it holds the projections in vLLM's own 4 bits.
        reserve_gib: workspace beyond what was measured.
    """
    weights = _four_bit_bytes(shape, nested=False, other=BF16) if four_bit else shape.parameters * BF16
    slots = ADAPTER_SLOTS * shape.lora_parameters(rank, PROJECTIONS) * BF16 if rank else 0
    logits = max(sequences, 1) * shape.vocab_size * SERVER_LOGIT_BYTES
    kv_cache = completions * context * shape.kv_bytes_per_token(BF16)
    return Need(
        (
            ("weights", weights / tensor_parallel / GIB),
            ("adapter slots", slots / GIB),
            ("workspace", SERVER_WORKSPACE_GIB + logits / GIB + reserve_gib),
            ("KV cache", kv_cache / tensor_parallel / GIB),
            ("CUDA graphs and context", SERVER_BEYOND_SHARE_GIB),
        ),
        resting=SERVER_BEYOND_SHARE_GIB,
    )


def trainer(shape: ModelShape, recipe: Recipe, *, processes: int, accelerate: str, generated: int = 0) -> Need:
    """What one GPU of a GRPO trainer needs at its peak.

    Args:
        shape: the model's.
        recipe: what is trained and how.
        processes: trainer processes, one a GPU.
        accelerate: the name of the accelerate config; DeepSpeed's say what is shared among the processes.
        generated: completions that one process generates by itself at once; 0 where a policy server does.
    """
    completion = recipe["max_completion_length"] or PROMPT_WITHOUT_LIMIT
    sequence = (recipe.own.max_prompt_tokens or PROMPT_WITHOUT_LIMIT) + completion
    tokens = recipe["per_device_train_batch_size"] * sequence
    weights, trained, state = _held(shape, recipe, processes, accelerate)

    width = BF16 if _held_in_16_bits(recipe) else FP32
    layer = ACTIVATION_BYTES_OF_HIDDEN * shape.hidden_size + ACTIVATION_BYTES_OF_INTERMEDIATE * shape.intermediate_size
    if recipe["gradient_checkpointing"]:
        activations = tokens * (shape.layers * shape.hidden_size * width + RECOMPUTED_LAYERS * layer)
    else:
        activations = tokens * shape.layers * layer
    tile = min(tokens, HEAD_TILE_TOKENS) * min(shape.vocab_size, HEAD_TILE_WORDS) * (BF16 + FP32)
    head = tile + tokens * shape.hidden_size * FP32
    if not recipe["use_peft"]:
        head += shape.vocab_size * shape.hidden_size * FP32  # the gradient of its weights is added up in fp32
    kv_cache = generated * sequence * shape.kv_bytes_per_token(width)
    working = max(activations / GIB + head / GIB, kv_cache / GIB)
    slack = ALLOCATOR_SLACK * (weights + trained + state + working)
    return Need(
        (
            ("weights", weights),
            ("gradients", trained),
            ("optimizer", state),
            ("activations" if working > kv_cache / GIB else "KV cache", working),
            ("CUDA context and slack", TRAINER_CONTEXT_GIB + slack),
        ),
        resting=weights + state + TRAINER_CONTEXT_GIB,
    )


def _held(shape: ModelShape, recipe: Recipe, processes: int, accelerate: str) -> tuple[float, float, float]:
    """GiB of weights, gradients and optimizer state that one process holds."""
    kept: float
    gradients: float
    state: float
    width = BF16 if _held_in_16_bits(recipe) else FP32
    if recipe["use_peft"]:
        adapter = shape.lora_parameters(recipe["lora_r"], recipe["lora_target_modules"])
        quantized = recipe["load_in_4bit"] or recipe["load_in_8bit"]
        # TRL holds the adapter of a quantized model in bf16, PEFT that of any other in fp32.
        trained, kept = adapter, adapter * (BF16 if quantized else FP32)
        if recipe["load_in_4bit"]:
            kept += _four_bit_bytes(shape, nested=recipe["use_bnb_nested_quant"], other=width)
        elif recipe["load_in_8bit"]:
            kept += shape.projection_parameters + shape.embedding_parameters * width
        else:
            kept += shape.parameters * width
        gradient_width = BF16 if quantized else FP32
    else:
        trained, kept, gradient_width = shape.parameters, shape.parameters * width, width
        if width == FP32 and recipe["bf16"] is not False:
            kept += shape.parameters * BF16  # autocast keeps a copy of each weight in bf16 for the length of a pass
        if recipe["beta"]:
            kept += shape.parameters * width  # the reference model
    state = trained * _optimizer_bytes(recipe["optim"])
    gradients = trained * gradient_width
    if accelerate.startswith("zero"):
        # DeepSpeed trains in bf16, and keeps an fp32 copy of the weights beside the optimizer's state.
        state, gradients = (state + trained * FP32) / processes, trained * BF16 / processes
        kept = shape.parameters * BF16 if not recipe["use_peft"] else kept
        if accelerate.startswith("zero3"):
            offloaded = "offload" in accelerate
            kept = (0 if offloaded else kept / processes) + ZERO3_GATHERED_GIB * GIB
            state = 0 if offloaded else state
        gradients += ZERO_BUCKETS_GIB * GIB
    elif processes > 1:
        gradients *= 2  # DDP's buckets hold them once more
    return kept / GIB, gradients / GIB, state / GIB


def _held_in_16_bits(recipe: Recipe) -> bool:
    return recipe["dtype"] in ("auto", "bfloat16", "float16")


def _four_bit_bytes(shape: ModelShape, *, nested: bool, other: int) -> float:
    """bitsandbytes: half a byte a weight and a scale for each 64 of them, in fp32 or, nested, in 8 bits."""
    scale = (1 + FP32 / 256) / 64 if nested else FP32 / 64
    return shape.projection_parameters * (0.5 + scale) + shape.embedding_parameters * other


def _optimizer_bytes(optim: str) -> int:
    """Bytes of state for each trained weight: AdamW's two moments in fp32, unless the name says otherwise."""
    if optim in ("sgd", "lomo", "adafactor", "galore_adafactor"):
        return 0
    if "paged" in optim:
        return 0  # lies in the host's memory while it is not used
    if "4bit" in optim:
        return 1
    if "8bit" in optim:
        return 1 if "lion" in optim else 2
    return 4 if "lion" in optim or optim in ("rmsprop", "adagrad") else 8


@dataclass(frozen=True)
class Sharing:
    """How server and trainer divide one GPU.

    Attributes:
        server_gib: all that the server takes, CUDA context and graphs included.
        trainer_gib: what is left for the trainer, its CUDA context included.
        utilization: the server's share of the card as vLLM counts it, without context and graphs.
    """

    server_gib: float
    trainer_gib: float
    utilization: float


def share(least: Need, most: Need, train: Need, *, card_gib: float, available_gib: float, sleep: bool) -> Sharing:
    """Divide `available_gib`: to the trainer what it needs, to the server the rest, but no more than it can use.

    Args:
        least: the server with the smallest KV cache worth having.
        most: the server with all the KV cache that it can use.
        train: the trainer at its peak.
        card_gib: memory of the card, of which vLLM counts its share.
        available_gib: what both may take together.
        sleep: whether the server gives its memory back while the trainer works, and the trainer needs little meanwhile.
    """
    beside = train.resting if sleep else train.total
    server_gib = max(least.total, min(most.total, available_gib - beside))
    # Rounded up: vLLM reads it as text, and a KV cache that is a token too small is refused.
    utilization = math.ceil((server_gib - SERVER_BEYOND_SHARE_GIB) / card_gib * 1000) / 1000
    left = available_gib - (SERVER_BEYOND_SHARE_GIB if sleep else server_gib)
    return Sharing(server_gib, left, utilization)


def least_needed(least: Need, train: Need, *, sleep: bool) -> float:
    """GiB that server and trainer need together at the worse moment of a step."""
    if sleep:
        return max(least.total + train.resting, least.resting + train.total)
    return least.total + train.total
