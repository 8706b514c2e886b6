"""The window after this one: asked of the policy servers while the trainer still learns from this one.

So both sides work at once. What is learned from was then made by the version of the window before, no older and no
newer one, which the importance sampling correction answers for (Noukhovitch et al. 2024, "Asynchronous RLHF", section
3, calls it one-step off-policy). A checkpoint holds the completions, since nobody could make them again: the weights
that made them are gone.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from r1zero.policy_client import Rollout
from r1zero.restarts import Refusal
from r1zero.training.rollouts import Rollouts


class NextWindow:
    """This process's completions of the next window, under way or there.

    Example:
        >>> made = Rollout((1, 2), (3,), (-0.5,), 4, False, "")
        >>> NextWindow.restored({"number": 5, "version": 4, "rollouts": packed([made])}).take(5, [[1, 2]]) == [made]
        True

    Args:
        number: of the window, from 0 on.
        version: the policy version that it was asked of.
        source: where.
        ticket: for it there.
    """

    def __init__(self, number: int, version: int, source: Rollouts | None, ticket: Any) -> None:
        self._number, self._version = number, version
        self._source, self._ticket = source, ticket
        self._completed: list[Rollout] | None = None

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "NextWindow":
        """One whose `state` was kept."""
        window = cls(state["number"], state["version"], None, None)
        window._completed = unpacked(state["rollouts"])
        return window

    def state(self) -> dict[str, Any]:
        """What `restored` makes it of again: tensors and plain values. All completions must be there."""
        return {"number": self._number, "version": self._version, "rollouts": packed(self._completed or [])}

    def wait(self, seconds: float) -> bool:
        """Whether all completions are there; looks on for so long at most.

        Raises:
            PolicyServerError: as `PolicyClient.collect`, where they will not come.
        """
        if self._completed is None and self._source is not None and self._source.wait(self._ticket, seconds):
            self._completed = self._source.collect(self._ticket)
        return self._completed is not None

    def cancel(self) -> None:
        """Give up what is still under way."""
        if self._completed is None and self._source is not None:
            self._source.cancel(self._ticket)

    def take(self, number: int, prompt_ids: Sequence[Sequence[int]]) -> list[Rollout]:
        """The completions, for the window that begins now. All of them must be there.

        Args:
            number: of that window.
            prompt_ids: its prompts.

        Raises:
            Refusal: they belong to another window, other prompts or another policy version.
        """
        completed = self._completed or []
        versions = {each.policy_version for each in completed}
        if number != self._number or versions != {self._version}:
            raise Refusal(
                f"window {number} begins, and at hand are completions of window {self._number} by the policy versions "
                f"{sorted(map(str, versions))}, asked of version {self._version}: they cannot be told apart any more"
            )
        if [list(each.prompt_ids) for each in completed] != [list(ids) for ids in prompt_ids]:
            raise Refusal(f"the completions of window {number} were made for other prompts than it has")
        return completed


def packed(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rollouts as a few tensors: thousands of numbers as single objects take seconds to read. Texts are left out.

    Returns:
        "prompts" and "completions" (int64: all ids in a row, and how many each has), "logprobs" (float64, as many as
        ids of completions), "versions" and "clipped" (one for each).
    """
    return {
        "prompts": _in_a_row([each.prompt_ids for each in rollouts]),
        "completions": _in_a_row([each.completion_ids for each in rollouts]),
        "logprobs": torch.tensor([value for each in rollouts for value in each.logprobs or ()], dtype=torch.float64),
        "versions": [each.policy_version for each in rollouts],
        "clipped": [each.clipped for each in rollouts],
    }


def unpacked(state: Mapping[str, Any]) -> list[Rollout]:
    """What `packed` was given, but for the texts."""
    completions = list(_apart(*state["completions"]))
    logprobs = iter(state["logprobs"].tolist())
    each = zip(_apart(*state["prompts"]), completions, state["versions"], state["clipped"], strict=True)
    return [
        Rollout(prompt, ids, tuple(itertools.islice(logprobs, len(ids))), version, clipped, "")
        for prompt, ids, version, clipped in each
    ]


def _in_a_row(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = [token for each in sequences for token in each]
    return torch.tensor(ids, dtype=torch.int64), torch.tensor([len(each) for each in sequences], dtype=torch.int64)


def _apart(ids: torch.Tensor, lengths: torch.Tensor) -> Iterator[tuple[int, ...]]:
    row = iter(ids.tolist())
    return (tuple(itertools.islice(row, length)) for length in lengths.tolist())
