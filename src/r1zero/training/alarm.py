"""When a share of the verdicts says that something is wrong, said once and not at every step."""

from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 10  # generations; one alone says little where a batch is small

_MEANING = {
    "unparsed": "have no answer that could be read",
    "timed_out": "have an answer that the verifier gave up on",
}
_REMEDY = {
    "unparsed": "read some in rollouts/: is max_completion_length long enough, and does prompt_template ask for "
    "the answer_format?",
    "timed_out": "read some in rollouts/: does the model answer with expressions that nobody can evaluate, or is the "
    "machine short of CPUs?",
}


class Alarm:
    """Watches the share of one verdict over the last generations.

    Attributes:
        verdict: "unparsed" or "timed_out".
        threshold: the largest share that is not worth a word.
    """

    def __init__(self, verdict: str, threshold: float) -> None:
        self.verdict = verdict
        self.threshold = threshold
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._said = False

    def add(self, share: float) -> float | None:
        """Take one generation's share; the mean share when it has just crossed the threshold, else None.

        Nothing is said before there are `WINDOW` generations. Once said, it is armed again when the mean is back at or
        below the threshold.
        """
        self._recent.append(share)
        mean = sum(self._recent) / len(self._recent)
        above = len(self._recent) == WINDOW and mean > self.threshold
        news = above and not self._said
        self._said = above
        return mean if news else None

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        return {"recent": list(self._recent), "said": self._said}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._said = state["said"]

    def message(self, share: float) -> str:
        """What a person is told.

        >>> Alarm("timed_out", 0.01).message(0.05)[:90]
        '5.0 % of the completions of the last 10 generations have an answer that the verifier gave '
        """
        return (
            f"{100 * share:.1f} % of the completions of the last {WINDOW} generations {_MEANING[self.verdict]} "
            f"(alert_{self.verdict} = {self.threshold}); {_REMEDY[self.verdict]}"
        )
