"""SIGUSR1 to the launcher in every phase: what can be saved is, the job is queued again once, and the run goes on."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from r1zero import preemption, resumption
from r1zero.preemption import Notice, Preempted, StopRequest, in_vain, requeues_file
from r1zero.recipe import RecipeError
from r1zero.run_folder import RunFolder, append_json_line, read_json, write_json, write_yaml
from r1zero.slurm import Job
from tests.conftest import PROJECT
from tests.test_run_failures import (
    SLOW_S,
    STOP_S,
    Launch,
    Start,
    assert_interrupted,
    launches,
    start_with_server,
)

__all__ = ["launches", "start_with_server"]
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1"}
SCONTROL = '#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n'


class Queue:
    """Slurm, as far as `scontrol` is it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.answers(SCONTROL)

    def answers(self, script: str) -> None:
        (self.bin / "scontrol").write_text(script)
        (self.bin / "scontrol").chmod(0o755)

    @property
    def asked(self) -> list[str]:
        file = self.bin / "asked"
        return file.read_text().splitlines() if file.exists() else []

    def env(self, restarts: int = 0) -> dict[str, str]:
        counted = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        return {**JOB, **counted, "PATH": f"{self.bin}:{os.environ['PATH']}"}


@pytest.fixture
def slurm(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


def assert_requeued(launch: Launch, slurm: Queue, step: int | None = None) -> dict[str, Any]:
    """It ended well, asked for one requeue, and said so; returns the summary."""
    assert launch.end(STOP_S) == 0
    assert slurm.asked == ["requeue 77"]
    assert "job 77 is in the queue again and goes on from there" in launch.output.splitlines()[-1]
    assert launch.summary["outcome"] == "stopped"
    assert "SIGUSR1 received" in launch.summary["why"]
    assert step is None or launch.summary["step"] == step
    assert [each["step"] for each in read_json(requeues_file(launch.run_folder))] == [launch.summary["step"]]
    return launch.summary


BEFORE_STEP_1: dict[str, tuple[dict[str, str], Callable[[Launch], object]]] = {
    "preparations": ({"R1ZERO_STAND_IN_LOOKS": "preflight"}, lambda launch: "told of" in launch.log("preflight")),
    "server start": ({"server": "slow"}, lambda launch: "/health" in launch.log("server")),
    "rehearsal": ({"R1ZERO_STAND_IN_LOOKS": "rehearsal"}, lambda launch: "told of" in launch.log("rehearsal")),
}


@pytest.mark.parametrize("phase", BEFORE_STEP_1)
def test_before_the_trainer_runs_nothing_is_waited_for(start_with_server: Start, slurm: Queue, phase: str) -> None:
    more, reached = BEFORE_STEP_1[phase]
    launch = start_with_server("--preemption_grace", "600", **more, **slurm.env())
    launch.until(lambda: reached(launch))
    launch.signal(signal.SIGUSR1)
    assert assert_requeued(launch, slurm, 0)["checkpoint"] is None


def test_while_it_trains_it_saves_is_queued_again_and_goes_on_in_the_same_folder(
    start_with_server: Start, slurm: Queue
) -> None:
    launch = start_with_server(**slurm.env())
    launch.until(lambda: launch.steps >= 2)
    for _ in range(3):
        launch.signal(signal.SIGUSR1)
    summary = assert_requeued(launch, slurm)
    saved = summary["step"]
    assert saved >= 2 and summary["checkpoint"] == f"checkpoints/checkpoint-{saved}"
    assert launch.output.count("SIGUSR1 received: the trainer has 240 s") == 1
    again = start_with_server(trainer="goes-on", **slurm.env(restarts=1))
    assert again.end(SLOW_S) == 0
    assert "step 1/1000" not in again.output  # what was said before is not said again
    assert "stand-in preflight" not in again.output  # nor looked at
    assert f"going on from checkpoints/checkpoint-{saved}" in again.output
    assert again.summary["outcome"] == "finished" and again.summary["requeues"] == 1
    steps = [line["step"] for line in again.run_folder.read_metrics() if line["kind"] == "step"]
    assert steps[-3:] == [saved + 1, saved + 2, saved + 3]
    assert not again.run_folder.stop.exists()
    assert sorted(path.name for path in again.folder.glob("run*")) == ["run"]


def test_a_trainer_that_does_not_stop_in_time_is_ended_and_its_last_checkpoint_counts(
    start_with_server: Start, slurm: Queue
) -> None:
    launch = start_with_server("--preemption_grace", "2", trainer="never-stops", **slurm.env())
    launch.until(lambda: launch.steps >= 6)
    launch.signal(signal.SIGUSR1)
    summary = assert_requeued(launch, slurm)
    assert summary["step"] % 5 == 0 and summary["step"] >= 5
    assert "the trainer had not ended 2 s later" in summary["why"]


def test_a_failure_while_it_stops_does_not_lose_the_job_its_place(start_with_server: Start, slurm: Queue) -> None:
    launch = start_with_server(trainer="fails-stopping", restarts=3, **slurm.env())
    launch.until(lambda: launch.steps >= 2)
    launch.signal(signal.SIGUSR1)
    assert "ValueError: the stand-in cannot stop" in assert_requeued(launch, slurm, 0)["why"]
    assert launch.restarts == []


def test_scancel_while_it_stops_is_no_requeue(start_with_server: Start, slurm: Queue) -> None:
    launch = start_with_server(trainer="never-stops", **slurm.env())
    launch.until(lambda: launch.steps >= 2)
    launch.signal(signal.SIGUSR1)
    launch.until(lambda: "the trainer has 240 s" in launch.output)
    assert_interrupted(launch, signal.SIGTERM)
    assert slurm.asked == []
    assert not requeues_file(launch.run_folder).exists()


def test_requeues_that_bring_nothing_come_to_an_end(start_with_server: Start, slurm: Queue) -> None:
    launch = start_with_server("--max_requeues", "1", **slurm.env())
    launch.until(lambda: launch.steps >= 2)
    launch.signal(signal.SIGUSR1)
    assert_requeued(launch, slurm)
    again = start_with_server(server="slow", **slurm.env(restarts=1))
    again.until(lambda: "starting the policy server" in again.output)
    again.signal(signal.SIGUSR1)
    assert again.end(STOP_S) == 1
    assert slurm.asked == ["requeue 77"]
    assert "1 requeue(s) in a row have saved no step (max_requeues: 1), so it is given up" in again.summary["reason"]


def test_a_requeue_that_slurm_refuses_is_said_and_not_counted(start_with_server: Start, slurm: Queue) -> None:
    slurm.answers("#!/bin/sh\necho 'Job requeue is disabled' >&2\nexit 1\n")
    launch = start_with_server(**slurm.env())
    launch.until(lambda: launch.steps >= 2)
    launch.signal(signal.SIGUSR1)
    assert launch.end(STOP_S) == preemption.STOPPED
    last = launch.output.splitlines()[-1]
    assert "scontrol requeue failed (Job requeue is disabled); goes on with launch/run.py --resume " in last
    assert read_json(requeues_file(launch.run_folder)) == []


def test_without_slurm_it_stops_and_goes_on_by_hand(start_with_server: Start) -> None:
    launch = start_with_server()
    launch.until(lambda: launch.steps >= 2)
    launch.signal(signal.SIGUSR1)
    assert launch.end(STOP_S) == 138
    saved = launch.summary["step"]
    assert f"goes on with launch/run.py --resume {launch.run_folder.path}" in launch.output.splitlines()[-1]
    again = start_with_server("--resume", str(launch.run_folder.path), "--max_restarts", "1", trainer="goes-on")
    assert again.end(SLOW_S) == 0
    assert f"going on from checkpoints/checkpoint-{saved}" in again.output
    assert "max_restarts: 1\n" in again.run_folder.recipe.read_text()


@pytest.mark.parametrize(("job", "code"), [(False, 138), (True, 0)])
def test_before_there_is_a_run_folder(
    tmp_path: Path, slurm: Queue, launches: list[Launch], job: bool, code: int
) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")  # a read that lasts, as a download of the model's config may
    launch = Launch(PROJECT / "launch" / "run.py", tmp_path, (), slurm.env() if job else {})
    launches.append(launch)
    writers: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody has it open yet
            writers.append(os.open(tmp_path / "recipe.yaml", os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    launch.until(is_read)
    launch.signal(signal.SIGUSR1)
    assert launch.end(STOP_S) == code
    os.close(writers[0])
    assert slurm.asked == (["requeue 77"] if job else [])
    assert not launch.run_folder.path.exists()
    assert launch.output.startswith("stopped: SIGUSR1 received before anything was started")


# The parts


def test_a_notice_interrupts_until_it_is_told_not_to() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Notice() as notice:
        with pytest.raises(Preempted):
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted):
            notice.check()
    with Notice() as notice:
        notice.interrupts = False
        notice.check()
        os.kill(os.getpid(), signal.SIGUSR1)
        first = notice.at
        os.kill(os.getpid(), signal.SIGUSR1)
        assert first is not None and notice.at == first
    assert signal.getsignal(signal.SIGUSR1) == before


def test_the_request_has_a_deadline_that_counts_from_the_signal(tmp_path: Path) -> None:
    said: list[str] = []
    with Notice() as notice:
        notice.interrupts = False
        request = StopRequest(RunFolder(tmp_path), notice, 0.5, said.append)
        request.tick()
        assert not RunFolder(tmp_path).stop.exists()
        os.kill(os.getpid(), signal.SIGUSR1)
        now = time.time()
        request.tick()
        asked = read_json(RunFolder(tmp_path).stop)
        assert asked["why"] == "SIGUSR1 received" and now < asked["deadline"] <= now + 0.6
        time.sleep(0.6)
        with pytest.raises(Preempted, match=r"the trainer had not ended 0\.5 s later"):
            request.tick()
    assert len(said) == 1


def test_requeues_count_until_a_later_step_is_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert in_vain(folder) == 0
    write_json(requeues_file(folder), [{"step": step} for step in (0, 4, 4, 4)])
    for step, count in ((4, 3), (9, 0)):
        (folder.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        append_json_line(folder.metrics, {"kind": "step", "step": 99})  # what was not saved is no progress
        assert in_vain(folder) == count


@pytest.fixture
def begun(tmp_path: Path) -> RunFolder:
    from r1zero import recipe

    folder = RunFolder(tmp_path / "run")
    write_yaml(folder.recipe, recipe.load(PROJECT / "recipes/tiny/arithmetic_grpo.yaml").resolved())
    return folder


def test_a_run_goes_on_with_its_own_recipe_and_what_may_change(begun: RunFolder) -> None:
    recipe = resumption.recipe(
        begun.path, ["--save_steps", "7", "--max_requeues", "9", "--per_device_train_batch_size", "64"]
    )
    assert (recipe["save_steps"], recipe.own.max_requeues, recipe["max_steps"]) == (7, 9, 160)
    assert resumption.folder(recipe, begun.path, None) == begun.path
    assert resumption.folder(recipe, None, None) is None


@pytest.mark.parametrize(
    "words",
    [
        ("--model_name_or_path", "other"),
        ("--per_device_train_batch_size", "32"),
        ("--seed", "1"),
        ("--max_steps", "300"),
        ("--task", "gsm8k"),
        ("--output_dir", "elsewhere"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_its_key(
    begun: RunFolder, words: tuple[str, str], run: Any
) -> None:
    answer = run("--resume", begun.path, *words, "--dry-run")
    assert answer.code == 2
    assert f"{words[0][2:]} = {words[1]}" in answer.err.replace("'", "")
    assert "would be another one" in answer.err and "these may change: " in answer.err


def test_what_cannot_go_on_is_refused(begun: RunFolder, tmp_path: Path, run: Any) -> None:
    answer = run("--resume", tmp_path / "absent")
    assert answer.code == 2 and "is no run folder: it has no recipe.yaml" in answer.err
    write_json(begun.summary, {"outcome": "finished"})
    with pytest.raises(RecipeError, match="has finished: there is nothing to go on with"):
        resumption.recipe(begun.path, [])


def test_a_requeued_job_finds_its_folder_by_its_number(begun: RunFolder) -> None:
    recipe = resumption.recipe(begun.path, ["--runs_dir", str(begun.path.parent)])
    mine = begun.path.rename(begun.path.with_name(f"{recipe.name}-77"))
    assert resumption.folder(recipe, None, Job("77", restarts=1)) == mine
    assert resumption.folder(recipe, None, Job("77")) is None  # a first start never writes into a folder that exists
    assert resumption.folder(recipe, None, Job("78", restarts=1)) is None
    assert resumption.folder(recipe, None, Job("77", step="2", restarts=1)) is None
