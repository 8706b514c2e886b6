"""slurm/train.sh through a real sbatch and srun, with a stand-in for Python; and the cluster leaves nothing behind."""

from contextlib import suppress
from pathlib import Path

import psutil

from tests.conftest import PROJECT
from tests.slurm import cluster as clusters

PYTHON = """#!/bin/sh
out="$TOLD/$SLURM_NODEID-${SLURM_RESTART_COUNT:-0}"
trap 'echo USR1 >> "$out.signals"' USR1
printf '%s\\0' "$PWD" "$@" > "$out.new" && mv "$out.new" "$out"
[ "${SLURM_RESTART_COUNT:-0}" = 1 ] && exit 0
for _ in $(seq 300); do
    [ -e "$out.signals" ] && [ "$SLURM_NODEID" = 0 ] && scontrol requeue "$SLURM_JOB_ID"
    sleep 0.2
done
"""
HOSTILE = (
    "a b",
    "$(touch hacked)",
    "`touch hacked`",
    "*",
    "--output=hacked",
    "-n 9",
    "x\ny",
    "'\"",
    ";touch hacked",
    "%j",
)


def test_the_script_runs_once_a_node_with_each_word_as_it_was_and_gets_the_signal(tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout; with $HOME"
    for folder in (checkout / "slurm", tmp_path / "slurm", tmp_path / "told"):
        folder.mkdir(parents=True)
    (checkout / "slurm" / "train.sh").write_bytes((PROJECT / "slurm" / "train.sh").read_bytes())
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    with clusters.running(tmp_path / "slurm") as cluster:
        job = cluster.submit(
            *("--nodes=3", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={tmp_path}/out.log"),
            *("slurm/train.sh", "recipes/x.yaml", *HOSTILE),
            cwd=checkout,
            more_env={"R1ZERO_PYTHON": str(tmp_path / "python"), "TOLD": str(tmp_path / "told")},
        )
        cluster.wait(job, lambda _: told(tmp_path, 0) == 3, 180)
        cluster.preempt(job)
        cluster.wait(job, lambda each: each.state == "PENDING" and each.restarts == 1, 180)
        cluster.start_now(job)
        cluster.wait(job, lambda each: each.state == "COMPLETED", 180)
        assert told(tmp_path, 1) == 3
        conf = cluster.environment["SLURM_CONF"]
    for file in (tmp_path / "told").glob("?-?"):
        assert file.read_text().split("\0") == [str(checkout), "launch/run.py", "recipes/x.yaml", *HOSTILE, ""]
    for node in range(3):
        assert (tmp_path / "told" / f"{node}-0.signals").read_text().startswith("USR1")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [checkout.name, "out.log", "python", "slurm", "told"]
    )
    assert [path.name for path in checkout.iterdir()] == ["slurm"]
    assert left_of(conf) == []


def told(folder: Path, restarts: int) -> int:
    return len(list((folder / "told").glob(f"?-{restarts}")))


def left_of(conf: str) -> list[psutil.Process]:
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get("SLURM_CONF") == conf and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    return left
