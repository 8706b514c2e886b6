"""Learning without padded tokens: micro-batches of whole sequences laid end to end, up to a budget of tokens.

TRL pads a generation to its longest prompt and its longest completion, and cuts it into passes of
``per_device_train_batch_size`` sequences. Here what those passes would hold, on all processes together, is divided
anew: without what teaches nothing, into as few micro-batches as the budget allows, equally many for every process (each
forward and backward pass may be a collective) and of nearly equal work. A micro-batch goes through the model as one
row, with positions that begin anew and attention that stays inside of each sequence; what comes out is scattered back
into TRL's (sequences, tokens) layout, so that the loss is computed by TRL. Completions of one prompt that share a row
also share the prompt, where `shares_prompts`: it is laid down once, and each completion attends to it and to itself.
"""

import bisect
import contextlib
import dataclasses
import heapq
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedType
from transformers import AttentionInterface, AttentionMaskInterface, Trainer
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r1zero.restarts import Refusal
from r1zero.training.probe import evaluating

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]

IGNORED = -100  # a label of no token, as torch's cross entropy has it
OURS = "r1zero_packed"  # the name of `attend` among transformers' attention functions
MOST_HEAD_DIM = 256  # that torch's kernel takes
SAME_LOGPROBS = 1e-4  # nats; what a machine that repeats itself exactly stays below
SHARING = ("cpu",)  # devices on which completions share their prompt; "cuda" was not measured yet
# Loss types that are a mean over the sequences of a pass; the others that can be packed are a sum over tokens, divided
# by what belongs to the whole generation (TRL's num_items_in_batch).
MEANS_OVER_SEQUENCES = ("grpo", "sapo", "dr_grpo", "luspo")


class Prompt(NamedTuple):
    """What a sequence begins with.

    Attributes:
        number: the same for all sequences that begin with the same prompt.
        shared: its first tokens, which are laid down once in a micro-batch; 0 where prompts are repeated.
    """

    number: int
    shared: int


@dataclasses.dataclass(frozen=True)
class Pool:
    """Sequences to be divided into micro-batches.

    >>> Pool([5, 6, 4], [Prompt(0, 2), Prompt(0, 2), Prompt(1, 2)]).tokens([0, 1, 2])  # 2 + 3 + 4, and 2 + 2
    13

    Attributes:
        lengths: of the sequences, tokens.
        prompts: by sequence.
    """

    lengths: Sequence[int]
    prompts: Sequence[Prompt]

    def tokens(self, places: Sequence[int]) -> int:
        """That a micro-batch of these sequences lays down."""
        return sum(map(self.own, places)) + sum(dict(self.prompts[place] for place in places).values())

    def own(self, place: int) -> int:
        """Tokens that a sequence shares with no other."""
        return self.lengths[place] - self.prompts[place].shared


def fill(
    pools: Sequence[Sequence[int]], shares: int, budget: int, prompts: Sequence[Sequence[Prompt]] | None = None
) -> list[list[list[list[int]]]]:
    """Divide pools of sequences into micro-batches, each pool into equally many, as few as the budget allows.

    Longest sequences first, each into the micro-batch that has least (Graham 1969, "Bounds on multiprocessing timing
    anomalies": at most 4/3 of the best there is; with many sequences much closer). A sequence that alone is beyond the
    budget has a micro-batch of its own. Where prompts are shared, the same with all sequences of a prompt as one, and
    filling one micro-batch after the other, are tried too, and that is taken which lets the processes be done first.
    Never more passes than with repeated prompts.

    >>> fill([[5, 4, 3, 3, 2, 1]], shares=2, budget=6)
    [[[[0], [2, 4]], [[3, 5], [1]]]]
    >>> fill([[5, 5, 5, 5]], shares=2, budget=7, prompts=[[Prompt(0, 3), Prompt(1, 3), Prompt(0, 3), Prompt(1, 3)]])
    [[[[0, 2], [1, 3]]]]

    Args:
        pools: lengths of sequences, in tokens; equally many in each pool, a multiple of `shares`.
        shares: processes among which the micro-batches of a pool are divided.
        budget: tokens that a micro-batch may have.
        prompts: of the sequences, likewise; None: none is shared.

    Returns:
        By pool, pass and share: the places of the micro-batch's sequences in the pool, ascending; never none.
    """
    each_its_own = [[Prompt(place, 0) for place in range(len(lengths))] for lengths in pools]
    made = [Pool(*both) for both in zip(pools, prompts or each_its_own, strict=True)]
    most = len(pools[0]) // shares
    passes = max(1, *(math.ceil(pool.tokens(range(len(pool.lengths))) / (shares * budget)) for pool in made))
    while True:
        filled = [_filled(pool, min(passes, most), shares, budget) for pool in made]
        if passes >= most or not any(beyond for beyond, _, _ in filled):
            return [rows for _, _, rows in filled]
        passes += 1


def _filled(pool: Pool, passes: int, shares: int, budget: int) -> tuple[bool, int, list[list[list[int]]]]:
    """So many passes: whether any micro-batch is beyond the budget, the tokens to wait for, and who is in which."""
    count = passes * shares
    ways = [_balanced(pool.lengths, count)]
    if any(prompt.shared for prompt in pool.prompts):
        ways += [_whole(pool, count), _in_turn(pool, count)]
    found = []
    for bins in filter(all, ways):
        beyond = any(len(places) > 1 and pool.tokens(places) > budget for places in bins)
        rows = _passes(pool, bins, shares)
        found.append((beyond, sum(max(map(pool.tokens, row)) for row in rows), rows))
    return min(found, key=lambda way: way[:2])


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` bins of places; none is empty where there are so many sequences."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0, number) for number in range(count)]
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        load, held, number = heapq.heappop(loads)
        bins[number].append(place)
        heapq.heappush(loads, (load + lengths[place], held + 1, number))
    return [sorted(places) for places in bins]


def _whole(pool: Pool, count: int) -> list[list[int]]:
    """`count` bins of places, all of a prompt in one; some are empty where there are fewer prompts."""
    alike = _by_prompt(pool)
    bins = _balanced([pool.tokens(places) for places in alike], count)
    return [sorted(place for number in numbers for place in alike[number]) for numbers in bins]


def _in_turn(pool: Pool, count: int) -> list[list[int]]:
    """`count` bins of places, each of what is then the mean: the largest prompts that fit whole, and part of one more.

    So few prompts are repeated: one for each bin at most. The last bins may be empty where there are few sequences.
    """
    rest = sorted((pool.tokens(places), places) for places in _by_prompt(pool))
    left = sum(tokens for tokens, _ in rest)
    bins = []
    for number in range(count):
        room = left / (count - number)
        taken: list[int] = []
        while fitting := bisect.bisect_right(rest, room, key=lambda each: each[0]):
            tokens, places = rest.pop(fitting - 1)
            taken += places
            left, room = left - tokens, room - tokens
        if rest:
            tokens, places = rest.pop(0)
            part = _part(pool, places, room - pool.prompts[places[0]].shared, at_least_one=not taken)
            left -= tokens
            if others := [place for place in places if place not in part]:
                bisect.insort(rest, (pool.tokens(others), others))
                left += pool.tokens(others)
            taken += part
        bins.append(sorted(taken))
    return bins


def _part(pool: Pool, places: Sequence[int], room: float, at_least_one: bool) -> list[int]:
    """Those that fill the room best: longest first what fits, and the shortest too if that is nearer."""
    longest_first = sorted(places, key=lambda place: -pool.own(place))
    part = []
    for place in longest_first:
        if pool.own(place) <= room:
            part.append(place)
            room -= pool.own(place)
    if not part:
        return longest_first[:1] if at_least_one else []
    shortest = longest_first[-1]
    return part if shortest in part or pool.own(shortest) > 2 * room else [*part, shortest]


def _by_prompt(pool: Pool) -> list[list[int]]:
    """Places of sequences, those of a prompt together."""
    alike: dict[int, list[int]] = {}
    for place, prompt in enumerate(pool.prompts):
        alike.setdefault(prompt.number, []).append(place)
    return list(alike.values())


def _passes(pool: Pool, bins: list[list[int]], shares: int) -> list[list[list[int]]]:
    """Bins of about the same work into the same pass, where processes wait for each other; the largest come first.

    Every other pass in reverse, so that no process has the larger one each time.
    """
    ordered = sorted(bins, key=lambda places: (-pool.tokens(places), places))
    rows = [ordered[start : start + shares] for start in range(0, len(ordered), shares)]
    return [row[::-1] if number % 2 else row for number, row in enumerate(rows)]


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
    of_prompts = prompts_of(ids[:, prompts], mask[:, prompts], shares_prompts(model, ids.device))
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


def shares_prompts(model: Any, device: torch.device) -> bool:
    """Whether completions of one prompt share it in a row: where attention is `attend`, on the devices of SHARING."""
    return _config(model)._attn_implementation == OURS and device.type in SHARING


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
    if not shares_prompts(model, device):
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


# Passes.


class MicroBatch(dict[str, Any]):
    """Sequences that are learnt from in one pass, as the dict that TRL's loss takes.

    Attributes:
        weight: what its loss counts, relative to what TRL has computed.
    """

    weight: float = 1.0


class PackedPasses(Trainer):  # type: ignore[misc]
    """Makes of TRL's passes as many as the budget asks for. Mixed in after TRL's trainer, so that it is called by it.

    Attributes:
        micro_batch_tokens: the budget; None: passes and padding are TRL's.
    """

    micro_batch_tokens: int | None = None
    _gathering: list[Mapping[str, Any]]
    _known_apart = False

    def begin_packing(self, micro_batch_tokens: int | None, references: Sequence[Any] = ()) -> None:
        """Learn from packed micro-batches of so many tokens from now on, after TRL's ``__init__``.

        Args:
            micro_batch_tokens: None: leave all as TRL has it.
            references: models beside the trained one whose log-probabilities are asked for.
        """
        self.micro_batch_tokens, self._gathering = micro_batch_tokens, []
        if micro_batch_tokens is None:
            return
        for each in (*references, self.model):
            prepare(self.accelerator.unwrap_model(each))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """TRL's passes up to the end of an optimizer step, or of a generation inside of it, are learnt from at once.

        Until then they are gathered, and nothing goes through the model.
        """
        if self.micro_batch_tokens is None:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        if not self._known_apart:
            require_apart(model, self.accelerator.device, self.accelerator.autocast)
            self._known_apart = True
        model.train()
        self._gathering.append(self._prepare_inputs(inputs))
        if not self.accelerator.sync_gradients and (self._step + 1) % self.args.steps_per_generation:
            return torch.zeros((), device=self.args.device)
        slices, self._gathering = self._gathering, []
        micro_batches, tokens = self._micro_batches(_joined(slices))
        before = {name: len(values) for name, values in self._metrics["train"].items()}
        loss = torch.zeros((), device=self.args.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with contextlib.nullcontext() if number == len(micro_batches) else self._more_to_come(model):
                loss += super().training_step(model, micro_batch, num_items_in_batch)
        self._merge_metrics(before, tokens)
        return loss

    @contextlib.contextmanager
    def _more_to_come(self, model: Any) -> Any:
        """Gradients are added up, as between the passes of an optimizer step."""
        state, synchronized = self.accelerator.gradient_state, self.accelerator.sync_gradients
        # ZeRO cannot leave out its reductions; it is told by sync_gradients that no step follows.
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        state._set_sync_gradients(False)
        try:
            with contextlib.nullcontext() if deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(synchronized)

    def _micro_batches(self, own: Mapping[str, Any]) -> tuple[list[MicroBatch], list[int]]:
        """This process's micro-batches, and by pass the tokens learnt from by all processes. A collective."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        together = {name: self._gathered(name, value) for name, value in own.items()} if world > 1 else own
        learnt = together["completion_mask"] * together.get("tool_mask", 1)
        prompts = prompts_of(together["prompt_ids"], together["prompt_mask"], self._shares_prompts(self.model))
        lengths, learnt, moves, *of_prompts = torch.stack(
            [
                together["prompt_mask"].sum(1) + together["completion_mask"].sum(1),
                learnt.sum(1),
                (together["advantages"] != 0) | (self.beta != 0.0),
                *prompts.unbind(1),
            ]
        ).tolist()
        assert self.micro_batch_tokens is not None  # noqa: S101 - its caller knows
        teaching = _teaching(lengths, learnt, moves, world)
        self._metrics["train"]["completions/left_out_ratio"].append(1 - len(teaching) / len(lengths))
        begun = [Prompt(*(values[place] for values in of_prompts)) for place in teaching]
        ((*passes,),) = fill([[lengths[place] for place in teaching]], world, self.micro_batch_tokens, [begun])
        passes = [[[teaching[number] for number in numbers] for numbers in shares] for shares in passes]
        made = []
        for shares in passes:
            # Metrics are gathered, which wants as many sequences of every process: some may be empty.
            rows = max(map(len, shares))
            made.append(_chosen(together, shares[rank], rows))
            if self.loss_type in MEANS_OVER_SEQUENCES:
                made[-1].weight = rows / self.args.per_device_train_batch_size
        return made, [sum(learnt[place] for places in shares for place in places) for shares in passes]

    def _shares_prompts(self, model: Any) -> bool:
        return shares_prompts(model, self.accelerator.device)

    def _gathered(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What all processes have of one of the batch's tensors; prompts are padded on the left."""
        if value.ndim == 0:
            return value
        if value.ndim == 2:
            # A ratio of one is none: the loss vespo multiplies those of padding too.
            nothing = 1 if name == "importance_sampling_ratio" else 0
            first = name.startswith("prompt_")
            value = self.accelerator.pad_across_processes(value, dim=1, pad_index=nothing, pad_first=first)
        gathered: torch.Tensor = self.accelerator.gather(value)
        return gathered

    def _merge_metrics(self, before: Mapping[str, int], tokens: Sequence[int]) -> None:
        """One value of each metric of the passes: the mean of all tokens, as if there had been one pass."""
        for name, values in self._metrics["train"].items():
            first = before.get(name, 0)
            by_pass = values[first:]
            if len(by_pass) != len(tokens):
                continue
            numbers = [(value, count) for value, count in zip(by_pass, tokens, strict=True) if not math.isnan(value)]
            if not numbers:
                merged = math.nan
            elif name.endswith(("_min", "_max")):
                merged = (min if name.endswith("_min") else max)(value for value, _ in numbers)
            else:
                merged = sum(value * count for value, count in numbers) / max(1, sum(count for _, count in numbers))
            values[first:] = [merged]

    def packed_log_probabilities(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, completion_tokens: int, at_once: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`log_probabilities` of this process's sequences; a collective where they are not taken at once.

        Args:
            model: as accelerate has wrapped it.
            ids: (sequences, tokens).
            mask: likewise, 1 where a token is no padding.
            completion_tokens: the last so many columns belong to completions.
            at_once: in one row, as a micro-batch is; else in as many as the budget asks for, and any process needs.
        """
        if at_once:
            return log_probabilities(model, ids, mask, completion_tokens)
        prompts = slice(None, -completion_tokens)
        of_prompts = prompts_of(ids[:, prompts], mask[:, prompts], self._shares_prompts(model))
        sequences = self.accelerator.gather(torch.cat([mask.sum(1, keepdim=True), of_prompts], dim=1))
        by_process = sequences.view(self.accelerator.num_processes, -1, 3).tolist()
        lengths = [[length for length, _, _ in own] for own in by_process]
        begun = [[Prompt(*prompt) for _, *prompt in own] for own in by_process]
        assert self.micro_batch_tokens is not None  # noqa: S101 - its caller knows
        passes = fill(lengths, 1, self.micro_batch_tokens, begun)[self.accelerator.process_index]
        order = [place for shares in passes for place in shares[0]]
        parts = [log_probabilities(model, ids[places], mask[places], completion_tokens) for (places,) in passes]
        back = torch.empty(len(order), dtype=torch.long, device=ids.device)
        back[torch.tensor(order, device=ids.device)] = torch.arange(len(order), device=ids.device)
        logps = torch.cat([each for each, _ in parts])[back]
        entropies = [each for _, each in parts if each is not None]
        return logps, torch.cat(entropies)[back] if entropies else None


def _teaching(lengths: Sequence[int], learnt: Sequence[int], moves: Sequence[int], least: int) -> list[int]:
    """Places of the sequences that change the weights, and as many more, the shortest, as make `least`.

    A sequence without an advantage adds nothing to the policy's loss, and one without tokens to learn from nothing to
    any. What the loss is divided by does not depend on who is left out.

    >>> _teaching([9, 9, 4, 7], learnt=[5, 5, 1, 0], moves=[1, 0, 0, 1], least=2)
    [0, 2]
    """
    moving = [place for place, (tokens, moved) in enumerate(zip(learnt, moves, strict=True)) if tokens and moved]
    others = sorted(set(range(len(lengths))) - set(moving), key=lambda place: (lengths[place], place))
    return sorted(moving + others[: max(0, least - len(moving))])


def _joined(slices: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Passes of one generation as one batch."""
    return {
        name: value if value.ndim == 0 else torch.cat([each[name] for each in slices])
        for name, value in slices[0].items()
        if value is not None
    }


def _chosen(batch: Mapping[str, torch.Tensor], places: Sequence[int], rows: int) -> MicroBatch:
    """Some sequences of a batch, and empty ones after them up to `rows`."""
    chosen = MicroBatch()
    for name, value in batch.items():
        if value.ndim == 0:
            chosen[name] = value
            continue
        taken = value[torch.tensor(places, device=value.device)]
        chosen[name] = torch.cat([taken, taken.new_zeros((rows - len(places), *taken.shape[1:]))])
    return chosen
