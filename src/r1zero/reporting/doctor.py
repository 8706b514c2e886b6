"""The doctor: what holds a run back, told from its own metrics, and which key to change by how much. No torch.

It shows what the rules of `ailments` find: in the report, and in the last lines of a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from r1zero.reporting.ailments import BY_NAME, SEVERITIES, Signs
from r1zero.reporting.run_reader import Run, read_run

# Where one completion says more than a share, and of which verdict it is.
SHOWN = {"unparsed": "unparsed", "never_right": "wrong", "verifier_timeouts": "timed_out"}
SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Finding:
    """One thing that holds a run back.

    >>> Finding("clipped", "broken", "answers are cut off", "98 % of them", "max_completion_length: 12 -> 48").lines()
    ['doctor: clipped (broken): answers are cut off; 98 % of them', '    -> max_completion_length: 12 -> 48']

    Attributes:
        name: of the ailment, as docs/doctor.md and ``stop_on`` have it.
        severity: one of `SEVERITIES`.
        what: the ailment in plain words.
        evidence: the numbers that show it.
        remedy: the recipe's key to change, and by how much.
    """

    name: str
    severity: str
    what: str
    evidence: str
    remedy: str

    def lines(self) -> list[str]:
        """As a terminal shows it."""
        return [f"doctor: {self.name} ({self.severity}): {self.what}; {self.evidence}", f"    -> {self.remedy}"]


def diagnose(run: Run) -> tuple[Finding, ...]:
    """What holds `run` back, worst first; nothing where its metrics do not tell."""
    reason = str(run.summary.get("reason") or "") if run.summary.get("outcome") == "failed" else ""
    findings = examine(Signs(run.recipe, run.steps, run.evaluations, reason, run.gpus))
    return tuple(_with_example(each, run) if each.name in SHOWN else each for each in findings)


def examine(signs: Signs) -> tuple[Finding, ...]:
    """What the signs tell, worst first; what only follows from something else that was found is left out."""
    findings = [each for name in BY_NAME if (each := look_for(name, signs))]
    explained = {name for each in findings for name in BY_NAME[each.name].explains}
    kept = [each for each in findings if each.name not in explained]
    return tuple(sorted(kept, key=lambda each: SEVERITIES.index(each.severity)))


def look_for(name: str, signs: Signs) -> Finding | None:
    """One ailment by name; None where the signs do not show it."""
    ailment = BY_NAME[name]
    sign = ailment.rule(signs)
    if sign is None:
        return None
    return Finding(name, sign.severity or ailment.severity, ailment.what, sign.evidence, sign.remedy)


def last_lines(folder: Path, most: int = 3) -> list[str]:
    """What the doctor has to say at the end of a run, for the terminal; nothing rather than an error of its own."""
    try:
        findings = diagnose(read_run(folder))
    except Exception:  # noqa: BLE001 - a run's own end must be told, whatever its files hold
        return []
    lines = [line for each in findings[:most] for line in each.lines()]
    if more := [each.name for each in findings[most:]]:
        lines.append(f"doctor: and {', '.join(more)}; docs/doctor.md tells what they are")
    return lines


def _with_example(finding: Finding, run: Run) -> Finding:
    """`finding` with one of the newest completions that it is about, where there is one."""
    row = _newest(run, SHOWN[finding.name])
    if row is None:
        return finding
    answer, gold = (str(row[name])[:SHOWN_CHARACTERS] for name in ("answer", "gold"))
    said = f"one answers {answer!r} where the gold is {gold!r}"
    if finding.name == "unparsed":
        said = f"one ends {row['completion'][-SHOWN_CHARACTERS:]!r}"
    return replace(finding, evidence=f"{finding.evidence}; {said}")


def _newest(run: Run, verdict: str) -> Mapping[str, Any] | None:
    """A completion of this verdict from the last file of rollouts; None without one, or where it cannot be read."""
    import pyarrow.parquet as pq

    for file in run.rollout_files()[-1:]:
        try:
            table = pq.read_table(file.path, columns=["completion", "answer", "gold", "verdict"])
        except (OSError, ValueError):
            return None
        for row in table.to_pylist():
            if row["verdict"] == verdict:
                return dict(row)
    return None
