"""A run's page while it runs, and at its end: made by processes of their own, so that nothing of it holds the run up.

Light, as the launcher imports it: what a page needs is imported where it is made.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

NAME = "report.html"
REFRESH_S = 60.0  # between two pages of a run that goes on, at least
REFRESH_SHARE = 0.05  # of the time, at most, one processor makes pages while a run goes on
DEADLINE_S = 300.0  # of one page, made in the background
LAST_DEADLINE_S = 120.0  # of a run's last page, which the launcher waits for


class Refresher:
    """Keeps a run's page fresh while it runs, and never holds it up: each page is made by a process of its own.

    With the lowest priority and one thread; no sooner than `REFRESH_S` after the one before it, nor than leaves it with
    `REFRESH_SHARE` of the time; not where nothing was recorded since. What goes wrong is in logs/report.log, and
    nowhere else.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._next = time.monotonic() + REFRESH_S
        self._shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def tick(self) -> None:
        """Look whether it is time for another page; takes no time."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._next = now + max(REFRESH_S, (now - self._began) / REFRESH_SHARE)
            self._process = None
        if self._process is not None or now < self._next:
            return
        self._next = now + REFRESH_S
        try:
            changed = (self._folder / "metrics.jsonl").stat().st_mtime
            if changed == self._shown:
                return
            self._process, self._began, self._shown = self._start(DEADLINE_S), now, changed
        except OSError:
            return  # no metrics yet, or a machine without another process to give

    def finish(self) -> str:
        """Make the run's last page, after all else has been written.

        Returns:
            A line that says where it is, or why there is none.
        """
        self._end()
        page = self._folder / NAME
        try:
            code = self._start(LAST_DEADLINE_S).wait(LAST_DEADLINE_S + 10)
        except (OSError, subprocess.SubprocessError) as error:
            return f"no report: {error}; `python launch/report.py {self._folder}` makes one"
        if code:
            log = self._folder / "logs" / "report.log"
            return f"no report, see {log}; `python launch/report.py {self._folder}` makes one"
        return str(page)

    def _start(self, deadline_s: float) -> "subprocess.Popen[bytes]":
        log = self._folder / "logs" / "report.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("wb") as file:
            return _spawn([str(self._folder), "--background", f"{deadline_s:g}"], file)

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._process = None


def _spawn(arguments: Sequence[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "r1zero.reporting.report", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # what is typed at the run's terminal is not meant for it
    )
