"""Answers by transformers in this process, where there is no vLLM: slower, the same whenever it is asked."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from r1zero.evaluation.asking import Answered, Ask, Completion, OnProgress
from r1zero.evaluation.models import Candidate, rounded_base

BATCH_TOKENS = {False: 16_384, True: 262_144}  # of prompts and completions at once, by whether there is a GPU
MOST_SEQUENCES = {False: 32, True: 256}


class InProcessEngine:
    """Loads one model after the other. An adapter stays one: nothing is merged.

    Args:
        dtype: of the weights; None: bfloat16 on a GPU, float32 on the CPU.
    """

    def __init__(self, dtype: str | None = None) -> None:
        self._gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if self._gpu else "cpu")
        self._dtype = dtype or ("bfloat16" if self._gpu else "float32")

    def description(self) -> dict[str, Any]:
        """What generated, for the result."""
        device = "gpu" if self._gpu else "cpu"
        return {"engine": "transformers", "device": device, "dtype": self._dtype, "exact": True}

    def answer(self, asks: Sequence[Ask], on_progress: OnProgress) -> Iterator[Answered]:
        """See `asking.Engine`."""
        by_model: dict[Candidate, list[Ask]] = defaultdict(list)
        for ask in asks:
            by_model[ask.candidate].append(ask)
        for candidate, own in by_model.items():
            on_progress(f"loading {candidate.label}", 0, 0)
            model = self._load(candidate)
            for ask in own:
                yield Answered(ask, self._answers(model, ask, on_progress))
            del model
            if self._gpu:
                torch.cuda.empty_cache()

    def _load(self, candidate: Candidate) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            rounded_base(candidate) if candidate.rounded else candidate.base,
            revision=candidate.revision or "main",
            dtype=getattr(torch, self._dtype),
            trust_remote_code=candidate.trust_remote_code,
        )
        if candidate.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(candidate.adapter))
        return model.to(self._device).eval()

    def _answers(self, model: Any, ask: Ask, on_progress: OnProgress) -> tuple[tuple[Completion, ...], ...]:
        """Batches of prompts of like length, which are always the same ones, each with a seed of its own."""
        samples = ask.protocol.samples
        wanted = [(index, sample) for index in range(len(ask.prompt_ids)) for sample in range(samples)]
        wanted.sort(key=lambda each: (len(ask.prompt_ids[each[0]]), each))
        found: dict[tuple[int, int], Completion] = {}
        at = 0
        while at < len(wanted):
            batch = self._batch(ask, wanted[at:])
            on_progress(f"{ask.candidate.label} on {ask.questions.title}", at, len(wanted))
            with torch.random.fork_rng(devices=[self._device] if self._gpu else []):
                torch.manual_seed(ask.protocol.seed * 1_000_003 + at)
                made = self._generate(model, ask, [index for index, _ in batch])
            found |= dict(zip(batch, made, strict=True))
            at += len(batch)
        return tuple(tuple(found[index, sample] for sample in range(samples)) for index in range(len(ask.prompt_ids)))

    def _batch(self, ask: Ask, left: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The first of `left` that fit together."""
        count = 1
        for each in left[1 : MOST_SEQUENCES[self._gpu]]:
            tokens = len(ask.prompt_ids[each[0]]) + max(ask.limits[each[0]], ask.limits[left[0][0]])
            if (count + 1) * tokens > BATCH_TOKENS[self._gpu]:
                break
            count += 1
        return left[:count]

    @torch.inference_mode()
    def _generate(self, model: Any, ask: Ask, indices: Sequence[int]) -> list[Completion]:
        protocol, prompts = ask.protocol, [ask.prompt_ids[index] for index in indices]
        width = max(map(len, prompts))
        pad = ask.tokenizer.pad_token_id if ask.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(each)) + list(each) for each in prompts])
        mask = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in prompts])
        sampling: dict[str, Any] = {"do_sample": False}
        if not protocol.greedy:
            sampling = {"do_sample": True, "temperature": protocol.temperature, "top_p": protocol.top_p, "top_k": 0}
        stop = {"stop_strings": list(ask.stop.strings), "tokenizer": ask.tokenizer} if ask.stop else {}
        limit = max(ask.limits[index] for index in indices)
        made = model.generate(
            input_ids=ids.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=GenerationConfig(
                max_new_tokens=limit, eos_token_id=list(ask.end_ids) or None, pad_token_id=pad, **sampling
            ),
            **stop,
        )
        return [
            self._completion(ask, row, ask.limits[index])
            for index, row in zip(indices, made[:, width:].tolist(), strict=True)
        ]

    @staticmethod
    def _completion(ask: Ask, row: list[int], limit: int) -> Completion:
        """One row of what was generated, up to its end; after that there is padding."""
        ends = [at for at, token in enumerate(row[:limit]) if token in ask.end_ids]
        kept = row[: ends[0] + 1] if ends else row[:limit]
        return ask.finished(kept, not ends)
