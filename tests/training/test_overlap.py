"""With max_staleness 1 the server makes the next window while the trainer learns from this one: whole runs, with a
server that draws the same for the same weights, prompts and seeds (`stand_ins/sampling_server.py`).
"""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1zero import checkpoints, hardware
from r1zero.policy_client import PolicyClient, PolicyServerError, Rollout, WrongPolicyVersion
from r1zero.restarts import Refusal
from r1zero.run_folder import RunFolder, read_json, write_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.training import probe
from r1zero.training.next_window import NextWindow, packed
from r1zero.training.stopping import StopRequest
from r1zero.training.trainer import PolicyTrainer
from tests.conftest import PROJECT
from tests.training import resuming
from tests.training.conftest import rows, write_recipe
from tests.training.resuming import EXACT, LORA, WAYS, as_killed_after, run, weights

# Most of a test here is the start of processes, which takes long where many share two cores.
pytestmark = pytest.mark.timeout(1200)

STAND_INS = PROJECT / "tests" / "stand_ins"
READY_S = 240.0
# A window of two prompts for each of six steps; ten problems are five windows, so that an epoch ends after the fifth.
OVERLAPPED = {
    **EXACT,
    "num_iterations": 1,
    "steps_per_generation": 1,
    "max_steps": 6,
    "save_steps": 1,
    "beta": 0.0,
    "use_vllm": True,
    "vllm_mode": "server",
    "seed_rollouts": True,
    "max_staleness": 1,
    "max_completion_length": 16,
}
LABELS = [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]  # of each step, it and the version that made what it learns


@dataclass(frozen=True)
class Served:
    """A server: its address, and the folder where it writes what it was asked for."""

    url: str
    place: Path

    @property
    def calls(self) -> list[dict[str, Any]]:
        log = self.place / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    @contextmanager
    def worse(self, how: str, much: object = "") -> Iterator[None]:
        (self.place / how).write_text(str(much))
        try:
            yield
        finally:
            (self.place / how).unlink()


@contextmanager
def serving(place: Path, model: Path) -> Iterator[Served]:
    place.mkdir(exist_ok=True)
    (port,) = hardware.free_ports(1)
    argv = [sys.executable, STAND_INS / "sampling_server.py", "--log", place / "calls.jsonl", "serve", model]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([*map(str, argv), "--port", str(port)], stdout=log, stderr=log)
    served = Served(f"http://127.0.0.1:{port}", place)
    try:
        deadline = time.monotonic() + READY_S
        with PolicyClient([served.url], None, generation_timeout_s=10, control_timeout_s=5) as client:
            while True:
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                try:
                    client.policy(served.url)
                    break
                except PolicyServerError:
                    time.sleep(0.1)
        yield served
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What server and trainer know of each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, "secret")
        patch.setenv(PUBLISH_FOLDER, str(tmp_path_factory.mktemp("publish")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that all runs here use in turn, but for those that need several or break theirs."""
    with serving(tmp_path_factory.mktemp("server"), model) as served:
        yield served


@pytest.fixture
def recipe(model: Path, few: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(*served: Served, way: str = "single", **keys: Any) -> Path:
        return recipe_for(way, tmp_path, model, few, *served, **keys)

    return make


def recipe_for(way: str, place: Path, model: Path, few: Path, *served: Served, **keys: Any) -> Path:
    own: dict[str, Any] = {"per_device_train_batch_size": 16 // WAYS[way][1]}
    if served:
        own["vllm_server_base_url"] = ",".join(each.url for each in served)
    return write_recipe(place / f"{way}.yaml", model, few, **OVERLAPPED | own | keys)


def labels(folder: RunFolder) -> list[tuple[int, int]]:
    """Of each step that begins a window, it and the policy versions of its completions."""
    files = sorted((folder.path / "rollouts").glob("train-*.parquet"))
    return sorted({(row["step"], row["policy_version"]) for file in files for row in rows(file)})


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Without times, and without what a trainer knows of the publishes before it was resumed."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("publish/", "probe/"))}
        for line in resuming.steps(folder)
    ]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Bit for bit the same metrics and model, and the same completions as far as both made them."""
    assert {line["step"]: line for line in steps(other)} == {line["step"]: line for line in steps(one)}
    made = sorted((other.path / "rollouts").glob("train-*.parquet"))
    assert made
    for file in made:
        assert rows(file) == rows(one.path / "rollouts" / file.name)
    expected, found = weights(one.model), weights(other.model)
    assert expected and [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.fixture(scope="module")
def overlapped(
    server: Served, model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, list[dict[str, Any]]]:
    """A run that never stopped, and what its server, which takes a while for each prompt, was asked for."""
    place, before = tmp_path_factory.mktemp("overlapped"), len(server.calls)
    with server.worse("delay", 0.3):
        folder = run("single", recipe_for("single", place, model, few, server), place / "run")
    return folder, server.calls[before:]


def rounds(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that asked for completions."""
    return sorted((each for each in calls if "n" in each), key=lambda each: float(each["came"]))


def told_idle(folder: RunFolder) -> list[tuple[int, float, float]]:
    """Of each step that says so, how idle server and trainer were."""
    lines = [line for line in folder.read_metrics() if line["kind"] == "step" and "idle/server" in line]
    return [(line["step"], line["idle/server"], line["idle/trainer"]) for line in lines]


def seen_idle(folder: RunFolder, *calls: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """The same of each step but the first, by what each server wrote down and by the trainer's phases."""
    lines = [line for line in folder.read_metrics() if line["kind"] == "step"]
    found = []
    for before, line in itertools.pairwise(lines):
        begin, end, idle = before["time"], line["time"], []
        for asked in map(rounds, calls):
            busy, reached = 0.0, begin
            for each in asked:
                came, done = max(each["came"], reached), min(each["done"], end)
                busy, reached = busy + max(0.0, done - came), max(reached, done)
            idle.append(1 - busy / (end - begin))
        waited = line.get("seconds/wait", 0.0) + line.get("seconds/generate", 0.0)
        found.append((line["step"], sum(idle) / len(idle), waited / line["seconds/step"]))
    return found


def is_told(folder: RunFolder, *calls: list[dict[str, Any]]) -> bool:
    told, seen = told_idle(folder)[1:], seen_idle(folder, *calls)
    return bool(seen) and np.allclose(told, seen, atol=0.15)


def test_each_window_is_made_by_the_policy_of_the_one_before(overlapped: tuple[RunFolder, Any]) -> None:
    folder, _ = overlapped
    assert labels(folder) == LABELS
    assert [line["staleness"] for line in steps(folder)] == [0, 1, 1, 1, 1, 1]
    # It has learnt meanwhile, so this was another policy, and the correction saw it.
    differences = [line["sampling/sampling_logp_difference/max"] for line in steps(folder)]
    assert differences[0] < 1e-4 < min(differences[1:])


def test_the_next_window_is_asked_for_before_the_step_ends_and_nothing_for_the_last(
    overlapped: tuple[RunFolder, list[dict[str, Any]]],
) -> None:
    folder, calls = overlapped
    lines = [line for line in folder.read_metrics() if line["kind"] == "step"]
    asked = rounds(calls)
    assert len(asked) == 2 * 6, "two prompts for each step, and none for a seventh"
    for line in lines[:-1]:
        assert max(each["came"] for each in asked[2 * line["step"] : 2 * line["step"] + 2]) < line["time"]
    assert all(line["seconds/wait"] > 0 and "seconds/generate" not in line for line in lines[1:])


def test_each_step_says_how_idle_either_side_was(overlapped: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    folder, calls = overlapped
    assert len(told_idle(folder)) == 6 and is_told(folder, calls)
    assert told_idle(folder)[0][2] > 0.1, "the first window has to be waited for"


def test_nothing_is_under_way_while_weights_are_published(
    overlapped: tuple[RunFolder, list[dict[str, Any]]],
) -> None:
    others = [each for each in overlapped[1] if "n" not in each]
    assert len({each["path"] for each in others}) >= 5
    assert [each for each in others if each["under_way"]] == []


def test_completions_are_asked_for_before_the_trainer_has_computed_its_side_of_the_proof(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, computed = len(server.calls), []

    def slow(*given: Any) -> Any:
        time.sleep(0.3)
        found = compute(*given)
        computed.append(time.time())
        return found

    compute = probe.trainer_logprobs
    monkeypatch.setattr(probe, "trainer_logprobs", slow)
    assert in_process(recipe(server, max_steps=3), tmp_path / "run")[0] == 0
    asked = [float(each["came"]) for each in rounds(server.calls[before:])]
    # Two requests a window: the first proof beside window 0, the second beside window 2; none comes after that.
    assert [sum(each < done for each in asked) for done in computed] == [2, 6, 6]


def test_every_prompt_comes_once_before_any_comes_again(overlapped: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    folder, calls = overlapped
    learnt = [row["prompt"] for step in range(1, 6) for row in rows(folder.rollouts(step))[::8]]
    assert len(learnt) == len(set(learnt)) == 10
    assert len({tuple(each["prompt"]) for each in rounds(calls)[:10]}) == 10


def test_without_it_they_take_turns(server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process) -> None:
    before = len(server.calls)
    code, folder, err = in_process(recipe(server, max_staleness=0, max_steps=3), tmp_path / "run")
    assert code == 0, err
    assert labels(folder) == [(1, 0), (2, 1), (3, 2)]
    lines = [line for line in folder.read_metrics() if line["kind"] == "step"]
    assert all(line["staleness"] == 0 and "seconds/wait" not in line for line in lines)
    asked = rounds(server.calls[before:])
    assert len(asked) == 6
    for line in lines[:-1]:
        assert min(each["came"] for each in asked[2 * line["step"] : 2 * line["step"] + 2]) > line["time"]
    assert [each["version"] for each in asked] == [0, 0, 1, 1, 2, 2]
    assert is_told(folder, server.calls[before:])


# --- as if it had never stopped


def test_killed_while_a_window_is_made_it_goes_on_to_the_same_end(
    overlapped: tuple[RunFolder, Any], server: Served, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """By SIGKILL, amid the fourth step's window, which the checkpoint before it does not hold."""
    made, folder = recipe(server, save_steps=2), RunFolder(tmp_path / "run")
    with server.worse("delay", 2), resuming.begin(resuming.command("single", made, folder.path), folder.path) as begun:
        resuming.until(lambda: len(resuming.steps(folder)) >= 3, begun, folder.path)
        resuming.kill(begun)
    checkpoint = checkpoints.newest(folder).path
    assert checkpoint == folder.checkpoints / "checkpoint-2"
    run("single", made, folder.path, "--resume", checkpoint)
    assert_same_run(overlapped[0], folder)


def test_a_run_that_is_measured_on_the_way_learns_the_same(
    overlapped: tuple[RunFolder, Any], server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process
) -> None:
    """And what is measured is the policy of that step; resumed at a step that is measured too."""
    before = len(server.calls)
    words = {"eval_strategy": "steps", "eval_steps": 2, "eval_count": 2, "eval_samples": 1, "eval_on_start": True}
    words["save_steps"] = 4  # saving waits for the window too
    with server.worse("delay", 0.5):
        code, folder, err = in_process(recipe(server, **words), tmp_path / "run")
    assert code == 0, err
    assert_same_run(overlapped[0], folder)
    measured = [line["step"] for line in folder.read_metrics() if line["kind"] == "evaluation"]
    assert measured == [0, 2, 4, 6]
    for step in measured:
        assert {row["policy_version"] for row in rows(folder.rollouts(step, "test"))} == {step}
    assert [each for each in server.calls[before:] if "n" not in each and each["under_way"]] == []
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(folder, 4, tmp_path / "again")
    code, again, err = in_process(recipe(server, **words), tmp_path / "again", "--resume", checkpoint)
    assert code == 0, err
    assert_same_run(folder, again)
    assert [step for step, _, _ in told_idle(again)] == [1, 2, 3, 4, 6], "not of the step that was resumed at"


def test_windows_of_several_steps_and_an_adapter(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process
) -> None:
    """A window feeds three steps, and is one window old; resumed in its middle."""
    before = len(server.calls)
    keys = {**LORA, "lora_dropout": 0.0, "steps_per_generation": 3, "max_steps": 7}
    code, folder, err = in_process(recipe(server, **keys), tmp_path / "run")
    assert code == 0, err
    assert labels(folder) == [(1, 0), (4, 0), (7, 3)]
    assert [line["staleness"] for line in steps(folder) if "staleness" in line] == [0, 3, 3]
    calls = server.calls[before:]
    assert len(rounds(calls)) == 18 and not [each for each in calls if "n" not in each and each["under_way"]]
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(folder, 5, tmp_path / "again")
    code, again, err = in_process(recipe(server, **keys), tmp_path / "again", "--resume", checkpoint)
    assert code == 0, err
    assert_same_run(folder, again)


@pytest.mark.parametrize("more", [{}, {"micro_batch_tokens": 256}], ids=["padded", "packed"])
def test_several_windows_a_step(
    more: dict[str, Any], server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process
) -> None:
    """An epoch of five windows has two steps of two and one of one; the second window of a step is not stale."""
    before = len(server.calls)
    made = recipe(server, gradient_accumulation_steps=2, max_steps=4, steps_per_generation=1, **more)
    code, folder, err = in_process(made, tmp_path / "run")
    assert code == 0, err
    assert labels(folder) == [(1, 0), (2, 0), (2, 1), (3, 1), (4, 2), (4, 3)]
    asked = rounds(server.calls[before:])
    assert len(asked) == 14, "five windows and two, and none that nobody learns from"
    assert len({tuple(each["prompt"]) for each in asked[:10]}) == 10


@pytest.mark.alone  # the idle shares are of steps of 0.4 s, and two trainers and two servers take all cores
@pytest.mark.parametrize("way", ["ddp", pytest.param("zero2", marks=pytest.mark.soak), "zero3"])
def test_several_processes_and_servers(
    way: str, server: Served, model: Path, recipe: Callable[..., Path], tmp_path: Path
) -> None:
    with serving(tmp_path / "other", model) as other:
        before = len(server.calls)
        made = recipe(server, other, way=way, max_steps=4)
        folder = run(way, made, tmp_path / "run")
        assert labels(folder) == LABELS[:4]
        assert is_told(folder, server.calls[before:], other.calls)
        for calls in (server.calls[before:], other.calls):
            # Each server has one prompt of each window, though each process has one prompt alone.
            assert [each["version"] for each in rounds(calls)] == [version for _, version in LABELS[:4]]
            assert not [each for each in calls if "n" not in each and each["under_way"]]
        (tmp_path / "again").mkdir()
        checkpoint = as_killed_after(folder, 2, tmp_path / "again")
        assert_same_run(folder, run(way, made, tmp_path / "again", "--resume", checkpoint))


# --- asked to stop


@pytest.fixture
def stopping_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the run asked to stop when a step is on record, with so many seconds to do it in."""

    def ask(folder: RunFolder, step: int, seconds: float, one_before: Callable[[], object] = lambda: None) -> None:
        seen = StopRequest.seen_here

        def look(self: StopRequest) -> bool:
            if len(resuming.steps(folder)) == step - 1:
                one_before()
            if len(resuming.steps(folder)) == step and not folder.stop.exists():
                write_json(folder.stop, {"why": "the time is over", "deadline": time.time() + seconds})
            return seen(self)

        monkeypatch.setattr(StopRequest, "seen_here", look)

    return ask


def test_asked_to_stop_it_waits_for_the_window_and_goes_on_to_the_same_end(
    overlapped: tuple[RunFolder, Any],
    server: Served,
    recipe: Callable[..., Path],
    tmp_path: Path,
    in_process,
    stopping_after,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asked while the trainer waits for it, so that the checkpoint is one of a step that has ended before."""
    made, folder = recipe(server, save_strategy="no"), RunFolder(tmp_path / "run")
    stopping_after(folder, 3, 300)
    with server.worse("delay", 1.5):
        code, _, err = in_process(made, folder.path)
    assert (code, read_json(folder.summary)["step"]) == (0, 3), err
    monkeypatch.undo()
    folder.stop.unlink()
    assert not [line for line in folder.read_metrics() if line["kind"] == "alert"]
    code, _, err = in_process(made, folder.path, "--resume", folder.checkpoints / "checkpoint-3")
    assert code == 0, err
    assert_same_run(overlapped[0], folder)


def test_without_time_for_it_the_window_is_given_up_and_that_is_said(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process, stopping_after, monkeypatch
) -> None:
    """Its server needs longer for it than is left."""
    made, folder = recipe(server, save_strategy="no"), RunFolder(tmp_path / "run")
    stopping_after(folder, 3, 6, lambda: (server.place / "delay").write_text("10"))
    code, _, err = in_process(made, folder.path)
    assert (code, read_json(folder.summary)["step"]) == (0, 3), err
    (alert,) = (line for line in folder.read_metrics() if line["kind"] == "alert")
    assert "the completions of the next window were not there, and there was no time" in alert["message"]
    monkeypatch.undo()
    folder.stop.unlink()
    (server.place / "delay").unlink()
    code, _, err = in_process(made, folder.path, "--resume", folder.checkpoints / "checkpoint-3")
    assert code == 0, err
    assert labels(folder) == [*LABELS[:3], (4, 3), (5, 3), (6, 4)]


def test_a_window_that_will_not_come_does_not_cost_the_checkpoint(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is found by the save after the second step; the third step's window is asked for anew."""
    wait, under_way, saving = NextWindow.wait, PolicyTrainer.under_way, [0]

    def fails(self: NextWindow, seconds: float) -> bool:
        if saving[-1] == 2:
            raise PolicyServerError("http://here", "POST /v1/completions", "gone")
        return wait(self, seconds)

    def look(self: PolicyTrainer) -> dict[str, Any]:
        saving.append(self.state.global_step)
        try:
            return under_way(self)
        finally:
            saving.append(0)

    monkeypatch.setattr(NextWindow, "wait", fails)
    monkeypatch.setattr(PolicyTrainer, "under_way", look)
    code, folder, err = in_process(recipe(server, save_steps=2, max_steps=4), tmp_path / "run")
    assert code == 0, err
    (alert,) = (line for line in folder.read_metrics() if line["kind"] == "alert")
    said = "the completions of the next window will not come (policy server at http://here: POST /v1/completions: gone)"
    assert said in alert["message"]
    assert labels(folder) == [*LABELS[:2], (3, 2), (4, 2)]
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(folder, 2, tmp_path / "again")
    monkeypatch.undo()
    code, again, err = in_process(recipe(server, save_steps=2, max_steps=4), tmp_path / "again", "--resume", checkpoint)
    assert code == 0, err
    assert_same_run(folder, again)


# --- the guard


def test_a_server_that_says_an_older_version_is_not_learned_from(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process
) -> None:
    why = "expected policy version 1, but its answer carries policy version 0"
    with server.worse("lag"), pytest.raises(WrongPolicyVersion, match=why):
        in_process(recipe(server), tmp_path / "run")
    assert [line["step"] for line in steps(RunFolder(tmp_path / "run"))] == [1, 2]


MADE = [Rollout((1, 2), (3,), (-0.5,), 4, False, ""), Rollout((1, 2), (5, 6), (-1 / 3, -0.0), 4, True, "")]
PROMPTS = [[1, 2], [1, 2]]


@pytest.mark.parametrize(
    ("rollouts", "number", "prompts", "why"),
    [
        (MADE, 5, PROMPTS, None),
        (MADE, 6, PROMPTS, "window 6 begins, and at hand are completions of window 5"),
        (MADE, 5, PROMPTS[:1], "made for other prompts"),
        (MADE, 5, [[1, 2], [1, 3]], "made for other prompts"),
        ([dataclasses.replace(each, policy_version=3) for each in MADE], 5, PROMPTS, "versions \\['3'\\], asked of"),
        ([dataclasses.replace(each, policy_version=5) for each in MADE], 5, PROMPTS, "versions \\['5'\\], asked of"),
        ([MADE[0], dataclasses.replace(MADE[1], policy_version=3)], 5, PROMPTS, "versions \\['3', '4'\\]"),
    ],
)
def test_only_the_version_prompts_and_window_that_were_asked_for(
    rollouts: list[Rollout], number: int, prompts: list[list[int]], why: str | None
) -> None:
    window = NextWindow.restored({"number": 5, "version": 4, "rollouts": packed(rollouts)})
    if why is None:
        assert window.take(number, prompts) == rollouts
        return
    with pytest.raises(Refusal, match=why):
        window.take(number, prompts)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2**31), max_size=4),
            st.lists(st.tuples(st.integers(0, 2**31), st.floats(-1e3, 0, allow_nan=False)), max_size=4),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_what_a_checkpoint_keeps_is_what_was_made(made: list[tuple[list[int], list[tuple[int, float]], bool]]) -> None:
    rollouts = [
        Rollout(tuple(prompt), tuple(token for token, _ in each), tuple(value for _, value in each), 7, clipped, "")
        for prompt, each, clipped in made
    ]
    window = NextWindow.restored({"number": 1, "version": 7, "rollouts": packed(rollouts)})
    again = NextWindow.restored(window.state())
    assert again.take(1, [list(each.prompt_ids) for each in rollouts]) == rollouts


# --- the server dies


def test_a_server_that_is_killed_while_it_makes_a_window_starts_again_and_the_run_ends_the_same(
    overlapped: tuple[RunFolder, Any], recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the one command; the pair starts again from the checkpoint, which holds the window of the step after it."""
    made, folder = recipe(save_steps=2), RunFolder(tmp_path / "run")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "delay").write_text("3")
    argv = [sys.executable, STAND_INS / "launch_sampling.py", made, "--output_dir", folder.path]
    monkeypatch.setenv("R1ZERO_NOTES", str(notes))
    with resuming.begin([str(each) for each in argv], tmp_path / "out") as launcher:
        try:
            resuming.until(lambda: len(resuming.steps(folder)) >= 3, launcher, tmp_path / "out")
            for child in psutil.Process(launcher.pid).children(recursive=True):
                if any(word.endswith("sampling_server.py") for word in child.cmdline()):
                    child.kill()
            (notes / "delay").unlink()
            assert launcher.wait(600) == 0, (tmp_path / "out" / "log").read_text()[-6000:]
        finally:
            resuming.kill(launcher)
    (restart,) = (line for line in folder.read_metrics() if line["kind"] == "restart")
    assert "killed by SIGKILL" in restart["cause"] and restart["checkpoint"] == "checkpoints/checkpoint-2"
    assert labels(folder) == LABELS
    assert_same_run(overlapped[0], folder)
