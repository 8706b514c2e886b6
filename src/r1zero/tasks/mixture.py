"""How many problems each part of a mixture gives, and which."""

import random
from collections.abc import Sequence
from fractions import Fraction

from r1zero.tasks.problem import DatasetError, Problem


def counts(weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Problems to take from each part: in the proportion of the weights, and as many as the scarcest part allows.

    No problem is taken twice: the part that is scarce for its weight gives all it has. Shares that come out fractional
    are rounded down.

    >>> counts([1, 1], [100, 40]), counts([3, 1], [100, 40])
    ([40, 40], [100, 33])
    """
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 as it was written, not its nearest binary fraction
    unit = min(Fraction(have) / weight for weight, have in zip(exact, available, strict=True))
    return [int(unit * weight) for weight in exact]


def draw(parts: Sequence[Sequence[Problem]], weights: Sequence[float], seed: int) -> list[list[Problem]]:
    """The problems of each part that an epoch holds, drawn by `seed`, in the order of their dataset.

    Raises:
        DatasetError: when a part would give nothing.
    """
    drawn = []
    wanted = counts(weights, [len(part) for part in parts])
    for part, weight, count in zip(parts, weights, wanted, strict=True):
        if not count:
            raise DatasetError(
                f"mixture: the weight {weight:g} gives no problem to a part of {len(part)}; the parts would give "
                f"{wanted}: raise that weight, or leave the part out"
            )
        chosen = random.Random(seed).sample(range(len(part)), count)
        drawn.append([part[index] for index in sorted(chosen)])
    return drawn
