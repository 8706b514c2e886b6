"""A run as it stands on disk, read once: what the report, the doctor and ``--status`` look at. No torch.

Nothing is required but one file that only a run writes. A run that has just begun, an older one, a cold start or one
that failed at step 0 lacks files, metrics, steps: then there is nothing of it here, and no reader has a case for it.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from r1zero.run_folder import RunFolder, read_json

EVENTS = ("restart", "resume", "alert", "requeue")
REQUEUES = "requeues.json"  # what `r1zero.preemption` writes; it is not imported, as the trainer imports this
_ROLLOUTS = re.compile(r"(train|test)-(\d+)\.parquet")


class RunError(Exception):
    """A folder that cannot be read as a run; the message names it and says what is in the way."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run, beside its steps.

    >>> Event("resume", step=20, time=1795288341.1, text="goes on after step 20, from checkpoints/checkpoint-20").step
    20

    Attributes:
        kind: restart (server and trainer failed and were started again), resume (the trainer went on from a
            checkpoint, or anew), alert, or requeue (Slurm's).
        step: after which optimizer step it happened; of a resume, the step that it went back to.
        time: unix seconds.
        text: in words.
    """

    kind: str
    step: int
    time: float
    text: str


@dataclass(frozen=True)
class RolloutFile:
    """One file of ``rollouts/``.

    >>> RolloutFile(Path("runs/x/rollouts/train-000020.parquet"), step=20, split="train").step
    20

    Attributes:
        path: of the file.
        step: the optimizer step that learned from them, or after which an evaluation sampled them.
        split: train, or test for an evaluation.
    """

    path: Path
    step: int
    split: str


@dataclass(frozen=True)
class Run:
    """One run.

    >>> lines = ({"kind": "step", "step": 1, "reward": 0.25}, {"kind": "step", "step": 2, "reward": 0.5})
    >>> Run(RunFolder(Path("runs/x")), lines=lines).series("reward")
    ([1, 2], [0.25, 0.5])

    Attributes:
        folder: where it lies.
        recipe: recipe.yaml, resolved and flat; empty where there is none yet.
        plan: plan.txt; empty where there is none yet.
        manifest: versions.json: packages, git commit, GPUs, command line.
        status: status.json: phase, done, total, seconds left.
        summary: summary.json: how it ended; empty while it runs.
        lines: metrics.jsonl in the order of time, without what a resume has made void.
        requeues: requeues.json: ``{"time", "step"}`` of each.
        seconds: how long its processes ran, redone steps included and time in a queue left out; the start of policy
            servers is included for the last attempt only, as nothing is on record of the others'.
    """

    folder: RunFolder
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plan: str = ""
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    status: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lines: tuple[Mapping[str, Any], ...] = ()
    requeues: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.path.resolve().name

    @cached_property
    def steps(self) -> tuple[Mapping[str, Any], ...]:
        """The optimizer steps' lines by step, each step once: as it was done last."""
        by_step = {int(line["step"]): line for line in self.lines if line["kind"] == "step"}
        return tuple(by_step[step] for step in sorted(by_step))

    @property
    def evaluations(self) -> tuple[Mapping[str, Any], ...]:
        """The measurements on held-out problems by step, each as it was done last."""
        by_step = {int(line["step"]): line for line in self.lines if line["kind"] == "evaluation"}
        return tuple(by_step[step] for step in sorted(by_step))

    @property
    def publishes(self) -> tuple[Mapping[str, Any], ...]:
        """What ``publish/`` and ``probe/`` say of each step that has it, with the step."""
        found = []
        for line in self.steps:
            of_publish = {name: value for name, value in line.items() if name.startswith(("publish/", "probe/"))}
            if of_publish:
                found.append({"step": line["step"], **of_publish})
        return tuple(found)

    @property
    def events(self) -> tuple[Event, ...]:
        """Restarts, resumes, alerts and requeues in the order of time."""
        found = [_event(line) for line in self.lines if line["kind"] in EVENTS]
        found += [
            Event("requeue", int(each["step"]), float(each["time"]), "stopped by Slurm and queued again")
            for each in self.requeues
        ]
        return tuple(sorted(found, key=lambda event: event.time))

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs of the run's machines, by name."""
        return tuple(self.manifest.get("gpus") or ())

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the numbers in the steps' lines, in the order of their first appearance."""
        names = {name: None for line in self.steps for name, value in line.items() if _is_number(value)}
        return tuple(name for name in names if name not in ("kind", "time"))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps that have this metric, and its values."""
        found = [(int(line["step"]), float(line[name])) for line in self.steps if _is_number(line.get(name))]
        return [step for step, _ in found], [value for _, value in found]

    def rollout_files(self, split: str = "train") -> tuple[RolloutFile, ...]:
        """The files of completions by step."""
        found = []
        for path in (self.folder.path / "rollouts").glob(f"{split}-*.parquet"):
            if (match := _ROLLOUTS.fullmatch(path.name)) is not None:
                found.append(RolloutFile(path, int(match[2]), match[1]))
        return tuple(sorted(found, key=lambda file: file.step))


def read_run(path: str | Path) -> Run:
    """Read a run folder; a run that is still going is read as far as it has come.

    Raises:
        RunError: there is no such folder, no run in it, or a file of it that is no JSON or YAML.
    """
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise RunError(f"{path}: there is no such folder; name a run folder, such as runs/X-20261121-093000")
    files = {
        "recipe": folder.recipe,
        "manifest": folder.versions,
        "metrics": folder.metrics,
        "status": folder.status,
        "summary": folder.summary,
    }
    if not any(each.is_file() for each in files.values()):
        names = ", ".join(each.name for each in files.values())
        raise RunError(f"{path}: is no run folder, it holds none of {names}; name one, such as runs/X-20261121-093000")
    try:
        everything = folder.read_metrics_after(0)[0]
        lines = tuple(folder.read_metrics())
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder.metrics}: a line of it is not what a run writes: {error!r}") from error
    manifest, summary = _object(folder.versions), _object(folder.summary)
    return Run(
        folder=folder,
        recipe=_yaml(folder.recipe),
        plan=folder.plan.read_text(encoding="utf-8") if folder.plan.is_file() else "",
        manifest=manifest,
        status=_object(folder.status),
        summary=summary,
        lines=lines,
        requeues=tuple(_json(folder.path / REQUEUES) or ()),
        seconds=_seconds(everything, summary),
    )


def _event(line: Mapping[str, Any]) -> Event:
    kind = str(line["kind"])
    if kind == "restart":
        text = f"restart {line.get('restart')} of at most {line.get('most')}: {line.get('cause')}; {_goes_on(line)}"
    elif kind == "resume":
        text = _goes_on(line)
    else:
        text = str(line.get("message", ""))
    return Event(kind, int(line.get("step") or 0), float(line.get("time") or 0.0), text)


def _goes_on(line: Mapping[str, Any]) -> str:
    checkpoint = line.get("checkpoint")
    return f"goes on from {Path(str(checkpoint)).name}" if checkpoint else "begins anew, there is no checkpoint"


def _seconds(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> float:
    """See `Run.seconds`. An attempt begins where the run's first phase is entered and no restart has just happened."""
    attempts: list[list[float]] = []
    first = next((line["phase"] for line in lines if line["kind"] == "phase"), None)
    restarted = False
    for line in lines:
        begins = line["kind"] == "phase" and line["phase"] == first and not restarted
        if begins or not attempts:
            attempts.append([])
        attempts[-1].append(float(line.get("time") or 0.0))
        restarted = line["kind"] == "restart"
    seconds = [max(times) - min(times) for times in attempts]
    whole = summary.get("seconds_in_all")
    if _is_number(whole):
        seconds[-1:] = [max(float(whole), seconds[-1] if seconds else 0.0)]  # type: ignore[arg-type]
    return sum(seconds)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except json.JSONDecodeError as error:
        raise RunError(f"{path}: is no JSON: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    if found is not None and not isinstance(found, dict):
        raise RunError(f"{path}: holds no JSON object")
    return found or {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise RunError(f"{path}: is no YAML: {error}") from error
    if found is not None and not isinstance(found, dict):
        raise RunError(f"{path}: holds no keys and values")
    return found or {}


def read_runs(paths: Iterable[str | Path]) -> tuple[Run, ...]:
    """`read_run` of each, in their order."""
    return tuple(read_run(path) for path in paths)
