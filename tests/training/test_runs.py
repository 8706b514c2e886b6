"""Whole runs on a CPU through the doors: accelerate by hand, launch/run.py, and two processes under torchrun.

One run by hand measures on the way; one through the launcher, of the same recipe and seed, does not: both learn alike.
"""

import itertools
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from r1zero import recipe as recipes
from r1zero.evaluation.scores import mean_score
from r1zero.reporting import metrics
from r1zero.run_folder import RunFolder, read_json
from r1zero.tasks import load_problems
from r1zero.tasks.prompts import TEMPLATES
from r1zero.tasks.verifier import Graded, Verdict, Verifier
from r1zero.training.recorder import ROLLOUT_SCHEMA
from tests.conftest import PROJECT
from tests.training.conftest import rows, start, without_times, write_recipe

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


def grade(completion: str, gold: str) -> Graded:
    with Verifier(answer_format="tagged", numbers=True) as verifier:
        return verifier.grade([completion], [gold])[0]


@dataclass(frozen=True)
class Run:
    done: subprocess.CompletedProcess[str]
    folder: RunFolder
    place: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return list(self.folder.read_metrics())

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line["kind"] == "step"]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if line["kind"] == "evaluation"]


@pytest.fixture(scope="module")
def by_hand(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("by_hand")
    keys = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    recipe = write_recipe(
        place / "add.yaml", model, data, output_dir="run", save_strategy="steps", save_steps=2, **keys
    )
    config = PROJECT / "accelerate_configs" / "cpu.yaml"
    launch = ["--config_file", config, "--num_processes", 1, PROJECT / "launch" / "grpo.py", "--config", recipe]
    return Run(start([*ACCELERATE, *launch], place), RunFolder(place / "run"), place)


@pytest.fixture(scope="module")
def launched(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("launched")
    recipe = write_recipe(place / "add.yaml", model, data, runs_dir="runs")
    done = start([sys.executable, PROJECT / "launch" / "run.py", recipe, "--eval_on_start"], place)
    made = list((place / "runs").iterdir())
    assert len(made) == 1, done.stderr
    return Run(done, RunFolder(made[0]), place)


def test_by_hand_it_ends_well_and_says_each_thing_once(by_hand: Run) -> None:
    assert by_hand.done.returncode == 0, by_hand.done.stderr
    said = [line.split("  ")[0] for line in by_hand.done.stdout.splitlines()]
    said = [line.split(":")[0] if line.startswith("held-out") else line for line in said]
    looked = said.index("run folder: run")  # what is looked at before anything is loaded
    assert "golds: all 40 train golds can be read, and equal themselves" in said[:looked]
    assert said[looked:] == [
        "run folder: run",
        "loading model and data",
        "decontamination: none of 40 training problems shares 13 words in a row with one of 10 measured questions",
        "40 problems to train on, 6 to measure on",
        *("measuring before training", "held-out accuracy at step 0", "training", "step 1/3", "step 2/3"),
        *("measuring at step 2", "held-out accuracy at step 2", "step 3/3"),
        *("measuring after training", "held-out accuracy at step 3", "saving the model", "done"),
    ]


def test_by_hand_the_run_folder_is_complete(by_hand: Run) -> None:
    folder = by_hand.folder
    files = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert {"recipe.yaml", "versions.json", "status.json", "metrics.jsonl", "summary.json"} <= files
    assert {f"rollouts/train-00000{n}.parquet" for n in (1, 2, 3)} <= files
    assert {f"rollouts/test-00000{n}.parquet" for n in (0, 2, 3)} <= files
    assert len([name for name in files if name.startswith("rollouts/")]) == 6
    assert any(name.startswith("tensorboard/events.out.tfevents.") for name in files)
    assert "checkpoints/checkpoint-2/trainer_state.json" in files
    assert {"model/model.safetensors", "model/tokenizer.json", "model/config.json"} <= files
    assert not [name for name in files if Path(name).name.startswith(".")]
    assert sorted(path.name for path in by_hand.place.iterdir()) == ["add.yaml", "run"]
    assert read_json(folder.status)["phase"] == "done"
    versions = read_json(folder.versions)
    assert versions["packages"]["torch"] == torch.__version__
    assert versions["argv"][0].endswith("launch/grpo.py")
    written, given = recipes.load(folder.recipe), recipes.load(by_hand.place / "add.yaml")
    assert written.own == given.own
    assert {**written.library, "output_dir": "run"} == given.library  # that folder is taken now


def test_tensorboard_has_the_rewards_of_the_metrics(by_hand: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(by_hand.folder.path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert shown == [(line["step"], pytest.approx(line["reward"])) for line in by_hand.steps]


def test_a_line_of_metrics_for_each_step_with_where_its_time_went(by_hand: Run) -> None:
    assert [(line["step"], line["steps"]) for line in by_hand.steps] == [(1, 3), (2, 3), (3, 3)]
    for line in by_hand.steps:
        assert {"reward", "reward_std", "loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "time"} <= set(
            line
        )
        assert {"completions/mean_length", "completions/clipped_ratio", "rewards/correctness/mean"} <= set(line)
        assert {f"verdict/{verdict.value}" for verdict in Verdict} <= set(line)
        phases = [line[f"seconds/{phase}"] for phase in ("generate", "grade", "record", "train")]
        assert all(seconds > 0 for seconds in phases)
        assert sum(phases) + line.get("seconds/save", 0.0) == pytest.approx(line["seconds/step"])
        # The measurement after step 2 is no part of it, and takes nothing from it either.
        assert line["seconds/generate"] > 0.01
        assert line["seconds/step"] >= line["step_time"] * 0.9
        assert line["step"] < 3 or line["seconds_left"] == 0
        assert not [name for name in line if name != "kind" and metrics.definition(name) is None]
        assert not [name for name in line if name.startswith("idle/")]  # there is one side only
    assert any(line["grad_norm"] > 0 for line in by_hand.steps)
    tokens = [0.0, *(line["num_tokens"] for line in by_hand.steps)]
    for (before, after), line in zip(itertools.pairwise(tokens), by_hand.steps, strict=True):
        assert line["tokens_per_second"] * line["seconds/step"] == pytest.approx(after - before)
        lengths = [row["length"] for row in rows(by_hand.folder.rollouts(line["step"]))]
        assert line["completions/p50_length"] == median(lengths)
        assert min(lengths) <= line["completions/p10_length"] <= line["completions/p90_length"] <= max(lengths)


def test_every_rollout_is_written_and_graded_as_it_says(by_hand: Run, data: Path) -> None:
    problems = {
        split: {
            TEMPLATES["r1rl"].build(problem.question): problem for problem in load_problems("gsm8k", split, str(data))
        }
        for split in ("train", "test")
    }
    seen = Counter[str]()
    for path in sorted((by_hand.folder.path / "rollouts").iterdir()):
        assert pq.read_schema(path).remove_metadata().equals(ROLLOUT_SCHEMA)
        split, number = path.stem.split("-")
        step = int(number)
        table = rows(path)
        assert len(table) == (16 if split == "train" else 6 * 2)
        for row in table:
            problem = problems[split][row["prompt"]]
            graded = grade(row["completion"], problem.gold)
            assert row["rewards"] == ([("correctness", row["reward"])] if split == "train" else None)
            assert (row["answer"], row["verdict"]) == (graded.answer, graded.verdict.value)
            assert row["reward"] == float(graded.verdict is Verdict.CORRECT)
            assert (row["gold"], row["source"]) == (problem.gold, f"gsm8k/{split}")
            # What a step learns from was made by the weights before it; a measurement measures those that are there.
            assert (row["step"], row["policy_version"]) == (step, step - 1 if split == "train" else step)
            assert 0 < row["length"] <= 40
            assert row["length"] == 40 or not row["clipped"]
            if row["completion"] == "\n</reasoning>\n<answer>\n7\n</answer>":
                assert (row["length"], row["clipped"]) == (9, False)  # with the token that ends it
            seen[row["verdict"]] += 1
    assert seen["correct"] > 0 and seen["wrong"] > 0


def test_the_metrics_are_those_of_the_rollouts(by_hand: Run) -> None:
    for line in by_hand.steps:
        table = rows(by_hand.folder.rollouts(line["step"]))
        assert line["reward"] == pytest.approx(sum(row["reward"] for row in table) / 16)
        assert line["completions/mean_length"] == pytest.approx(sum(row["length"] for row in table) / 16)
        assert line["completions/clipped_ratio"] == pytest.approx(sum(row["clipped"] for row in table) / 16)
        for verdict in Verdict:
            assert line[f"verdict/{verdict.value}"] == sum(row["verdict"] == verdict for row in table) / 16
        groups = Counter(row["prompt"] for row in table)
        assert list(groups.values()) == [8, 8]


def test_the_scores_are_those_of_the_measured_completions(by_hand: Run) -> None:
    scores = {}
    for line in by_hand.evaluations:
        table = rows(by_hand.folder.rollouts(line["step"], "test"))
        by_prompt: dict[str, list[float]] = {}
        for row in table:
            by_prompt.setdefault(row["prompt"], []).append(row["reward"])
        score = asdict(mean_score(list(by_prompt.values())))
        assert {key: line[key] for key in score} == score
        assert (line["questions"], line["samples"], line["temperature"]) == (6, 2, 1.0)
        assert line["mean_length"] == pytest.approx(sum(row["length"] for row in table) / 12)
        assert line["clipped"] == pytest.approx(sum(row["clipped"] for row in table) / 12)
        assert line["verdict/correct"] == score["mean"] or line["verdict/correct"] == pytest.approx(
            score["mean"], abs=1e-4
        )
        scores[line["step"]] = score
    assert list(scores) == [0, 2, 3]
    prompts = [{row["prompt"] for row in rows(by_hand.folder.rollouts(step, "test"))} for step in scores]
    assert prompts[0] == prompts[1] == prompts[2]
    summary = read_json(by_hand.folder.summary)
    assert (summary["outcome"], summary["steps"], summary["model"]) == ("finished", 3, "run/model")
    assert summary["held_out"] == {"before": scores[0], "after": scores[3]}


def test_the_final_model_loads_and_is_not_the_one_it_began_with(by_hand: Run, model: Path) -> None:
    before, after = (AutoModelForCausalLM.from_pretrained(each).state_dict() for each in (model, by_hand.folder.model))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_the_launcher_ends_well_and_closes_with_before_and_after(launched: Run) -> None:
    assert launched.done.returncode == 0, launched.done.stderr
    out = launched.done.stdout
    assert "1 process, accelerate cpu" in out
    assert all(line in out for line in ("held-out accuracy at step 0", "step 1/3", "step 3/3"))
    tail = [" ".join(line.split()) for line in out.splitlines()][-9:]
    summary = read_json(launched.folder.summary)
    for at, when in ((1, "before"), (2, "after")):
        score = summary["held_out"][when]
        shares = [f"{100 * score[key]:.1f}" for key in ("mean", "low", "high")]
        assert tail[at] == f"{when} training {shares[0]} % {shares[1]} to {shares[2]} % 6 x 2"
    assert tail[3].startswith("finished after ")
    assert tail[4] == f"the final model {launched.folder.model.relative_to(launched.place)}"
    assert tail[8] == f"the report {(launched.folder.path / 'report.html').relative_to(launched.place)}"
    assert summary["seconds_in_all"] > summary["seconds"]


def test_the_launchers_run_folder_has_plan_and_logs_as_well(launched: Run) -> None:
    folder = launched.folder
    plan = folder.plan.read_text()
    assert plan in launched.done.stdout
    assert "= 16 completions = 2 prompts x 8 generations" in plan
    assert "step 3/3" in (folder.logs / "trainer.log").read_text()
    assert read_json(folder.versions)["argv"][-1] == "--eval_on_start"
    assert yaml.safe_load(folder.recipe.read_text())["eval_on_start"] is True


def test_the_same_seed_gives_the_same_run_and_measuring_on_the_way_changes_nothing(by_hand: Run, launched: Run) -> None:
    assert len(launched.evaluations) == 2 and len(by_hand.evaluations) == 3
    assert [without_times(line) for line in launched.steps] == [without_times(line) for line in by_hand.steps]
    for step in (1, 2, 3):
        assert rows(launched.folder.rollouts(step)) == rows(by_hand.folder.rollouts(step))
    for which in (0, -1):
        assert without_times(launched.evaluations[which]) == without_times(by_hand.evaluations[which])
    weights = [(run.folder.model / "model.safetensors").read_bytes() for run in (launched, by_hand)]
    assert weights[0] == weights[1]


def test_the_cold_start_through_the_launcher(model: Path, data: Path, tmp_path: Path) -> None:
    keys = dict.fromkeys(("num_generations", "max_completion_length", "eval_count", "eval_samples"), ...)
    recipe = write_recipe(tmp_path / "sft.yaml", model, data, method="sft", max_steps=2, output_dir="run", **keys)
    done = start([sys.executable, PROJECT / "launch" / "run.py", recipe], tmp_path)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    steps = [line for line in folder.read_metrics() if line["kind"] == "step"]
    assert [(line["kind"], line["step"]) for line in steps] == [("step", 1), ("step", 2)]
    assert all(line["loss"] > 0 and line["seconds/train"] > 0 and "reward" not in line for line in steps)
    assert "40 worked solutions to learn from" in (folder.logs / "trainer.log").read_text()
    assert read_json(folder.summary)["steps"] == 2
    assert read_json(folder.summary)["held_out"]["after"]["questions"] == 10
    assert (folder.path / "evaluation" / "result.json").is_file()
    tail = done.stdout.splitlines()[-5:]
    assert any("the final model" in line for line in tail) and not any("rollouts" in line for line in tail)
    loaded = AutoModelForCausalLM.from_pretrained(folder.model)
    assert not torch.equal(
        loaded.get_input_embeddings().weight, AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight
    )


def test_two_processes_share_one_run_folder_and_the_rollouts_of_both_are_in_it(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """Over gloo, as torchrun starts them. 7 problems for two processes: the share of the second is filled up."""
    recipe = write_recipe(
        tmp_path / "add.yaml", model, data, per_device_train_batch_size=8, max_steps=2, eval_count=7, runs_dir="runs"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = start([*torchrun, PROJECT / "launch" / "grpo.py", "--config", recipe], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1
    made = list((tmp_path / "runs").iterdir())
    assert len(made) == 1
    folder = RunFolder(made[0])
    for step in (1, 2):
        table = rows(folder.rollouts(step))
        assert len(table) == 2 * 8
        assert list(Counter(row["prompt"] for row in table).values()) == [8, 8]
        line = next(each for each in folder.read_metrics() if each["kind"] == "step" and each["step"] == step)
        assert line["reward"] == pytest.approx(sum(row["reward"] for row in table) / 16)
        for row in table:
            assert row["reward"] == float(grade(row["completion"], row["gold"]).verdict is Verdict.CORRECT)
    measured = rows(folder.rollouts(2, "test"))
    assert sorted(Counter(row["prompt"] for row in measured).values()) == [2] * 7
    assert read_json(folder.summary)["held_out"]["after"]["questions"] == 7


def test_a_data_error_in_the_trainer_is_what_the_launcher_ends_with(model: Path, data: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "add.yaml", model, data, max_prompt_tokens=5, output_dir="run")
    done = start([sys.executable, PROJECT / "launch" / "run.py", "add.yaml"], tmp_path)
    assert done.returncode == 2
    assert "max_prompt_tokens = 5: every one of 40 prompts is longer; raise it" in done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["outcome"] == "failed"
