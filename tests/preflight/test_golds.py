"""Golds are looked at before anything is loaded, through the launcher's door and by hand."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import recipe as recipes
from r1zero.preflight import golds
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.selection import Selection
from tests.conftest import PROJECT, Answer


def write(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> Path:
    """A recipe over a model that has no weights: whoever tried to load it would fail with another message."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps({**row, "question": f"{split} {row['question']}"}) + "\n" for row in rows)
        )
    model = folder / "model-without-weights"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    recipe = {"task": "dataset", "model_name_or_path": str(model), "dataset_name": str(folder), **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def rows(broken: int, whole: int) -> list[dict[str, Any]]:
    bad = [{"question": f"What is broken {n}?", "answer": f"see figure {n}, \\frac{{1}}{{"} for n in range(broken)]
    return bad + [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(whole)]


@pytest.mark.parametrize("door", [["launch/run.py"], ["launch/run.py", "--check"], ["launch/grpo.py", "--config"]])
def test_a_broken_gold_stops_before_any_model_is_loaded(tmp_path: Path, door: list[str]) -> None:
    recipe = write(tmp_path, rows(broken=1, whole=40))
    words = [sys.executable, PROJECT / door[0], *door[1:], recipe, "--runs_dir", tmp_path / "runs"]
    watched = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watched += "finally: sys.stderr.write(f'torch loaded: {\"torch\" in sys.modules}')"
    command = [str(word) for word in [words[0], "-c", watched, *words[1:]]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "1 of 41 train golds (2.4 %) cannot be read as one answer, 0.5 % may" in done.stderr
    assert f"{tmp_path.name}/train 1: gold 'see figure 0, \\\\frac{{1}}{{'" in done.stderr
    assert "raise max_unreadable_golds" in done.stderr
    assert done.stderr.endswith("torch loaded: False")
    assert not (tmp_path / "runs").exists()


def test_below_the_threshold_it_is_a_warning_that_lists_the_rows(
    tmp_path: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write(tmp_path, rows(broken=12, whole=40))
    answer = run(recipe, "--dry-run", "--hardware", "1x0", "--max_unreadable_golds", "0.5")
    assert answer.code == 0, answer.err
    assert "warning: golds: 12 of 52 train golds (23 %) cannot be read" in answer.out
    assert "What is broken 9?" in answer.out
    assert "and 2 more" in answer.out


def test_all_golds_right_is_said(tmp_path: Path, run: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run(write(tmp_path, rows(broken=0, whole=40)), "--dry-run", "--hardware", "1x0")
    assert "golds: all 40 train golds can be read, and equal themselves" in answer.out
    assert "golds: all 40 test golds can be read, and equal themselves" in answer.out


def test_a_gold_of_gsm8k_is_a_number(tmp_path: Path, run: Callable[..., Answer]) -> None:
    words = [{"question": "How many?", "answer": "Many.\n#### banana"}]
    answer = run(write(tmp_path, words, task="gsm8k"), "--dry-run", "--hardware", "1x0")
    assert answer.code == 2
    assert "gold 'banana': is not a plain number; train How many?" in answer.err


@pytest.mark.parametrize("template", ["r1rl", "qwen_boxed", "r1_zero", "abel"])
@pytest.mark.parametrize("match", ["math", "exact"])
def test_a_gold_is_right_in_the_form_that_each_template_asks_for(template: str, match: str) -> None:
    recipe = recipes.load(
        PROJECT / "recipes/tiny/arithmetic_grpo.yaml", ["--prompt_template", template, "--answer_match", match]
    )
    problems = [Problem("a", "42", "arithmetic/train"), Problem("b", "-7", "arithmetic/train")]
    (finding,) = golds.required(Selection(problems, [], ()), recipe)
    assert finding.level == "note"


def test_an_answer_that_the_answer_format_would_not_find_is_a_fault() -> None:
    recipe = recipes.load(
        PROJECT / "recipes/tiny/arithmetic_grpo.yaml", ["--task", "math", "--answer_format", "tagged"]
    )
    problems = [Problem("a", "1 < 2 </answer> 3", "math/train")]
    with pytest.raises(DatasetError, match="cannot be read"):
        golds.required(Selection(problems, [], ()), recipe)
