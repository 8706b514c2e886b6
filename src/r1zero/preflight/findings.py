"""What a check found, and how it is told."""

from collections.abc import Iterable
from dataclasses import dataclass

LEVELS = ("fault", "warning", "note")


@dataclass(frozen=True)
class Finding:
    r"""One thing that a check found.

    >>> Finding("warning", "31 % of the completions were cut off", "raise max_completion_length").line()
    'warning: 31 % of the completions were cut off\n    -> raise max_completion_length'

    Attributes:
        level: "fault" (training cannot start), "warning" (it can, and will probably go wrong) or "note".
        text: what it is, with numbers.
        remedy: the key to change and how; "" for a note.
    """

    level: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        said = self.text if self.level == "note" else f"{self.level}: {self.text}"
        return said + (f"\n    -> {self.remedy}" if self.remedy else "")


def has_fault(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "fault" for finding in findings)
