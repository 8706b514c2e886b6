"""launch/run.py with a real policy server on the CPU, as a person starts it, and all that it left."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.training.conftest import QUIET, rows

DEADLINE_S = 540.0
RECIPE = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"
# As short as a run can be that still moves the policy.
SHORT = {
    "use_vllm": "true",
    "vllm_mode": "server",
    "reward_funcs": "tests.stand_ins.striking:reward",
    "per_device_train_batch_size": 16,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": 3,
    "eval_count": 0,
    "eval_on_start": "false",
    "save_strategy": "no",
    "report_to": "none",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"use_peft": "true", "lora_r": 8, "lora_dropout": 0, "lora_target_modules": PROJECTIONS}


@dataclass(frozen=True)
class Launched:
    """A run that is over.

    Attributes:
        code: exit code of the launcher.
        err: its stderr.
        folder: its run folder.
        notes: what `stand_ins/striking.py` wrote.
        seen: every process that was a descendant of the launcher at any look.
        ended: the wall clock when the launcher had ended.
    """

    code: int
    err: str
    folder: RunFolder
    notes: Path
    seen: frozenset[psutil.Process]
    ended: float

    @property
    def secrets(self) -> tuple[str, Path]:
        """The token and the publish folder."""
        token, publish = json.loads((self.notes / "secrets.json").read_text())
        return token, Path(publish)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Of the metrics."""
        return [line for line in self.folder.read_metrics() if line["kind"] == kind]

    @property
    def last_line(self) -> str:
        return self.err.rstrip().rpartition("\n")[2]

    @property
    def struck(self) -> float:
        """The wall clock when the server was struck."""
        return float(json.loads((self.notes / "struck.json").read_text())["time"])

    def assert_nothing_is_left(self) -> None:
        token, publish = self.secrets
        left = [each for each in self.seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert not left
        assert publish.name.startswith("r1zero-") and not publish.exists()
        files = [path for path in self.folder.path.rglob("*") if path.is_file()]
        assert self.folder.recipe in files
        assert not [path for path in files if token.encode() in path.read_bytes()]

    def assert_rollouts_are_of_their_step(self, steps: int) -> None:
        files = sorted((self.folder.path / "rollouts").glob("train-*.parquet"))
        assert len(files) == steps
        for step, file in enumerate(files, 1):
            assert {(row["step"], row["policy_version"]) for row in rows(file)} == {(step, step - 1)}


def words(keys: Mapping[str, Any]) -> list[str]:
    """As they are typed."""
    given: list[str] = []
    for key, value in keys.items():
        given += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
    return given


def server_python() -> str:
    python = os.environ.get("R1ZERO_CPU_SERVER_PYTHON", "")
    if not python:
        pytest.skip("R1ZERO_CPU_SERVER_PYTHON names no Python with vLLM's CPU build; `make cpu-server` makes one")
    return str(Path(python).absolute())


def environment(notes: Path, strike: str = "") -> dict[str, str]:
    """Of a launcher or a trainer under test: no tracker of the user's, and the reward where Python finds it."""
    hidden = ("COV", "WANDB_", "CUDA_VISIBLE_DEVICES", "TENSORBOARD_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    ours = {"PYTHONPATH": str(PROJECT), "R1ZERO_NOTES": str(notes), "R1ZERO_STRIKE": strike}
    return {**kept, **QUIET, **ours, "HF_HUB_OFFLINE": "1"}


def launch(place: Path, model: Path, keys: Mapping[str, Any], strike: str = "") -> Launched:
    """Run launch/run.py to its end.

    Args:
        place: an empty folder.
        model: to train.
        keys: of the recipe, on top of `SHORT`.
        strike: for `stand_ins/striking.py`.
    """
    notes = place / "notes"
    notes.mkdir()
    given = {**SHORT, **keys, "model_name_or_path": model, "output_dir": place / "run"}
    seen: set[psutil.Process] = set()
    with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
        popen = subprocess.Popen(
            [server_python(), str(PROJECT / "launch" / "run.py"), str(RECIPE), *words(given)],
            cwd=PROJECT,
            env=environment(notes, strike),
            stdout=out,
            stderr=err,
        )
        process = psutil.Process(popen.pid)
        deadline = time.monotonic() + DEADLINE_S
        try:
            while popen.poll() is None:
                assert time.monotonic() < deadline, f"not over after {DEADLINE_S:g} s"
                with suppress(psutil.NoSuchProcess):
                    seen |= set(process.children(recursive=True))
                time.sleep(0.2)
        finally:
            if popen.poll() is None:
                popen.terminate()
                popen.wait(60)
    ended = time.time()
    return Launched(
        popen.returncode, (place / "err").read_text(), RunFolder(place / "run"), notes, frozenset(seen), ended
    )


def seconds(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(step[name]) for step in steps if name in step]
