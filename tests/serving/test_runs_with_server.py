"""Whole runs with a real policy server on the CPU, by the one command; and a trainer whose publishing is broken."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from r1zero.restarts import REFUSED
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from tests.conftest import PROJECT
from tests.serving.conftest import Server
from tests.serving.launched import LORA, RECIPE, SHORT, environment, launch, seconds, server_python, words
from tests.training.conftest import rows

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(600)]


# The accidents of test_accidents.py are runs with an adapter.
@pytest.mark.parametrize("route", [pytest.param("adapter", marks=pytest.mark.soak), "folded", "shared_memory"])
def test_a_run_with_a_server_of_its_own(route: str, tmp_path: Path, model_folder: Path) -> None:
    keys: dict[str, Any] = {"learning_rate": 3e-4} if route == "shared_memory" else {**LORA, "publish": route}
    run = launch(tmp_path, model_folder, keys)
    assert run.code == 0, run.err
    steps = run.lines("step")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert not run.lines("restart")
    assert f"publish {route}" in run.folder.plan.read_text()
    run.assert_rollouts_are_of_their_step(3)
    assert len(seconds(steps, "publish/seconds")) == 3
    assert min(seconds(steps, "publish/bytes")) > 10_000
    assert max(seconds(steps, "probe/difference")) < 1e-3
    followed = seconds(steps, "probe/followed")
    assert followed and min(followed) > 0.9
    for phase in ("generate", "publish", "probe", "train"):
        assert min(seconds(steps, f"seconds/{phase}")) > 0
    run.assert_nothing_is_left()


def test_a_server_that_dies_while_it_is_ahead_of_the_trainer(tmp_path: Path, model_folder: Path) -> None:
    """With max_staleness 1: killed while the trainer learns from one window and it makes the next."""
    keys = {**LORA, "publish": "folded", "max_staleness": 1, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
    run = launch(tmp_path, model_folder, keys, "engine SIGKILL training")
    assert run.code == 0, run.err
    assert "Overlap: the policy server makes the next window" in run.folder.plan.read_text()
    (restart,) = run.lines("restart")
    assert restart["checkpoint"] == "checkpoints/checkpoint-1"
    files = sorted((run.folder.path / "rollouts").glob("train-*.parquet"))
    labels = [{(row["step"], row["policy_version"]) for row in rows(file)} for file in files]
    assert labels == [{(1, 0)}, {(2, 0)}, {(3, 1)}, {(4, 2)}, {(5, 3)}]
    steps = run.lines("step")
    assert [step["staleness"] for step in steps] == [0, 1, 1, 1, 1]
    assert max(seconds(steps, "probe/difference")) < 1e-3
    run.assert_nothing_is_left()


def test_an_old_adapter_under_a_new_name_ends_the_run_at_that_publish(server: Server, tmp_path: Path) -> None:
    """The trainer by hand, with a server that somebody else started."""
    notes = tmp_path / "notes"
    notes.mkdir()
    given = {
        **SHORT,
        **LORA,
        "max_steps": 5,
        "model_name_or_path": server.model,
        "vllm_server_base_url": f"http://127.0.0.1:{server.port}",
        "output_dir": tmp_path / "run",
    }
    trainer = [server_python(), str(PROJECT / "launch" / "grpo.py"), "--config", str(RECIPE), *words(given)]
    secrets = {TOKEN: server.token, PUBLISH_FOLDER: str(server.publish)}
    done = subprocess.run(
        trainer,
        cwd=PROJECT,
        env=environment(notes, "old-adapter") | secrets,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == REFUSED, done.stderr
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert last.startswith("error: the policy server does not have version 1 of the trainer's policy: ")
    evidence = tmp_path / "run" / "probe.json"
    assert str(evidence) in last
    kept = json.loads(evidence.read_text())
    assert kept["version"] == 1
    assert [len(each) for each in kept["trainer"]] == [len(each) for each in kept["server"]]
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["kind"] == "step"] == [1]
    assert server.token not in done.stdout + done.stderr
    for name in ("policy-0", "policy-1"):
        server.post("/v1/unload_lora_adapter", {"lora_name": name})
