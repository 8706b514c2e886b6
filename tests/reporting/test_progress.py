"""The lines of a run, word for word."""

from typing import Any

import pytest

from r1zero.reporting.progress import alert_line, duration, evaluation_line, phase_line, step_line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (7.31, "7.3 s"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (135.9, "2 min 15 s"),
        (3599.9, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (7300, "2 h 1 min"),
        (100 * 3600, "100 h 0 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


STEP = {
    **{"step": 7, "steps": 110, "reward": 0.12345, "loss": 0.5, "completions/mean_length": 31.6, "seconds_left": 75},
    **{
        "seconds/generate": 0.456,
        "seconds/publish": 0.0149,
        "seconds/train": 1.0,
        "seconds/grade": 9.0,
        "seconds/step": 9,
    },
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "step   7/110  reward 0.123  length 32  left 1 min 15 s  publish 0.01 s  generate 0.46 s  train 1.00 s",
        ),
        (
            {"seconds/publish": None, "reward": 0.0},
            "step   7/110  reward 0.000  length 32  left 1 min 15 s  generate 0.46 s  train 1.00 s",
        ),
        (
            {"reward": None, "completions/mean_length": None, "seconds/generate": None, "seconds/publish": None},
            "step   7/110  loss 0.5000  left 1 min 15 s  train 1.00 s",
        ),
    ],
    ids=["grpo", "grpo without a server, nothing right", "sft"],
)
def test_step_line(changes: dict[str, Any], line: str) -> None:
    assert step_line({**STEP, **changes}) == line
    assert step_line({key: value for key, value in {**STEP, **changes}.items() if value is not None}) == line


def test_the_longest_line_has_its_time_left_in_80_columns() -> None:
    longest = {"step": 9999, "steps": 10000, "reward": -0.123, "completions/mean_length": 32768, "seconds_left": 360000}
    line = step_line({**STEP, **longest})
    assert line.index("left 100 h 0 min") + len("left 100 h 0 min") <= 80


def test_a_step_that_could_compute_nothing_still_has_a_line() -> None:
    assert step_line({"step": 2, "steps": 2, "reward": None, "loss": None, "seconds_left": 0}) == "step 2/2  left 0.0 s"


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({"phase": "loading model and data", "done": 0, "total": 0, "seconds_left": None}, "loading model and data"),
        ({"phase": "measuring", "done": 0, "total": 200, "seconds_left": None}, "measuring  0/200"),
        ({"phase": "measuring", "done": 50, "total": 200, "seconds_left": 61}, "measuring  50/200  left 1 min 1 s"),
        ({"phase": "measuring", "done": 200, "total": 200, "seconds_left": 0.0}, "measuring  200/200  left 0.0 s"),
    ],
)
def test_phase_line(status: dict[str, Any], line: str) -> None:
    assert phase_line(status) == line


def test_alert_line() -> None:
    assert alert_line({"kind": "alert", "step": 12, "message": "look here"}) == "ALERT at step 12: look here"


def test_evaluation_line() -> None:
    metrics = {"step": 110, "mean": 0.3217, "low": 0.28, "high": 0.365, "questions": 200, "samples": 4, "seconds": 12.3}
    assert evaluation_line(metrics) == (
        "held-out accuracy at step 110: 32.2 % [28.0, 36.5]  (200 questions x 4, 12.3 s)"
    )
