"""The GPU memory that a trainer and a policy server need, estimated before either starts. Pure arithmetic, no torch.

What can be counted is counted from the model's shape and the recipe's lengths. What cannot (workspaces, CUDA graphs,
what the allocator leaves unused) is a constant that was measured once; each says where. So an estimate is good to about
a tenth, and only what is beyond it by more than `CLEARLY` is refused.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from r1zero.model_facts import PROJECTIONS, ModelShape, adapted
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
# What folding takes besides the clean copy: 2^24 weights and their sum in fp32, A and B, and what the allocator adds.
FOLDING_GIB = 0.25
COPY_ON_GPU, COPY_ON_HOST = "clean copy and workspace", "workspace of the copy in host memory"  # of what folds
HOST_COPY_SHARE = 0.25  # of a host's memory that the plan gives to clean copies: the trainer loads its model there too
DEFAULT_SEQUENCES = 256  # vLLM's max_num_seqs
BF16, FP32 = 2, 4

# The trainer: bytes of one token in one layer that the backward pass needs. Measured on an H200, Qwen2.5-3B, NF4 and
# LoRA on seven projections, without gradient checkpointing: 7.6 GB for each 1,006 tokens, of which 1.8 MB a token were
# logits, which TRL's fused head no longer keeps.
ACTIVATION_BYTES_OF_HIDDEN = 16
ACTIVATION_BYTES_OF_INTERMEDIATE = 12
RECOMPUTED_LAYERS = 2  # with gradient checkpointing: one layer's activations, and as much again for their gradients
TRAINER_CONTEXT_GIB = 0.6  # CUDA context and cuBLAS workspaces
ALLOCATOR_SLACK = 0.1  # share of what comes and goes in a step that lies between the allocator's blocks
# TRL's fused head (trl/kernels/chunked_logprob.py) holds one tile of logits at a time, and its gradient.
HEAD_TILE_TOKENS, HEAD_TILE_WORDS = 4096, 32768
PROMPT_WITHOUT_LIMIT = 512  # tokens that a prompt is taken to have where max_prompt_tokens is not given
# DeepSpeed 0.19 with its own defaults, which accelerate_configs/ leaves alone, in elements. It holds weights and
# gradients in the type of its module (bf16 where bf16 is on), adds gradients up in it too, and keeps an fp32 copy of
# the trained weights beside the optimizer's state (runtime/zero/stage_1_and_2.py, stage3.py).
ZERO_BUCKET = 5e8  # reduce_bucket_size: gradients on their way to the process that keeps them; reducing makes a copy
ZERO3_LIVE = 1e9  # stage3_max_live_parameters: weights that are gathered at once
ZERO3_STEP = 1e9  # sub_group_size: gradients that ZeRO-3 turns into fp32 at once for the optimizer; ZeRO-2 turns all


@dataclass(frozen=True)
class Need:
    """The memory of one process on one GPU, in parts.

    >>> Need((("weights", 5.75), ("KV cache", 0.5))).text()
    'weights 5.8 + KV cache 0.5'

    Attributes:
        parts: what needs it, and GiB.
        resting: GiB that stay while the other process works: a trainer between two steps, what a server has beyond its
            share.
    """

    parts: tuple[tuple[str, float], ...]
    resting: float = 0.0

    @property
    def total(self) -> float:
        """GiB."""
        return sum(gib for _, gib in self.parts)

    def times(self, count: int) -> "Need":
        """That of so many such processes on the same GPU.

        >>> Need((("weights", 0.5),), resting=0.25).times(2)
        Need(parts=(('weights', 1.0),), resting=0.5)
        """
        return Need(tuple((what, count * gib) for what, gib in self.parts), count * self.resting)

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
    clean_copy_gib: float = 0.0,
    copy_label: str = COPY_ON_GPU,
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
        clean_copy_gib: beyond its share, where it folds adapters.
        copy_label: what that is called.
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
            (copy_label, clean_copy_gib),
        ),
        resting=SERVER_BEYOND_SHARE_GIB + clean_copy_gib,
    )


def clean_copy(shape: ModelShape, targets: Sequence[str] | None, *, tensor_parallel: int, pinned: bool) -> float:
    """GiB of one rank's copy of the weights that an adapter changes, without which none can be folded.

    Args:
        shape: the model's.
        targets: names as in ``lora_target_modules``; None stands for PEFT's own choice.
        tensor_parallel: GPUs that share the model.
        pinned: in the host's memory, where torch takes a power of two for each piece.
    """
    size = 0
    for name in adapted(targets):
        inputs, outputs = shape.projection(name)
        if name in ("k_proj", "v_proj"):
            outputs = max(outputs // tensor_parallel, shape.head_dim)
            piece = inputs * outputs * BF16
        else:
            piece = inputs * outputs * BF16 // tensor_parallel
        size += shape.layers * (1 << (piece - 1).bit_length() if pinned else piece)
    return size / GIB


def trainer(
    shape: ModelShape, recipe: Recipe, *, processes: int, zero_stage: int = 0, offload: bool = False, generated: int = 0
) -> Need:
    """What one GPU of a GRPO trainer takes: at the peak of a pass, or while it generates, and for the optimizer's step.

    That step comes when activations are gone, but its tensors are larger than the blocks that those leave to torch's
    allocator, which keeps both. Without this an estimate for ZeRO-2 and ZeRO-3 was 11 and 15 % low (docs/log.md).

    Args:
        shape: the model's.
        recipe: what is trained and how.
        processes: trainer processes on all nodes, one a GPU.
        zero_stage: of DeepSpeed, which says what is shared among the processes; 0 without it.
        offload: whether DeepSpeed keeps weights and optimizer state in the host's memory.
        generated: completions that one process generates by itself at once; 0 where a policy server does.
    """
    held = _held(shape, recipe, processes, zero_stage, offload)
    width = _width(recipe, zero_stage)
    completion = recipe["max_completion_length"] or PROMPT_WITHOUT_LIMIT
    sequence = (recipe.own.max_prompt_tokens or PROMPT_WITHOUT_LIMIT) + completion
    tokens = recipe["per_device_train_batch_size"] * sequence
    if recipe.own.micro_batch_tokens is not None:
        tokens = max(recipe.own.micro_batch_tokens, sequence)  # one sequence alone may be beyond the budget
    kv_cache = generated * sequence * shape.kv_bytes_per_token(width)
    moments = {
        "activations": _activations(shape, recipe, tokens, width) + held.buckets,
        "KV cache": float(kv_cache),
    }
    peak = max(moments, key=lambda name: moments[name])
    working = moments[peak]
    parts: list[tuple[str, float]] = [("weights", held.weights), ("reference model", held.reference)]
    parts += [("gradients", held.gradients), ("optimizer", held.state)]
    if peak == "activations":
        parts += [("activations", working - held.buckets), ("buckets", held.buckets)]
    else:
        parts.append((peak, working))
    parts.append(("optimizer step", held.stepping))
    slack = ALLOCATOR_SLACK * (held.gradients + working)
    resting = held.weights + held.reference + held.state
    return Need(
        (*((what, size / GIB) for what, size in parts), ("CUDA context and slack", TRAINER_CONTEXT_GIB + slack / GIB)),
        resting=resting / GIB + TRAINER_CONTEXT_GIB,
    )


def _activations(shape: ModelShape, recipe: Recipe, tokens: int, width: int) -> float:
    """Bytes that a forward and backward pass over `tokens` needs besides what is held all the time."""
    layer = ACTIVATION_BYTES_OF_HIDDEN * shape.hidden_size + ACTIVATION_BYTES_OF_INTERMEDIATE * shape.intermediate_size
    tile = min(tokens, HEAD_TILE_TOKENS) * min(shape.vocab_size, HEAD_TILE_WORDS) * (BF16 + FP32)
    head = tile + tokens * shape.hidden_size * FP32
    if not recipe["use_peft"]:
        head += shape.vocab_size * shape.hidden_size * FP32  # the gradient of its weights is added up in fp32
    if recipe["gradient_checkpointing"]:
        # The head is through with its own before the first layer is computed again.
        return tokens * shape.layers * shape.hidden_size * width + max(head, tokens * RECOMPUTED_LAYERS * layer)
    return tokens * shape.layers * layer + head


@dataclass(frozen=True)
class _Held:
    """Bytes that one process holds.

    Attributes:
        weights: of the policy, gathered ones included.
        reference: the reference model.
        gradients: from the first pass of a step to its end.
        state: the optimizer's, with DeepSpeed's fp32 copy of the weights.
        buckets: gradients on their way, during the backward pass.
        stepping: what the optimizer's step needs besides.
    """

    weights: float
    reference: float
    gradients: float
    state: float
    buckets: float = 0.0
    stepping: float = 0.0


def _held(shape: ModelShape, recipe: Recipe, processes: int, zero_stage: int, offload: bool) -> _Held:
    width, peft = _width(recipe, zero_stage), recipe["use_peft"]
    frozen = _frozen_bytes(shape, recipe, width) if peft else 0.0
    trained = shape.lora_parameters(recipe["lora_r"], recipe["lora_target_modules"]) if peft else shape.parameters
    # TRL holds the adapter of a quantized model in bf16, PEFT that of any other in fp32, where DeepSpeed lets it.
    quantized = recipe["load_in_4bit"] or recipe["load_in_8bit"]
    trained_width = width if zero_stage or not peft else BF16 if quantized else FP32
    weights = frozen + trained * trained_width
    # With an adapter the reference model is the policy with the adapter switched off.
    reference = float(shape.parameters * width) if recipe["beta"] and not peft else 0.0
    if zero_stage >= 2:
        return _sharded(recipe, weights, reference, trained, width, processes, zero_stage, offload)
    if width == FP32 and recipe["bf16"] is not False:
        weights += shape.parameters * BF16  # autocast keeps a copy of each weight in bf16 for the length of a pass
    gradients = float(trained * trained_width)
    state = float(trained * _optimizer_bytes(recipe["optim"], trained_width))
    if zero_stage == 1:
        state = (state + trained * FP32) / processes
    # DDP's buckets hold all gradients once more.
    return _Held(weights, reference, gradients * (2 if processes > 1 else 1), state)


def _sharded(
    recipe: Recipe,
    weights: float,
    reference: float,
    trained: int,
    width: int,
    processes: int,
    zero_stage: int,
    offload: bool,
) -> _Held:
    """ZeRO-2 and ZeRO-3: a process keeps its share of gradients and optimizer state, in ZeRO-3 of the weights too."""
    share = trained / processes
    gradients, buckets = share * width, ZERO_BUCKET * width + min(ZERO_BUCKET, trained) * width
    state = share * (FP32 + _optimizer_bytes(recipe["optim"], FP32))
    if zero_stage == 2:
        # What earlier passes of the step left, and what this one adds to it.
        several = recipe["gradient_accumulation_steps"] > 1 or recipe.own.micro_batch_tokens is not None
        gradients *= 2 if several else 1
        return _Held(weights, reference, gradients, state, buckets, share * FP32)
    gathered = min(weights, ZERO3_LIVE * width)
    if offload:
        return _Held(gathered, 0.0, 0.0, 0.0, buckets)
    weights, reference = weights / processes + gathered, reference / processes
    return _Held(weights, reference, gradients, state, buckets, min(share, ZERO3_STEP) * FP32)


def _frozen_bytes(shape: ModelShape, recipe: Recipe, width: int) -> float:
    """The weights beneath an adapter."""
    if recipe["load_in_4bit"]:
        return _four_bit_bytes(shape, nested=recipe["use_bnb_nested_quant"], other=width)
    if recipe["load_in_8bit"]:
        return float(shape.projection_parameters + shape.embedding_parameters * width)
    return float(shape.parameters * width)


def _width(recipe: Recipe, zero_stage: int) -> int:
    """Bytes of a weight: as it was loaded, or under DeepSpeed as it computes."""
    if recipe["dtype"] in ("auto", "bfloat16", "float16"):
        return BF16
    return BF16 if zero_stage and (recipe["fp16"] or recipe["bf16"] is not False) else FP32


def _four_bit_bytes(shape: ModelShape, *, nested: bool, other: int) -> float:
    """bitsandbytes: half a byte a weight and a scale for each 64 of them, in fp32 or, nested, in 8 bits."""
    scale = (1 + FP32 / 256) / 64 if nested else FP32 / 64
    return shape.projection_parameters * (0.5 + scale) + shape.embedding_parameters * other


def _optimizer_bytes(optim: str, width: int) -> int:
    """Bytes of state for each trained weight of `width` bytes: two moments, unless the name says otherwise."""
    if optim in ("sgd", "lomo", "adafactor", "galore_adafactor"):
        return 0
    if "paged" in optim:
        return 0  # lies in the host's memory while it is not used
    if "4bit" in optim:
        return 1
    if "8bit" in optim:
        return 1 if "lion" in optim else 2
    if "lion" in optim or optim in ("rmsprop", "adagrad"):
        return 4
    return 2 * width  # torch keeps the moments in the type of the weights


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
    utilization = math.ceil((server_gib - least.resting) / card_gib * 1000) / 1000
    left = available_gib - (least.resting if sleep else server_gib)
    return Sharing(server_gib, left, utilization)


def least_needed(least: Need, train: Need, *, sleep: bool) -> float:
    """GiB that server and trainer need together at the worse moment of a step."""
    if sleep:
        return max(least.total + train.resting, least.resting + train.total)
    return least.total + train.total
