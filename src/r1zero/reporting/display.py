"""What a person sees while the launcher runs: it reads the run folder and says what is new. No torch."""

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from r1zero.reporting import progress
from r1zero.run_folder import RunFolder, read_json


class Display:
    """On a terminal a bar with the time left; elsewhere (a file, a Slurm log) a plain line a step.

    What stays is the same on both, but for the steps' lines.
    """

    def __init__(self, console: Console, folder: RunFolder) -> None:
        self.console = console
        self.folder = folder
        self._offset = 0
        self._step: dict[str, Any] = {}
        self._next_read = 0.0
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(Text(line), soft_wrap=True)

    def now(self, line: str) -> None:
        """A line that the next one replaces; shown on a terminal only."""
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))

    def pass_over_what_is_there(self) -> None:
        """Say nothing of what the run folder holds by now: whoever began the run has said it."""
        self._offset = self.folder.read_metrics_after(0)[1]

    def tick(self) -> None:
        """Say what the run folder holds that was not said yet. Cheap: reads the files at most twice a second."""
        if time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + 0.5
        self._read()

    def finish(self) -> None:
        """Say what is left to say, at once."""
        self._read()

    def _read(self) -> None:
        lines, self._offset = self.folder.read_metrics_after(self._offset)
        for metrics in lines:
            if metrics["kind"] == "phase":
                self.say(metrics["phase"])
            elif metrics["kind"] == "evaluation":
                self.say(progress.evaluation_line(metrics))
            elif metrics["kind"] == "alert":
                self.say(progress.alert_line(metrics))
            elif metrics["kind"] == "restart":
                self.say(progress.restart_line(metrics))
            elif metrics["kind"] == "resume":
                self.say(progress.resume_line(metrics))
            elif self._live:
                self._step = metrics
            else:
                self.say(progress.step_line(metrics))
        status = read_json(self.folder.status)
        if self._live and status is not None:
            figures = progress.figures_line(self._step) if self._step and status["phase"] == "training" else ""
            self._live.update(Progress(status, figures))


class Progress:
    """How far a phase is, the time left counted down between two words of the run on it; below it the last step.

    Args:
        status: as status.json has it.
        figures: of the last step; empty before it.
    """

    def __init__(self, status: dict[str, Any], figures: str) -> None:
        self._status, self._figures = status, figures

    def __rich__(self) -> RenderableType:
        status, phase = self._status, Text(self._status["phase"], no_wrap=True, overflow="ellipsis")
        if not status.get("total"):
            return phase
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_column(no_wrap=True)
        left = ""
        if status.get("seconds_left") is not None:
            since = time.time() - status.get("time", time.time())
            left = f"left {progress.duration(max(0.0, status['seconds_left'] - max(0.0, since)))}"
        bar = ProgressBar(total=status["total"], completed=status["done"])
        line.add_row(phase, bar, f"{status['done']}/{status['total']}", left)
        if not self._figures:
            return line
        return Group(line, Text(self._figures))


def ending(summary: dict[str, Any]) -> Table:
    """The closing table: accuracy before and after, with 95 % intervals."""
    table = Table(box=None, pad_edge=False, header_style="", show_header=bool(summary.get("held_out")))
    for column in ("held-out accuracy", "mean", "95 % interval", "questions x samples"):
        table.add_column(column)
    for when, score in summary.get("held_out", {}).items():
        table.add_row(
            f"{when} training",
            f"{100 * score['mean']:.1f} %",
            f"{100 * score['low']:.1f} to {100 * score['high']:.1f} %",
            f"{score['questions']} x {score['samples']}",
        )
    return table
