"""Sums of two two-digit numbers: the task that the embedded model can learn on a laptop.

Every problem exists before any model does, so nothing is downloaded. Of all 8100 ordered pairs 500 are held out for
testing, always together with their mirror image: whoever saw 38 + 47 has not been asked 47 + 38 for the first time.
"""

import random

from r1zero.tasks.problem import Problem

NUMBERS = range(10, 100)
HELD_OUT_PAIRS = 250  # unordered, of two different numbers: 500 test problems
HELD_OUT_SEED = 3407  # what is held out never depends on the caller's seed

# How often a careless writer goes wrong. Together: right about one time in three.
GUESS_RATE = 0.66  # writes no steps and answers with a number nearby
SLIP_RATE = 0.005  # at each step: one too many or one too few
FORGOTTEN_CARRY_RATE = 0.02  # where there is a carry


def pairs(split: str) -> list[tuple[int, int]]:
    """All pairs of one split, "train" or "test", in ascending order."""
    if split not in ("train", "test"):
        raise ValueError(f"arithmetic has the splits 'train' and 'test', not {split!r}")
    unordered = [(a, b) for a in NUMBERS for b in NUMBERS if a < b]
    held_out = set(random.Random(HELD_OUT_SEED).sample(unordered, HELD_OUT_PAIRS))
    return [(a, b) for a in NUMBERS for b in NUMBERS if ((min(a, b), max(a, b)) in held_out) == (split == "test")]


def question(a: int, b: int) -> str:
    """The text put to the model.

    >>> question(47, 38)
    'What is 47 + 38?'
    """
    return f"What is {a} + {b}?"


def worked_solution(a: int, b: int) -> str:
    r"""The column addition of `a` and `b`.

    >>> worked_solution(47, 38)
    'ones 7+8=15\ntens 4+3+1=8'
    """
    return _column_addition(a, b, ones_slip=0, carry_forgotten=False, tens_slip=0)[0]


def careless_solution(a: int, b: int, rng: random.Random) -> tuple[str, int]:
    """Steps and answer of a writer who can add but takes little care: the embedded model's pretraining text.

    A slip is carried through to the answer, so a wrong step leads to a wrong answer, and someone who skips the steps is
    seldom right. A reward for the answer alone can therefore teach both to show the steps and to take care in each.
    """
    if rng.random() < GUESS_RATE:
        return "", a + b + rng.randint(-10, 10)
    return _column_addition(
        a,
        b,
        ones_slip=_slip(rng),
        carry_forgotten=rng.random() < FORGOTTEN_CARRY_RATE,
        tens_slip=_slip(rng),
    )


def load(split: str, seed: int = 0) -> list[Problem]:
    """The problems of one split; `seed` decides their order and nothing else."""
    problems = [
        Problem(question(a, b), gold=str(a + b), source=f"arithmetic/{split}", solution=worked_solution(a, b))
        for a, b in pairs(split)
    ]
    random.Random(seed).shuffle(problems)
    return problems


def _slip(rng: random.Random) -> int:
    return rng.choice((-1, 1)) if rng.random() < SLIP_RATE else 0


def _column_addition(a: int, b: int, *, ones_slip: int, carry_forgotten: bool, tens_slip: int) -> tuple[str, int]:
    ones = max(a % 10 + b % 10 + ones_slip, 0)
    carry = 0 if carry_forgotten else ones // 10
    tens = a // 10 + b // 10 + carry + tens_slip
    carried = f"+{carry}" if carry else ""
    steps = f"ones {a % 10}+{b % 10}={ones}\ntens {a // 10}+{b // 10}{carried}={tens}"
    return steps, 10 * tens + ones % 10
