"""Gold against answer: one of four verdicts, never a bare number.

Most answers are decided at once, by reading them; what needs algebra goes to worker processes with a limit of time and
memory for each answer. ``python -m r1zero.tasks.verifier IN.jsonl OUT.jsonl`` grades a file.
"""

import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import TracebackType
from typing import Self

from r1zero.tasks.answers import ANSWER_CHOICES, ANSWER_FORMATS, committed
from r1zero.tasks.mathematics import equivalence
from r1zero.tasks.mathematics.latex import MOST_CHARACTERS
from r1zero.tasks.mathematics.notation import read
from r1zero.tasks.mathematics.values import Number, Unreadable
from r1zero.tasks.worker_pool import Outcome, WorkerPool

logger = logging.getLogger(__name__)

ANSWER_MATCHES = ("math", "exact")

# A batch of 128 completions that all overrun is to be decided within half a minute on two CPUs. Where few have to be
# decided each may take longer: of 307 rewritten golds of MATH-500, Minerva and OlympiadBench five took 0.2 to 0.45 s.
CPU_SECONDS = 0.2
MOST_CPU_SECONDS = 0.6
BATCH_CPU_SECONDS = 128 * CPU_SECONDS
WALL_SECONDS = 2.5
# Golds are read once and by somebody trusted.
GOLD_CPU_SECONDS = 3.0
GOLD_WALL_SECONDS = 20.0
MEMORY_BYTES = 1 << 30
CACHED_PAIRS = 200_000
_SHORTEST_COPY = 3  # characters; a symbol of the question may well be the answer


class Verdict(StrEnum):
    """What became of a completion's answer. The four are counted apart: only the first is worth a reward.

    UNPARSED: the completion commits to no answer, or the answer is not one in a notation that is known here.
    TIMED_OUT: the answer could not be decided within its limits of time and memory.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Graded:
    r"""A completion's answer and its verdict.

    >>> Verifier().grade([r"... \boxed{\frac{84}{2}}"], ["42"])[0].verdict
    <Verdict.CORRECT: 'correct'>

    Attributes:
        answer: the text that the completion commits to, without its tag or box; None for none.
        verdict: against the gold.
        seconds: what deciding it took, of a worker's time where a worker was asked; 0 for a repeated pair.
    """

    answer: str | None
    verdict: Verdict
    seconds: float = 0.0


class Verifier:
    """Grades completions. Thread-safe. Its processes start when needed, or with `begin`; they end with `close`."""

    def __init__(
        self,
        *,
        answer_format: str = "boxed",
        answer_choice: str = "agreed",
        answer_match: str = "math",
        remove_commas: bool = True,
        numbers: bool = False,
        workers: int | None = None,
    ) -> None:
        r"""Starts nothing yet.

        Args:
            answer_format: where an answer stands: "tagged", in ``<answer>``, or "boxed", in ``\boxed{}``.
            answer_choice: of several answers "first", "last", or "agreed": contradicting ones are no answer.
            answer_match: "math": equal as mathematics; "exact": R1RL's rule, equal as text.
            remove_commas: for "exact": commas do not count. R1RL removes them from the gold only.
            numbers: for "math": an answer has to be a plain number. A calculation that is left undone, 9*2 for 18, is
                none; GSM8K asks for numbers only.
            workers: worker processes; None: one for each CPU this process may use, 4 at most.
        """
        for name, value, legal in (
            ("answer_format", answer_format, ANSWER_FORMATS),
            ("answer_choice", answer_choice, ANSWER_CHOICES),
            ("answer_match", answer_match, ANSWER_MATCHES),
        ):
            if value not in legal:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(legal)}")
        self.answer_format = answer_format
        self.answer_choice = answer_choice
        self.answer_match = answer_match
        self.remove_commas = remove_commas
        self.numbers = numbers
        self._workers = workers
        self._pool: WorkerPool | None = None
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()

    def begin(self) -> None:
        """Start the worker processes, where answers may need them, and do not wait: they take seconds to be ready."""
        if self.answer_match == "math":
            self._workers_for_algebra().begin()

    def grade(
        self, completions: Sequence[str], golds: Sequence[str], questions: Sequence[str] | None = None
    ) -> list[Graded]:
        """One `Graded` for each completion and its gold. What stands beside a completion never changes its verdict.

        Args:
            completions: what the model wrote.
            golds: the right answers.
            questions: what was asked, where it is known: an expression that is copied from the question ("Compute
                513^2 - 487^2") is then no answer, though it is equal to the gold.
        """
        found = [self._committed(completion) for completion in completions]
        # A completion that commits to several answers is decided from the last one backwards, while they are right:
        # so a hostile completion costs one answer or two, however many it holds.
        decided: dict[tuple[str, str], tuple[Verdict, float]] = {}
        left = [(gold, list(answers)) for gold, answers in zip(golds, found, strict=True) if answers]
        while left:
            asked = [((gold, answers.pop()), answers) for gold, answers in left]
            decided |= self._decide({pair for pair, _ in asked} - decided.keys())
            left = [(pair[0], answers) for pair, answers in asked if answers and decided[pair][0] is Verdict.CORRECT]
        graded = [_combined(gold, answers, decided) for gold, answers in zip(golds, found, strict=True)]
        if questions is None or self.answer_match == "exact":
            return graded
        return [
            replace(one, verdict=Verdict.WRONG) if _is_copied(one, gold, question) else one
            for one, gold, question in zip(graded, golds, questions, strict=True)
        ]

    def check_golds(self, golds: Sequence[str], numbers: bool = False) -> list[str | None]:
        """For each gold None, when it can be read and equals itself; otherwise why a right answer could go unseen.

        Args:
            golds: any number of them; repeated ones are looked at once.
            numbers: every gold must be a plain number, as in GSM8K.
        """
        if numbers:
            return [None if _is_number(gold) else "is not a plain number" for gold in golds]
        if self.answer_match == "exact":
            return [None if gold.strip() else "is empty" for gold in golds]
        distinct = list(dict.fromkeys(golds))
        reasons: dict[str, str | None] = {}
        left: list[str] = []
        for gold in distinct:
            try:
                equivalence.check(gold, _ask_later)
                reasons[gold] = None
            except NeedsAlgebra:
                left.append(gold)
            except Unreadable as error:
                reasons[gold] = str(error)
        outcomes: list[Outcome] = []
        if left:
            with self._new_pool(GOLD_CPU_SECONDS, GOLD_WALL_SECONDS) as pool:
                outcomes = pool.map([(gold, None) for gold in left])
        for gold, outcome in zip(left, outcomes, strict=True):
            ended = f"cannot be read within its limits ({outcome.ended})"
            reasons[gold] = outcome.value if outcome.ended == "returned" else ended
        return [reasons[gold] for gold in golds]

    def close(self) -> None:
        """End the worker processes."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _committed(self, completion: str) -> tuple[str, ...]:
        answers = committed(completion, self.answer_format, self.answer_choice)
        if self.answer_match == "math" or not self.remove_commas:
            return answers
        return tuple(dict.fromkeys(short for answer in answers if (short := answer.replace(",", ""))))

    def _same_text(self, gold: str, answer: str) -> bool:
        return (gold.replace(",", "") if self.remove_commas else gold) == answer

    def _decide(self, pairs: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[Verdict, float]]:
        decided: dict[tuple[str, str], tuple[Verdict, float]] = {}
        if self.answer_match == "exact":
            return {pair: (Verdict.CORRECT if self._same_text(*pair) else Verdict.WRONG, 0.0) for pair in pairs}
        left: list[tuple[str, str]] = []
        for pair in sorted(pairs):
            known = self._recall(pair)
            if known is not None:
                decided[pair] = known, 0.0
                continue
            began = time.perf_counter()
            try:
                if self.numbers and not equivalence.is_number(pair[1]):
                    verdict = Verdict.UNPARSED
                else:
                    verdict = Verdict.CORRECT if equivalence.same(*pair, _ask_later) else Verdict.WRONG
            except NeedsAlgebra:
                left.append(pair)
                continue
            except Unreadable:
                verdict = Verdict.UNPARSED
            except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
                # A fault of the reader's must not cost a run; the answer earns nothing, and the log says so.
                logger.warning("could not read the answer %r: %r; please report it", pair[1], error)
                verdict = Verdict.UNPARSED
            decided[pair] = verdict, time.perf_counter() - began
        for pair, outcome in zip(left, self._ask(left), strict=True):
            decided[pair] = _verdict_of(outcome), outcome.seconds
        self._remember(decided)
        return decided

    def _ask(self, calls: Sequence[tuple[str, str]]) -> list[Outcome]:
        if not calls:
            return []
        share = min(BATCH_CPU_SECONDS / len(calls), MOST_CPU_SECONDS)
        return self._workers_for_algebra().map(calls, max(share, CPU_SECONDS))

    def _workers_for_algebra(self) -> WorkerPool:
        with self._lock:
            if self._pool is None:
                self._pool = self._new_pool(CPU_SECONDS, WALL_SECONDS)
            return self._pool

    def _new_pool(self, cpu_seconds: float, wall_seconds: float) -> WorkerPool:
        return WorkerPool(
            "r1zero.tasks.mathematics.algebra:decide",
            workers=self._workers,
            cpu_seconds=cpu_seconds,
            wall_seconds=wall_seconds,
            memory_bytes=MEMORY_BYTES,
        )

    def _recall(self, pair: tuple[str, str]) -> Verdict | None:
        with self._lock:
            known = self._known.get(pair)
            if known is not None:
                self._known.move_to_end(pair)
            return known

    def _remember(self, decided: dict[tuple[str, str], tuple[Verdict, float]]) -> None:
        with self._lock:
            for pair, (verdict, _) in decided.items():
                self._known[pair] = verdict
            while len(self._known) > CACHED_PAIRS:
                self._known.popitem(last=False)


class NeedsAlgebra(Exception):
    """Two expressions have to be compared: a matter for a worker process."""


_TYPOGRAPHY = re.compile(r"\s|\$|\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-z])|(?<=\\)[dt](?=frac|binom)")


def _is_copied(graded: Graded, gold: str, question: str) -> bool:
    """Whether a right answer is an expression that stands in the question, where the gold does not."""
    if graded.verdict is not Verdict.CORRECT or graded.answer is None:
        return False
    answer, asked = _TYPOGRAPHY.sub("", graded.answer), _TYPOGRAPHY.sub("", question)
    if len(answer) < _SHORTEST_COPY or answer not in asked or _TYPOGRAPHY.sub("", gold) in asked:
        return False
    return not equivalence.is_number(graded.answer) or "/" in answer or "frac" in answer


def _is_number(gold: str) -> bool:
    try:
        return isinstance(read(gold), Number)
    except Unreadable:
        return False


def _ask_later(gold: str, answer: str) -> bool:
    raise NeedsAlgebra


def _verdict_of(outcome: Outcome) -> Verdict:
    if outcome.ended == "returned":
        return Verdict(outcome.value)
    # What sympy gives up on is no answer; what it cannot finish is counted apart.
    return Verdict.UNPARSED if outcome.ended == "raised" else Verdict.TIMED_OUT


def _combined(gold: str, answers: tuple[str, ...], decided: dict[tuple[str, str], tuple[Verdict, float]]) -> Graded:
    """The verdict of a completion: all of its answers are right, or they agree on something else, or it has none."""
    if not answers:
        return Graded(None, Verdict.UNPARSED)
    known = [decided[gold, answer] for answer in answers if (gold, answer) in decided]
    verdict, seconds = decided[gold, answers[-1]][0], sum(seconds for _, seconds in known)
    if verdict is Verdict.CORRECT:
        agreed = all(each is Verdict.CORRECT for each, _ in known)
    else:
        agreed = verdict is Verdict.TIMED_OUT or _agree(answers)
    if not agreed:
        return Graded(None, Verdict.UNPARSED, seconds)
    return Graded(answers[-1][:MOST_CHARACTERS], verdict, seconds)


def _agree(answers: tuple[str, ...]) -> bool:
    """Whether wrong answers are at least the same one, as far as that can be told without algebra."""
    try:
        return all(equivalence.same(answers[0], answer, _ask_later) for answer in answers[1:])
    except (NeedsAlgebra, Unreadable):
        return False


if __name__ == "__main__":
    from r1zero.tasks.grade_file import main

    sys.exit(main())
