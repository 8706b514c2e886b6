"""What happens when the time of a run is over before its work is: it is asked to stop, saves, and is queued again.

Slurm's ``--signal=USR1@300`` sends SIGUSR1 five minutes before the limit. Then the launcher writes ``stop.json`` into
the run folder; the trainer writes a checkpoint of its last whole step, and ends. Where there is no trainer yet there is
nothing to save. Either way the job is put back into the queue, once, and goes on in the same run folder.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from r1zero import checkpoints, slurm
from r1zero.run_folder import STOPPED_OUTCOME, RunFolder, read_json, write_json

STOPPED = 128 + signal.SIGUSR1  # exit code of a run that was stopped, and that nothing but a person will start again


class Preempted(Exception):
    """The run stops here, to go on later; the message says why."""


class Notice:
    """Whether SIGUSR1 has come; within the ``with`` block that ends nothing by itself.

    Attributes:
        interrupts: whether it raises `Preempted` in the main thread as it comes. That is for the time in which nothing
            was started and nothing can be saved.
    """

    def __init__(self) -> None:
        self.interrupts = True
        self._at: float | None = None

    def __enter__(self) -> "Notice":
        self._before = signal.signal(signal.SIGUSR1, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGUSR1, self._before)

    @property
    def at(self) -> float | None:
        """When it first came, on the monotonic clock; None: it has not."""
        return self._at

    def check(self) -> None:
        """Raise `Preempted` where it has come: here there is nothing to save."""
        if self._at is not None:
            raise Preempted("SIGUSR1 received")

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._at is None:
            self._at = time.monotonic()
            if self.interrupts:
                self.check()


class StopRequest:
    """Asks the trainer to stop once `notice` has come, and bears with it until the deadline.

    Args:
        folder: of the run.
        notice: of the signal.
        grace_s: how long after it the trainer may take (``preemption_grace``).
        say: prints a line.
    """

    def __init__(self, folder: RunFolder, notice: Notice, grace_s: float, say: Callable[[str], None]) -> None:
        self._folder, self._notice, self._grace_s, self._say = folder, notice, grace_s, say
        self._asked = False

    def tick(self) -> None:
        """Look once.

        Raises:
            Preempted: when the deadline has passed.
        """
        if self._notice.at is None:
            return
        left = self._notice.at + self._grace_s - time.monotonic()
        if not self._asked:
            self._asked = True
            write_json(self._folder.stop, {"why": "SIGUSR1 received", "deadline": time.time() + left})
            self._say(f"SIGUSR1 received: the trainer has {left:.0f} s to write a checkpoint and end")
        if left < 0:
            raise Preempted(f"SIGUSR1 received, and the trainer had not ended {self._grace_s:g} s later")


def requeues_file(folder: RunFolder) -> Path:
    """A list of ``{"time", "step"}``, one a requeue: the newest checkpoint's step, 0 without one."""
    return folder.path / "requeues.json"


def saved_step(folder: RunFolder) -> int:
    """The step of the newest checkpoint; 0 where there is none. What was not saved is no progress."""
    return max(checkpoints.by_step(folder.checkpoints), default=0)


def in_vain(folder: RunFolder) -> int:
    """How many of the last requeues, in a row, have saved no step since."""
    step, count = saved_step(folder), 0
    for each in reversed(read_json(requeues_file(folder)) or []):
        if each["step"] < step:
            break
        count += 1
    return count


def write_stopped(folder: RunFolder, why: str) -> dict[str, Any]:
    """The summary of a run that was stopped; the trainer's own, where it came to write one."""
    summary = read_json(folder.summary) or {}
    if summary.get("outcome") != STOPPED_OUTCOME:
        step = saved_step(folder)
        path = checkpoints.by_step(folder.checkpoints).get(step)
        where = None if path is None else str(path.relative_to(folder.path))
        summary = {"outcome": STOPPED_OUTCOME, "step": step, "checkpoint": where, "why": why}
        write_json(folder.summary, summary)
    return dict(summary)


def requeue(job: slurm.Job, folder: RunFolder | None) -> str:
    """Put the job back into the queue, and write that into the run folder where there is one.

    From here on SIGTERM is not heeded: Slurm sends it to whatever of a requeued job still runs.

    Returns:
        Why it could not be done; empty when it was.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before: list[dict[str, Any]] = []
    if folder is not None:
        before = read_json(requeues_file(folder)) or []
        write_json(requeues_file(folder), [*before, {"time": time.time(), "step": saved_step(folder)}])
    why = slurm.requeue(job.id)
    if why and folder is not None:
        write_json(requeues_file(folder), before)
    return why
