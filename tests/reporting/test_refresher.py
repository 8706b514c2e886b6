"""A run's page while it runs: new where there is something new, cheap, and never the run's concern."""

import time
from pathlib import Path
from typing import Any

import pytest

from r1zero.reporting import refresher as module
from r1zero.reporting.refresher import Refresher
from r1zero.run_folder import append_json_line, write_json
from tests.reporting import simulated_run
from tests.reporting.test_report import contents


def test_a_page_is_made_anew_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    monkeypatch.setattr(module, "REFRESH_SHARE", 1000.0)
    folder = simulated_run.write(tmp_path / "run", steps=2)
    page = folder.path / "report.html"
    with Refresher(folder.path) as refresher:
        _tick_until(refresher, page.exists)
        first = page.stat().st_mtime_ns
        append_json_line(folder.metrics, simulated_run.step_line(3, 3))
        _tick_until(refresher, lambda: page.stat().st_mtime_ns > first)
    assert contents(page)["runs"][0]["steps"] == [1, 2, 3]


def test_no_page_is_made_of_what_is_shown_already_or_too_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Process:
        def poll(self) -> int:
            return 0

    monkeypatch.setattr(module, "_spawn", lambda arguments, log: started.append(list(arguments)) or Process())
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = simulated_run.write(tmp_path / "run", steps=1)
    with Refresher(folder.path) as refresher:
        refresher.tick()
        assert started == []  # a minute has to pass first
        now[0] += 61
        refresher.tick()
        assert len(started) == 1
        append_json_line(folder.metrics, simulated_run.step_line(2, 2))
        now[0] += 30  # making it took so long, so the next one has to wait for ten minutes
        refresher.tick()
        now[0] += 599
        refresher.tick()
        assert len(started) == 1
        now[0] += 2
        refresher.tick()
        assert len(started) == 2
        refresher.tick()  # made at once
        for _ in range(9):  # nothing new
            now[0] += 61
            refresher.tick()
        assert len(started) == 2


def test_what_goes_wrong_with_a_page_is_nothing_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    with Refresher(tmp_path / "gone") as refresher:
        refresher.tick()
        assert refresher.finish().startswith("no report: ")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("nonsense\n")
    with Refresher(tmp_path / "run") as refresher:
        refresher.tick()
        said = refresher.finish()
    log = tmp_path / "run" / "logs" / "report.log"
    assert said == f"no report, see {log}; `python launch/report.py {tmp_path / 'run'}` makes one"
    assert "metrics.jsonl: a line of it is not what a run writes" in log.read_text()


def test_the_last_page_shows_how_the_run_ended(tmp_path: Path) -> None:
    folder = simulated_run.write(tmp_path / "run", steps=1)
    with Refresher(folder.path) as refresher:
        write_json(folder.summary, {"outcome": "interrupted", "reason": "SIGINT received"})
        assert refresher.finish() == str(folder.path / "report.html")
    assert contents(folder.path / "report.html")["runs"][0]["state"] == "interrupted: SIGINT received"


def _tick_until(refresher: Refresher, done: Any) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "no page within a minute"
        refresher.tick()
        time.sleep(0.05)
