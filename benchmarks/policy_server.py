"""What an adapter costs: publishing it, and generating with it against generating with the base alone.

    python benchmarks/policy_server.py MODEL_FOLDER [--completions 16 128] [--tokens 512] [--turns 3] [--publishes 200]

Starts `vllm serve` as a plan does (on the first GPU, or vLLM's CPU build where there is none), once for adapters under
names of their own and once for adapters folded into the weights, and publishes a LoRA of rank 64 on all seven
projections again and again. On each server base and adapter take turns; where they are folded, the base is an adapter
of zeros. What was folded is then compared with weights merged by PEFT, after the first publish as after the last.
Weights may be random: `transformers`' `Qwen2Config` of any shape, saved with any tokenizer, will do.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side.served import served

from r1zero.model_facts import PROJECTIONS
from r1zero.policy_client import PolicyClient
from r1zero.serving import FOLDED
from r1zero.training import policy_sync
from r1zero.training.probe import trainer_logprobs

RANK = 64
PROMPT_TOKENS = 128
NAMED_PUBLISHES = 12
SEQUENCES = [[5 + (i * 31 + j * (i + 3)) % 90 for j in range(PROMPT_TOKENS)] for i in range(8)]


class Policy:
    """The trainer's side: a base in the servers' dtype, and an adapter whose weights are drawn anew by number."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.accelerator, self.dtype = Accelerator(), dtype
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(self.accelerator.device)
        self.model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)))

    def draw(self, seed: int) -> None:
        """0 is an adapter that changes nothing; any other changes each weight by about a tenth of its size."""
        generator = torch.Generator(self.accelerator.device).manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.02, generator=generator) if seed else weight.zero_()

    def logprobs(self, *, merged: bool) -> torch.Tensor:
        """Of the tokens of `SEQUENCES`, by the trainer; nats."""
        if not merged:
            return _flat(trainer_logprobs(self.model, self.accelerator, SEQUENCES))
        self.model.merge_adapter()
        try:
            return _flat(trainer_logprobs(self.model, self.accelerator, SEQUENCES))
        finally:
            self.model.unmerge_adapter()


class Served:
    """One server and the publisher that speaks to it."""

    def __init__(self, client: PolicyClient, policy: Policy, folder: Path, route: str) -> None:
        self.client, self.policy = client, policy
        self._publisher = policy_sync.make(
            route,
            policy.model,
            policy.accelerator,
            client,
            publish_folder=folder,
            timeout_s=120,
            group_port=0,
            dtype=policy.dtype,
        )
        self._versions = count()
        self.seconds: list[float] = []
        self.bytes = 0

    def publish(self, seed: int) -> str | None:
        """Draw an adapter and publish it; returns the name that it has there."""
        self.policy.draw(seed)
        done = self._publisher.publish(next(self._versions))
        self.seconds.append(done.seconds)
        self.bytes = done.bytes
        return self._publisher.adapter_name

    def logprobs(self) -> torch.Tensor:
        """Of the tokens of `SEQUENCES`, by the server; nats."""
        return _flat(self.client.prompt_logprobs(SEQUENCES, timeout_s=120)[0])

    def say_publishes(self, label: str) -> None:
        print(
            f"{label}: {len(self.seconds)} publishes of {self.bytes / 1e6:.0f} MB: median "
            f"{statistics.median(self.seconds):.3f} s, {min(self.seconds):.3f} to {max(self.seconds):.3f}, the first "
            f"{self.seconds[0]:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--completions", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--publishes", type=int, default=200)
    asked = parser.parse_args()
    policy = Policy(asked.model, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    base: dict[int, float] = {}
    with serving(asked, policy, "folded") as server:
        same_after_many(server, asked.publishes)
        for completions in asked.completions:
            of_base, with_adapter = in_turns(server, asked, completions, lambda seed: server.publish(seed))
            base[completions] = of_base
            say(f"{completions} completions, folded", with_adapter, of_base)
    with serving(asked, policy, "adapter") as server:
        for seed in range(1, NAMED_PUBLISHES + 1):
            name = server.publish(seed)
        server.say_publishes("under a name")
        for completions in asked.completions:
            of_base, with_adapter = in_turns(server, asked, completions, lambda seed: name if seed else None)
            say(f"{completions} completions, base of a server for adapters", of_base, base[completions])
            say(f"{completions} completions, adapter under a name", with_adapter, base[completions])


@contextmanager
def serving(asked: argparse.Namespace, policy: Policy, route: str) -> Iterator[Served]:
    """A server for one way of publishing."""
    folded = route == "folded"
    lora: dict[str, Any] = {"lora_rank": RANK, "lora_target_modules": PROJECTIONS}
    with served(
        asked.model,
        f"publish {route}",
        adapters=not folded,
        max_model_len=PROMPT_TOKENS + asked.tokens,
        max_num_seqs=max(asked.completions),
        dtype=str(policy.dtype).removeprefix("torch."),
        **({"weight_transfer": FOLDED} if folded else lora),
    ) as server:
        yield Served(server.client, policy, server.publish_folder, route)


def same_after_many(server: Served, publishes: int) -> None:
    """Fold other adapters again and again: does the first one then still give the same policy?"""
    first = None
    for number in range(publishes):
        server.publish(1 if number in (0, publishes - 1) else number + 1)
        if number == 0:
            first = server.logprobs()
    assert first is not None  # noqa: S101 - there is at least one publish
    last = server.logprobs()
    server.say_publishes("folded")
    server.policy.draw(1)
    merged, unmerged = (server.policy.logprobs(merged=each) for each in (True, False))
    server.policy.draw(0)
    print(
        f"logprobs of {len(last)} tokens, mean |difference| in nats: folded after 1 publish to merged weights "
        f"{_apart(first, merged)}, after {publishes} {_apart(last, merged)}; after 1 to after {publishes} "
        f"{_apart(first, last)}; unmerged to merged, both by the trainer, {_apart(unmerged, merged)}; "
        f"without the adapter {_apart(server.policy.logprobs(merged=False), merged)}"
    )


def in_turns(
    server: Served, asked: argparse.Namespace, completions: int, choose: Callable[[int], str | None]
) -> tuple[float, float]:
    """Tokens a second of the base and of an adapter, in turns: the median of each."""
    sampling = {"max_tokens": asked.tokens, "min_tokens": asked.tokens, "ignore_eos": True, "temperature": 1.0}
    speeds: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(asked.turns):
        for seed, found in speeds.items():
            name = choose(seed)
            # Other prompts each time, or the prefix cache would have them.
            prompts = [[5 + (turn * 31 + i * 7 + j) % 90 for j in range(PROMPT_TOKENS)] for i in range(completions)]
            began = time.perf_counter()
            made = server.client.collect(server.client.submit(prompts, sampling, model=name))
            found.append(sum(len(each.completion_ids) for each in made) / (time.perf_counter() - began))
    turns = f"{_whole(speeds[0])} and {_whole(speeds[1])}"
    print(f"{completions} completions of {asked.tokens} tokens, tokens/s in turns: {turns}")
    return statistics.median(speeds[0]), statistics.median(speeds[1])


def say(label: str, speed: float, base: float) -> None:
    print(f"{label}: {speed:,.0f} tokens/s, {speed / base:.3f} of the base alone")


def _apart(one: torch.Tensor, other: torch.Tensor) -> str:
    difference = (one - other).abs()
    return f"{float(difference.mean()):.2g} (at most {float(difference.max()):.2g})"


def _whole(speeds: list[float]) -> str:
    return " ".join(f"{each:,.0f}" for each in speeds)


def _flat(logprobs: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for each in logprobs for value in each], dtype=torch.float64)


if __name__ == "__main__":
    main()
