"""What the real trackers get of real training, without a network, and that none of them can stop it."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from r1zero import tiny
from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.reporting import wandb_file
from tests.training.conftest import QUIET, data, write_recipe

__all__ = ["data"]  # a fixture
KEYS = {"max_steps": 2, "max_completion_length": 20, "eval_count": 2, "eval_on_start": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape and the tokenizer of the embedded model; it has learnt nothing."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), tiny.make_tokenizer()
    tiny.make_model(tiny.Pretraining(hidden_size=32), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(recipe: Path, place: Path, **environment: str) -> tuple[str, RunFolder]:
    """A trainer process by hand: what it says, and its run folder."""
    hidden = (
        "WANDB_",
        "TRACKIO_",
        "TENSORBOARD_",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, PROJECT / "launch" / "grpo.py", "--config", recipe, "--output_dir", place / "run"],
        cwd=place,
        env={**inherited, **QUIET, "HOME": str(place), "TRACKIO_DIR": str(place / "trackio"), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, RunFolder(place / "run")


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    """What a tracker can take of a line of metrics.jsonl."""
    return {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("time", "kind")}


def test_wandb_offline_has_what_the_run_folder_has_while_another_tracker_fails(
    model: Path, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "add.yaml", model, data, report_to=["wandb", "tensorboard"], **KEYS)
    said, folder = train(recipe, tmp_path, WANDB_MODE="offline", TENSORBOARD_LOGGING_DIR="/dev/null/none")
    assert f"Weights & Biases: offline, {folder.path}/wandb/offline-run-" in said
    off = [line for line in said.splitlines() if "is off from here on" in line]
    assert [line.split(":")[0] for line in off] == ["tensorboard is off from here on, the run goes on without it"]

    history = wandb_file.history(folder.path)
    tables = [row for row in history if "rollouts" in row]
    lines = [line for line in folder.read_metrics() if line["kind"] in ("step", "evaluation")]
    assert [line["kind"] for line in lines] == ["evaluation", "step", "step", "evaluation"]
    expected = [
        {k if k == "step" or line["kind"] == "step" else f"evaluation/{k}": v for k, v in numbers(line).items()}
        for line in lines
    ]
    assert [row for row in history if "rollouts" not in row] == expected
    assert {"reward", "seconds/generate", "verdict/correct", "seconds_left"} <= set(expected[1])

    assert [row["step"] for row in tables] == [1]
    assert tables[0]["rollouts"]["nrows"] == 8
    written = pq.read_table(folder.rollouts(1)).to_pylist()
    config = {
        update.key: update.value_json
        for record in wandb_file.records(folder.path)
        if record.WhichOneof("record_type") == "run"
        for update in record.run.config.update
    }
    assert config["answer_choice"] == '"agreed"' and config["max_steps"] == "2"

    artifacts = wandb_file.artifacts(folder.path)
    table = wandb_file.table(folder.path, "rollouts")
    assert table["data"][0] == [written[0][name] for name in table["columns"]]
    assert "<html" in artifacts["report"][0].read_text()[:200]
    assert all(path.is_relative_to(folder.path) for paths in artifacts.values() for path in paths)
    assert not (tmp_path / ".local").exists()


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="pip install trackio")
def test_trackio_has_the_steps(model: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "add.yaml", model, data, report_to="trackio", **KEYS)
    said, folder = train(recipe, tmp_path)
    assert "is off from here on" not in said
    (database,) = (tmp_path / "trackio").glob("r1zero*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row[0]) for row in connection.execute("select metrics from metrics where run_name = 'run'")]
    steps = [line for line in folder.read_metrics() if line["kind"] == "step"]
    assert [row["train/reward"] for row in rows if "train/reward" in row] == [line["reward"] for line in steps]
