"""Measuring while a run trains changes nothing of what it learns: the real trainer on a CPU, with and without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from r1zero.evaluation.models import find
from r1zero.run_folder import RunFolder, read_json
from tests.training.conftest import rows, train, without_times, write_recipe

__all__ = ["train"]

Train = Callable[..., tuple[int, RunFolder, str, str]]
OFTEN = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_count": 5, "eval_samples": 3}


@pytest.mark.parametrize("measuring", [{"eval_temperature": 1.0}, {"eval_temperature": 0.0}], ids=["sampled", "greedy"])
def test_the_trajectory_is_bit_identical_with_and_without_measuring(
    measuring: dict[str, Any], train: Train, model: Path, data: Path, tmp_path: Path
) -> None:
    folders = []
    for name, keys in (("measured", OFTEN | measuring), ("unmeasured", {"eval_count": 0, "eval_samples": 1})):
        # The same training problems in both: what is measured on would be kept apart from them.
        recipe = write_recipe(tmp_path / f"{name}.yaml", model, data, decontaminate_ngram=0, **keys)
        code, _, _, err = train(recipe, "--output_dir", tmp_path / name)
        assert code == 0, err
        folders.append(RunFolder(tmp_path / name))
    measured, unmeasured = folders
    kinds = [[line["kind"] for line in folder.read_metrics()].count("evaluation") for folder in folders]
    assert kinds == [4, 0]
    steps = [[without_times(line) for line in folder.read_metrics() if line["kind"] == "step"] for folder in folders]
    assert len(steps[0]) == 3 and steps[0] == steps[1]
    for step in (1, 2, 3):
        assert rows(measured.rollouts(step)) == rows(unmeasured.rollouts(step))
    one, other = (load_file(folder.model / "model.safetensors") for folder in folders)
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_the_model_that_measured_best_is_kept_beside_the_final_one(
    train: Train, model: Path, data: Path, tmp_path: Path
) -> None:
    keys = OFTEN | {"keep_best": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    recipe = write_recipe(tmp_path / "recipe.yaml", model, data, **keys)
    code, _, _, err = train(recipe, "--output_dir", tmp_path / "run")
    assert code == 0, err
    folder = RunFolder(tmp_path / "run")
    measured = [line for line in folder.read_metrics() if line["kind"] == "evaluation" and line["step"] > 0]
    best = max(measured, key=lambda line: line["mean"])
    kept = read_json(folder.best / "best.json")
    assert (kept["step"], kept["mean"]) == (best["step"], best["mean"])
    one = load_file(folder.best / "model.safetensors")
    other = load_file(folder.checkpoints / f"checkpoint-{best['step']}" / "model.safetensors")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    (candidate,) = find([str(folder.best)])
    assert candidate.label == "run@best"
    assert {path.name for path in folder.path.iterdir() if path.name.startswith(".best")} == set()
