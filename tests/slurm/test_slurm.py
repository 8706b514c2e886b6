"""What SLURM_* says of a job, and the command line inside of one; `scontrol` is a script put first on PATH."""

import os
from pathlib import Path

import pytest

from r1zero import slurm
from r1zero.slurm import Job, SlurmError
from tests.conftest import PROJECT

RECIPE = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"
BATCH = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "3", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "d[1-3]"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
STEP |= {"SLURM_STEP_NODELIST": "d[1-2]", "SLURM_NODEID": "1"}
SCONTROL = '#!/bin/sh\n[ "$1 $2" = "show hostnames" ] || exit 9\ncase "$3" in\n'
SCONTROL += (
    '"d[1-3]") printf "d1\\nd2\\nd3\\n" ;;\n"d[1-2]") printf "d1\\nd2\\n" ;;\n*) echo bad >&2; exit 1 ;;\nesac\n'
)


@pytest.fixture(autouse=True)
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job, whatever the tests themselves run in; with a `scontrol` on PATH."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def within(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_CONF": "/etc/slurm.conf"}, None),
        (BATCH, Job("77", node=0, nodes=3)),
        (STEP, Job("77", node=1, nodes=2, step="0")),
        ({**STEP, "SLURM_STEP_ID": "4", "SLURM_RESTART_COUNT": "2"}, Job("77", 1, 2, "4", 2)),
    ],
)
def test_the_job_of_a_process(variables: dict[str, str], job: Job | None) -> None:
    assert slurm.job(variables) == job


def test_a_second_run_of_one_job_has_a_name_of_its_own() -> None:
    assert [Job("77", step=step).name for step in (None, "0", "1")] == ["77", "77", "77.1"]


def test_two_tasks_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch, run) -> None:
    within(monkeypatch, {**STEP, "SLURM_STEP_NUM_TASKS": "4"})
    with pytest.raises(
        SlurmError, match=r"4 tasks on 2 node\(s\), and one on each is wanted: srun --nodes=2 --ntasks=2"
    ):
        slurm.job()
    answer = run(RECIPE)
    assert answer.code == 2 and "srun started 4 tasks on 2 node(s)" in answer.err


def test_the_nodes_are_named_and_a_failure_of_scontrol_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d1").touch()  # a shell that saw d[1-3] unquoted would find this
    monkeypatch.chdir(tmp_path)
    assert slurm.hosts(BATCH) == ("d1", "d2", "d3")
    assert slurm.hosts(STEP) == ("d1", "d2")
    with pytest.raises(SlurmError, match="the job's nodes are e1, but scontrol could not expand that: bad"):
        slurm.hosts({"SLURM_JOB_NODELIST": "e1"})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No such file or directory: 'scontrol'" in slurm.requeue("77")


def test_no_child_takes_itself_for_a_rank_of_the_srun() -> None:
    environment = {"PMI_RANK": "1", "PMIX_ID": "1", "OMPI_COMM_WORLD_RANK": "1", "PATH": "/bin", "SLURM_JOB_ID": "77"}
    assert slurm.without_mpi(environment) == {"PATH": "/bin", "SLURM_JOB_ID": "77"}


@pytest.mark.parametrize(("variables", "nodes"), [(BATCH, 3), ({**STEP, "SLURM_NODEID": "0"}, 2)])
def test_a_dry_run_inside_a_job_plans_for_its_nodes_and_meets_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run, variables: dict[str, str], nodes: int
) -> None:
    within(monkeypatch, variables)
    answer = run(RECIPE, "--dry-run", "--accelerate_config", "ddp", "--runs_dir", tmp_path / "runs")
    assert answer.code == 0, answer.err
    for number in range(nodes):
        assert f"d{number + 1}" in answer.out and f"trainer-{number}" in answer.out
    assert f"trainer-{nodes}" not in answer.out
    assert "tiny-arithmetic_grpo-77" in answer.out  # by the job's number, not by the time
    assert not (tmp_path / "runs").exists()


def test_of_a_dry_run_on_several_nodes_the_first_one_tells(monkeypatch: pytest.MonkeyPatch, run) -> None:
    within(monkeypatch, STEP)
    answer = run(RECIPE, "--dry-run")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_a_job_of_several_nodes_needs_srun(monkeypatch: pytest.MonkeyPatch, run, tmp_path: Path) -> None:
    within(monkeypatch, BATCH)
    answer = run(RECIPE, "--runs_dir", tmp_path / "runs")
    assert answer.code == 2
    assert "the job has 3 nodes, and this was started on one: srun --nodes=3 --ntasks=3" in answer.err
    assert not (tmp_path / "runs").exists()
