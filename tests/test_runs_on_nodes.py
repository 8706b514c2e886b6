"""launch/run.py once for each of three nodes, as srun starts it, with stand-ins for policy server and trainer.

The nodes are this machine three times over, with two GPUs each that are not there: trainers on the first two, a policy
server on each GPU of the last.
"""

import signal
from pathlib import Path

import pytest

from r1zero.run_folder import read_json
from tests.test_preemption import Queue
from tests.test_run_failures import (
    SLOW_S,
    STOP_S,
    Launch,
    Start,
    assert_failed,
    kill_trainer,
    launches,
    start_with_server,
)

__all__ = ["launches", "start_with_server"]
NODES = 3


@pytest.fixture
def slurm(tmp_path: Path) -> Queue:
    return Queue(tmp_path)


@pytest.fixture
def start_nodes(start_with_server: Start, slurm: Queue, tmp_path: Path) -> Start:
    """All nodes; returns the launcher of the first, and those of the others."""

    def call(trainer: str, restarts: int = 0) -> tuple[Launch, list[Launch]]:
        begun = []
        for node in range(NODES):
            step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": str(NODES), "SLURM_STEP_NUM_TASKS": str(NODES)}
            env = {**slurm.env(), **step, "SLURM_NODEID": str(node), "PMI_RANK": str(node), "PMI_SIZE": str(NODES)}
            runs = ("--runs_dir", str(tmp_path / "runs"))
            begun.append(start_with_server(*runs, trainer=trainer, restarts=restarts, **env))
        return begun[0], begun[1:]

    return call


def assert_agents_are_done(agents: list[Launch]) -> None:
    """Each said one line when it had joined and one at the end."""
    for number, agent in enumerate(agents, 1):
        assert agent.end(STOP_S) == 0
        joined, done = agent.output.splitlines()
        assert joined.startswith(f"node {number} of {NODES} (") and "serves the run that 127.0.0.1 leads" in joined
        assert done.startswith(f"node {number} (") and done.endswith(": done")


def test_a_run_over_three_nodes(start_nodes: Start) -> None:
    head, agents = start_nodes("finishes")
    head.until(lambda: head.phase == "done")
    assert head.end(STOP_S) == 0
    assert_agents_are_done(agents)
    assert head.summary["outcome"] == "finished"
    for name in ("server-0", "server-1", "trainer-0"):
        assert head.log(name), name
    plan = head.run_folder.plan.read_text()
    assert "trainer-0" in plan and "trainer-1" in plan
    assert not [path for path in (head.folder / "runs").iterdir() if path.name.startswith(".meeting")]
    assert not list(head.run_folder.path.glob("r1zero-*"))


def test_the_node_whose_trainer_failed_first_is_the_cause(start_nodes: Start) -> None:
    head, agents = start_nodes("fails-on-node-1")
    head.until(lambda: head.steps >= 2)
    cause = (
        "trainer-1: exited with code 1: ValueError: the reward of node 1 is broken, then trainer-0: exited with code 1"
    )
    assert_failed(head, 60, cause)
    assert_agents_are_done(agents)


def test_after_an_accident_all_nodes_go_on(start_nodes: Start) -> None:
    head, agents = start_nodes("resumes", restarts=1)
    head.until(lambda: head.steps >= 6)
    before = {name: head.log(name).count("stand-in server: ") for name in ("server-0", "server-1")}
    kill_trainer(head)
    head.until(lambda: head.restarts)
    assert head.end(SLOW_S) == 0
    assert_agents_are_done(agents)
    assert head.summary["restarts"] == 1
    assert {name: head.log(name).count("stand-in server: ") for name in before} == dict.fromkeys(before, 2)


def test_sigusr1_to_every_node_is_one_requeue(start_nodes: Start, slurm: Queue) -> None:
    head, agents = start_nodes("trains")
    head.until(lambda: head.steps >= 2)
    for each in (*agents, head):
        each.signal(signal.SIGUSR1)
    assert head.end(STOP_S) == 0
    assert_agents_are_done(agents)
    assert slurm.asked == ["requeue 77"]
    assert (read_json(head.run_folder.summary) or {})["outcome"] == "stopped"


def test_sigterm_to_every_node_is_an_interrupted_run(start_nodes: Start, slurm: Queue) -> None:
    head, agents = start_nodes("trains")
    head.until(lambda: head.steps >= 2)
    for each in (*agents, head):
        each.signal(signal.SIGTERM)
    assert head.end(STOP_S) == 143
    assert [agent.end(STOP_S) for agent in agents] == [143, 143]
    assert head.summary["outcome"] == "interrupted"
    assert slurm.asked == []


def test_a_node_that_is_lost_ends_the_run_by_its_name(start_nodes: Start) -> None:
    head, agents = start_nodes("trains", restarts=3)
    head.until(lambda: head.steps >= 2)
    agents[1].signal(signal.SIGKILL)
    assert_failed(head, STOP_S + SLOW_S, "node 2 (", "its launcher is gone", "server-0, server-1 ran there")
    assert agents[0].end(STOP_S) == 0
