"""What a trainer process writes into the run folder while it works. Only the main process writes."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1zero.reporting import progress
from r1zero.reporting.trackers import WandbRun
from r1zero.run_folder import STOPPED_OUTCOME, RunFolder, append_json_line, drop_half_line, write_json, write_parquet

# One row of rollouts/*.parquet, written by training and by measuring alike.
ROLLOUT_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("gold", pa.string()),
        ("answer", pa.string()),
        ("verdict", pa.string()),
        ("reward", pa.float64()),
        ("rewards", pa.map_(pa.string(), pa.float64())),  # by reward function, unweighted; null where it gave none
        ("length", pa.int64()),
        ("clipped", pa.bool_()),
        ("policy_version", pa.int64()),
        ("source", pa.string()),
    ]
)


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as one text: as it is, or its chat messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)


def clipped(completion_ids: Sequence[int], eos_token_ids: Sequence[int]) -> bool:
    """Whether a completion was cut off before it ended by itself."""
    return not completion_ids or completion_ids[-1] not in eos_token_ids


class Recorder:
    """Metrics, status and rollouts of one run, and the same in plain lines on stdout (the trainer's log).

    Attributes:
        active: whether this is the process that writes.
        restarts: how often this run was started again.
        seconds_left: of training, as of the last recorded step; None before the first.
        tracker: is given what is recorded of steps and evaluations; None: nothing is.
    """

    def __init__(self, folder: RunFolder, active: bool) -> None:
        self.folder = folder
        self.active = active
        if active:
            drop_half_line(folder.metrics)  # of a process that was killed
        self.restarts = sum(line["kind"] == "restart" for line in folder.read_metrics()) if active else 0
        self.seconds_left: float | None = None
        self.tracker: WandbRun | None = None
        self._phase_began = time.monotonic()
        self._rollouts: list[dict[str, Any]] = []

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)  # noqa: T201 - stdout is this process's log

    def phase(self, name: str, done: int = 0, total: int = 0, seconds_left: float | None = None) -> None:
        """Replace status.json: what goes on, how far it is. The beginning of a phase is a line of metrics.jsonl too."""
        if not self.active:
            return
        if done == 0:
            self._phase_began = time.monotonic()
            append_json_line(self.folder.metrics, {"kind": "phase", "time": time.time(), "phase": name})
        elapsed = time.monotonic() - self._phase_began
        if seconds_left is None and done:
            seconds_left = elapsed / done * (total - done)
        status = {
            "phase": name,
            "done": done,
            "total": total,
            "seconds_left": seconds_left,
            "restarts": self.restarts,
            "time": time.time(),
        }
        write_json(self.folder.status, status)
        if done == 0:
            self.say(progress.phase_line(status))

    def step(self, metrics: dict[str, Any]) -> None:
        """One optimizer step's metrics: a line of metrics.jsonl, a line of the log."""
        if not self.active:
            return
        # JSON has no NaN; a metric that could not be computed is null.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        line = {"kind": "step", "time": time.time(), **clean}
        append_json_line(self.folder.metrics, line)
        if self.tracker is not None:
            self.tracker.record(line)
        self.seconds_left = metrics["seconds_left"]
        self.phase("training", metrics["step"], metrics["steps"], metrics["seconds_left"])
        self.say(progress.step_line(line))

    def resumed(self, step: int, checkpoint: Path | None) -> None:
        """The run goes on after `step`: what was recorded of later steps does not count any more.

        Args:
            step: 0 where it begins anew.
            checkpoint: None where it begins anew. Then nothing is said unless an earlier attempt has recorded steps.
        """
        if not self.active or (
            checkpoint is None and all(line["kind"] != "step" for line in self.folder.read_metrics())
        ):
            return
        line = {"kind": "resume", "time": time.time(), "step": step, "checkpoint": checkpoint and str(checkpoint)}
        append_json_line(self.folder.metrics, line)
        self.say(progress.resume_line(line))

    def stopped(self, step: int, checkpoint: Path | None, why: str, more: Mapping[str, Any] | None = None) -> None:
        """The run leaves off here, to be resumed; `more` is what the summary says besides."""
        if not self.active:
            return
        where = None if checkpoint is None else os.path.relpath(checkpoint, self.folder.path)
        write_json(
            self.folder.summary,
            {"outcome": STOPPED_OUTCOME, "step": step, "checkpoint": where, "why": why, **(more or {})},
        )
        self.phase(f"stopped at step {step}: {why}")

    def evaluation(self, metrics: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """One measurement: a line of metrics.jsonl, every completion in parquet."""
        if not self.active:
            return
        write_parquet(self.folder.rollouts(metrics["step"], "test"), rows, ROLLOUT_SCHEMA)
        line = {"kind": "evaluation", "time": time.time(), **metrics}
        append_json_line(self.folder.metrics, line)
        if self.tracker is not None:
            self.tracker.record(line)
        self.say(progress.evaluation_line(line))

    def alert(self, step: int, message: str) -> None:
        """Something that a person should look at: a line of metrics.jsonl, a line of the log."""
        if not self.active:
            return
        line = {"kind": "alert", "time": time.time(), "step": step, "message": message}
        append_json_line(self.folder.metrics, line)
        self.say(progress.alert_line(line))

    def add_rollouts(self, rows: list[dict[str, Any]]) -> None:
        self._rollouts.extend(rows)

    def flush_rollouts(self, step: int) -> None:
        """Write what `add_rollouts` gathered for this optimizer step, if anything."""
        if self.active and self._rollouts:
            write_parquet(self.folder.rollouts(step), self._rollouts, ROLLOUT_SCHEMA)
            if self.tracker is not None:
                self.tracker.rollouts(step, self._rollouts)
        self._rollouts = []
