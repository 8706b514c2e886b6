"""What Slurm says of the job that this process is a part of, and the one thing that is asked of it: a requeue."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

COMMAND_TIMEOUT_S = 60.0
# By these MPI libraries, and accelerate, find the other tasks of an srun. Ours are no ranks of anything.
MPI_VARIABLES = ("PMI_", "PMIX_", "OMPI_", "MV2_COMM_", "MPI_LOCAL")


class SlurmError(Exception):
    """Slurm has started this in a way that no run can come of, or does not answer."""


@dataclass(frozen=True)
class Job:
    """A job of Slurm, as one of its processes sees it.

    >>> Job("4711", node=1, nodes=3, step="0").name
    '4711'

    Attributes:
        id: the job's number; of an array job, of that element.
        node: which of the nodes this process is on, from 0.
        nodes: how many there are.
        step: the number of the ``srun`` that started this process; None where none did: it is the batch script's.
        restarts: how often the job was requeued before.
    """

    id: str
    node: int = 0
    nodes: int = 1
    step: str | None = None
    restarts: int = 0

    @property
    def name(self) -> str:
        """What tells this job's run from others, and stays the same when the job is requeued."""
        return self.id if self.step in (None, "0") else f"{self.id}.{self.step}"


def job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The job that this process belongs to; None outside of one.

    Raises:
        SlurmError: when ``srun`` started more than one task on a node.
    """
    number = environment.get("SLURM_JOB_ID")
    if not number:
        return None
    restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
    step = environment.get("SLURM_STEP_ID")
    if step is None:
        return Job(number, nodes=int(environment.get("SLURM_JOB_NUM_NODES") or 1), restarts=restarts)
    nodes = int(environment.get("SLURM_STEP_NUM_NODES") or 1)
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or nodes)
    if tasks != nodes:
        raise SlurmError(f"srun started {tasks} tasks on {nodes} node(s), and one on each is wanted: {srun(nodes)}")
    return Job(number, int(environment.get("SLURM_NODEID") or 0), nodes, step, restarts)


def srun(nodes: int) -> str:
    """What starts the launcher once on each node."""
    return f"srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 python launch/run.py ..."


def hosts(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The names of the job's nodes, in its order.

    Raises:
        SlurmError: when ``scontrol`` cannot tell.
    """
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    done, why = _scontrol("show", "hostnames", names)
    if why:
        raise SlurmError(f"the job's nodes are {names}, but scontrol could not expand that: {why}")
    return tuple(done.split())


def requeue(number: str) -> str:
    """Put the job back into the queue, which ends all of it that still runs.

    Returns:
        Why that could not be; empty when it was done.
    """
    return _scontrol("requeue", number)[1]


def without_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without the variables that would make a child take itself for a rank of the srun."""
    return {name: value for name, value in environment.items() if not name.startswith(MPI_VARIABLES)}


def _scontrol(*words: str) -> tuple[str, str]:
    """What it printed, and why it failed."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    if done.returncode:
        return "", done.stderr.strip() or f"scontrol exited with {done.returncode}"
    return done.stdout, ""
