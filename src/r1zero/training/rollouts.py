"""Where the trainer's completions come from: the policy server, or the trainer's own process, behind one interface.

`submit` starts a round and `collect` waits for it, so that a trainer may do something else in between.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from r1zero.policy_client import PolicyClient, Rollout, Ticket


class Rollouts(Protocol):
    """Completions of prompts, each with the policy version that made it.

    The prompts come as TRL gives them: each as often as completions of it are wanted, side by side.
    """

    def submit(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Mapping[str, Any],
        seed: int | None = None,
    ) -> Any:
        """Start a round and return the ticket for it.

        Args:
            prompt_ids: token ids, one entry for each completion.
            num_generations: completions of one prompt that belong together.
            sampling: vLLM's sampling parameters.
            seed: of the first completion; the one after it has the next seed, and so on. None draws as it comes.
        """

    def wait(self, ticket: Any, seconds: float) -> bool:
        """Whether `collect` would return or raise at once, waiting so long for it at most."""

    def cancel(self, ticket: Any) -> None:
        """Give a round up."""

    def collect(self, ticket: Any) -> list[Rollout]:
        """Wait for a round: one rollout for each entry of `prompt_ids`, in that order."""


class ServerRollouts:
    """Completions from the policy servers; `Rollouts` says how."""

    def __init__(self, client: PolicyClient, policy: Callable[[], tuple[int | None, str | None]]) -> None:
        """
        Args:
            client: of the servers.
            policy: the policy version published last, None before the first, and the adapter's name where it is
                served by one.
        """
        self._client, self._policy = client, policy

    def submit(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Mapping[str, Any],
        seed: int | None = None,
    ) -> Ticket:
        version, adapter = self._policy()
        if version is None:
            raise RuntimeError("no policy version was published: the servers' policy is not the trainer's")
        groups = list(_groups(prompt_ids, num_generations))
        counts = [count for _, count in groups]
        # vLLM gives the completions of one request the seeds that follow its own.
        seeds = None if seed is None else [seed + before for before in itertools.accumulate([0, *counts[:-1]])]
        return self._client.submit(
            [ids for ids, _ in groups], sampling, counts, adapter, expected_version=version, seeds=seeds
        )

    def wait(self, ticket: Ticket, seconds: float) -> bool:
        return self._client.wait(ticket, seconds)

    def cancel(self, ticket: Ticket) -> None:
        self._client.cancel(ticket)

    def collect(self, ticket: Ticket) -> list[Rollout]:
        return self._client.collect(ticket)


@dataclass(frozen=True)
class Round:
    """What `InProcessRollouts` was asked for."""

    prompt_ids: list[list[int]]
    num_generations: int
    sampling: Mapping[str, Any]


class InProcessRollouts:
    """Completions made in the trainer's process, when they are collected; `Rollouts` says how."""

    def __init__(
        self,
        generate: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]],
        version: Callable[[], int],
        end_token_ids: Collection[int] = (),
    ) -> None:
        """
        Args:
            generate: from prompts and num_generations to the completions' token ids and, where it keeps them, the
                sampled tokens' logprobs; it has its sampling parameters from elsewhere.
            version: of the policy, in optimizer steps.
            end_token_ids: a completion of full length that ends with one of them was not cut off.
        """
        self._generate, self._version, self._end_token_ids = generate, version, frozenset(end_token_ids)

    def submit(
        self,
        prompt_ids: Sequence[Sequence[int]],
        num_generations: int,
        sampling: Mapping[str, Any],
        seed: int | None = None,
    ) -> Round:
        if seed is not None:
            raise ValueError("only a policy server draws with the seeds that it is given")
        return Round([list(ids) for ids in prompt_ids], num_generations, dict(sampling))

    def wait(self, ticket: Round, seconds: float) -> bool:
        return True

    def cancel(self, ticket: Round) -> None:
        pass

    def collect(self, ticket: Round) -> list[Rollout]:
        version = self._version()
        completions, logprobs = self._generate(ticket.prompt_ids, ticket.num_generations)
        values = [None] * len(completions) if logprobs is None else [tuple(each) for each in logprobs]
        longest = ticket.sampling.get("max_tokens")
        return [
            Rollout(tuple(prompt), tuple(ids), each, version, self._clipped(ids, longest), "")
            for prompt, ids, each in zip(ticket.prompt_ids, completions, values, strict=True)
        ]

    def _clipped(self, ids: Sequence[int], longest: int | None) -> bool:
        return longest is not None and len(ids) >= longest and ids[-1] not in self._end_token_ids


def _groups(prompt_ids: Sequence[Sequence[int]], most: int) -> Iterator[tuple[Sequence[int], int]]:
    """Equal neighbours as one prompt and their number, at most `most`: a group that is asked for with one request."""
    start = 0
    while start < len(prompt_ids):
        end = start + 1
        while end < len(prompt_ids) and end - start < most and list(prompt_ids[end]) == list(prompt_ids[start]):
            end += 1
        yield prompt_ids[start], end - start
        start = end
