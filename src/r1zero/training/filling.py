"""Which sequences make which micro-batch: as few passes as a budget of tokens allows, of nearly equal work."""

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Prompt(NamedTuple):
    """What a sequence begins with.

    Attributes:
        number: the same for all sequences that begin with the same prompt.
        shared: its first tokens, which are laid down once in a micro-batch; 0 where prompts are repeated.
    """

    number: int
    shared: int


@dataclass(frozen=True)
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


def teaching(lengths: Sequence[int], learnt: Sequence[int], moves: Sequence[int], shares: int) -> list[int]:
    """Places of the sequences that change the weights, and of as many others as make a multiple of `shares`.

    A sequence without an advantage adds nothing to the policy's loss, and one without tokens to learn from nothing to
    any. What the loss is divided by does not depend on who is left out. The others are the shortest of those that have
    tokens of which something can be said: each share of a pass must have one, and none has to take two for that.

    >>> teaching([9, 9, 4, 7], learnt=[5, 5, 1, 0], moves=[1, 0, 0, 1], shares=2)
    [0, 2]

    Args:
        lengths: of the sequences, tokens.
        learnt: of them, to learn from.
        moves: by sequence, whether it adds to the loss at all.
        shares: processes among which they are divided.
    """
    moving = [place for place, (tokens, moved) in enumerate(zip(learnt, moves, strict=True)) if tokens and moved]
    others = sorted(
        set(range(len(lengths))) - set(moving), key=lambda place: (not learnt[place], lengths[place], place)
    )
    count = max(1, math.ceil(len(moving) / shares)) * shares
    return sorted(moving + others[: count - len(moving)])


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
