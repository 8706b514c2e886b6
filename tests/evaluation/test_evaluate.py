"""launch/evaluate.py through its door: what it asks, what it writes, and that grading again says the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1zero.evaluation import benchmarks as known
from r1zero.evaluation import grading, protocol, published
from r1zero.evaluation.results import SCHEMA
from r1zero.tasks.problem import Problem
from r1zero.tasks.prompts import TEMPLATES
from r1zero.training import held_out
from tests.conftest import DATA, PROJECT
from tests.evaluation.conftest import Evaluated, make_run

Evaluate = Callable[..., Evaluated]
ASKED = ("--prompt_template", "r1rl", "--max_tokens", "40")


def test_a_model_on_a_benchmark(evaluate: Evaluate, model: Path, benchmarks: Path) -> None:
    words = [f"mine={model}", "--benchmarks", "gsm8k", "--data", benchmarks, *ASKED, "--samples", 4, "--temperature", 1]
    done = evaluate(*words)
    assert done.code == 0, done.err
    rows, scores, result = done.rows("mine"), done.scores("mine"), done.result
    assert pq.read_schema(next((done.folder / "completions").iterdir())).equals(SCHEMA)
    assert [(row["index"], row["sample"]) for row in rows] == [(i, s) for i in range(10) for s in range(4)]
    assert all(row["prompt"] == TEMPLATES["r1rl"].build(row["question"]) for row in rows)
    right = [row["verdict"] == "correct" for row in rows]
    assert scores["mean"] == round(sum(right) / 40, 4) and 0 < scores["mean"] < 1
    assert scores["low"] < scores["mean"] < scores["high"]
    assert scores["pass_at_k"]["4"]["mean"] == round(sum(any(right[i : i + 4]) for i in range(0, 40, 4)) / 10, 4)
    assert scores["pass_at_k"]["1"]["mean"] == scores["mean"] <= scores["pass_at_k"]["2"]["mean"]
    assert scores["mean_length"] == sum(row["length"] for row in rows) / 40
    assert sum(scores[each] for each in ("correct", "wrong", "unparsed", "timed_out")) == pytest.approx(1)
    (entry,), (asked,) = result["evaluations"], result["benchmarks"]
    assert entry["protocol"]["template"] == TEMPLATES["r1rl"].text
    expected = {"answer_format": "tagged", "samples": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 40, "seed": 0}
    assert {key: entry["protocol"][key] for key in expected} == expected
    assert (asked["questions"], asked["of"], asked["numbers"], len(asked["sha256"])) == (10, 10, True, 64)
    assert len(result["verifier"]["sha256"]) == 64 and result["verifier"]["math-verify"]
    assert "mine on GSM8K" in done.out and "| mine |" in (done.folder / "table.md").read_text()


def test_greedy_answers_are_the_models_own_and_the_same_each_time(
    evaluate: Evaluate, model: Path, benchmarks: Path
) -> None:
    words = [f"mine={model}", "--benchmarks", "gsm8k", "--data", benchmarks, *ASKED]
    first, second = evaluate(*words, into="first"), evaluate(*words, into="second")
    assert first.rows("mine") == second.rows("mine")
    file = first.result["evaluations"][0]["completions"]
    assert file == second.result["evaluations"][0]["completions"]  # the hash of the bytes too
    tokenizer, loaded = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    row = first.rows("mine")[3]
    ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(row["length"]):
            ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, -row["length"] :], skip_special_tokens=True) == row["completion"]
    assert ids[0, -1] == tokenizer.eos_token_id and not row["clipped"]


def test_what_is_cut_off_and_where_a_stop_string_ends(evaluate: Evaluate, model: Path, benchmarks: Path) -> None:
    words = [f"mine={model}", "--benchmarks", "gsm8k", "--data", benchmarks, "--prompt_template", "r1rl"]
    short = evaluate(*words, "--max_tokens", 3, into="short")
    assert {(row["length"], row["clipped"], row["verdict"]) for row in short.rows("mine")} == {(3, True, "unparsed")}
    assert short.scores("mine")["clipped"] == 1
    stopped = evaluate(*words, "--max_tokens", 40, "--stop_strings", "</reasoning>", into="stopped")
    rows = stopped.rows("mine")
    assert all(row["completion"].endswith("</reasoning>") and not row["clipped"] for row in rows)


def test_a_run_its_checkpoints_and_what_it_began_with_side_by_side(
    evaluate: Evaluate, model: Path, data: Path, tmp_path: Path
) -> None:
    """Whole weights and adapters; asked as the recipe says, on what the recipe measures on."""
    whole = make_run(tmp_path / "whole", model, data)
    adapted = make_run(tmp_path / "adapted", model, data, adapter=True)
    done = evaluate(whole, adapted, "--checkpoints", "all", "--with_base")
    assert done.code == 0, done.err
    base = model.name
    labels = [each["label"] for each in done.result["models"]]
    assert [each.rpartition("/")[2] for each in labels] == [base, "whole@5", "whole", "adapted@5", "adapted"]
    assert [each["role"] for each in done.result["models"]] == ["baseline", *["trained"] * 4]
    assert [each["step"] for each in done.result["models"]] == [None, 5, None, 5, None]
    for label in labels:
        assert (done.scores(label)["questions"], done.scores(label)["samples"]) == (8, 4)
    # Near the model that the run began with, and far from it.
    assert abs(done.scores("whole@5")["mean"] - done.scores(labels[0])["mean"]) < 0.6
    assert done.rows("adapted@5") != done.rows(labels[0]) and done.rows("adapted") != done.rows("adapted@5")
    assert [each["model"] for each in done.result["differences"]] == labels[1:]
    for each in done.result["differences"]:
        gain = done.scores(each["model"])["mean"] - done.scores(each["less"])["mean"]
        assert each["mean"] == pytest.approx(gain, abs=1e-3) and each["low"] <= each["mean"] <= each["high"]


def test_an_adapter_is_not_merged_and_answers_as_peft_does(
    evaluate: Evaluate, model: Path, data: Path, benchmarks: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "adapted", model, data, adapter=True)
    done = evaluate(run / "model", "--benchmarks", "gsm8k", "--data", benchmarks, "--temperature", 0, "--count", 2)
    assert done.code == 0, done.err
    (label,) = [each["label"] for each in done.result["models"]]
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(run / "model")).eval()
    for row in done.rows(label):
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            for _ in range(row["length"]):
                ids = torch.cat([ids, policy(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert tokenizer.decode(ids[0, -row["length"] :], skip_special_tokens=True) == row["completion"]


def test_grading_again_says_the_same_bit_for_bit(evaluate: Evaluate, model: Path, benchmarks: Path) -> None:
    words = [f"mine={model}", "--benchmarks", "gsm8k", "--data", benchmarks, *ASKED, "--samples", 3, "--temperature", 1]
    first = evaluate(*words, into="first")
    again = evaluate("--rescore", first.folder, "--output_dir", "again", into="again")
    assert again.code == 0, again.out
    assert "all of 30 completions and every score came out the same" in again.out
    for name in ("result.json", "table.md", first.result["evaluations"][0]["completions"]["file"]):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()


def test_grading_again_says_what_came_out_otherwise(evaluate: Evaluate, model: Path, benchmarks: Path) -> None:
    first = evaluate(f"mine={model}", "--benchmarks", "gsm8k", "--data", benchmarks, *ASKED, into="first")
    (file,) = (first.folder / "completions").iterdir()
    kept = file.read_bytes()
    rows = pq.read_table(file).to_pylist()
    rows[2] |= {"answer": "7", "verdict": "correct" if rows[2]["verdict"] == "wrong" else "wrong"}
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    touched = evaluate("--rescore", first.folder)
    assert touched.code == 2 and "is not the file that was written" in touched.err
    file.write_bytes(kept)
    result = first.result
    result["evaluations"][0]["scores"]["mean"] = 0.123
    (first.folder / "result.json").write_text(json.dumps(result))
    other = evaluate("--rescore", first.folder)
    assert other.code == 1 and "scores {'mean': 0.123" in other.out and "came out otherwise" in other.out
    file.unlink()
    assert "without it nothing can be graded again" in evaluate("--rescore", first.folder).err
    assert "no result.json" in evaluate("--rescore", first.folder / "completions").err


def test_a_preset_asks_a_baseline_and_a_trained_model_as_the_seed_did(
    evaluate: Evaluate, model: Path, data: Path, benchmarks: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", model, data)
    words = [run, "--with_base", "--preset", "simplerl-v1", "--benchmarks", "gsm8k", "--data", benchmarks]
    done = evaluate(*words, "--max_tokens", 8)
    assert done.code == 0, done.err
    baseline, trained = [each["protocol"] for each in done.result["evaluations"]]
    assert (baseline["temperature"], baseline["samples"]) == (0.0, 1)
    assert (trained["temperature"], trained["top_p"], trained["samples"]) == (1.0, 0.95, 1)
    assert baseline["prompt_template"] == trained["prompt_template"] == "qwen_boxed"
    assert "was trained with the template r1rl, and is asked with qwen_boxed" in done.out
    table = (done.folder / "table.md").read_text()
    assert "| *Qwen2.5-Math-7B + SimpleRL-Zoo* | *90.2* |" in table and published.V1 in table
    assert "AIME avg@32: 24.0" in table


@pytest.mark.parametrize("name", protocol.PRESETS)
def test_what_the_presets_say(name: str) -> None:
    preset = protocol.PRESETS[name]
    assert set(preset.benchmarks) <= set(known.BENCHMARKS) and preset.source and preset.differs
    for role in ("baseline", "trained"):
        for benchmark in preset.benchmarks:
            asked = preset.of(role, benchmark)
            again = protocol.Protocol.read(json.loads(json.dumps(asked.written())))
            assert again.template.text == asked.template.text
            assert again.written() == {**asked.written(), "prompt_template": "custom"}
            assert asked.template.answer_format in (None, asked.answer_format)
    for row in published.rows(name):
        assert set(row.scores) <= set(preset.benchmarks) and all(0 < value < 100 for value in row.scores.values())
    if name == "simplerl-v1":
        assert preset.of("trained", "aime24").samples == 32 and preset.of("trained", "amc23").samples == 1


def test_the_questions_of_a_count_are_those_that_training_measures_on() -> None:
    problems = [Problem(str(n), str(n), "s") for n in range(300)]
    assert known.subset(problems, 200) == held_out.subset(problems, 200)
    assert known.subset(problems, None) == problems == known.subset(problems, 300)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("gsm8k", 1319), ("math500", 500), ("aime24", 30), ("amc23", 40), ("minerva_math", 272), ("olympiadbench", 675)],
)
def test_the_published_benchmarks_are_read_whole(name: str, rows: int) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not at {DATA}; set R1ZERO_TEST_DATA")
    found = known.read(name, str(DATA))
    assert (len(found.problems), found.of, found.numbers) == (rows, rows, name == "gsm8k")
    assert known.read(name, str(DATA)).sha256 == found.sha256 != known.read(name, str(DATA), 20).sha256


def test_a_majority_votes_by_value() -> None:
    def row(answer: str | None, verdict: str) -> dict[str, object]:
        return {"index": 0, "answer": answer, "verdict": verdict, "clipped": False, "length": 1}

    halves = [row("0.5", "wrong"), row(r"\frac12", "wrong"), row("42", "correct")]
    assert grading.score(halves)["majority"]["mean"] == 0.0
    assert grading.score([*halves, row("42.0", "correct")])["majority"]["mean"] == 0.5
    assert (
        grading.score([*halves[:1], row(None, "unparsed"), row("42", "correct"), row("42.0", "correct")])["majority"][
            "mean"
        ]
        == 1.0
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name a model or a run to evaluate"),
        (["MODEL"], "name --benchmarks, some of: gsm8k"),
        (["MODEL", "--benchmarks", "gsm9k"], "--benchmarks gsm9k: is not a benchmark; there are gsm8k"),
        (["MODEL", "--benchmarks", "own"], "no run was given"),
        (["MODEL", "--benchmarks", "math500"], "holds no math500/test.jsonl; it holds gsm8k"),
        (["./nothing", "--benchmarks", "gsm8k"], "./nothing: no such folder"),
        (["runs/nothing", "--benchmarks", "gsm8k"], "runs/nothing: no such folder"),
        (["DATA", "--benchmarks", "gsm8k"], "neither a run (no recipe.yaml) nor a model"),
        (["MODEL", "a=MODEL", "RUN", "--checkpoints", "9"], "has no checkpoint 9"),
        (["RUN", "--checkpoints", "last"], "'last' is neither a step, nor all, nor final"),
        (["MODEL", "--benchmarks", "gsm8k", "--samples", "2", "--temperature", "0"], "greedy answers are all alike"),
        (["MODEL", "--benchmarks", "gsm8k", "--top_p", "0"], "--top_p 0: is a share above 0"),
        (["MODEL", "--benchmarks", "gsm8k", "--count", "0"], "--count 0: must be at least 1"),
        (["MODEL", "--benchmarks", "gsm8k", "--prompt_template", "r1r"], "did you mean r1rl?"),
        (["MODEL", "--rescore", "x"], "takes a result's folder and no models"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_by_name(
    words: list[str], why: str, evaluate: Evaluate, model: Path, data: Path, benchmarks: Path, tmp_path: Path
) -> None:
    places = {"MODEL": str(model), "a=MODEL": f"a={model}", "DATA": str(data), "RUN": ""}
    if "RUN" in words:
        places["RUN"] = str(make_run(tmp_path / "run", model, data))
    done = evaluate(*[places.get(word, word) for word in words], "--data", benchmarks)
    assert done.code == 2 and why in done.err
    assert not done.folder.exists() or not any(done.folder.iterdir())


def test_a_result_is_never_written_over(evaluate: Evaluate, model: Path, benchmarks: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = evaluate(model, "--benchmarks", "gsm8k", "--data", benchmarks, *ASKED)
    assert done.code == 2 and "never writes over another" in done.err


def test_help_answers_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", PROJECT / "launch" / "evaluate.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "trl", "numpy", "pyarrow", "datasets"}
    assert "--benchmarks" in done.stdout
