"""Alarms that end a run: `stop_on` through the trainer's door, with the checkpoint that is left."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from r1zero import checkpoints, recipe
from r1zero.recipe import RecipeError
from r1zero.reporting import ailments
from r1zero.run_folder import RunFolder, append_json_line, read_json
from r1zero.training import alarm
from r1zero.training.alarm import StopAlarms
from r1zero.training.trainer import PolicyTrainer
from tests.conftest import PROJECT
from tests.training.conftest import start, write_recipe
from tests.training.resuming import run as run_processes
from tests.training.resuming import steps, weights

NOTHING = "tests.reporting.odd_rewards:nothing"
# zero_reward needs as many steps as a rule looks at, and answers of which some are right.
IDLE = {"reward_funcs": [NOTHING], "max_steps": 40, "eval_count": 0, "max_completion_length": 24}
BEFORE = {"save_strategy": "steps", "save_steps": 1, "eval_count": 0, "max_completion_length": 24}


@pytest.fixture
def idle(model: Path, data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "r.yaml", model, data, **IDLE, stop_on=["nan", "zero_reward"])


def assert_stopped_at(folder: RunFolder, step: int, name: str) -> dict[str, Any]:
    """It is over, says why in its own way, and left a checkpoint of its last step; returns the summary."""
    summary: dict[str, Any] = read_json(folder.summary)
    assert (summary["outcome"], summary["alarm"], summary["step"]) == (alarm.OUTCOME, name, step)
    assert summary["evidence"] and re.match(r"\w+: ", summary["remedy"])
    assert read_json(folder.status)["phase"].startswith(f"stopped at step {step}: alarm {name}: ")
    assert [line["step"] for line in steps(folder)][-1] == step
    alerts = [line for line in folder.read_metrics() if line["kind"] == "alert" and "stop_on" in line["message"]]
    assert [line["step"] for line in alerts][-1] == step
    assert not folder.model.exists()
    return summary


def test_it_stops_at_the_first_step_that_shows_it_with_a_checkpoint_and_may_be_resumed(
    in_process, idle: Path, tmp_path: Path
) -> None:
    code, folder, _ = in_process(idle, tmp_path / "run")
    assert code == 0
    summary = assert_stopped_at(folder, ailments.RECENT, "zero_reward")
    assert summary["checkpoint"] == f"checkpoints/checkpoint-{ailments.RECENT}"
    assert f"each got 0, although {100 * steps(folder)[0]['verdict/correct']:.0f}"[:8] in summary["why"]
    newest = checkpoints.newest(folder)
    assert newest.path == folder.path / summary["checkpoint"] and not newest.passed_over
    # Who resumes it has thought of something, so it is let alone for as many steps as a rule looks at.
    in_process(idle, folder.path, "--resume", newest.path)
    assert_stopped_at(folder, 2 * ailments.RECENT, "zero_reward")


def test_without_stop_on_the_same_run_goes_on(in_process, idle: Path, tmp_path: Path) -> None:
    code, folder, _ = in_process(idle, tmp_path / "run", "--stop_on", "null", "--max_steps", ailments.RECENT + 1)
    assert code == 0 and read_json(folder.summary)["outcome"] == "finished"


def test_of_weights_that_are_no_numbers_no_checkpoint_is_kept(
    in_process, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the arithmetic of the fourth step overflows."""
    compute = PolicyTrainer.compute_loss

    def overflow(self: Any, *arguments: Any, **more: Any) -> torch.Tensor:
        loss: torch.Tensor = compute(self, *arguments, **more)
        return loss * math.nan if self.state.global_step >= 3 else loss

    monkeypatch.setattr(PolicyTrainer, "compute_loss", overflow)
    mine = write_recipe(
        tmp_path / "r.yaml",
        model,
        data,
        **{**BEFORE, "max_steps": 8, "save_total_limit": 1, "stop_on": ["nan"]},
    )
    code, folder, _ = in_process(mine, tmp_path / "run")
    assert code == 0
    summary = assert_stopped_at(folder, 4, "nan")
    assert summary["checkpoint"] == "checkpoints/checkpoint-3"
    assert "the weights after it are no numbers and were not kept" in summary["why"]
    assert summary["remedy"].startswith("learning_rate: 0.001 -> 0.0001")
    assert [path.name for path in folder.checkpoints.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert checkpoints.problem(folder.checkpoints / "checkpoint-3") is None
    kept = weights(folder.checkpoints / "checkpoint-3")
    assert kept and all(bool(torch.isfinite(each).all()) for each in kept.values())


def test_all_processes_leave_together(model: Path, data: Path, tmp_path: Path) -> None:
    keys = {**IDLE, "per_device_train_batch_size": 8, "stop_on": ["zero_reward"]}
    folder = run_processes("ddp", write_recipe(tmp_path / "r.yaml", model, data, **keys), tmp_path / "run")
    assert_stopped_at(folder, ailments.RECENT, "zero_reward")
    manifest = checkpoints.read_manifest(checkpoints.newest(folder).path)
    assert manifest["facts"]["processes"] == 2


def test_the_launcher_says_it_last_after_the_doctor_and_starts_nothing_again(idle: Path, tmp_path: Path) -> None:
    done = start([sys.executable, PROJECT / "launch" / "run.py", idle, "--output_dir", tmp_path / "run"], PROJECT)
    folder, step = RunFolder(tmp_path / "run"), ailments.RECENT
    assert done.returncode == alarm.EXIT_CODE == 4, done.stderr
    assert_stopped_at(folder, step, "zero_reward")
    said = done.stderr.strip().splitlines()
    assert said[-1].startswith("stopped: alarm zero_reward: every completion gets the same reward")
    assert said[-1].endswith(
        f"; at step {step}, checkpoints/checkpoint-{step}; goes on with launch/run.py --resume {folder.path}"
    )
    assert said[-4].startswith("doctor: zero_reward (broken): ") and said[-3].startswith("    -> reward_funcs: ")
    assert len([line for line in folder.read_metrics() if line["kind"] in ("restart", "resume")]) == 0


# --- which of them, and when


def step(number: int, **metrics: Any) -> dict[str, Any]:
    return {"step": number, "loss": 0.1, "grad_norm": 0.1, "reward": 0.0, "reward_std": 0.0, **metrics}


IDLE_STEP = {"verdict/correct": 0.25, "frac_reward_zero_std": 1.0}


def folder_with(path: Path, last: int) -> RunFolder:
    path.mkdir(exist_ok=True)
    for number in range(1, last + 1):
        append_json_line(path / "metrics.jsonl", {"kind": "step", **step(number, **IDLE_STEP)})
    return RunFolder(path)


def test_a_run_that_goes_on_is_let_alone_for_a_while_unless_it_is_lost(tmp_path: Path) -> None:
    watch = StopAlarms(["zero_reward", "nan"], {}, folder_with(tmp_path, 20))
    for number in range(21, 21 + ailments.RECENT - 1):
        assert watch.look(step(number, **IDLE_STEP)) is None
    found = watch.look(step(20 + ailments.RECENT, **IDLE_STEP))
    assert found is not None and found.name == "zero_reward"
    lost = StopAlarms(["zero_reward", "nan"], {}, folder_with(tmp_path, 0)).look(step(21, grad_norm=float("nan")))
    assert lost is not None and lost.name == "nan" and "grad_norm since step 21" in lost.evidence


def test_the_first_name_of_the_recipe_is_the_one_that_is_said(tmp_path: Path) -> None:
    for names in (["zero_spread", "zero_reward"], ["zero_reward", "zero_spread"]):
        watch = StopAlarms(names, {"learning_rate": 1e-6}, folder_with(tmp_path, 0))
        watch._steps = []
        found = [watch.look(step(number, **IDLE_STEP)) for number in range(1, 11)][-1]
        assert found is not None and found.name == names[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop_on", "nan", "zero_spred"], "stop_on = 'zero_spred': is not an alarm\n    -> one of: nan, "),
        (["--stop_on", "too_hot"], "stop_on = 'too_hot': is not an alarm"),  # it is there from the first step
    ],
)
def test_a_name_that_is_none_is_refused_with_the_legal_ones(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe.load(PROJECT / "recipes/tiny/arithmetic_grpo.yaml", words)
    assert message in str(error.value)
    assert ", ".join(ailments.stoppable("grpo")) in str(error.value)


def test_the_cold_start_has_one_alarm(model: Path, data: Path, tmp_path: Path) -> None:
    keys = {"method": "sft", "num_generations": ..., "max_completion_length": ..., "stop_on": ["nan"]}
    cold = write_recipe(tmp_path / "r.yaml", model, data, **keys)
    assert recipe.load(cold).own.stop_on == ["nan"]
    with pytest.raises(RecipeError, match=r"is not an alarm of method sft\n    -> one of: nan$"):
        recipe.load(cold, ["--stop_on", "zero_spread"])
