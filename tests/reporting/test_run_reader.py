"""A run as it is read: what counts after a resume, what is missing, what cannot be read."""

import json
from pathlib import Path

import pytest

from r1zero.preemption import requeues_file
from r1zero.reporting.run_reader import RunError, read_run
from r1zero.run_folder import RunFolder, append_json_line, write_json
from tests.reporting import simulated_run


def begin(path: Path) -> RunFolder:
    path.mkdir()
    return RunFolder(path)


def lines(folder: RunFolder, *given: dict[str, object]) -> None:
    for line in given:
        append_json_line(folder.metrics, line)


def phase(time: float, name: str) -> dict[str, object]:
    return {"kind": "phase", "time": time, "phase": name}


def step(time: float, number: int, **more: object) -> dict[str, object]:
    return {"kind": "step", "time": time, "step": number, "steps": 9, **more}


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(simulated_run.write(tmp_path / "run", steps=6, evaluate_each=3).path)
    assert [line["step"] for line in run.steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in run.evaluations] == [3, 6]
    assert run.series("learning_rate")[0] == [1, 2, 3, 4, 5, 6]
    assert run.series("absent") == ([], [])
    assert run.publishes[0] == {
        "step": 1,
        "publish/seconds": 0.2,
        "publish/bytes": 1e9,
        "probe/difference": run.steps[0]["probe/difference"],
        "probe/difference_max": 0.05,
    }
    assert "reward" in run.metrics and "kind" not in run.metrics and "time" not in run.metrics
    assert [file.step for file in run.rollout_files()] == [1, 2, 3, 4, 5, 6]
    assert [file.step for file in run.rollout_files("test")] == [3, 6]
    assert run.gpus == ("NVIDIA H200", "NVIDIA H200")
    assert run.events == ()
    assert run.seconds == 30 + 6 * simulated_run.STEP_S


def test_each_step_counts_once_as_it_was_done_last(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    lines(folder, phase(0, "loading"), step(1, 1, reward=0.1), step(2, 2, reward=0.2), step(3, 3, reward=0.3))
    lines(folder, phase(4, "loading"), {"kind": "resume", "time": 5, "step": 1, "checkpoint": "/x/checkpoint-1"})
    lines(folder, step(6, 2, reward=0.9))
    run = read_run(folder.path)
    assert run.series("reward") == ([1, 2], [0.1, 0.9])
    assert [(event.kind, event.step, event.text) for event in run.events] == [
        ("resume", 1, "goes on from checkpoint-1"),
    ]


def test_a_run_of_before_resumes_were_recorded(tmp_path: Path) -> None:
    """Then a step that was done twice stands twice."""
    folder = begin(tmp_path / "run")
    lines(folder, step(1, 1, reward=0.1), step(2, 2, reward=0.2))
    restart = {"kind": "restart", "time": 3, "restart": 1, "most": 2, "step": 2, "cause": "server: gone"}
    lines(folder, {**restart, "checkpoint": None}, step(4, 1, reward=0.5))
    run = read_run(folder.path)
    assert run.series("reward") == ([1, 2], [0.5, 0.2])
    assert run.events[0].text == "restart 1 of at most 2: server: gone; begins anew, there is no checkpoint"


def test_the_time_of_all_attempts_and_none_of_the_queue(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    restart = {"kind": "restart", "time": 70, "restart": 1, "most": 3, "step": 1, "cause": "c", "checkpoint": None}
    lines(folder, phase(0, "loading"), step(60, 1), restart, phase(100, "loading"), step(110, 2))  # one attempt: 110 s
    lines(folder, phase(5000, "loading"), step(5030, 3))  # queued again, then 30 s and the start of its server
    assert read_run(folder.path).seconds == 110 + 30
    write_json(requeues_file(folder), [{"time": 111.0, "step": 2}])
    write_json(folder.summary, {"outcome": "finished", "seconds_in_all": 40.0})
    run = read_run(folder.path)
    assert run.seconds == 110 + 40
    assert [(event.kind, event.step) for event in run.events] == [("restart", 1), ("requeue", 2)]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    lines(folder, step(1, 1))
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_run(folder.path).steps) == 1


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    write_json(folder.summary, {"outcome": "failed", "reason": "trainer: exited with code 2"})
    run = read_run(folder.path)
    assert (run.steps, run.evaluations, run.recipe, run.plan, run.seconds) == ((), (), {}, "", 0.0)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path}/absent: there is no such folder"):
        read_run(tmp_path / "absent")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path}: is no run folder, it holds none of recipe.yaml"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("recipe.yaml", "a: [1"),
        ("recipe.yaml", "- a"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "nonsense\n"),
        ("requeues.json", "?"),
    ],
)
def test_a_file_that_is_not_what_a_run_writes_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"phase": "training"}))
    (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=f"{tmp_path}/{name}: "):
        read_run(tmp_path)
