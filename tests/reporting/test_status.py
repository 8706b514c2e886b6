"""What --status and --list say of runs in every state, and of what is no run."""

import io
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1zero import run_folder
from r1zero.reporting import status as module
from r1zero.run_folder import RunFolder, append_json_line, write_json, write_text
from tests.conftest import Answer
from tests.reporting import simulated_run

Run = Callable[..., Answer]


def said(answer: Answer) -> dict[str, str]:
    """What --status prints, by its words at the left; of a word that is there twice the first."""
    found: dict[str, str] = {}
    for line in answer.out.splitlines()[1:]:
        name, _, text = line.strip().partition("  ")
        found.setdefault(name.strip(), text.strip()) if name != "held out" else found.update({name: text.strip()})
    return found


def begun(path: Path, **manifest: Any) -> RunFolder:
    """A run whose launcher is this process: step 3 of 9 is done, and measured."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    write_json(folder.versions, {**run_folder.versions(path), **manifest})
    append_json_line(folder.metrics, {"kind": "phase", "time": time.time() - 100, "phase": "training"})
    for step in (1, 2, 3):
        append_json_line(folder.metrics, {**simulated_run.step_line(step, 9), "reward": step / 10})
    append_json_line(folder.metrics, simulated_run.evaluation_line(2, 0.4))
    at = {"done": 3, "total": 9, "seconds_left": 90.0, "time": time.time()}
    write_json(folder.status, {"phase": "training", **at})
    write_text(folder.logs / "model.log", "fetched\n")
    os.utime(folder.logs / "model.log", (0, 0))
    write_text(folder.logs / "trainer.log", "going\nValueError: of an attempt before\n")
    return folder


def ended(path: Path, outcome: str, **more: Any) -> RunFolder:
    folder = begun(path)
    write_json(folder.summary, {"outcome": outcome, **more})
    return folder


def age(folder: RunFolder, seconds: float) -> None:
    """As if nothing had been written for so long."""
    then = time.time() - seconds
    for path in folder.path.rglob("*"):
        os.utime(path, (then, then))


@contextmanager
def another() -> Iterator[psutil.Process]:
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def as_process(process: psutil.Process) -> dict[str, Any]:
    return {"pid": process.pid, "began": process.create_time(), "namespace": run_folder.pid_namespace()}


def test_a_run_that_goes_on(tmp_path: Path, run: Run) -> None:
    folder = begun(tmp_path / "x")
    answer = run("--status", folder.path)
    assert answer.code == 0 and answer.err == ""
    assert answer.out.splitlines()[0] == str(folder.path)
    words = said(answer)
    assert re.match(rf"running on {platform.node()}, pid {os.getpid()}, begun 1 min 4\d s ago$", words["state"])
    assert re.match(r"training 3/9, left 1 min (2\d|30) s$", words["phase"])
    assert words["step"] == "3 of 9 (33 %)"
    assert words["reward"].startswith("0.300 at step 3 +- 0.3")
    assert words["held out"] == "40.0 % [36.0, 44.0] at step 2"
    assert words["logs"].startswith(f"{folder.logs / 'trainer.log'}, written ")
    assert words["logs"].endswith("; beside it model.log")
    assert f"next      follow it: tail -f {folder.logs / 'trainer.log'}" in answer.out
    assert f"next      stop it with a checkpoint: kill -USR1 {os.getpid()}" in answer.out
    assert "error" not in words


def test_a_run_whose_launcher_was_killed_has_died(tmp_path: Path, run: Run) -> None:
    with another() as process:
        folder = begun(tmp_path / "x", process=as_process(process))
        (folder.checkpoints / "checkpoint-2").mkdir(parents=True)
        assert said(run("--status", folder.path))["state"].startswith(
            f"running on {platform.node()}, pid {process.pid}"
        )
        process.send_signal(signal.SIGKILL)
        wait_until_ended(process)
        words = said(run("--status", folder.path))  # it is a zombie, as its parent has not asked for it
    died = f"died on {platform.node()}: its launcher is gone, and it did not say how it ended; last written "
    assert words["state"].startswith(died)
    assert said(run("--status", folder.path))["state"].startswith(died)
    assert words["error"] == "ValueError: of an attempt before"
    assert words["next"] == f"go on from checkpoint-2: python launch/run.py --resume {folder.path}"


def wait_until_ended(process: psutil.Process) -> None:
    deadline = time.monotonic() + 30
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_process_that_has_the_pid_by_now_is_not_the_launcher(tmp_path: Path, run: Run) -> None:
    own = as_process(psutil.Process())
    folder = begun(tmp_path / "x", process={**own, "began": own["began"] - 3600})
    assert said(run("--status", folder.path))["state"].startswith("died")


@pytest.mark.parametrize(
    "manifest",
    [{"host": "another-node"}, {"process": {"pid": 1, "began": 0.0, "namespace": "pid:[1]"}}, {"process": None}],
    ids=["another host", "another container", "an older run"],
)
def test_where_the_launcher_cannot_be_looked_at_what_it_writes_tells(
    tmp_path: Path, run: Run, manifest: dict[str, Any]
) -> None:
    folder = begun(tmp_path / "x", **manifest)
    assert said(run("--status", folder.path))["state"].startswith("running on ")
    age(folder, module.SILENT_S + 60)
    words = said(run("--status", folder.path))
    assert re.match(r"silent on \S+: nothing was written for 16 min \d+ s, and its launcher cannot be", words["state"])
    assert "go on from the beginning, there is no checkpoint: python launch/run.py --resume" in words["next"]
    append_json_line(folder.metrics, {**simulated_run.step_line(4, 9), "seconds/step": 600.0})
    age(folder, module.SILENT_S + 60)
    assert said(run("--status", folder.path))["state"].startswith("running on ")  # its steps take as long


@pytest.mark.parametrize(
    ("outcome", "more", "state", "error", "to_do"),
    [
        (
            "failed",
            {"reason": "trainer: killed by SIGKILL"},
            "failed",
            "trainer: killed by SIGKILL",
            "when the error is",
        ),
        ("interrupted", {"reason": "SIGINT received"}, "interrupted", "SIGINT received", "go on from the beginning"),
        ("stopped", {"why": "SIGUSR1 received", "step": 3}, "stopped", "SIGUSR1 received", "go on from the beginning"),
        ("alarm", {"why": "alarm nan", "remedy": "learning_rate: 1 -> 0.1"}, "alarm", "alarm nan", "learning_rate: 1"),
    ],
)
def test_a_run_that_said_how_it_ended(
    tmp_path: Path, run: Run, outcome: str, more: dict[str, Any], state: str, error: str, to_do: str
) -> None:
    folder = ended(tmp_path / "x", outcome, **more)
    answer = run("--status", folder.path)
    words = said(answer)
    assert words["state"].startswith(f"{state} on {platform.node()}, ")
    assert words["why" if state == "stopped" else "error"] == error
    assert words["next"].startswith(to_do)
    assert f"python launch/run.py --resume {folder.path}" in answer.out


def test_a_run_that_slurm_starts_again(tmp_path: Path, run: Run) -> None:
    folder = ended(tmp_path / "x", "stopped", why="SIGUSR1 received")
    write_json(folder.path / "requeues.json", [{"time": time.time(), "step": 3}])
    words = said(run("--status", folder.path))
    assert words["state"].startswith("queued: stopped, and given back to Slurm, ")
    assert words["next"].startswith("nothing: Slurm starts it again")
    write_json(folder.path / "requeues.json", [{"time": time.time() - 7200, "step": 3}])  # that was an earlier stop
    assert said(run("--status", folder.path))["state"].startswith("stopped on ")


def test_a_finished_run_names_its_page_and_model(tmp_path: Path, run: Run) -> None:
    folder = ended(tmp_path / "x", "finished", seconds_in_all=12.0)
    assert f"look at it: python launch/report.py {folder.path}" in run("--status", folder.path).out
    write_text(folder.path / "report.html", "<html>")
    folder.model.mkdir()
    answer = run("--status", folder.path)
    assert f"next      look at it: {folder.path / 'report.html'}\n" in answer.out
    assert f"next      its model: {folder.model}\n" in answer.out
    assert said(answer)["state"].startswith("finished on ")
    assert not {"phase", "error"} & set(said(answer))


def test_a_cold_start_that_is_still_measured_goes_on(tmp_path: Path, run: Run) -> None:
    folder = ended(tmp_path / "x", "finished", steps=9)
    write_json(folder.status, {"phase": "measuring after training", "done": 0, "total": 0, "time": time.time()})
    words = said(run("--status", folder.path))
    assert words["state"].startswith("running") and words["phase"] == "measuring after training"


def test_an_attempt_that_has_just_begun_does_not_show_what_the_one_before_it_did(tmp_path: Path, run: Run) -> None:
    folder = begun(tmp_path / "x")
    write_json(folder.status, {"phase": "stopped at step 3", "done": 0, "total": 0, "time": time.time() - 60})
    assert said(run("--status", folder.path))["phase"] == "starting (trainer)"


def test_the_time_left_is_counted_down(tmp_path: Path, run: Run) -> None:
    folder = begun(tmp_path / "x", time="")
    at = {"phase": "training", "done": 3, "total": 9, "time": time.time() - 3600}
    write_json(folder.status, {**at, "seconds_left": 3600 + 7200.0})
    assert said(run("--status", folder.path))["phase"] == "training 3/9, left 1 h 59 min"
    write_json(folder.status, {**at, "seconds_left": 10.0})
    assert said(run("--status", folder.path))["phase"] == "training 3/9, left 0.0 s"


def test_what_a_resume_has_made_void_is_not_shown(tmp_path: Path, run: Run) -> None:
    folder = begun(tmp_path / "x")
    append_json_line(folder.metrics, {"kind": "resume", "time": time.time(), "step": 1, "checkpoint": "checkpoint-1"})
    words = said(run("--status", folder.path))
    assert words["step"] == "1 of 9 (11 %)" and words["reward"].startswith("0.100 at step 1")
    assert "held out" not in words


def test_the_last_alert_and_the_doctors_word(tmp_path: Path, run: Run) -> None:
    folder = simulated_run.write(
        tmp_path / "x", steps=40, recipe={**simulated_run.RECIPE, "max_completion_length": 512}
    )
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for line in lines:
        if line["kind"] == "step":
            line["completions/clipped_ratio"] = 0.97
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    append_json_line(folder.metrics, {"kind": "alert", "time": 0.0, "step": 12, "message": "look [here]"})
    words = said(run("--status", folder.path))
    assert words["alert"] == "at step 12: look [here]"
    assert words["doctor"].startswith("clipped (broken): ") and "max_completion_length" in words["doctor"]


@pytest.mark.parametrize(
    ("there", "error"),
    [
        ("", "there is no such folder; --list says which runs there are"),
        ("other", "is no run folder; --list says which runs there are"),
        ("runs", "is no run folder; runs are in it, such as {place}/y: --list {place}"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, run: Run, there: str, error: str) -> None:
    place = tmp_path / "x"
    if there:
        place.mkdir()
    if there == "runs":
        begun(place / "y")
    answer = run("--status", place)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == f"error: {place}: {error.format(place=place)}\n"


def test_a_word_too_many_is_refused(tmp_path: Path, run: Run) -> None:
    assert run("--list", tmp_path, "x").code == 2
    answer = run("--status", tmp_path, "--learning_rate", "1")
    assert answer.code == 2 and "error: --learning_rate 1: --status takes one run folder" in answer.err
    assert run("--list", tmp_path / "none").code == 2
    assert run("--list", "").code == 0  # the folder one is in
    assert run("--status").code == 2


def listed(answer: Answer) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in answer.out.splitlines()]


def test_a_list_has_a_line_a_run_newest_first_and_passes_over_what_is_none(tmp_path: Path, run: Run) -> None:
    names = ["first", "second", "an-uncommonly-long-name-of-a-recipe-20261121-093000"]
    for number, name in enumerate(names):
        folder = ended(tmp_path / name, "failed", reason="x") if number == 0 else begun(tmp_path / name)
        lines = folder.metrics.read_text().splitlines()
        first = {"kind": "phase", "time": 1000.0 * number + 1, "phase": "training"}
        folder.metrics.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    (tmp_path / "no-run").mkdir()
    (tmp_path / ".meeting-1.json").write_text("{}")
    (tmp_path / "new").mkdir()
    write_text(RunFolder(tmp_path / "new").recipe, "method: grpo\n")
    answer = run("--list", tmp_path)
    assert answer.code == 0
    assert listed(answer)[0] == ["STATE", "STEP", "REWARD", "HELD OUT", "LEFT, AGO", "RUN"]
    assert listed(answer)[1:] == [
        ["running", "new"],  # it has nothing but a recipe yet
        ["running", "3/9", "0.300", "40.0 %", "1 min", names[2]],
        ["running", "3/9", "0.300", "40.0 %", "1 min", "second"],
        ["failed", "3/9", "0.300", "40.0 %", "0 s ago", "first"],
    ]


def test_a_torn_file_does_not_break_a_list(tmp_path: Path, run: Run) -> None:
    for name in ("metrics", "status", "summary", "versions", "recipe"):
        folder = ended(tmp_path / name, "failed", reason="x")
        path = getattr(folder, name)
        path.write_bytes(b'{"kind": "step", "st')
    torn = begun(tmp_path / "one-line-torn")
    torn.metrics.write_bytes(torn.metrics.read_bytes() + b'{"kind": "step", "step": 4, "rew')
    answer = run("--list", tmp_path)
    rows = {row[-1]: row[:-1] for row in listed(answer)[1:]}
    assert answer.code == 0 and len(rows) == 6
    assert rows["one-line-torn"][:3] == ["running", "3/9", "0.300"]
    assert rows["status"][:3] == ["failed", "3/9", "0.300"]
    assert rows["metrics"][0] == "failed"
    for name in rows:
        assert run("--status", tmp_path / name).code == 0


def test_on_a_terminal_each_line_fits(tmp_path: Path) -> None:
    name = "an-uncommonly-long-name-of-a-recipe-20261121-093000"
    runs = [module.glance(begun(tmp_path / name)), module.glance(begun(tmp_path / "x"))]
    fitted = [text.plain for text in module.table(runs, time.time(), 80)]
    assert all(len(line) <= 80 for line in fitted)
    assert re.search(r" an-uncommonly-\S+…\S+-093000$", fitted[1])
    assert [text.plain for text in module.table(runs, time.time(), None)][1].endswith(f" {name}")


def test_without_a_run_it_says_so(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = run("--list")
    assert (answer.code, answer.out, answer.err) == (0, "", "no runs in runs\n")
    folder = begun(tmp_path / "runs" / "x")
    assert "it is a run itself: --status" in run("--list", folder.path).err


def test_of_long_files_only_the_ends_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 runs of 1000 steps each: what is read of each is bounded, whatever it holds."""
    folder = begun(tmp_path / "x")
    long = "\n".join(json.dumps(simulated_run.step_line(step, 9000)) for step in range(4, 8000))
    append_json_line(folder.metrics, simulated_run.evaluation_line(3, 0.5))
    with folder.metrics.open("a") as file:
        file.write(long + "\n")
    size = folder.metrics.stat().st_size
    assert size > 4 * module.TAIL_BYTES[-1]
    read: list[int] = []
    opened = Path.open

    class Counting(io.BufferedReader):
        def read(self, *words: Any) -> bytes:
            found = super().read(*words)
            read.append(len(found))
            return found

    def counting(path: Path, mode: str = "r", *words: Any, **more: Any) -> Any:
        return Counting(io.FileIO(path)) if mode == "rb" else opened(path, mode, *words, **more)

    monkeypatch.setattr(Path, "open", counting)
    standing = module.glance(folder)
    assert standing.step == 7999
    assert 0 < sum(read) <= sum(module.TAIL_BYTES)


def test_asking_does_not_load_torch(tmp_path: Path) -> None:
    folder = begun(tmp_path / "x")
    for words in (["--status", folder.path], ["--list", tmp_path]):
        command = [sys.executable, "-X", "importtime", module.__file__.split("/src/")[0] + "/launch/run.py", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert "r1zero.reporting.status" in imported
        assert not imported & {"torch", "transformers", "trl", "pyarrow", "datasets", "wandb"}
