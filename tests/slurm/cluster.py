"""A real Slurm of several nodes on this one machine: munged, slurmctld and slurmd of its own.

All that it writes lies in one folder, all its ports are free ones, and at its end no process of it is left.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from r1zero.hardware import free_ports

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "mungekey")
UP_S = 60.0
CONFIG = """
ClusterName=r1zero-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
JobRequeue=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Job:
    """What ``scontrol show job`` says of a job.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, FAILED, ...
        restarts: how often it was requeued.
        exit_code: of the batch script.
    """

    state: str
    restarts: int
    exit_code: int


@dataclass(frozen=True)
class Cluster:
    """A running Slurm.

    Attributes:
        folder: its configuration, logs and state.
        nodes: their names.
        environment: with which sbatch, srun and scontrol speak to it.
    """

    folder: Path
    nodes: tuple[str, ...]
    environment: Mapping[str, str]

    def call(self, *command: str, cwd: Path | None = None, more_env: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm prints; fails where it fails."""
        done = subprocess.run(
            command,
            env={**self.environment, **(more_env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, more_env: Mapping[str, str] | None = None) -> int:
        """``sbatch`` with these words; the number of the job."""
        return int(self.call("sbatch", "--parsable", *words, cwd=cwd, more_env=more_env).split(";")[0])

    def job(self, number: int) -> Job:
        fields = dict(
            word.partition("=")[::2]
            for word in self.call("scontrol", "show", "job", str(number)).split()
            if "=" in word
        )
        return Job(fields["JobState"], int(fields["Restarts"]), int(fields["ExitCode"].partition(":")[0]))

    def preempt(self, number: int) -> None:
        """What ``#SBATCH --signal=USR1@300`` does five minutes before the limit."""
        self.call("scancel", "--signal=USR1", str(number))

    def start_now(self, number: int) -> None:
        """Spare a requeued job the two minutes that Slurm lets it wait."""
        self.call("scontrol", "update", f"JobId={number}", "StartTime=now")

    def wait(self, number: int, until: Callable[[Job], bool], seconds: float) -> Job:
        """The job once `until` holds for it; fails when that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not until(job := self.job(number)):
            assert time.monotonic() < deadline, f"{job} after {seconds:g} s"
            time.sleep(0.2)
        return job


@contextmanager
def running(folder: Path, nodes: int = 3, gpus: int = 0) -> Iterator[Cluster]:
    """A Slurm of `nodes` nodes, named d1, d2, ...; skips the test where Slurm is not installed.

    Args:
        folder: an empty folder.
        nodes: how many.
        gpus: of each node, as Slurm counts them; there are none behind them.
    """
    missing = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and Slurm: apt-get install slurm-wlm munge ({', '.join(missing) or 'not root'})")
    names = tuple(f"d{number}" for number in range(1, nodes + 1))
    controller, *ports = free_ports(nodes + 1)
    host = os.uname().nodename
    lines = [
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=1000 State=UNKNOWN"
        + (f" Gres=gpu:{gpus}" if gpus else "")
        for name, port in zip(names, ports, strict=True)
    ]
    if gpus:
        lines.insert(0, "GresTypes=gpu")
        (folder / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu Count={gpus} File=/dev/null\n")
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, host=host, port=controller, nodes="\n".join(lines)))
    (folder / "state").mkdir()
    for name in names:
        (folder / f"spool-{name}").mkdir()
    _run("mungekey", "--create", f"--keyfile={folder / 'munge.key'}")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    environment = {**kept, "PATH": _path(), "SLURM_CONF": str(config)}
    cluster = Cluster(folder, names, environment)
    daemons: list[psutil.Process] = []
    try:
        daemons.append(_daemon(environment, folder, "munged", "--foreground", "--force", *_munge_files(folder)))
        _until(lambda: (folder / "munge.socket").exists(), "munged has made no socket")
        daemons.append(_daemon(environment, folder, "slurmctld", "-D", "-f", str(config)))
        daemons += [_daemon(environment, folder, "slurmd", "-D", "-N", name, "-f", str(config)) for name in names]
        _until(lambda: _idle(cluster) == nodes, "the nodes are not up")
        yield cluster
    finally:
        _tear_down(cluster, daemons)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _run(*command: str) -> None:
    subprocess.run(command, env={**os.environ, "PATH": _path()}, check=True, timeout=60, stdout=subprocess.DEVNULL)


def _munge_files(folder: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    return [f"--{flag}={folder / name}" for flag, name in {**files, "seed-file": "munge.seed"}.items()]


def _daemon(environment: Mapping[str, str], folder: Path, *command: str) -> psutil.Process:
    with (folder / "daemons.log").open("ab") as log:
        popen = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return psutil.Process(popen.pid)


def _idle(cluster: Cluster) -> int:
    found = subprocess.run(
        ["sinfo", "-h", "-N", "-o", "%T"], env=cluster.environment, capture_output=True, text=True, check=False
    )
    return found.stdout.split().count("idle")


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + UP_S
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {UP_S:g} s"
        time.sleep(0.1)


def _tear_down(cluster: Cluster, daemons: list[psutil.Process]) -> None:
    """Jobs first, then the daemons, the last first, and whatever of slurmstepd is left."""
    with suppress(subprocess.SubprocessError):
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, timeout=30, check=False)
        deadline = time.monotonic() + 30
        while _idle(cluster) < len(cluster.nodes) and time.monotonic() < deadline:
            time.sleep(0.2)
    left = [each for daemon in daemons if daemon.is_running() for each in daemon.children(recursive=True)]
    left += [each for each in psutil.process_iter() if _is_of(each, cluster)]
    for each in reversed(daemons):
        with suppress(psutil.Error):
            each.send_signal(signal.SIGTERM)
    psutil.wait_procs(daemons, timeout=15)
    for each in {*left, *daemons}:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(daemons, timeout=5)


def _is_of(process: psutil.Process, cluster: Cluster) -> bool:
    """Whether it is a step of a job of this Slurm: slurmstepd leaves slurmd's tree."""
    with suppress(psutil.Error, OSError):
        return process.environ().get("SLURM_CONF") == str(cluster.folder / "slurm.conf")
    return False
