"""The trainer process through its door, called in this process: what it refuses, counts, and leaves alone."""

import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from r1zero import model_facts, tiny
from r1zero import recipe as recipes
from r1zero.run_folder import RunFolder, read_json
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.prompts import TEMPLATES
from r1zero.tasks.verifier import Verdict, Verifier
from r1zero.training import arguments, held_out
from r1zero.training import data as training_data
from r1zero.training.clock import Clock
from r1zero.training.recorder import Recorder
from r1zero.training.trainer import PolicyTrainer
from tests.training.conftest import CHAT, one_process, rows, write_recipe


def verdict(completion: str, gold: str, answer_format: str = "tagged") -> Verdict:
    with Verifier(answer_format=answer_format, numbers=answer_format == "tagged") as verifier:
        return verifier.grade([completion], [gold])[0].verdict


# --- what is refused, with exit code 2


def test_a_recipe_with_a_server_is_not_started_by_hand(train, model: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", model, data, use_vllm=True, vllm_mode="server")
    code, folder, _, err = train(recipe)
    assert code == 2 and not folder.path.exists()
    assert "vllm_mode = 'server': started by hand there is no launcher to start the policy server" in err
    assert "--vllm_server_base_url" in err


def test_a_grpo_recipe_is_not_for_the_cold_start(train, model: Path, data: Path, tmp_path: Path) -> None:
    code, folder, _, err = train(write_recipe(tmp_path / "r.yaml", model, data), method="sft")
    assert code == 2 and not folder.path.exists()
    assert "method = 'grpo': this is launch/sft.py" in err and "start launch/grpo.py" in err


def test_a_wrong_key_is_refused_here_as_well(train, model: Path, data: Path, tmp_path: Path) -> None:
    code, folder, _, err = train(write_recipe(tmp_path / "r.yaml", model, data), "--num_generation", 4)
    assert code == 2 and not folder.path.exists()
    assert "did you mean num_generations?" in err


@pytest.mark.parametrize(
    ("rows_of_train", "words", "message"),
    [
        (['{"question": "?", "answer": "7"}'], [], "line 1: no gold after ####"),
        (None, ["--max_prompt_tokens", 5], "max_prompt_tokens = 5: every one of 40 prompts is longer; raise it"),
    ],
    ids=["no gold", "all too long"],
)
def test_data_that_cannot_be_trained_on(
    rows_of_train: list[str] | None, words: list[Any], message: str, train, model: Path, data: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    if rows_of_train:
        (mine / "train.jsonl").write_text("\n".join(rows_of_train))
    code, _, _, err = train(write_recipe(tmp_path / "r.yaml", model, mine), *words)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ") and message in err


# --- one step in other forms


def test_chat_messages_go_through_the_tokenizers_template(train, model: Path, data: Path, tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text(CHAT)
    words = ["--prompt_template", "r1rl_chat", "--max_steps", 1, "--eval_count", 3, "--max_prompt_tokens", 60]
    code, folder, out, _ = train(write_recipe(tmp_path / "r.yaml", chat, data), *words)
    assert code == 0
    assert "40 problems to train on, 3 to measure on" in out
    for path, count in ((folder.rollouts(1), 16), (folder.rollouts(1, "test"), 6)):
        table = rows(path)
        assert len(table) == count
        for row in table:
            system, user = json.loads(row["prompt"])
            assert TEMPLATES["r1rl_chat"].build(user["content"]) == [system, user]
            assert row["verdict"] == verdict(row["completion"], row["gold"])
        assert any(row["verdict"] in ("correct", "wrong") for row in table)


def test_never_measured_where_the_recipe_says_so_and_one_generation_may_feed_two_steps(
    train, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--eval_count", 0, "--eval_on_start", "--steps_per_generation", 2, "--max_steps", 2]
    code, folder, out, _ = train(write_recipe(tmp_path / "r.yaml", model, data), *words)
    assert code == 0 and "0 to measure on" in out
    assert [path.name for path in (folder.path / "rollouts").iterdir()] == ["train-000001.parquet"]
    assert len(rows(folder.rollouts(1))) == 32
    assert {line["kind"] for line in folder.read_metrics()} == {"phase", "step"}
    assert read_json(folder.summary)["held_out"] == {}


def test_a_lora_adapter_is_what_is_saved(train, model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", 1, "--eval_count", 2]
    code, folder, _, _ = train(write_recipe(tmp_path / "r.yaml", model, data), *words, "--eval_temperature", 0)
    assert code == 0
    assert (folder.model / "adapter_model.safetensors").is_file() and not (folder.model / "model.safetensors").exists()
    by_prompt: dict[str, set[str]] = {}
    for row in rows(folder.rollouts(1, "test")):
        by_prompt.setdefault(row["prompt"], set()).add(row["completion"])
    assert [len(completions) for completions in by_prompt.values()] == [1, 1]  # greedy: both samples are the same


def test_the_cold_start(train, model: Path, data: Path, tmp_path: Path) -> None:
    keys = dict.fromkeys(("num_generations", "max_completion_length"), ...)
    recipe = write_recipe(tmp_path / "r.yaml", model, data, method="sft", **keys)
    code, folder, out, _ = train(recipe, "--max_steps", 2, "--model_revision", "main", method="sft")
    assert code == 0 and "40 worked solutions to learn from" in out
    assert re.search(r"step 2/2  loss \d\.\d{4}  left ", out)
    assert (folder.model / "model.safetensors").is_file()


def test_wandb_has_the_steps_of_the_run_in_one_run_of_the_folders_name(
    train, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        words = ["--report_to", "wandb", "--max_steps", 1, "--eval_count", 0]
        code, folder, out, _ = train(write_recipe(tmp_path / "r.yaml", model, data), *words)
    finally:
        wandb.teardown()
    assert code == 0 and "Weights & Biases: offline, " in out
    (file,) = (folder.path / "wandb").rglob("*.wandb")
    assert file.name == "run-run.wandb"
    assert b"reward" in file.read_bytes() and b"train/reward" not in file.read_bytes()


# --- measuring


@pytest.fixture
def trainer(model: Path, data: Path, tmp_path: Path) -> Any:
    recipe = recipes.load(write_recipe(tmp_path / "r.yaml", model, data))
    folder = RunFolder(tmp_path / "run").create()
    with one_process(), Verifier(answer_format="tagged", numbers=True) as verifier:
        yield PolicyTrainer(
            model=str(model),
            reward_funcs=recipe.reward_functions(),
            args=arguments.config_for(recipe, folder),
            train_dataset=Dataset.from_list([{"prompt": "?", "gold": "7", "source": "s"}] * 16),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            recorder=Recorder(folder, active=True),
            verifier=verifier,
        )


def test_measuring_moves_no_random_numbers_no_weights_and_no_settings(trainer: Any, data: Path) -> None:
    problems = [Problem(f"What is {n} + 30?", "7", "s") for n in range(10, 15)]
    keys = recipes.OwnKeys(task="gsm8k", eval_samples=3, eval_temperature=0.5)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.random.get_rng_state(), random.getstate()
    config = trainer.generation_config.to_dict()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    scores = [held_out.measure(trainer, problems, keys, "measuring") for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert trainer.generation_config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())
    assert scores[0] == scores[1]  # two measurements of the same weights draw alike
    assert (scores[0].questions, scores[0].samples) == (5, 3)
    assert 0 < scores[0].mean < 1
    torch.manual_seed(4)
    assert held_out.measure(trainer, problems, keys, "measuring") == scores[0]


def test_the_problems_that_are_measured_are_a_fixed_draw() -> None:
    problems = [Problem(str(n), "1", "s") for n in range(50)]
    drawn = held_out.subset(problems, 10)
    assert drawn == held_out.subset(problems, 10) != problems[:10]
    assert len({problem.question for problem in drawn}) == 10
    assert held_out.subset(problems, None) == held_out.subset(problems, 50) == held_out.subset(problems, 99) == problems


# --- data


@pytest.fixture
def recipe(model: Path, data: Path, tmp_path: Path) -> Any:
    path = write_recipe(tmp_path / "r.yaml", model, data)
    return lambda *words: recipes.load(path, [str(word) for word in words])


def test_prompts_that_are_too_long_are_left_out(recipe, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    problems = [Problem("1" * length, "1", "s") for length in (1, 20, 21, 90)]
    longest = len(tokenizer(TEMPLATES["r1rl"].build("1" * 20))["input_ids"])
    kept = training_data.within_limit(problems, recipe("--max_prompt_tokens", longest), tokenizer)
    assert [len(problem.question) for problem in kept] == [1, 20]
    assert training_data.within_limit(problems, recipe(), tokenizer) == problems


def test_the_rows_of_the_cold_start_answer_in_the_form_that_is_graded(recipe) -> None:
    problems = [Problem("12 + 30?", "42", "s", "It is 42.")]
    for name, template in TEMPLATES.items():
        chosen = recipe("--prompt_template", name)
        row = training_data.for_sft(problems, chosen)[0]
        chat = not isinstance(row["prompt"], str)
        text = row["completion"][0]["content"] if chat else row["completion"]
        assert verdict(text, "42", chosen.answer_format) == Verdict.CORRECT
        # Prompt and completion together read as the prompt of GRPO and its completion do.
        prompt = template.build("12 + 30?")
        if name == "r1rl_chat_prefix":
            assert row["prompt"] == prompt[:-1] and text.startswith("<reasoning>\n")
        else:
            assert row["prompt"] == prompt
        assert "It is 42." in text


def test_without_a_worked_solution_there_is_no_cold_start(recipe) -> None:
    with pytest.raises(DatasetError, match=r"s: '12 \+ 30\?' has no worked solution to learn from"):
        training_data.for_sft([Problem("12 + 30?", "42", "s")], recipe())


def test_the_run_decides_where_things_go_and_the_recipe_the_rest(recipe, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = ["--eval_strategy", "steps", "--eval_steps", 5, "--model_revision", "v1", "--attn_implementation", "sdpa"]
    with one_process():
        config = arguments.config_for(recipe(*words, "--model_init_kwargs", '{"a": 1}'), folder)
        other = arguments.config_for(recipe("--fp16", "--use_cpu", "false", "--run_name", "mine"), folder)
    assert config.output_dir == str(folder.checkpoints) and config.run_name == "run" and other.run_name == "mine"
    assert config.eval_strategy == "no" and config.learning_rate == 1e-3
    assert config.bf16 == torch.cuda.is_available() and other.fp16 and not other.bf16
    expected = {"revision": "v1", "attn_implementation": "sdpa", "a": 1}
    assert expected.items() <= config.model_init_kwargs.items()


def test_a_model_is_found_by_folder_or_left_to_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_facts.path_of(str(model)) == str(model)
    assert model_facts.path_of("org/model") == "org/model"
    monkeypatch.setattr(tiny, "ensure", lambda: Path("/made"))
    assert model_facts.path_of(recipes.TINY_MODEL) == "/made"


# --- clock and recorder


def test_a_clock_counts_the_inner_phase_in_the_inner_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    clock = Clock()
    wait(1)
    with clock.phase("outer"):
        wait(2)
        with clock.phase("inner"):
            wait(4)
            with clock.phase("innermost"):
                wait(8)
        with clock.phase("inner"):
            wait(16)
        wait(32)
    wait(64)
    with clock.stopped():
        wait(1000)
        with clock.phase("outer"):
            wait(1000)
    assert clock.read(steps=2) == {
        "seconds/outer": 17.0,
        "seconds/inner": 10.0,
        "seconds/innermost": 4.0,
        "seconds/train": 32.5,
        "seconds/step": 63.5,
    }
    with clock.phase("outer"):
        wait(3)
    wait(1)
    assert clock.read(steps=1) == {"seconds/outer": 3.0, "seconds/train": 1.0, "seconds/step": 4.0}
    with pytest.raises(KeyError), clock.phase("outer"):
        wait(3)
        raise KeyError
    assert clock.read(steps=1)["seconds/outer"] == 3.0
    wait(5)
    clock.restart()
    assert clock.read(steps=1) == {"seconds/train": 0.0, "seconds/step": 0.0}


def test_a_metric_that_could_not_be_computed_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(RunFolder(tmp_path), active=True)
    metrics = {"step": 1, "steps": 2, "reward": float("nan"), "a": float("inf"), "b": 1.5, "seconds_left": 1.0}
    recorder.step(metrics)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["reward"], line["a"], line["b"]) == (None, None, 1.5)
    assert read_json(tmp_path / "status.json")["phase"] == "training"
    assert capsys.readouterr().out == "step 1/2  left 1.0 s\n"


def test_only_the_main_process_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(RunFolder(tmp_path), active=False)
    recorder.say("a")
    recorder.phase("b")
    recorder.step({"step": 1, "steps": 2, "seconds_left": 0})
    recorder.evaluation({"step": 1}, [])
    recorder.flush_rollouts(1)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
