"""What a person sees of a run folder, on a terminal and elsewhere."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.live import Live

from r1zero import run_folder
from r1zero.reporting import display as module
from r1zero.reporting.display import Display, ending
from r1zero.run_folder import RunFolder

EVALUATION = {
    "kind": "evaluation",
    "step": 0,
    "mean": 0.5,
    "low": 0.4,
    "high": 0.6,
    "questions": 9,
    "samples": 2,
    "seconds": 1,
}
RESTART = {"kind": "restart", "step": 2, "restart": 1, "most": 3, "cause": "server: killed by SIGKILL"}
MEASURED = "held-out accuracy at step 0: 50.0 % [40.0, 60.0]  (9 questions x 2, 1.0 s)"


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number, "steps": 3, "reward": 0.1 * number, "seconds_left": 3 - number}


def status(folder: RunFolder, phase: str, done: int = 0, total: int = 0, left: float | None = None) -> None:
    run_folder.write_json(folder.status, {"phase": phase, "done": done, "total": total, "seconds_left": left})
    if done == 0:
        run_folder.append_json_line(folder.metrics, {"kind": "phase", "phase": phase})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=40, highlight=False)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_new_thing_is_one_plain_line_once(folder: RunFolder) -> None:
    console = plain()
    with Display(console, folder) as display:
        display.finish()
        assert written(console) == ""
        status(folder, "measuring before training", 0, 9)
        display.finish()
        status(folder, "measuring before training", 5, 9)
        run_folder.append_json_line(folder.metrics, EVALUATION)
        display.finish()
        display.finish()
        status(folder, "training", 0, 3)
        display.finish()
        run_folder.append_json_line(folder.metrics, step(1))
        run_folder.append_json_line(folder.metrics, step(2))
        run_folder.append_json_line(folder.metrics, {"kind": "alert", "step": 2, "message": "[look] here"})
        run_folder.append_json_line(folder.metrics, {**RESTART, "checkpoint": "checkpoints/checkpoint-1"})
        run_folder.append_json_line(folder.metrics, {**RESTART, "checkpoint": None})
        with folder.metrics.open("a") as file:
            file.write('{"kind": "step", "step": 3, "steps"')
        display.finish()
        display.finish()
        with folder.metrics.open("a") as file:
            file.write(': 3, "reward": 0.3, "seconds_left": 0}\n')
        display.now("seen on a terminal only")
        display.say("a long line that stays whole, [bold]brackets[/bold] and all: /a/path/that/is/copied")
        display.finish()
    assert written(console).splitlines() == [
        "measuring before training",
        MEASURED,
        "training",
        "step 1/3  reward 0.100  left 2.0 s",
        "step 2/3  reward 0.200  left 1.0 s",
        "ALERT at step 2: [look] here",
        "FAILED at step 2: server: killed by SIGKILL; restart 1 of at most 3 goes on from checkpoints/checkpoint-1",
        "FAILED at step 2: server: killed by SIGKILL; restart 1 of at most 3 goes on from the beginning, there is no "
        "checkpoint",
        "a long line that stays whole, [bold]brackets[/bold] and all: /a/path/that/is/copied",
        "step 3/3  reward 0.300  left 0.0 s",
    ]


def test_a_tick_looks_at_most_twice_a_second(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    console = plain()
    display = Display(console, folder)
    status(folder, "one")
    display.tick()
    status(folder, "two")
    now[0] += 0.4
    display.tick()
    assert written(console) == "one\n"
    now[0] += 0.2
    display.tick()
    assert written(console) == "one\ntwo\n"


def shown_by(renderable: RenderableType, width: int) -> list[str]:
    """The words that stand on a terminal of this width, without the bar, which is drawn in colour alone."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, color_system=None)
    console.print(renderable)
    lines = written(console).splitlines()
    assert all(len(line) <= width for line in lines)
    return [" ".join(re.sub("[━╸╺]", " ", line).split()) for line in lines]


def test_on_a_terminal_a_bar_is_rewritten_and_the_rest_stays(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False, color_system=None)
    shown: list[list[str]] = []

    class Recording(Live):
        """rich's Live, which draws four times a second, drawing each time that it is told something."""

        def update(self, renderable: RenderableType, *, refresh: bool = False) -> None:
            shown.append(shown_by(renderable, 80))
            super().update(renderable, refresh=True)

    monkeypatch.setattr(module, "Live", Recording)
    with Display(console, folder) as display:
        status(folder, "measuring", 3, 9)
        display.finish()
        run_folder.append_json_line(folder.metrics, EVALUATION)
        status(folder, "training", 0, 3)
        display.finish()
        for number in (1, 2):
            run_folder.append_json_line(folder.metrics, step(number))
            status(folder, "training", number, 3, 3.0 - number)
            display.finish()
        status(folder, "saving the model")
        display.finish()
    assert shown == [
        ["measuring 3/9"],
        ["training 0/3"],
        ["training 1/3 left 2.0 s", "reward 0.100"],
        ["training 2/3 left 1.0 s", "reward 0.200"],
        ["saving the model"],
    ]
    text = written(console)
    assert "\x1b[" in text
    assert text.count(MEASURED + "\n") == 1
    assert "step 1/3" not in text


def test_the_time_left_is_counted_down_and_seen_in_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "time", lambda: 1000.0)
    status = {"phase": "training", "done": 1234, "total": 5000, "seconds_left": 7400.0, "time": 900.0}
    figures = "reward 0.797  length 2034  publish 10.20 s  probe 0.10 s  generate 101.36 s  train 99.59 s"
    for width in (60, 80, 160):
        bar, *rest = shown_by(module.Progress(status, figures), width)
        assert bar == "training 1234/5000 left 2 h 1 min"
        assert " ".join(rest).split() == figures.split()


def test_the_closing_table() -> None:
    score = {"mean": 0.3217, "low": 0.28, "high": 0.365, "questions": 200, "samples": 4}
    console = Console(file=io.StringIO(), width=100)
    console.print(ending({"held_out": {"before": {**score, "mean": 0.1}, "after": score}}))
    rows = [" ".join(line.split()) for line in written(console).splitlines()]
    assert rows == [
        "held-out accuracy mean 95 % interval questions x samples",
        "before training 10.0 % 28.0 to 36.5 % 200 x 4",
        "after training 32.2 % 28.0 to 36.5 % 200 x 4",
    ]


@pytest.mark.parametrize("summary", [{}, {"held_out": {}}])
def test_without_a_measurement_the_table_is_empty(summary: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(ending(summary))
    assert written(console).strip() == ""
