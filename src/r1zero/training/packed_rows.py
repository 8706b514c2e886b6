"""Several sequences as one row: laid down end to end, attention inside of each, and what the model says of it.

Completions of one prompt that share a row also share the prompt, where `shares_prompts`: it is laid down once, and each
completion attends to it and to itself.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r1zero.restarts import Refusal
from r1zero.training.filling import Pool, Prompt
from r1zero.training.probe import evaluating

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

IGNORED = -100  # a label of no token, as torch's cross entropy has it
OURS = "r1zero_packed"  # the name of `attend` among transformers' attention functions
MOST_HEAD_DIM = 256  # that torch's kernel takes
SAME_LOGPROBS = 1e-4  # nats; what a machine that repeats itself exactly stays below
SHARING = True  # whether completions share their prompt; tests and the benchmark compare


def prompts_of(ids: torch.Tensor, mask: torch.Tensor, shared: bool) -> torch.Tensor:
    """Which sequences begin with the same prompt, and with how many tokens of it they may share.

    All but its last one: that one's prediction is each completion's own.

    Args:
        ids: (sequences, tokens) of prompts.
        mask: likewise, 1 where a token is no padding.
        shared: whether prompts are shared at all.

    Returns:
        (sequences, 2): what makes a `Prompt`.
    """
    lengths = mask.sum(1)
    if not shared:
        return torch.stack([torch.arange(len(ids), device=ids.device), torch.zeros_like(lengths)], dim=1)
    numbers: torch.Tensor = torch.unique(ids.masked_fill(mask == 0, -1), dim=0, return_inverse=True)[1]
    return torch.stack([numbers, (lengths - 1).clamp(min=0)], dim=1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What of sequences that lie end to end goes through the model, in segments.

    >>> layout = Layout.of(Pool([5, 6, 4], [Prompt(0, 2), Prompt(0, 2), Prompt(1, 2)]))
    >>> layout.segments  # what the first two share, their own tokens, and the third one
    (range(0, 2), range(2, 5), range(7, 11), range(11, 15))
    >>> layout.attended
    ((0,), (0, 1), (0, 2), (3,))

    Attributes:
        segments: places in the sequences end to end.
        attended: by segment, which ones its tokens see: of the last one, itself, what comes no later than they.
    """

    segments: tuple[range, ...]
    attended: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pool: Pool) -> "Layout":
        """Of sequences in this order; those of one prompt come where the first of them is."""
        by_prompt: dict[tuple[int, int], list[range]] = {}
        for place, (stop, length) in enumerate(zip(accumulate(pool.lengths), pool.lengths, strict=True)):
            number, shared = pool.prompts[place]
            by_prompt.setdefault((number, shared) if shared else (-1, place), []).append(range(stop - length, stop))
        segments: list[range] = []
        attended: list[tuple[int, ...]] = []
        for (_, shared), sequences in by_prompt.items():
            first: tuple[int, ...] = ()
            if len(sequences) > 1:
                first = (len(segments),)
                segments.append(sequences[0][:shared])
                attended.append(first)
            for sequence in sequences:
                attended.append((*first, len(segments)))
                segments.append(sequence[shared:] if first else sequence)
        return cls(tuple(segments), tuple(attended))

    def places(self) -> torch.Tensor:
        """In the sequences end to end, of each token of the row."""
        return torch.cat([torch.arange(each.start, each.stop) for each in self.segments])

    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [len(each) for each in self.segments]

    def key_lengths(self) -> list[int]:
        """Tokens that each segment attends to."""
        return [sum(len(self.segments[number]) for number in each) for each in self.attended]

    def for_flash_attention(self, device: torch.device) -> dict[str, Any]:
        """What transformers gives to kernels for various lengths; enough where no prompt is shared."""
        made: dict[str, Any] = {}
        for side, lengths in (("q", self.lengths()), ("k", self.key_lengths())):
            made[f"cu_seq_lens_{side}"] = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            made[f"max_length_{side}"] = max(lengths)
        return made

    def for_attend(self, device: torch.device) -> dict[str, Any]:
        """What `attend` takes beside."""
        keys = None
        if any(len(each) > 1 for each in self.attended):
            starts = [0, *accumulate(self.lengths())]
            seen = [number for each in self.attended for number in each]
            keys = torch.cat([torch.arange(starts[number], starts[number + 1]) for number in seen]).to(device)
        return {"packed_lengths": self.lengths(), "packed_key_lengths": self.key_lengths(), "packed_keys": keys}


def log_probabilities(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, completion_tokens: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the completions' tokens, and the entropies before them, from one row that holds all sequences.

    Sequences lie end to end. Those that share their prompt lie behind it, each from its last token on, which is thereby
    repeated: what is predicted there is each one's own.

    Args:
        model: with TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), which projects hidden states through the
            language head in tiles, so that there are never logits of all tokens, and the attention of `prepare`.
        ids: (sequences, tokens), padded anywhere.
        mask: likewise, 1 where a token is no padding. A sequence without any is allowed, beside one that has some.
        completion_tokens: the last so many columns belong to completions.

    Returns:
        Two of (sequences, `completion_tokens`), zero where there is padding; the second is None for a model whose
        head was not asked for entropies.
    """
    kept = mask.bool()
    row = ids[kept]
    positions = (mask.long().cumsum(1) - 1)[kept]
    of_completions = kept.clone()
    of_completions[:, :-completion_tokens] = False
    # The first token of a sequence has no word before it, other than of a stranger.
    scored = of_completions[kept] & (positions > 0)
    labels = torch.full_like(row, IGNORED)
    labels[:-1] = torch.where(scored, row, IGNORED)[1:]
    prompts = slice(None, -completion_tokens)
    of_prompts = prompts_of(ids[:, prompts], mask[:, prompts], shares_prompts(model))
    sequences = torch.cat([mask.sum(1, keepdim=True), of_prompts], dim=1).tolist()
    sequences = [each for each in sequences if each[0]]
    layout = Layout.of(Pool([length for length, *_ in sequences], [Prompt(*prompt) for _, *prompt in sequences]))
    places, more = layout.places().to(ids.device), layout.for_flash_attention(ids.device)
    if _config(model)._attn_implementation == OURS:
        # transformers leaves a mask of four dimensions as it is, and `attend` does not look at it.
        more |= {"attention_mask": row.new_ones((1, 1, 1, 1), dtype=torch.bool), **layout.for_attend(ids.device)}
    laid_down = {"input_ids": row, "position_ids": positions, "shift_labels": labels}
    outputs = model(**{name: each[places][None] for name, each in laid_down.items()}, fused_lm_head=True, **more)

    def scattered(values: torch.Tensor) -> torch.Tensor:
        # Each place has the value of the token after it, and the last one, whose label is ignored, zero.
        by_token = values.new_zeros(row.shape).index_copy(0, places, values[0]).roll(1)
        return values.new_zeros(ids.shape).masked_scatter(kept, by_token)[:, -completion_tokens:]

    return scattered(outputs.log_probs), None if outputs.entropy is None else scattered(outputs.entropy)


# Attention inside of each sequence of a row, and to the prompt that it shares.


def shares_prompts(model: Any) -> bool:
    """Whether completions of one prompt share it in a row: where attention is `attend`."""
    return SHARING and _config(model)._attn_implementation == OURS


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_lengths: Sequence[int] | None = None,
    packed_key_lengths: Sequence[int] = (),
    packed_keys: torch.Tensor | None = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """In a packed row, each segment of its own: torch's kernel for various lengths where it runs, else one by one.

    A segment's queries are the last of the tokens that it attends to, and see what comes no later: keys and values of a
    shared prompt are repeated here, for each of its completions, and nowhere else. Without `packed_lengths` it does
    what sdpa does.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim) of a packed row.
        key: likewise, with the heads of keys and values.
        value: likewise.
        attention_mask: of a batch that is not packed.
        dropout: of the probabilities.
        scaling: of the scores.
        packed_lengths: of the segments of a packed row, in its order; tokens.
        packed_key_lengths: how many tokens each attends to.
        packed_keys: which ones, one segment's after the other; None: each to its own.
        cu_seq_lens_q: where the segments begin, and the last one's end; tokens.
        cu_seq_lens_k: likewise, of what they attend to.
        kwargs: what sdpa also takes.
    """
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling}
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)  # type: ignore[no-any-return]
    if packed_keys is not None:
        # In float32, since a shared token's gradient is the sum over all that attend to it.
        key, value = (each.float().index_select(2, packed_keys).to(each.dtype) for each in (key, value))
    # The kernel takes half precision alone; under autocast rotated queries and keys are float32.
    device = query.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    if dropout or not _kernel_takes(query, kind):
        queries = torch.split(query, list(packed_lengths), dim=2)
        keys, values = (torch.split(each, list(packed_key_lengths), dim=2) for each in (key, value))
        outputs = []
        for each in zip(queries, keys, values, strict=True):
            tokens, attended = each[0].shape[2], each[1].shape[2]
            seen = None if tokens == attended else _no_later(tokens, attended, query.device)
            outputs.append(sdpa_attention_forward(module, *each, seen, is_causal=True, **options)[0])
        return torch.cat(outputs, dim=1), None
    groups = query.shape[1] // key.shape[1]
    # Nothing after the token itself, where the last query stands at the last key (flash attention since 2.1).
    causal: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in _kernel_options():
        causal["enable_gqa"] = groups > 1
    else:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = (each[0].transpose(0, 1).to(kind) for each in (query, key, value))
    longest = (max(packed_lengths), max(packed_key_lengths))
    output: Any = varlen_attn(query, key, value, cu_seq_lens_q, cu_seq_lens_k, *longest, **causal)
    return output[None], None


def _no_later(tokens: int, attended: int, device: torch.device) -> torch.Tensor:
    """(`tokens`, `attended`): what the last `tokens` of `attended` see, true up to themselves."""
    return torch.ones((tokens, attended), dtype=torch.bool, device=device).tril(attended - tokens)


def _kernel_takes(query: torch.Tensor, kind: torch.dtype) -> bool:
    if not query.is_cuda or kind not in (torch.bfloat16, torch.float16):
        return False
    if not {"scale", "window_size"} <= _kernel_options():  # torch 2.10's had neither
        return False
    width = query.shape[-1]
    return torch.cuda.get_device_capability(query.device) >= (8, 0) and width % 8 == 0 and width <= MOST_HEAD_DIM


@cache
def _kernel_options() -> frozenset[str]:
    return frozenset(() if varlen_attn is None else inspect.signature(varlen_attn).parameters)


def prepare(model: Any) -> None:
    """Set `model`, as transformers made it or under an adapter, up for packed rows.

    Raises:
        Refusal: when its attention is neither sdpa, in whose place comes `attend`, nor flash attention, which takes
            packed rows.
    """
    found = _config(model)._attn_implementation
    if found == "sdpa":
        AttentionInterface.register(OURS, attend)
        AttentionMaskInterface.register(OURS, sdpa_mask)
        (model.get_base_model() if hasattr(model, "peft_config") else model).set_attn_implementation(OURS)
    elif found not in (OURS, "flash_attention_2", "flash_attention_3"):
        raise Refusal(
            f"micro_batch_tokens: the model's attention is {found}, which was not shown to keep packed sequences "
            f"apart; set attn_implementation: sdpa or flash_attention_2, or leave micro_batch_tokens out"
        )


def require_apart(model: Any, device: torch.device, autocast: Callable[[], Any]) -> None:
    """Refuse a model in which a sequence sees another one of its row. A collective where the model's forward is.

    The log-probabilities of a sequence must be the same whatever stands before it in the row, but for what the machine
    does not repeat exactly. Of completions that share their prompt, each must be the same whatever its neighbours on
    both sides are, and nearly what it is alone with its prompt: apart by rounding, which is far less than by another
    prompt.

    Args:
        model: as accelerate has wrapped it, after `prepare`.
        device: where it computes.
        autocast: what it computes in.

    Raises:
        Refusal: when it does.
    """
    words: int = _config(model).vocab_size

    def tokens(step: int, first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count * step, step, device=device) % words

    def of_one(number: int, sequences: Sequence[torch.Tensor], completion_tokens: int) -> torch.Tensor:
        ids = torch.stack(list(sequences))
        logps, _ = log_probabilities(model, ids, torch.ones_like(ids), completion_tokens)
        return logps[number]

    def away(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max())

    ours = tokens(17, 3, 8)
    with evaluating(model), torch.no_grad(), autocast():
        once, again, beside_another = (of_one(1, [tokens(31, first, 8), ours], 7) for first in (0, 0, 7))
    leaked, noise = away(beside_another, once), away(again, once)
    if not leaked <= SAME_LOGPROBS + 4 * noise:  # also where it is not a number
        raise Refusal(
            f"micro_batch_tokens: in a packed row the log-probabilities of a sequence change by {leaked:.3g} nats with "
            f"what stands before it, so this model does not keep packed sequences apart; leave micro_batch_tokens out"
        )
    if not shares_prompts(model):
        return

    def of_ours(prompt: int, *neighbours: int) -> torch.Tensor:
        # All of one last token: what else the prompt says is seen by attention alone.
        begun = torch.cat([tokens(23, prompt, 8), tokens(1, 5, 1)])
        ends = [tokens(31, first, 8) for first in neighbours]
        return of_one(len(ends) // 2, [torch.cat([begun, end]) for end in (*ends[:1], ours, *ends[1:])], 8)

    with evaluating(model), torch.no_grad(), autocast():
        shared, again, beside_others, alone, elsewhere = (
            of_ours(*what) for what in ((1, 0, 11), (1, 0, 11), (1, 7, 19), (1,), (2,))
        )
    leaked, noise, wrong, least = (
        away(one, other)
        for one, other in ((beside_others, shared), (again, shared), (shared, alone), (elsewhere, alone))
    )
    if not (leaked <= SAME_LOGPROBS + 4 * noise and wrong <= SAME_LOGPROBS + least / 4):
        raise Refusal(
            f"micro_batch_tokens: the log-probabilities of a completion that shares its prompt change by {leaked:.3g} "
            f"nats with the completions beside it, and are {wrong:.3g} nats from those with a prompt of its own (with "
            f"another prompt: {least:.3g}), so this model does not keep completions of one prompt apart; leave "
            f"micro_batch_tokens out"
        )


def _config(model: Any) -> Any:
    while hasattr(model, "module"):  # wrapped by DDP, or by DeepSpeed, whose `config` is its own
        model = model.module
    return model.config.get_text_config()
