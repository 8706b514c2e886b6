"""With max_staleness 1 the server makes the next window while the trainer learns from this one: whole runs by hand,
with a server that draws the same for the same weights, prompts and seeds (`stand_ins/sampling_server.py`).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from r1zero import checkpoints, hardware
from r1zero.policy_client import PolicyClient, PolicyServerError, Rollout
from r1zero.restarts import Refusal
from r1zero.run_folder import RunFolder, read_json, write_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.training.next_window import NextWindow, packed
from tests.conftest import PROJECT
from tests.training import resuming
from tests.training.conftest import rows, write_recipe
from tests.training.resuming import EXACT, LORA, WAYS, run, weights

# Most of a test here is the start of processes, which takes long where many share two cores.
pytestmark = pytest.mark.timeout(900)

SERVER = PROJECT / "tests" / "stand_ins" / "sampling_server.py"
READY_S = 120.0
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


@dataclass(frozen=True)
class Served:
    """A server: its address, and where it writes what it was asked for."""

    url: str
    log: Path

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """What was asked for in training and in measuring."""
        return [each for each in self.calls if "n" in each]


@contextmanager
def serving(place: Path, model: Path, *words: object) -> Iterator[Served]:
    place.mkdir(exist_ok=True)
    (port,) = hardware.free_ports(1)
    argv = [sys.executable, SERVER, "--port", port, "--model", model, "--log", place / "calls.jsonl", *words]
    with (place / "log").open("w") as log:
        process = subprocess.Popen([str(each) for each in argv], stdout=log, stderr=log)
    served = Served(f"http://127.0.0.1:{port}", place / "calls.jsonl")
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What server and trainer know of each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN, "secret")
        folder = tmp_path_factory.mktemp("publish")
        patch.setenv(PUBLISH_FOLDER, str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder


@pytest.fixture(scope="module")
def few(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten problems."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("train", "test"):
        lines = (data / f"{split}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:10]))
    return folder


@pytest.fixture(scope="module")
def train_with(
    model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[RunFolder, list[Served]]]:
    """A run to its end, with a server of its own or several: its folder, and what the servers were asked for."""

    def call(way: str = "single", servers: int = 1, words: tuple[object, ...] = (), **keys: Any) -> Any:
        place = tmp_path_factory.mktemp("run")
        with several(servers, place, model, *words) as served:
            recipe = recipe_for(way, place, model, few, served, **keys)
            return run(way, recipe, place / "run"), served

    return call


@contextmanager
def several(count: int, place: Path, model: Path, *words: object) -> Iterator[list[Served]]:
    if count == 0:
        yield []
        return
    with serving(place / f"server-{count}", model, *words) as one, several(count - 1, place, model, *words) as others:
        yield [one, *others]


def recipe_for(way: str, place: Path, model: Path, few: Path, served: list[Served], **keys: Any) -> Path:
    own = {
        "per_device_train_batch_size": 16 // WAYS[way][1],
        "vllm_server_base_url": ",".join(each.url for each in served),
    }
    return write_recipe(place / f"{way}.yaml", model, few, **OVERLAPPED | own | keys)


def labels(folder: RunFolder, steps: int) -> list[tuple[int, int]]:
    """Of each step, it and the policy version of its completions."""
    found = [
        {(row["step"], row["policy_version"]) for row in rows(folder.rollouts(step))} for step in range(1, steps + 1)
    ]
    assert all(len(each) == 1 for each in found)
    return [each.pop() for each in found]


def steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Without times, and without what a trainer knows of the publishes before it was resumed."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("publish/", "probe/"))}
        for line in resuming.steps(folder)
    ]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    """Bit for bit the same completions, metrics and model."""
    assert steps(other) == steps(one)
    count = len(steps(one))
    for step in range(1, count + 1):
        assert rows(other.rollouts(step)) == rows(one.rollouts(step))
    expected, found = weights(one.model), weights(other.model)
    assert expected and [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.fixture(scope="module")
def overlapped(train_with: Callable[..., Any]) -> tuple[RunFolder, list[Served]]:
    """Never stopped, with a server that takes a while for each prompt."""
    found: tuple[RunFolder, list[Served]] = train_with(words=("--delay", 0.3))
    return found


def test_each_window_is_made_by_the_policy_of_the_one_before(overlapped: tuple[RunFolder, list[Served]]) -> None:
    folder, _ = overlapped
    assert labels(folder, 6) == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]
    assert [line["staleness"] for line in steps(folder)] == [0, 1, 1, 1, 1, 1]
    # It has learnt meanwhile, so this was another policy, and the correction saw it.
    assert all(line["sampling/sampling_logp_difference/max"] > 1e-4 for line in steps(folder)[1:])


def test_the_next_window_is_asked_for_before_the_step_ends_and_nothing_for_the_last(
    overlapped: tuple[RunFolder, list[Served]],
) -> None:
    folder, (served,) = overlapped
    recorded = [line["time"] for line in folder.read_metrics() if line["kind"] == "step"]
    rounds = served.rounds
    assert len(rounds) == 2 * 6, "two prompts for each step, and none for a seventh"
    for step, ended in enumerate(recorded[:-1], 1):
        assert all(each["came"] < ended for each in rounds[2 * step : 2 * step + 2])
    lines = [line for line in folder.read_metrics() if line["kind"] == "step"]
    assert all(line["seconds/wait"] > 0 and "seconds/generate" not in line for line in lines[1:])


def test_nothing_is_under_way_while_weights_are_published(overlapped: tuple[RunFolder, list[Served]]) -> None:
    _, (served,) = overlapped
    others = [each for each in served.calls if "n" not in each]
    assert len({each["path"] for each in others}) >= 5
    assert [each for each in others if each["under_way"]] == []


def test_every_prompt_comes_once_before_any_comes_again(overlapped: tuple[RunFolder, list[Served]]) -> None:
    folder, (served,) = overlapped
    asked = [row["prompt"] for step in range(1, 6) for row in rows(folder.rollouts(step))[::8]]
    assert len(asked) == len(set(asked)) == 10
    assert len({tuple(each["prompt"]) for each in served.rounds[:10]}) == 10
