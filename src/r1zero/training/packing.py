"""Learning without padded tokens: micro-batches of whole sequences laid end to end, up to a budget of tokens.

TRL pads a generation to its longest prompt and its longest completion, and cuts it into passes of
``per_device_train_batch_size`` sequences. Here what those passes would hold, on all processes together, is divided
anew: without what teaches nothing, into as few micro-batches as the budget allows, equally many for every process (each
forward and backward pass may be a collective) and of nearly equal work. A micro-batch goes through the model as one
row (packed_rows.py); what comes out is scattered back into TRL's (sequences, tokens) layout, so that the loss is
computed by TRL.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from r1zero.training.filling import Prompt, fill, teaching
from r1zero.training.packed_rows import log_probabilities, prepare, prompts_of, require_apart, shares_prompts

# Loss types that are a mean over the sequences of a pass; the others that can be packed are a sum over tokens, divided
# by what belongs to the whole generation (TRL's num_items_in_batch).
MEANS_OVER_SEQUENCES = ("grpo", "sapo", "dr_grpo", "luspo")


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
        prompts = prompts_of(together["prompt_ids"], together["prompt_mask"], shares_prompts(self.model))
        lengths, learnt, moves, *of_prompts = torch.stack(
            [
                together["prompt_mask"].sum(1) + together["completion_mask"].sum(1),
                learnt.sum(1),
                (together["advantages"] != 0) | (self.beta != 0.0),
                *prompts.unbind(1),
            ]
        ).tolist()
        assert self.micro_batch_tokens is not None  # noqa: S101 - its caller knows
        kept = teaching(lengths, learnt, moves, world)
        self._metrics["train"]["completions/left_out_ratio"].append(1 - len(kept) / len(lengths))
        begun = [Prompt(*(values[place] for values in of_prompts)) for place in kept]
        ((*passes,),) = fill([[lengths[place] for place in kept]], world, self.micro_batch_tokens, [begun])
        passes = [[[kept[number] for number in numbers] for numbers in shares] for shares in passes]
        made = []
        for shares in passes:
            # Metrics are gathered, which wants as many sequences of every process: some may be empty.
            rows = max(map(len, shares))
            made.append(_chosen(together, shares[rank], rows))
            if self.loss_type in MEANS_OVER_SEQUENCES:
                made[-1].weight = rows / self.args.per_device_train_batch_size
        return made, [sum(learnt[place] for places in shares for place in places) for shares in passes]

    def _gathered(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What all processes have of one of the batch's tensors; prompts are padded on the left."""
        if value.ndim == 0:
            return value
        if value.ndim == 2:
            first = name.startswith("prompt_")
            value = self.accelerator.pad_across_processes(value, dim=1, pad_index=_padding_of(name), pad_first=first)
        gathered: torch.Tensor = self.accelerator.gather(value)
        return gathered

    def _merge_metrics(self, before: Mapping[str, int], tokens: Sequence[int]) -> None:
        """One value of each metric of the passes: the mean of all tokens, as if there had been one pass."""
        for name, values in self._metrics["train"].items():
            first = before.get(name, 0)
            by_pass = values[first:]
            if len(by_pass) != len(tokens):
                continue
            said = zip(by_pass, tokens, strict=True)
            numbers = [(value, count) for value, count in said if count and not math.isnan(value)]
            if not numbers:
                merged = math.nan
            elif name.endswith(("_min", "_max")):
                merged = (min if name.endswith("_min") else max)(value for value, _ in numbers)
            else:
                merged = sum(value * count for value, count in numbers) / sum(count for _, count in numbers)
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
        of_prompts = prompts_of(ids[:, prompts], mask[:, prompts], shares_prompts(model))
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


def _padding_of(name: str) -> int:
    """What one of the batch's tensors has where nothing is. A ratio of one is none: vespo multiplies all of them."""
    return 1 if name == "importance_sampling_ratio" else 0


def _joined(slices: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Passes of one generation as one batch."""
    return {
        name: value if value.ndim == 0 else torch.cat([each[name] for each in slices])
        for name, value in slices[0].items()
        if value is not None
    }


def _chosen(batch: Mapping[str, torch.Tensor], places: Sequence[int], rows: int) -> MicroBatch:
    """Some sequences of a batch, and empty ones after them up to `rows`; a ratio of one is none."""
    chosen = MicroBatch()
    for name, value in batch.items():
        if value.ndim == 0:
            chosen[name] = value
            continue
        taken = value[torch.tensor(places, device=value.device)]
        nothing = taken.new_full((rows - len(places), *taken.shape[1:]), _padding_of(name))
        chosen[name] = torch.cat([taken, nothing])
    return chosen
