"""Between completion and reward, inside the trainer: where it ends, what graded it, what is measured of it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from r1zero import recipe as recipes
from r1zero import tiny
from r1zero.run_folder import RunFolder, read_json
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.prompts import TEMPLATES, chat_arguments
from r1zero.tasks.verifier import Graded, Verdict
from r1zero.training import arguments, held_out
from r1zero.training import data as training_data
from r1zero.training.alarm import WINDOW, Alarm
from r1zero.training.recorder import Recorder
from r1zero.training.stop_strings import StopStrings
from r1zero.training.trainer import PolicyTrainer
from tests.tasks.test_prompts import CHATML
from tests.training.conftest import CHAT, one_process, rows, write_recipe


class FixedVerifier:
    """Says the same of every completion, or what it is told to by its gold."""

    def __init__(self, verdict: Verdict | None = None) -> None:
        self.verdict = verdict
        self.asked: list[tuple[Sequence[str], Sequence[str]]] = []

    def grade(self, completions: Sequence[str], golds: Sequence[str], questions: Sequence[str]) -> list[Graded]:
        self.asked.append((completions, golds))
        return [Graded(f"of {gold}", self.verdict or Verdict(gold)) for gold in golds]


Make = Callable[..., Any]


@pytest.fixture
def make(model: Path, data: Path, tmp_path: Path) -> Any:
    """A trainer of the recipe with `keys`, over `examples`."""
    with one_process():

        def build(
            examples: list[dict[str, Any]] | None = None, verifier: Any = None, model: Path = model, **keys: Any
        ) -> Any:
            recipe = recipes.load(write_recipe(tmp_path / "r.yaml", model, data, **keys))
            return PolicyTrainer(
                model=str(model),
                reward_funcs=recipe.reward_functions(),
                args=arguments.config_for(recipe, RunFolder(tmp_path / "run").create()),
                train_dataset=Dataset.from_list(
                    examples or [{"prompt": "?", "question": "?", "gold": "7", "source": "s"}] * 16
                ),
                processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
                recorder=Recorder(RunFolder(tmp_path / "run"), active=True),
                verifier=verifier or FixedVerifier(Verdict.CORRECT),
                stop_strings=recipe.own.stop_strings or (),
                alerts={"unparsed": recipe.own.alert_unparsed, "timed_out": recipe.own.alert_timed_out},
            )

        yield build


@pytest.fixture
def chat_model(model: Path, tmp_path: Path) -> Path:
    chat = tmp_path / "chat"
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text(CHAT)
    return chat


# --- stop strings


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


@pytest.mark.parametrize(
    ("strings", "text", "kept"),
    [
        (["</answer>"], "a<answer>7</answer>bc", "a<answer>7</answer>"),
        (["</answer>"], "a</answer>b</answer>", "a</answer>"),
        (["</answer>"], "no end", "no end"),
        (["</answer>"], "", ""),
        (["stop"], "do not stop stop", "do not stop"),
        (["stop"], "st stostop!", "st stostop"),
        (["\nQuestion:", "</answer>"], "7\nQuestion: 1</answer>", "7\nQuestion:"),
        (["Question:", "stop"], "stop", "stop"),
        (["<eos>"], "a<eos>b", "a<eos>"),  # a special token's text
        ([], "</answer>", "</answer>"),
    ],
)
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(
    strings: list[str], text: str, kept: str, tokenizer: Any
) -> None:
    stop = StopStrings(strings, tokenizer)
    ids = tokenizer(text)["input_ids"]
    (cut,), (logprobs,) = stop.cut([ids], [[float(at) for at in range(len(ids))]])
    assert tokenizer.decode(cut, skip_special_tokens=False) == kept
    assert logprobs == [float(at) for at in range(len(cut))]
    assert stop.cut([ids], None) == ([cut], None)
    assert stop.ended(cut) is any(string in text for string in strings)
    assert stop.cut([cut], None) == ([cut], None)


def test_vllm_is_told_to_stop_by_itself(tokenizer: Any) -> None:
    told = StopStrings(["\n\n", "<eos>"], tokenizer).for_vllm()
    assert told == {"stop": ["\n\n", "<eos>"], "stop_token_ids": [tokenizer.eos_token_id]}


def test_with_stop_strings_a_run_makes_the_same_completions_up_to_there(
    train: Any, model: Path, data: Path, tmp_path: Path
) -> None:
    """The model ends after </answer>; here it must end at the tag before, and nothing of it counts as cut off."""
    made = {}
    for name, words in (("free", []), ("stopped", ["--stop_strings", "</reasoning>", "Question"])):
        recipe = write_recipe(tmp_path / "r.yaml", model, data, output_dir=str(tmp_path / name))
        code, folder, _, err = train(recipe, "--max_steps", 1, "--eval_count", 3, *words)
        assert code == 0, err
        made[name] = rows(folder.rollouts(1)), rows(folder.rollouts(1, "test")), list(folder.read_metrics())
        shutil.rmtree(folder.path)
    free, stopped = (made[name][0] for name in ("free", "stopped"))
    assert len(free) == len(stopped) == 16
    cut = 0
    for before, after in zip(free, stopped, strict=True):
        assert before["prompt"] == after["prompt"]
        assert after["completion"] == before["completion"].partition("</reasoning>")[0] + (
            "</reasoning>" if "</reasoning>" in before["completion"] else ""
        )
        if after["completion"].endswith("</reasoning>"):
            assert not after["clipped"] and after["length"] < before["length"]
            cut += 1
    assert cut > 8
    assert sum(row["completion"].endswith("</reasoning>") and not row["clipped"] for row in made["stopped"][1]) > 3
    step = next(line for line in made["stopped"][2] if line["kind"] == "step")
    assert step["completions/clipped_ratio"] == sum(row["clipped"] for row in stopped) / 16
    lengths = [row["length"] for row in stopped if not row["clipped"]]
    assert step["completions/mean_terminated_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert step["completions/max_terminated_length"] == max(lengths)
    assert step["completions/mean_length"] == pytest.approx(sum(row["length"] for row in stopped) / 16)


# --- conversations that the assistant has begun


def test_what_the_model_reads_is_what_was_counted(make: Make, chat_model: Path, data: Path, tmp_path: Path) -> None:
    (chat_model / "chat_template.jinja").write_text(CHATML)
    trainer = make(model=chat_model)
    for name in ("r1rl_chat", "r1rl_chat_prefix", "r1rl"):
        prompt = TEMPLATES[name].build("What is 12 + 30?")
        (ids,), images, fields = trainer._tokenize_prompts([prompt])
        if isinstance(prompt, str):
            text = prompt
        else:
            text = trainer.processing_class.apply_chat_template(prompt, tokenize=False, **chat_arguments(prompt))
        assert trainer.processing_class.decode(ids, skip_special_tokens=False) == text
        assert images is None and fields == {}
        problems = [Problem("What is 1 + 2?", "3", "s")]
        longest = len(trainer._tokenize_prompts([TEMPLATES[name].build(problems[0].question)])[0][0])
        for limit, kept in ((longest, 1), (longest - 1, None)):
            chosen = recipes.load(tmp_path / "r.yaml", ["--prompt_template", name, "--max_prompt_tokens", str(limit)])
            if kept:
                assert training_data.within_limit(problems, chosen, trainer.processing_class) == problems
            else:
                with pytest.raises(DatasetError, match="every one of 1 prompts is longer"):
                    training_data.within_limit(problems, chosen, trainer.processing_class)


def test_a_run_goes_on_inside_the_reasoning_that_the_conversation_has_begun(
    train: Any, chat_model: Path, data: Path, tmp_path: Path
) -> None:
    words = ["--prompt_template", "r1rl_chat_prefix", "--reward_funcs", "correctness", "format", "--max_steps", 1]
    code, folder, _, err = train(write_recipe(tmp_path / "r.yaml", chat_model, data), *words, "--eval_count", 3)
    assert code == 0, err
    for path in (folder.rollouts(1), folder.rollouts(1, "test")):
        for row in rows(path):
            assert json.loads(row["prompt"])[-1] == {"role": "assistant", "content": "<reasoning>"}
            if row["completion"] == "\n</reasoning>\n<answer>\n7\n</answer>":
                assert row["verdict"] == "correct"
                assert row["rewards"] in (None, [("correctness", 1.0), ("format", 1.0)])
    assert any(row["verdict"] == "correct" for row in rows(folder.rollouts(1)))


def test_the_cold_start_of_a_conversation_that_the_assistant_has_begun(
    train: Any, chat_model: Path, data: Path, tmp_path: Path
) -> None:
    keys = dict.fromkeys(("num_generations", "max_completion_length"), ...)
    recipe = write_recipe(tmp_path / "r.yaml", chat_model, data, method="sft", **keys)
    code, folder, _, err = train(recipe, "--max_steps", 1, "--prompt_template", "r1rl_chat_prefix", method="sft")
    assert code == 0, err
    assert read_json(folder.summary)["outcome"] == "finished"


# --- rewards

MINE = """
def seen(prompts, completions, completion_ids, gold, source, answer, verdict, **unused):
    rows = list(zip(prompts, completions, completion_ids, gold, source, answer, verdict, strict=True))
    return [None if v == "wrong" else float(len(ids)) for _, _, ids, _, _, _, v in rows]
"""


def test_several_rewards_with_weights_and_one_of_the_users_own(
    train: Any, model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "seen_by_me.py").write_text(MINE)
    words = ["--reward_funcs", "correctness", "format", "seen_by_me:seen", "--reward_weights", 1, 0.5, 0.01]
    code, folder, _, err = train(write_recipe(tmp_path / "r.yaml", model, data), *words, "--max_steps", 1)
    assert code == 0, err
    table = rows(folder.rollouts(1))
    for row in table:
        given = dict(row["rewards"])
        assert list(given) == ["correctness", "format", "seen"]
        assert given["correctness"] == float(row["verdict"] == "correct")
        assert given["seen"] == (None if row["verdict"] == "wrong" else row["length"])
        expected = given["correctness"] + 0.5 * given["format"] + 0.01 * (given["seen"] or 0.0)
        assert row["reward"] == pytest.approx(expected, abs=1e-6)
    step = next(line for line in folder.read_metrics() if line["kind"] == "step")
    for name in ("correctness", "format", "seen"):
        values = [dict(row["rewards"])[name] for row in table if dict(row["rewards"])[name] is not None]
        assert step[f"rewards/{name}/mean"] == pytest.approx(sum(values) / len(values))
    assert step["reward"] == pytest.approx(sum(row["reward"] for row in table) / 16)
    evaluation = rows(folder.rollouts(1, "test"))
    assert {row["reward"] for row in evaluation} <= {0.0, 1.0} and {row["rewards"] for row in evaluation} == {None}


def test_a_function_that_cannot_be_had_stops_the_trainer_before_there_is_a_run(
    train: Any, model: Path, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", model, data, reward_funcs=["nowhere_at_all:f"])
    code, folder, _, err = train(recipe)
    assert code == 2 and not folder.path.exists()
    assert "reward_funcs = 'nowhere_at_all:f': cannot be imported: ModuleNotFoundError" in err


# --- what is measured of a batch


def test_a_batch_is_graded_once_and_every_reward_gets_what_was_found(make: Make, tmp_path: Path) -> None:
    examples = [
        {"prompt": TEMPLATES["r1rl"].build("What is 12 + 30?"), "question": "?", "gold": gold, "source": source}
        for gold, source in [("correct", "easy"), ("wrong", "hard"), ("unparsed", "hard"), ("timed_out", "easy")]
    ]
    verifier = FixedVerifier()
    trainer = make(
        examples,
        verifier,
        per_device_train_batch_size=32,
        reward_funcs=["correctness", "simplerl_v0"],
        reward_weights=[1, 0.1],
        max_steps=1,
    )
    trainer.train()
    assert [len(golds) for _, golds in verifier.asked] == [32]
    table = rows(tmp_path / "run" / "rollouts" / "train-000001.parquet")
    assert len(table) == 32
    for row in table:
        assert (row["verdict"], row["answer"]) == (row["gold"], f"of {row['gold']}")
    (step,) = (line for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "step")
    assert {key: value for key, value in step.items() if key.startswith(("verdict/", "source/"))} == {
        **{f"verdict/{verdict.value}": 0.25 for verdict in Verdict},
        "source/easy/correct": 0.5,
        "source/hard/correct": 0.0,
        **{
            f"source/{source}/reward": pytest.approx(
                sum(row["reward"] for row in table if row["source"] == source) / 16, abs=1e-6
            )
            for source in ("easy", "hard")
        },
    }


def test_one_source_has_no_metrics_of_its_own(make: Make, tmp_path: Path) -> None:
    make(max_steps=1).train()
    (step,) = (line for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "step")
    assert step["verdict/correct"] == 1.0 and not [key for key in step if key.startswith("source/")]


def test_measuring_grades_in_batches_and_says_what_the_verifier_says(make: Make, tmp_path: Path) -> None:
    verifier = FixedVerifier(Verdict.TIMED_OUT)
    trainer = make(verifier=verifier)
    problems = [Problem(f"What is {n} + 30?", "7", "s") for n in range(10, 15)]
    score = held_out.measure(trainer, problems, recipes.OwnKeys(eval_samples=3), "measuring")
    assert score.mean == 0.0
    assert [len(golds) for _, golds in verifier.asked] == [15]
    (line,) = (line for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "evaluation")
    assert line["verdict/timed_out"] == 1.0 and line["verdict/wrong"] == 0.0


# --- alerts


def test_an_alarm_speaks_once_when_crossed_and_again_after_it_was_quiet() -> None:
    alarm = Alarm("unparsed", 0.5)
    said = [alarm.add(1.0) for _ in range(WINDOW)]
    assert said == [None] * (WINDOW - 1) + [1.0]  # not before the window is full
    assert [alarm.add(1.0) for _ in range(5)] == [None] * 5
    assert [alarm.add(0.0) for _ in range(5)] == [None] * 5  # now at the threshold, which is not above it
    assert alarm.add(1.0) is None
    assert [alarm.add(1.0) for _ in range(5)] == [None, None, None, None, pytest.approx(0.6)]
    assert alarm.add(1.0) is None
    assert "60.0 % of the completions of the last 10 generations have no answer" in alarm.message(0.6)
    never = Alarm("timed_out", 1.0)
    assert [never.add(1.0) for _ in range(2 * WINDOW)] == [None] * (2 * WINDOW)


def test_an_alert_is_a_line_of_the_metrics_and_of_the_log(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    make(verifier=FixedVerifier(Verdict.TIMED_OUT), max_steps=WINDOW + 2, max_completion_length=4).train()
    alerts = [line for line in RunFolder(tmp_path / "run").read_metrics() if line["kind"] == "alert"]
    assert [line["step"] for line in alerts] == [WINDOW]
    message = "100.0 % of the completions of the last 10 generations have an answer that the verifier gave up on"
    assert alerts[0]["message"].startswith(f"{message} (alert_timed_out = 0.01); read some in rollouts/")
    assert capsys.readouterr().out.count(f"ALERT at step 10: {message}") == 1
