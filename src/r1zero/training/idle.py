"""How much of a step's time the policy servers had nothing to generate, and the trainer nothing to learn from."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from r1zero.policy_client import Interval


@dataclass(frozen=True)
class Account:
    """What one trainer process knows of the same time.

    >>> one = Account(10.0, 4.0, [[(0.0, 2.0), (6.0, 8.0)], []])
    >>> shares([one, Account(10.0, 5.0, [[(1.0, 3.0)], [(9.0, 10.5)]])])
    {'idle/server': 0.7, 'idle/trainer': 0.45}

    Attributes:
        seconds: how long it was; measurements on the way, which belong to no step, are cut out.
        waited: of them, for completions; seconds.
        busy: for each server when it had requests of this process for completions under way, in seconds before the end.
    """

    seconds: float
    waited: float
    busy: list[list[Interval]]


def shares(accounts: Sequence[Account]) -> dict[str, float]:
    """The metrics `idle/server` and `idle/trainer`.

    Args:
        accounts: of all trainer processes; the first one's seconds are what the servers' idle time is a share of.
    """
    seconds = accounts[0].seconds
    servers = zip(*(each.busy for each in accounts), strict=True)
    idle = [1 - _covered(seconds, (one for busy in server for one in busy)) / seconds for server in servers]
    waited = [each.waited / each.seconds for each in accounts]
    return {"idle/server": statistics.fmean(idle), "idle/trainer": statistics.fmean(waited)}


def _covered(seconds: float, intervals: Iterable[Interval]) -> float:
    """How much of the first `seconds` lies in at least one of the intervals."""
    covered = reached = 0.0
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached), min(end, seconds)
        if begin < end:
            covered += end - begin
            reached = end
    return covered
