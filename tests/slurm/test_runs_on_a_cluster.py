"""sbatch of the tiny recipe on a real Slurm of three nodes, preempted on its way and left alone.

With a real policy server on the last node: undisturbed over two nodes, where the first has two trainer processes; and
over three, a trainer process on each of the first two. Without one: a trainer process on each of three, and three on
one. Rollouts and final weights are the same, bit by bit.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from r1zero import tiny
from r1zero.run_folder import RunFolder, read_json
from tests.conftest import PROJECT
from tests.serving.launched import server_python, words
from tests.slurm import cluster as clusters
from tests.slurm.cluster import Cluster
from tests.training.conftest import QUIET

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(1800)]
RUN_S = 900.0
STEPS = 7
KEYS = {
    "accelerate_config": "ddp",
    "reward_funcs": "tests.slurm.rewards:spread",
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": STEPS,
    "eval_count": 0,
    "eval_on_start": "false",
    "save_strategy": "no",
    "report_to": "none",
}
WITH_SERVER = {
    "use_vllm": "true",
    "vllm_mode": "server",
    "seed_rollouts": "true",
    "server_ready_timeout": 800,
    "server_silence_timeout": 120,
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    (tmp_path / "slurm").mkdir()
    with clusters.running(tmp_path / "slurm") as running:
        yield running


@dataclass(frozen=True)
class Run:
    """A job that is over.

    Attributes:
        folder: its run folder.
        output: what it printed.
        lost_s: for each preemption the seconds from the last step before it to the first one after it.
    """

    folder: RunFolder
    output: str
    lost_s: tuple[float, ...]


def submit(
    cluster: Cluster, python: str, place: Path, model: Path, nodes: int, preempt: tuple[int, ...] = (), **keys: Any
) -> Run:
    """Run slurm/train.sh to its end.

    Args:
        python: that it runs with.
        place: an empty folder that takes the run.
        model: to train.
        nodes: how many.
        preempt: after which steps the job gets SIGUSR1.
        keys: of the recipe, on top of `KEYS`.
    """
    place.mkdir()
    given = {**KEYS, **keys, "model_name_or_path": model, "runs_dir": place / "runs"}
    words_of_sbatch = [f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={place}/out.log"]
    env = {**QUIET, "R1ZERO_PYTHON": python, "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "R1ZERO_CACHE": str(place / "cache")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, (PROJECT / "src", PROJECT)))}
    recipe = "recipes/tiny/arithmetic_grpo.yaml"
    job = cluster.submit(*words_of_sbatch, "slurm/train.sh", recipe, *words(given), cwd=PROJECT, more_env=env)
    folder = RunFolder(place / "runs" / f"tiny-arithmetic_grpo-{job}")
    deadline = time.monotonic() + RUN_S * (1 + len(preempt))
    left = list(preempt)
    while (state := cluster.job(job)).state not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        assert time.monotonic() < deadline, f"{state}: {(place / 'out.log').read_text()}"
        if left and state.state == "RUNNING" and last_step(folder) >= left[0]:
            cluster.preempt(job)
            left.pop(0)
            cluster.wait(job, lambda job: job.state == "PENDING", 200)
            cluster.start_now(job)
        time.sleep(0.2)
    output = (place / "out.log").read_text()
    assert state == clusters.Job("COMPLETED", len(preempt), 0), output
    times = [line["time"] for line in folder.read_metrics() if line["kind"] == "step"]
    resumed = [line["step"] for line in folder.read_metrics() if line["kind"] == "resume"]
    lost = [round(times[step] - times[step - 1], 1) for step in resumed]
    return Run(folder, output, tuple(lost))


def last_step(folder: RunFolder) -> int:
    return max((line["step"] for line in folder.read_metrics() if line["kind"] == "step"), default=0)


def rollouts(folder: RunFolder) -> list[list[tuple[str, str, float, int]]]:
    """Prompt, completion, reward and policy version of every completion, by step."""
    columns = ["prompt", "completion", "reward", "policy_version"]
    files = [folder.rollouts(step) for step in range(1, STEPS + 1)]
    return [sorted(tuple(row.values()) for row in pq.read_table(file, columns=columns).to_pylist()) for file in files]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The embedded model, eight steps old."""
    monkeypatch.setenv("R1ZERO_CACHE", str(tmp_path / "cache"))
    return tiny.ensure(tiny.Pretraining(steps=8))


@pytest.mark.parametrize("preempt", [(3,), pytest.param((1, 3, 5), marks=pytest.mark.soak)])
def test_a_preempted_run_over_three_nodes_equals_an_undisturbed_one_over_two(
    cluster: Cluster, tmp_path: Path, model: Path, preempt: tuple[int, ...]
) -> None:
    python = server_python()
    preempted = submit(cluster, python, tmp_path / "preempted", model, 3, preempt, **WITH_SERVER)
    undisturbed = submit(cluster, python, tmp_path / "undisturbed", model, 2, cpu_processes=2, **WITH_SERVER)
    assert_same_end(preempted, undisturbed, model, len(preempt))
    assert not list(preempted.folder.path.glob("r1zero-*"))  # where the weights went from trainer to server


def test_preempted_three_times_it_ends_as_one_that_was_left_alone(
    cluster: Cluster, tmp_path: Path, model: Path
) -> None:
    """The trainers generate: the start of a policy server would be half of each of the four attempts.

    With two processes it does not matter in which order gradients are added. With three it does, and DDP arranges them
    anew after the first step of each attempt, but not where some might be missing.
    """
    keys = {"reward_funcs": "tests.slurm.rewards:unhurried", "ddp_find_unused_parameters": "true"}
    preempted = submit(cluster, sys.executable, tmp_path / "preempted", model, 3, (1, 3, 5), **keys)
    undisturbed = submit(cluster, sys.executable, tmp_path / "undisturbed", model, 1, cpu_processes=3, **keys)
    assert_same_end(preempted, undisturbed, model, 3)


def assert_same_end(preempted: Run, undisturbed: Run, model: Path, times: int) -> None:
    """The run over three nodes was preempted so many times, and it does not show in what came of it."""
    print(f"seconds from the last step before each preemption to the first one after it: {preempted.lost_s}")
    assert len(preempted.lost_s) == times
    assert rollouts(preempted.folder) == rollouts(undisturbed.folder)
    (weights,) = preempted.folder.model.glob("*.safetensors")
    assert weights.read_bytes() == (undisturbed.folder.model / weights.name).read_bytes()
    assert weights.read_bytes() != (model / weights.name).read_bytes()
    summary = read_json(preempted.folder.summary)
    assert (summary["outcome"], summary["requeues"], summary["restarts"]) == ("finished", times, 0)
    steps = [line["step"] for line in preempted.folder.read_metrics() if line["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    assert preempted.output.count("is in the queue again") == times
    for node in (1, 2):
        assert preempted.output.count(f"node {node} of 3 (") == times + 1
    assert not [path for path in preempted.folder.path.parent.iterdir() if path.name.startswith(".")]
    versions = json.loads(preempted.folder.versions.read_text())
    assert versions["argv"][0].endswith("launch/run.py") and os.environ.get("SLURM_JOB_ID") is None
