"""What is said, once and not at every step, when a share of the verdicts is wrong; and what ends a run by itself.

No torch: the launcher has the outcome and the exit code of such an end from here.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from r1zero.reporting.ailments import RECENT, Signs
from r1zero.reporting.doctor import Finding, look_for
from r1zero.run_folder import RunFolder

WINDOW = 10  # generations; one alone says little where a batch is small
OUTCOME = "alarm"  # of a run that an alarm of stop_on has ended
EXIT_CODE = 4  # of the launcher then: neither a failure nor a request, and nothing starts it again by itself

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


class StopAlarms:
    """The alarms that ``stop_on`` names: rules of the doctor, looked at after each step that is logged.

    A run that was resumed is let alone for `RECENT` steps, but for nan: whoever resumed it knew of the alarm, and has
    changed something or means to go on.

    Args:
        names: of ailments.
        recipe: flat, as the doctor reads it.
        folder: the run's, whose metrics tell of the steps before a resume.
    """

    def __init__(self, names: Sequence[str], recipe: Mapping[str, Any], folder: RunFolder) -> None:
        self.names = tuple(names)
        self._recipe, self._folder = recipe, folder
        self._steps: list[dict[str, Any]] | None = None
        self._resumed_with = 0

    @property
    def on_nan(self) -> bool:
        """Whether weights that are no numbers are not to be saved."""
        return "nan" in self.names

    def look(self, metrics: Mapping[str, Any]) -> Finding | None:
        """What has come up with this step; the first of `names` that has. For the main process alone.

        Args:
            metrics: of the step, with its number as ``step``.
        """
        if self._steps is None:
            recorded = [line for line in self._folder.read_metrics() if line["kind"] == "step"]
            self._steps = [line for line in recorded if line["step"] < metrics["step"]]
            self._resumed_with = len(self._steps)
        self._steps.append(
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        )
        signs = Signs(self._recipe, self._steps)
        settled = self._resumed_with == 0 or len(self._steps) - self._resumed_with >= RECENT
        found = (look_for(name, signs) for name in self.names if settled or name == "nan")
        return next((finding for finding in found if finding), None)


def summary_of(finding: Finding) -> dict[str, str]:
    """What summary.json says of a run that this has ended."""
    return {"outcome": OUTCOME, "alarm": finding.name, "evidence": finding.evidence, "remedy": finding.remedy}
