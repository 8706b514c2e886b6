"""From a recipe to the problems of its run: sources, levels, mixtures, order, and what is kept apart."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import recipe as recipes
from r1zero.tasks import arithmetic, selection, sources
from r1zero.tasks.problem import DatasetError
from r1zero.tasks.selection import Selection


def write(file: Path, *found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def load(*words: str, **keys: Any) -> recipes.Recipe:
    keys = {"model_name_or_path": recipes.TINY_MODEL, **keys}
    Path("recipe.yaml").write_text(yaml.safe_dump(keys))
    return recipes.load("recipe.yaml", words)


def select(*words: str, **keys: Any) -> Selection:
    return selection.of(load(*words, **keys))


def questions(problems: Any) -> list[str]:
    return [problem.question for problem in problems]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small datasets: words (GSM8K's form), hard (with levels), other (columns of its own)."""
    monkeypatch.chdir(tmp_path)
    for split, first in (("train", 0), ("test", 100)):
        numbers = range(first, first + 20)
        write(
            Path("words", f"{split}.jsonl"), *({"question": f"Word {n}?", "answer": f"#### {n},000"} for n in numbers)
        )
        levels = ({"problem": f"Hard {n}?", "answer": f"{n},000", "level": n % 5 + 1} for n in numbers)
        write(Path("hard", f"{split}.jsonl"), *levels)
        write(Path("other", f"{split}.jsonl"), *({"q": f"Other {n}?", "a": n, "why": f"It is {n}."} for n in numbers))
    return tmp_path


OTHER = {"task": "dataset", "dataset_name": "other", "question_column": "q", "answer_column": "a"}


@pytest.mark.parametrize(
    ("keys", "train", "test", "sources"),
    [
        ({"task": "arithmetic"}, 7600, 500, ("arithmetic/train", "arithmetic/test")),
        ({"task": "gsm8k", "dataset_name": "words"}, 20, 20, ("gsm8k/train", "gsm8k/test")),
        ({"task": "math", "dataset_name": "hard"}, 12, 20, ("math/train", "math/test")),
        (OTHER, 20, 20, ("other/train", "other/test")),
    ],
    ids=["arithmetic", "gsm8k", "math", "dataset"],
)
def test_each_task_trains_on_one_split_and_measures_on_the_other(
    keys: dict[str, Any], train: int, test: int, sources: tuple[str, str]
) -> None:
    found = select(**keys)
    assert (len(found.train), len(found.test)) == (train, test)
    assert tuple({p.source for p in problems} for problems in (found.train, found.test)) == ({sources[0]}, {sources[1]})


def test_commas_go_from_the_golds_of_gsm8k_only() -> None:
    assert select(task="gsm8k", dataset_name="words").train[1].gold == "1000"
    assert select(task="gsm8k", dataset_name="words", remove_commas=False).train[1].gold == "1,000"
    assert select(task="math", dataset_name="hard").train[0].gold == "2,000"


@pytest.mark.parametrize("method", ["grpo", "sft"])
def test_where_nothing_is_measured_no_test_split_is_needed(method: str) -> None:
    Path("words", "test.jsonl").unlink()
    found = select("--method", method, "--eval_count", "0", task="gsm8k", dataset_name="words")
    assert (len(found.train), found.test, found.notes) == (20, [], ())


def test_the_order_is_the_datasets_or_that_of_shuffle_seed() -> None:
    plain = questions(select(task="gsm8k", dataset_name="words").train)
    assert plain == [f"Word {n}?" for n in range(20)]
    shuffled = [
        questions(select(task="gsm8k", dataset_name="words", shuffle_seed=seed).train) for seed in (3407, 3407, 1)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert plain != shuffled[0] and sorted(shuffled[0]) == sorted(plain)


# --- levels


def test_the_levels_of_simplerl_are_trained_on_and_all_are_measured() -> None:
    found = select(task="math", dataset_name="hard")
    assert questions(found.train) == [f"Hard {n}?" for n in range(20) if n % 5 + 1 >= 3]
    assert len(found.test) == 20
    assert found.notes[0] == "levels: 12 of 20 problems of math/train have level 3, 4, 5"


@pytest.mark.parametrize("words", [("--levels", "1", "2"), ("--levels", "[1, 2]"), ("--levels=[1,2]",)], ids=str)
def test_levels_by_override(words: tuple[str, ...]) -> None:
    assert len(select(*words, task="math", dataset_name="hard").train) == 8
    assert len(select("--levels", "2", task="math", dataset_name="hard").train) == 4


# --- splits and other datasets to measure on


def test_splits_have_the_names_that_the_recipe_gives() -> None:
    Path("words", "test.jsonl").rename("words/validation.jsonl")
    found = select(task="gsm8k", dataset_name="words", dataset_train_split="validation", dataset_test_split="train")
    assert (questions(found.train)[0], questions(found.test)[0]) == ("Word 100?", "Word 0?")
    assert found.train[0].source == "gsm8k/validation"


def test_a_configuration_is_read_for_training_and_measuring_alike() -> None:
    for split in ("train", "test"):
        write(Path("configured", "main", f"{split}.jsonl"), {"question": f"{split}?", "answer": "#### 1"})
    found = select(task="gsm8k", dataset_name="configured", dataset_config="main")
    assert (questions(found.train), questions(found.test)) == (["train?"], ["test?"])


@pytest.mark.parametrize(
    ("keys", "first", "source"),
    [
        ({"eval_task": "math", "eval_dataset_name": "hard"}, "Hard 100?", "hard/test"),
        ({"eval_task": "math", "eval_dataset_name": "hard/test.jsonl"}, "Hard 100?", "hard/test"),
        ({"eval_dataset_name": "words2"}, "Word 100?", "words2/test"),
        ({"eval_task": "arithmetic"}, arithmetic.load("test")[0].question, "arithmetic/test"),
        ({"eval_task": "gsm8k"}, "Word 100?", "gsm8k/test"),
    ],
    ids=str,
)
def test_measuring_on_something_else(keys: dict[str, Any], first: str, source: str, place: Path) -> None:
    (place / "words2").symlink_to(place / "words")
    found = select(task="gsm8k", dataset_name="words", **keys)
    assert (found.test[0].question, found.test[0].source) == (first, source)
    assert len(found.train) == 20


def test_a_single_file_is_trained_on_and_something_else_measured() -> None:
    found = select(task="math", dataset_name="hard/train.jsonl", eval_dataset_name="hard/test.jsonl")
    assert (len(found.train), len(found.test)) == (12, 20)
    assert len(select(task="math", dataset_name="hard/train.jsonl", eval_count=0).train) == 12


def test_named_columns_are_those_of_the_measured_data_too_unless_it_has_a_task_of_its_own() -> None:
    assert questions(select(**OTHER).test)[0] == "Other 100?"
    found = select(**OTHER, eval_task="math", eval_dataset_name="hard")
    assert questions(found.test)[0] == "Hard 100?"


@pytest.mark.parametrize(
    ("keys", "trained", "measured"),
    [
        ({"task": "gsm8k"}, ("openai/gsm8k", "train", "main"), ("openai/gsm8k", "test", "main")),
        (
            {"task": "gsm8k", "dataset_config": "socratic"},
            ("openai/gsm8k", "train", "socratic"),
            ("openai/gsm8k", "test", "socratic"),
        ),
        (
            {"task": "math"},
            ("DigitalLearningGmbH/MATH-lighteval", "train", "default"),
            ("HuggingFaceH4/MATH-500", "test", "default"),
        ),
        (
            {"task": "gsm8k", "eval_task": "math"},
            ("openai/gsm8k", "train", "main"),
            ("HuggingFaceH4/MATH-500", "test", "default"),
        ),
        ({"task": "dataset", "dataset_name": "a/b"}, ("a/b", "train", None), ("a/b", "test", None)),
        (
            {"mixture": [{"task": "math"}, {"task": "gsm8k", "split": "train[:50%]"}], "eval_task": "gsm8k"},
            ("DigitalLearningGmbH/MATH-lighteval", "train", "default"),
            ("openai/gsm8k", "test", "main"),
        ),
    ],
    ids=str,
)
def test_what_is_read_from_the_hub(keys: dict[str, Any], trained: tuple[Any, ...], measured: tuple[Any, ...]) -> None:
    recipe = load(**keys)
    assert sources.trained_on(recipe)[0].place == trained
    assert sources.measured_on(recipe)[0].place == measured
    assert selection.needs_download(recipe)


# --- mixtures

MIXTURE = [
    {"task": "gsm8k", "dataset_name": "words", "weight": 2},
    {"task": "math", "dataset_name": "hard", "levels": [1, 2]},
    {**OTHER, "weight": 1},
]


def test_a_mixture_has_the_shares_of_its_weights_and_measures_on_each_part() -> None:
    found = select(mixture=MIXTURE)
    assert Counter(p.source for p in found.train) == {"gsm8k/train": 16, "math/train": 8, "other/train": 8}
    assert Counter(p.source for p in found.test) == {"gsm8k/test": 20, "math/test": 20, "other/test": 20}
    assert len(set(questions(found.train))) == 32
    assert found.notes[-1] == (
        "mixture: 32 problems, 16 of 20 from gsm8k/train (50%), 8 of 8 from math/train (25%), "
        "8 of 20 from other/train (25%)"
    )


def test_a_mixture_is_drawn_by_the_seed_and_interleaved() -> None:
    first, again, other = (select(mixture=MIXTURE, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert set(questions(first.train)) != set(questions(other.train))
    assert [p.source for p in first.train] != sorted(p.source for p in first.train)
    reordered = select(mixture=MIXTURE, seed=1, shuffle_seed=5)
    assert set(questions(reordered.train)) == set(questions(first.train))
    assert questions(reordered.train) != questions(first.train)


@pytest.mark.parametrize("text", [json.dumps(MIXTURE), yaml.safe_dump(MIXTURE, default_flow_style=True)])
def test_a_mixture_by_override(text: str) -> None:
    assert select("--mixture", text) == select(mixture=MIXTURE)


def test_the_parts_of_a_mixture_have_names_of_their_own() -> None:
    write(Path("more", "hard", "train.jsonl"), {"problem": "More?", "answer": "1"})
    parts = [
        {"task": "math", "dataset_name": "hard", "levels": [1]},
        {"task": "math", "dataset_name": "hard", "levels": [2]},
        {"task": "math", "dataset_name": "more/hard/train.jsonl"},
        {"task": "gsm8k", "dataset_name": "words"},
    ]
    recipe = load(mixture=parts, eval_task="arithmetic")
    assert [s.label for s in sources.trained_on(recipe)] == [
        "hard-1/train",
        "hard-2/train",
        "hard-3/train",
        "gsm8k/train",
    ]


def test_a_dataset_in_two_parts_is_measured_once() -> None:
    parts = [{"task": "math", "dataset_name": "hard", "levels": [level]} for level in (1, 2)]
    assert len(select(mixture=parts).test) == 20


def test_a_question_in_two_parts_counts_for_the_first() -> None:
    parts = [{"task": "math", "dataset_name": "hard", "levels": [1, 2], "weight": 1}]
    parts.append({"task": "math", "dataset_name": "hard", "levels": [2, 3], "weight": 1})
    found = select(mixture=parts)
    assert Counter(p.source for p in found.train) == {"hard-1/train": 4, "hard-2/train": 4}
    assert len(set(questions(found.train))) == 8
    assert found.notes[-1].endswith("; 4 were in a part before theirs")
    with pytest.raises(DatasetError, match="every problem of hard-2/train is in a part before it"):
        select(mixture=[parts[0], {**parts[0], "levels": [1]}])


def test_what_is_written_down_of_a_mixture_is_the_same_mixture() -> None:
    first = load(mixture=MIXTURE)
    Path("again.yaml").write_text(yaml.safe_dump(first.resolved()))
    again = recipes.load("again.yaml")
    assert again.own == first.own
    assert selection.of(again) == selection.of(first)


@pytest.mark.parametrize(("tasks", "form"), [(["gsm8k", "arithmetic"], "tagged"), (["gsm8k", "math"], "boxed")])
def test_a_mixture_answers_in_tags_where_all_its_tasks_do(tasks: list[str], form: str) -> None:
    recipe = load(mixture=[{"task": task} for task in tasks], prompt_template="{question}")
    assert recipe.answer_format == form


# --- decontamination

LONG = "Ann has three red apples and gives two of them to her brother Bob; how many are left?"


def test_what_repeats_a_measured_question_is_left_out_counted_and_shown() -> None:
    with Path("words", "test.jsonl").open("a") as file:
        file.write(json.dumps({"question": LONG.replace("Ann", "Eve"), "answer": "#### 1"}) + "\n")
    with Path("words", "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": LONG, "answer": "#### 1"}) + "\n")
        file.write(json.dumps({"question": "word 100", "answer": "#### 1"}) + "\n")
    found = select(task="gsm8k", dataset_name="words")
    assert questions(found.train) == [f"Word {n}?" for n in range(20)]
    assert len(found.test) == 21
    (note,) = found.notes
    assert note.startswith(
        "decontamination: left out 2 of 22 training problems that share 13 words in a row with one of 21"
    )
    assert "the first: gsm8k/train 'Ann has three" in note
    assert "has 'has three red apples and gives two of them to her brother bob' as 'Eve has" in note
    assert len(select(task="gsm8k", dataset_name="words", decontaminate_ngram=0).train) == 22
    assert len(select(task="gsm8k", dataset_name="words", decontaminate_ngram=20).train) == 21  # "word 100", whole


def test_nothing_left_out_is_said_too_and_arithmetic_loses_nothing() -> None:
    found = select(task="arithmetic")
    assert len(found.train) == 7600
    assert found.notes == (
        "decontamination: none of 7600 training problems shares 13 words in a row with one of 500 measured questions",
    )


def test_the_draw_of_eval_count_does_not_narrow_what_is_kept_apart() -> None:
    with Path("words", "train.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Word 119?", "answer": "#### 1"}) + "\n")
    assert len(select(task="gsm8k", dataset_name="words", eval_count=1).train) == 20


@pytest.mark.parametrize(
    ("against", "left"),
    [(["hard"], 20), (["words:train"], None), (["extra.jsonl"], 19), (["hard", "extra.jsonl"], 19), (["words"], 20)],
    ids=str,
)
def test_further_datasets_to_be_kept_apart_from(against: list[str], left: int | None) -> None:
    write(Path("extra.jsonl"), {"problem": "word 3"})
    keys = {"task": "gsm8k", "dataset_name": "words", "method": "sft", "decontaminate_against": against}
    if left is None:
        with pytest.raises(DatasetError, match=r"every one of the 20 problems of gsm8k/train.*decontaminate_ngram: 0"):
            select(**keys)
    else:
        assert len(select(**keys).train) == left


def test_a_dataset_without_questions_to_be_kept_apart_from() -> None:
    keys = {"task": "gsm8k", "dataset_name": "words", "decontaminate_against": ["other"]}
    with pytest.raises(DatasetError, match=r"test\.jsonl, line 1: no question: .* problem or question"):
        select(**keys)


# --- the doors


def test_the_launcher_shows_what_was_chosen(run) -> None:
    Path("recipe.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": recipes.TINY_MODEL, "task": "math", "dataset_name": "hard"})
    )
    answer = run("recipe.yaml", "--dry-run", "--hardware", "1x0")
    assert answer.code == 0, answer.err
    assert "levels: 12 of 20 problems of math/train have level 3, 4, 5\ndecontamination: none of 12" in answer.out
    assert "data: 12 train problems, 20 test problems." in answer.out
    answer = run("recipe.yaml", "--dry-run", "--hardware", "1x0", "--decontaminate_against", "openai/gsm8k")
    assert "data not looked at" in answer.out


def test_choosing_needs_no_torch() -> None:
    code = (
        "import sys; from r1zero import recipe; from r1zero.tasks import selection;"
        "selection.of(recipe.load('recipe.yaml'));"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'heavy'"
    )
    load(task="math", dataset_name="hard")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
