"""The one place that names what a run writes. Evaluation and report read nothing but this folder.

Every file but the append-only ones is written aside and renamed, so that a reader, or a crash, never meets half a file.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

if TYPE_CHECKING:
    import pyarrow as pa

PACKAGES = (
    *("r1zero", "torch", "trl", "transformers", "accelerate", "peft", "datasets", "vllm", "deepspeed"),
    *("bitsandbytes", "liger-kernel", "wandb"),
)
STOPPED_OUTCOME = "stopped"  # in the summary of a run that left off to be resumed
OF_A_STEP = frozenset({"step", "evaluation", "alert"})  # kinds of lines that a step makes anew when it is done again


@dataclass(frozen=True)
class RunFolder:
    """A run on disk. Paths are fixed; nothing here holds state.

    >>> RunFolder(Path("runs/tiny-arithmetic_grpo-20261121-093000")).metrics.name
    'metrics.jsonl'
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: every own key, every TRL key given. It can be run again as it is."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan as the table that was printed."""
        return self.path / "plan.txt"

    @property
    def versions(self) -> Path:
        """Python, packages, git commit, host, the process that began the run, GPUs and command line."""
        return self.path / "versions.json"

    @property
    def status(self) -> Path:
        """What the run does right now: phase, progress, seconds left. Replaced as it goes."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, in the order of time: ``kind`` is phase, step, evaluation, alert, restart, resume."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """How the run ended: outcome, scores before and after, seconds, where to look next."""
        return self.path / "summary.json"

    @property
    def stop(self) -> Path:
        """The request to stop soon: ``{"why": str, "deadline": unix seconds}``. Who begins an attempt removes it."""
        return self.path / "stop.json"

    @property
    def logs(self) -> Path:
        """stdout and stderr of each process."""
        return self.path / "logs"

    @property
    def checkpoints(self) -> Path:
        """What the trainer saves on the way: checkpoint-N."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model (or adapter) with its tokenizer."""
        return self.path / "model"

    @property
    def best(self) -> Path:
        """The model (or adapter) that measured best on the way, with its step and score in ``best.json``."""
        return self.path / "best"

    def rollouts(self, step: int, split: str = "train") -> Path:
        """Parquet of the completions that optimizer step `step` learned from, or that an evaluation there sampled."""
        return self.path / "rollouts" / f"{split}-{step:06d}.parquet"

    def create(self) -> "RunFolder":
        """Make the folder; a folder that exists is never written into, a name that is taken gets a number."""
        for number in range(1, 1000):
            path = self.path if number == 1 else self.path.with_name(f"{self.path.name}-{number}")
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return RunFolder(path)
        raise FileExistsError(f"{self.path}: a thousand runs of this name exist")

    def read_metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics` that count; a last line still being written is left out.

        Where the run went back to a checkpoint, what it had recorded of later steps does not: they were done again.
        """
        kept: list[dict[str, Any]] = []
        for line in self.read_metrics_after(0)[0]:
            if line["kind"] == "resume":
                kept = [each for each in kept if each["kind"] not in OF_A_STEP or each["step"] <= line["step"]]
            kept.append(line)
        yield from kept

    def read_metrics_after(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines of `metrics` from byte `offset` on, and the offset after them, to go on from."""
        if not self.metrics.exists():
            return [], offset
        with self.metrics.open("rb") as file:
            file.seek(offset)
            whole, end, _ = file.read().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.split(b"\n")] if end else []
        return lines, offset + len(whole) + len(end)


def default_path(runs_dir: str, recipe_name: str, output_dir: str | None, now: float | None = None) -> Path:
    """Where a run goes: `output_dir` where the recipe names one, else ``runs_dir/<recipe>-<time>``."""
    if output_dir:
        return Path(output_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return Path(runs_dir) / f"{recipe_name}-{stamp}"


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], schema: "pa.Schema") -> None:
    """Write a table whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), aside, compression="zstd")
    aside.replace(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Append one line in one write, so that a reader sees whole lines."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False) + "\n")


def drop_half_line(path: Path) -> None:
    """Cut off what a writer that was killed left of a line, so that the next line begins where one begins."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def versions(project: Path, gpus: tuple[str, ...] = ()) -> dict[str, Any]:
    """What ran: enough to run it again, or to see why it came out otherwise."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
        "host": platform.node(),
        "process": _this_process(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": list(gpus),
        "python": platform.python_version(),
        "packages": found,
        "git_commit": _git(project, "rev-parse", "HEAD"),
        "git_dirty": bool(_git(project, "status", "--porcelain", "--untracked-files=no")),
    }


def _this_process() -> dict[str, Any]:
    """What tells later whether this process still lives: another one may have its pid by then."""
    return {"pid": os.getpid(), "began": psutil.Process().create_time(), "namespace": pid_namespace()}


def pid_namespace() -> str | None:
    """What tells one container's pids from another's; None where there is nothing that does."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _git(project: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(project), *args], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
