"""A run that was killed and resumed is the run that never stopped; one that is asked to stop leaves what it needs."""

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from r1zero import checkpoints
from r1zero.run_folder import RunFolder, read_json, write_json
from r1zero.training import checkpoints as trainer_checkpoints
from r1zero.training.stopping import StopRequest
from tests.training import resuming
from tests.training.conftest import rows, write_recipe
from tests.training.resuming import EXACT, LORA, WAYS, as_killed_after, assert_same_run, run, steps, weights

FIXED = Path(__file__).with_name("fixed_completions.py")


# Most of a test here is the start of processes, which takes long where many share two cores.
pytestmark = pytest.mark.timeout(900)


def recipe_for(way: str, place: Path, model: Path, few: Path, **keys: Any) -> Path:
    """The same global batch of 16 completions, however many processes there are."""
    return write_recipe(
        place / f"{way}.yaml", model, few, **EXACT | {"per_device_train_batch_size": 16 // WAYS[way][1]} | keys
    )


@pytest.fixture(scope="module")
def single(model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunFolder]:
    """One process, never stopped: its recipe and its folder."""
    place = tmp_path_factory.mktemp("single")
    recipe = recipe_for("single", place, model, few, save_steps=1)
    return recipe, run("single", recipe, place / "run")


# --- as if it had never stopped


def test_killed_in_the_middle_it_goes_on_from_the_newest_checkpoint_to_the_same_end(
    single: tuple[Path, RunFolder], tmp_path: Path
) -> None:
    recipe, uninterrupted = single
    folder = RunFolder(tmp_path / "run")
    killed_and_resumed(recipe, folder, "single", lambda: len(steps(folder)) >= 3)
    assert_same_run(uninterrupted, folder)
    (resumed,) = (line for line in folder.read_metrics() if line["kind"] == "resume")
    assert resumed["step"] in range(1, 8)
    for step in (1, 7):  # the steps in which completions were generated
        assert rows(folder.rollouts(step)) == rows(uninterrupted.rollouts(step))


def killed_and_resumed(recipe: Path, folder: RunFolder, way: str, moment: Callable[[], bool]) -> int:
    """Start, kill all of it with SIGKILL at a moment, resume from what is there; the step gone on from."""
    argv = resuming.command(way, recipe, folder.path)
    with resuming.begin(argv, folder.path) as started:
        resuming.until(moment, started, folder.path)
        resuming.kill(started)
    found = checkpoints.newest(folder)
    assert found.passed_over == ()
    words = ("--resume", found.path) if found.path else ()
    run(way, recipe, folder.path, *words)
    return 0 if found.path is None else int(found.path.name.removeprefix("checkpoint-"))


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_four_steps_and_four_more_are_eight(way: str, model: Path, few: Path, tmp_path: Path) -> None:
    """Fp32, a reference model, killed in the middle of a window, with the end of an epoch ahead."""
    recipe = recipe_for(way, tmp_path, model, few)
    uninterrupted = run(way, recipe, tmp_path / "once")
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(uninterrupted, 4, tmp_path / "again")
    assert_same_run(uninterrupted, run(way, recipe, tmp_path / "again", "--resume", checkpoint))


def test_an_adapter_goes_on_exactly_too(model: Path, few: Path, tmp_path: Path, in_process) -> None:
    recipe = recipe_for("single", tmp_path, model, few, **LORA)
    _, uninterrupted, _ = in_process(recipe, tmp_path / "once")
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(uninterrupted, 4, tmp_path / "again")
    assert_same_run(uninterrupted, in_process(recipe, tmp_path / "again", "--resume", checkpoint)[1])


def test_every_prompt_is_asked_once_before_any_is_asked_again(single: tuple[Path, RunFolder]) -> None:
    _, folder = single
    asked = [row["prompt"] for step in (1, 7) for row in rows(folder.rollouts(step))[::8]]
    assert len(asked) == 12 and len(set(asked)) == 10
    assert len(set(asked[:6])) == 6


def test_a_checkpoint_is_no_part_of_the_time_that_training_took(single: tuple[Path, RunFolder]) -> None:
    """It counts for the step after it, which is under way when it is written."""
    first, *others = (line for line in single[1].read_metrics() if line["kind"] == "step")
    assert "seconds/save" not in first
    assert others and all(0 < line["seconds/save"] < line["seconds/step"] - line["seconds/train"] for line in others)


def test_what_is_not_logged_yet_is_not_lost(model: Path, few: Path, tmp_path: Path, in_process) -> None:
    """Three steps a line, saved after the second of them."""
    recipe = recipe_for("single", tmp_path, model, few, logging_steps=3, save_steps=2, max_steps=6)
    _, uninterrupted, _ = in_process(recipe, tmp_path / "once")
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(uninterrupted, 2, tmp_path / "again")
    code, resumed, _ = in_process(recipe, tmp_path / "again", "--resume", checkpoint)
    assert code == 0 and [line["step"] for line in steps(resumed)] == [3, 6]
    assert_same_run(uninterrupted, resumed)


def test_a_cold_start_is_resumed_exactly_too(model: Path, data: Path, tmp_path: Path, in_process) -> None:
    keys = {"method": "sft", "num_generations": ..., "max_completion_length": ..., "max_steps": 7}
    keys |= {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 3}
    recipe = write_recipe(tmp_path / "sft.yaml", model, data, **keys)
    _, uninterrupted, _ = in_process(recipe, tmp_path / "once", method="sft")
    for step in (3, 6):  # an epoch has 5 steps
        again = tmp_path / f"again-{step}"
        again.mkdir()
        checkpoint = as_killed_after(uninterrupted, step, again)
        assert_same_run(uninterrupted, in_process(recipe, again, "--resume", checkpoint, method="sft")[1])


# --- what nothing can go on from


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("optimizer.pt", "missing", "optimizer.pt is missing"),
        ("scheduler.pt", "missing", "scheduler.pt is missing"),
        ("rng_state.pth", "missing", "rng_state.pth is missing"),
        ("progress_0.pt", "missing", "progress_0.pt is missing"),
        ("model.safetensors", "cut", "model.safetensors is too short"),
        ("optimizer.pt", "altered", "optimizer.pt differs from what was written"),
        ("manifest.json", "missing", "manifest.json is missing"),
    ],
)
def test_what_is_missing_or_differs_is_refused_by_name(
    name: str, harm: str, why: str, single: tuple[Path, RunFolder], tmp_path: Path, in_process
) -> None:
    recipe, done = single
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(done, 4, tmp_path / "again")
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if harm != "missing":
        changed = content[:1000] if harm == "cut" else content[:1000] + bytes([content[1000] ^ 255]) + content[1001:]
        (checkpoint / name).write_bytes(changed)
    code, folder, err = in_process(recipe, tmp_path / "again", "--resume", checkpoint)
    assert code == 3
    assert err.splitlines()[-1].startswith(f"error: nothing can go on from {checkpoint}: {why}")
    assert not folder.summary.exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--seed", 2), "it was written with seed 1, and this run has 2"),
        (("--sync_ref_model",), "with sync_ref_model the reference model moves too, and a checkpoint does not hold it"),
        (("--num_iterations", 1), "it was written with num_iterations 2, and this run has 1"),
        (
            ("--per_device_train_batch_size", 8),
            "it was written with per_device_train_batch_size 16, and this run has 8",
        ),
    ],
)
def test_another_run_is_not_gone_on_with(
    words: tuple[object, ...], why: str, single: tuple[Path, RunFolder], tmp_path: Path, in_process
) -> None:
    recipe, done = single
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(done, 4, tmp_path / "again")
    code, _, err = in_process(recipe, tmp_path / "again", "--resume", checkpoint, *words)
    assert code == 3 and why in err


# --- asked to stop


def stop(folder: RunFolder) -> None:
    write_json(folder.stop, {"why": "the time is over", "deadline": time.time() + 60})


def test_asked_to_stop_it_ends_the_step_leaves_a_checkpoint_and_goes_on_to_the_same_end(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving nothing by itself, and then the model alone: what it leaves is complete all the same."""
    recipe, uninterrupted = single
    folder, words = RunFolder(tmp_path / "run"), ["--save_strategy", "no", "--save_only_model"]
    ask_when(monkeypatch, folder, lambda: len(steps(folder)) == 2)
    code, _, _ = in_process(recipe, folder.path, *words)
    ended = {"outcome": "stopped", "step": 3, "checkpoint": "checkpoints/checkpoint-3", "why": "the time is over"}
    assert (code, read_json(folder.summary)) == (0, ended)
    assert read_json(folder.status)["phase"] == "stopped at step 3: the time is over"
    found = checkpoints.newest(folder)
    assert found.path == folder.checkpoints / "checkpoint-3" and not folder.model.exists()
    folder.stop.unlink()
    monkeypatch.undo()
    assert in_process(recipe, folder.path, *words, "--resume", found.path)[0] == 0
    assert read_json(folder.summary)["outcome"] == "finished"
    assert_same_run(uninterrupted, folder)


def ask_when(monkeypatch: pytest.MonkeyPatch, folder: RunFolder, moment: Callable[[], bool]) -> None:
    """Ask the run to stop when it looks at `moment`."""
    seen = StopRequest.seen_here

    def look(self: StopRequest) -> bool:
        if moment():
            stop(folder)
        return seen(self)

    monkeypatch.setattr(StopRequest, "seen_here", look)


def test_a_round_of_generation_is_abandoned_and_drawn_again(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked while the completions of step 7 are made: random numbers were drawn, and are drawn again."""
    recipe, uninterrupted = single
    folder = RunFolder(tmp_path / "run")
    looks = iter(range(1000))
    ask_when(monkeypatch, folder, lambda: len(steps(folder)) == 6 and next(looks) == 1)
    assert in_process(recipe, folder.path, "--save_strategy", "no")[0] == 0
    assert read_json(folder.summary)["step"] == 6
    assert not folder.rollouts(7).exists()
    folder.stop.unlink()
    monkeypatch.undo()
    checkpoint = folder.checkpoints / "checkpoint-6"
    assert in_process(recipe, folder.path, "--save_strategy", "no", "--resume", checkpoint)[0] == 0
    assert_same_run(uninterrupted, folder)


def test_before_the_first_step_there_is_nothing_to_leave(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process
) -> None:
    """While the first measurement is made; the next attempt makes it again."""
    recipe, _ = single
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    stop(folder)
    words = ("--eval_count", 4, "--eval_on_start", "--max_steps", 1)
    assert in_process(recipe, folder.path, *words)[0] == 0
    ended = {"outcome": "stopped", "step": 0, "checkpoint": None, "why": "the time is over"}
    assert read_json(folder.summary) == ended
    assert {line["kind"] for line in folder.read_metrics()} == {"phase"}
    assert not checkpoints.by_step(folder.checkpoints)
    folder.stop.unlink()
    assert in_process(recipe, folder.path, *words)[0] == 0
    assert set(read_json(folder.summary)["held_out"]) == {"before", "after"}
    assert [line["step"] for line in folder.read_metrics() if line["kind"] == "evaluation"] == [0, 1]


def test_stopped_while_measuring_each_measurement_is_made_once(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the measurement of step 2, and again in that after the last step."""
    recipe, _ = single
    folder = RunFolder(tmp_path / "run")
    words = ("--eval_count", 6, "--eval_samples", 8, "--eval_on_start", "--eval_strategy", "steps", "--eval_steps", 2)
    words += ("--max_steps", 3, "--save_strategy", "no")

    def phases() -> list[str]:
        return [line["phase"] for line in folder.read_metrics() if line["kind"] == "phase"]

    def evaluations() -> list[int]:
        return [line["step"] for line in folder.read_metrics() if line["kind"] == "evaluation"]

    ask_when(monkeypatch, folder, lambda: phases()[-1:] == ["measuring at step 2"])
    assert in_process(recipe, folder.path, *words)[0] == 0
    assert read_json(folder.summary)["step"] == 2 and [line["step"] for line in steps(folder)] == [1, 2]
    assert evaluations() == [0]
    for asked, step, measured in (("measuring after training", 3, [0, 2]), (None, None, [0, 2, 3])):
        monkeypatch.undo()
        folder.stop.unlink()
        if asked:
            ask_when(monkeypatch, folder, lambda: phases()[-1:] == ["measuring after training"])
        assert in_process(recipe, folder.path, *words, "--resume", checkpoints.newest(folder).path)[0] == 0
        assert evaluations() == measured
        assert read_json(folder.summary).get("step") == step
    assert [line["step"] for line in steps(folder)] == [1, 2, 3]
    scores = read_json(folder.summary)["held_out"]
    first = next(line for line in folder.read_metrics() if line["kind"] == "evaluation")
    assert scores["before"]["mean"] == first["mean"] and set(scores) == {"before", "after"}
    assert phases()[-6:].count("saving the model") == 1


def test_processes_leave_together(model: Path, few: Path, tmp_path: Path) -> None:
    """Two under ZeRO-2, asked at a moment of its own."""
    recipe = recipe_for("zero2", tmp_path, model, few, save_strategy="no", max_steps=1000)
    folder = RunFolder(tmp_path / "run")
    with resuming.begin(resuming.command("zero2", recipe, folder.path), folder.path) as started:
        resuming.until(lambda: len(steps(folder)) >= 2, started, folder.path)
        stop(folder)
        assert started.wait(60) == 0, (folder.path / "log").read_text()[-6000:]
    summary = read_json(folder.summary)
    assert summary["outcome"] == "stopped" and summary["step"] >= 2
    assert checkpoints.newest(folder).path == folder.path / summary["checkpoint"]


# --- a disk that is full


def test_a_full_disk_ends_the_run_by_name_and_the_older_checkpoint_is_whole(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = single
    free = shutil.disk_usage(tmp_path)
    folder = RunFolder(tmp_path / "run")

    def usage(path: object) -> Any:
        return free._replace(free=10**6 if (folder.checkpoints / "checkpoint-2").exists() else free.free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    code, _, err = in_process(recipe, folder.path)
    assert code == 3
    assert f"error: no room for checkpoint-3 in {folder.checkpoints}: it needs " in err and "1.0 MiB are free" in err
    assert checkpoints.newest(folder).path == folder.checkpoints / "checkpoint-2"
    assert sorted(checkpoints.by_step(folder.checkpoints)) == [1, 2]
    assert not list(folder.checkpoints.glob(".*"))


def test_what_another_process_gave_up_is_not_taken_for_a_failure_of_ones_own(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several that had no room has deleted what was begun, and this one has still to write its part."""
    recipe, _ = single
    folder, save = RunFolder(tmp_path / "run"), torch.save

    def save_late(what: object, place: Any, *words: Any, **more: Any) -> None:
        if Path(place).name.startswith("progress") and ".checkpoint-2." in str(place):
            checkpoints.give_up(folder.checkpoints / "checkpoint-2")
        save(what, place, *words, **more)

    monkeypatch.setattr(torch, "save", save_late)
    monkeypatch.setattr(trainer_checkpoints, "CAUSE_S", 0)
    code, _, err = in_process(recipe, folder.path)
    assert code == 3
    assert err.splitlines()[-1].startswith("error: checkpoint-2 was given up by another process: ")
    assert checkpoints.newest(folder) == checkpoints.Found(folder.checkpoints / "checkpoint-1")


@pytest.mark.soak
def test_a_tmpfs_that_fills_up_while_a_checkpoint_is_written(
    single: tuple[Path, RunFolder], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look before is blinded, so that writing itself meets the end of the disk, in whichever file that comes."""
    recipe, _ = single
    for size in (1_900_000, 2_300_000, 2_800_000, 3_300_000):  # a checkpoint takes 1.75 MB
        folder = RunFolder(tmp_path / f"run-{size}")
        folder.checkpoints.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder.checkpoints], check=True)
        try:
            begin = checkpoints.begin
            monkeypatch.setattr(checkpoints, "begin", lambda checkpoint, needed, begin=begin: begin(checkpoint, 0))
            code, _, err = in_process(recipe, folder.path)
            monkeypatch.undo()
            assert code == 3 and f"error: no room for checkpoint-2 in {folder.checkpoints}: it needs " in err, err
            found = checkpoints.newest(folder)
            assert found.path == folder.checkpoints / "checkpoint-1" and found.passed_over == ()
            assert not list(folder.checkpoints.glob(".*"))
        finally:
            subprocess.run(["umount", folder.checkpoints], check=True)


# --- one trajectory, however it is shared

TOLERANCE = 1e-4  # relative, or in the unit of what is compared; sums in another order are all that differs


@pytest.fixture(scope="module")
def trajectories(model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """By way to train: metrics of ten steps with the same completions, and the final weights."""
    place = tmp_path_factory.mktemp("trajectories")
    made: dict[str, Any] = {}

    def of(way: str) -> Any:
        if way not in made:
            keys = {"steps_per_generation": 1, "max_steps": 10, "save_strategy": "no", "learning_rate": 1e-4}
            recipe = recipe_for(way, place, model, few, **keys)
            folder = run(way, recipe, place / way, script=FIXED)
            made[way] = steps(folder), weights(folder.model)
        return made[way]

    yield of


@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_however_the_work_is_shared_the_loss_goes_one_way(way: str, trajectories: Callable[[str], Any]) -> None:
    alone, shared = trajectories("single"), trajectories(way)
    for name in ("loss", "grad_norm", "learning_rate", "kl", "reward", "completions/mean_length"):
        expected, found = ([line[name] for line in each[0] if name in line] for each in (alone, shared))
        assert len(expected) == (5 if name in ("reward", "completions/mean_length") else 10)  # a window feeds two steps
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE), name
    assert max(abs(line["loss"]) for line in alone[0]) > 0.01
    farthest = max(float((alone[1][name] - shared[1][name]).abs().max()) for name in alone[1])
    assert farthest < TOLERANCE


# --- long repeats

KILLS = 20


@pytest.mark.soak
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize("way", list(WAYS))
def test_killed_at_random_moments(way: str, model: Path, few: Path, tmp_path: Path) -> None:
    """Anywhere between the start and the end, and so also while checkpoints are written, of which each step has one."""
    rng = random.Random(f"{way} 5")
    recipe = recipe_for(way, tmp_path, model, few, save_steps=1)
    uninterrupted = run(way, recipe, tmp_path / "once")
    for number in range(KILLS):
        folder = RunFolder(tmp_path / f"run-{number}")
        after, pause = rng.randrange(8), rng.uniform(0, 0.5)  # a step takes about so long with its checkpoint

        def moment(folder: RunFolder = folder, after: int = after, pause: float = pause) -> bool:
            reached = any(line["kind"] == "phase" for line in folder.read_metrics()) and len(steps(folder)) >= after
            if reached:
                time.sleep(pause)
            return reached

        gone_on_from = killed_and_resumed(recipe, folder, way, moment)
        assert_same_run(uninterrupted, folder)
        shutil.rmtree(folder.path)
        print(f"{way}: kill {number + 1} of {KILLS}, gone on from step {gone_on_from}", flush=True)
