"""Rewards through the door that TRL uses: keyword lists in, one number for each completion out."""

import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from r1zero import recipe as recipes
from r1zero.tasks import prompts, rewards
from r1zero.tasks.rewards import REWARDS, RewardError, Shape
from tests.conftest import PROJECT, Answer

VERDICTS = ("correct", "wrong", "unparsed", "timed_out")
TINY = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"


def shape(template: str = "r1rl", answer_format: str | None = None, **keys: Any) -> Shape:
    chosen = prompts.template(template)
    return Shape(chosen, answer_format or chosen.answer_format or "tagged", **{"max_completion_length": 100, **keys})


def reward(name: str, text: str = "", verdict: str = "wrong", tokens: int = 1, made: Shape | None = None) -> Any:
    (function,) = rewards.make([name], made or shape())
    (value,) = function(
        prompts=["?"], completions=[text], completion_ids=[[0] * tokens], verdict=[verdict], gold=["42"], source=["s"]
    )
    return value


# --- correctness and simpleRL v0


def test_correctness_is_the_scale_for_correct_and_zero_for_all_else() -> None:
    assert [reward("correctness", verdict=verdict) for verdict in VERDICTS] == [1.0, 0.0, 0.0, 0.0]
    scaled = shape(correctness_scale=2.5)
    assert [reward("correctness", verdict=verdict, made=scaled) for verdict in VERDICTS] == [2.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "verdict", "expected"),
    [
        ("so \\boxed{42}", "correct", 1.0),
        ("so \\boxed{41}", "wrong", -0.5),
        ("so \\boxed{", "unparsed", -0.5),  # its source looks for the word "boxed" and nothing else
        ("so I boxed 42", "unparsed", -0.5),
        ("so \\boxed{1} or \\boxed{2}", "unparsed", -0.5),
        ("so \\boxed{9^{9^{9}}}", "timed_out", -0.5),
        ("so 42", "unparsed", -1.0),
        ("", "unparsed", -1.0),
    ],
)
def test_simplerl_v0(text: str, verdict: str, expected: float) -> None:
    assert reward("simplerl_v0", text, verdict, made=shape("simplerl_v0")) == expected


def test_simplerl_v0_with_tagged_answers() -> None:
    assert reward("simplerl_v0", "<answer>42</answer>", "correct") == 1.0
    assert reward("simplerl_v0", "<answer>41</answer>", "wrong") == -0.5
    assert reward("simplerl_v0", "\\boxed{41}", "unparsed") == -1.0


# --- format

FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "r1rl": {  # the prompt has opened the reasoning
        "good": (
            "\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>",
            "</reasoning><answer>42</answer>\n",
            "a < b > c </reasoning> <answer>$42$</answer>",
        ),
        "bad": (
            "",
            "42",
            "<reasoning>12</reasoning><answer>42</answer>",  # opened once more
            "12<answer>42</answer>",
            "12</reasoning>42",
            "12</reasoning><answer>42",
            "12</reasoning><answer></answer>",
            "12</reasoning><answer> \n </answer>",
            "12</reasoning>so<answer>42</answer>",
            "12</reasoning><answer>42</answer> Question: 1 + 1?",
            "12</reasoning><answer>42</answer><answer>42</answer>",
            "12</reasoning><answer>41<answer>42</answer>",
            "1</reasoning>2</reasoning><answer>42</answer>",
            "<answer>41</answer></reasoning><answer>42</answer>",
            "12 \\boxed{42}</reasoning><answer>42</answer>",
            "12</think><answer>42</answer>",
            "12</Reasoning><answer>42</answer>",
        ),
    },
    "r1_zero": {
        "good": ("<think>12</think><answer>42</answer>", " <think>\n12\n</think>\n\n<answer> 42 </answer> "),
        "bad": (
            "12</think><answer>42</answer>",
            "Sure. <think>12</think><answer>42</answer>",
            "<think><think>12</think><answer>42</answer>",
            "<think>12<answer>42</answer></think>",
            "<answer>42</answer><think>12</think>",
            "<reasoning>12</reasoning><answer>42</answer>",
        ),
    },
    "none": {  # tagged, without tags for the reasoning
        "good": ("12 + 30\n<answer>42</answer>", "<answer>42</answer>"),
        "bad": (
            "<answer>41</answer><answer>42</answer>",
            "<answer>42</answer> done",
            "</answer><answer>42</answer>",
            "42",
        ),
    },
    "qwen_boxed": {
        "good": (
            "\\boxed{42}",
            "12 + 30 = 42, so $\\boxed{42}$.",
            "\\[ \\boxed{\\frac{84}{2}} \\]",
            "**\\boxed{\\{1, 2\\}}**\n",
        ),
        "bad": (
            "42",
            "\\boxed{42",
            "\\boxed{}",
            "\\boxed{ }",
            "boxed{42}",
            "\\boxed{41} no \\boxed{42}",
            "\\boxed{\\boxed{42}}",
            "\\boxed{42} Question: 1 + 1?",
            "\\boxed{42} dollars",
            "\\boxed{42} <answer>42</answer>",
            "\\boxed{42\\}",
        ),
    },
}


@pytest.mark.parametrize("template", FORMS)
def test_the_form_of_a_whole_completion(template: str) -> None:
    for verdict, expected in (("good", 1.0), ("bad", 0.0)):
        for text in FORMS[template][verdict]:
            assert reward("format", text, made=shape(template)) == expected, text


def test_the_form_of_reasoning_in_tags_before_a_box() -> None:
    made = shape("r1_zero", "boxed")
    assert reward("format", "<think>12</think> It is $\\boxed{42}$.", made=made) == 1.0
    for bad in (
        "\\boxed{42}",
        "<think>\\boxed{42}</think>",
        "<think>\\boxed{4}</think>\\boxed{42}",
        "<think>\\boxed{42}",
    ):
        assert reward("format", bad, made=made) == 0.0, bad


text_without_signs = st.text(st.characters(blacklist_characters="<>\\{}", blacklist_categories=("Cs",)), max_size=30)


@given(solution=text_without_signs, gold=st.integers(-999, 999).map(str), name=st.sampled_from(list(prompts.TEMPLATES)))
def test_what_the_cold_start_learns_has_the_form_that_is_rewarded(solution: str, gold: str, name: str) -> None:
    for answer_format in ("tagged", "boxed"):
        made = shape(name, answer_format)
        text = made.template.completion(solution, gold, answer_format)
        assert reward("format", text, made=made) == 1.0
        if answer_format == "tagged" and made.template.reasoning_tag:
            assert reward("tag_count", text, made=made) == 1.0


# --- tag count


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        ("r1rl", "12</reasoning><answer>42</answer>", 1.0),
        ("r1rl", "", 0.25),  # the prompt's
        ("r1rl", "<reasoning>12</reasoning><answer>42</answer>", 0.75),
        ("r1rl", "12</reasoning><answer>42</answer><answer>1</answer>", 0.5),
        ("r1rl_chat", "", 0.0),
        ("r1rl_chat", "<reasoning>12</reasoning><answer>42</answer>", 1.0),
        ("r1rl_chat", "</answer><answer></reasoning><reasoning>", 1.0),  # the order is the format's to judge
        ("r1rl_chat_prefix", "12</reasoning>", 0.5),
        ("r1_zero", "<think>12</think>", 0.5),
        ("r1_zero", "<reasoning>12</reasoning>", 0.0),
    ],
)
def test_tag_count(template: str, text: str, expected: float) -> None:
    assert reward("tag_count", text, made=shape(template)) == expected


# --- soft overlong punishment


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (30000, -1.0)],
)
def test_soft_overlong_is_the_papers_equation_with_the_papers_numbers(tokens: int, expected: float) -> None:
    for cache in (4096, None):  # a fifth of the limit is what the paper takes
        made = shape(max_completion_length=20480, overlong_cache_tokens=cache)
        assert reward("soft_overlong", tokens=tokens, made=made) == expected


@given(limit=st.integers(1, 50), cache=st.integers(1, 50), tokens=st.integers(0, 60))
def test_soft_overlong_falls_in_equal_steps_from_zero_to_minus_one(limit: int, cache: int, tokens: int) -> None:
    cache = min(cache, limit)
    exact = min(Fraction(0), max(Fraction(-1), Fraction(limit - cache - tokens, cache)))
    made = shape(max_completion_length=limit, overlong_cache_tokens=cache)
    assert reward("soft_overlong", tokens=tokens, made=made) == float(exact)


def test_the_shortest_limit_has_a_cache_of_one_token() -> None:
    assert [reward("soft_overlong", tokens=n, made=shape(max_completion_length=3)) for n in (1, 2, 3)] == [0, 0, -1]


# --- repetition


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("", 2, 0.0),
        ("one", 2, 0.0),
        ("one two", 2, 0.0),
        ("a b a b", 2, 2 / 3 - 1),  # ab ba ab
        ("a A\ta\na", 1, -0.75),
        ("a a a a", 2, 1 / 3 - 1),
        ("a a a a", 4, 0.0),
        ("1 2 3 4 5 6", 3, 0.0),
    ],
)
def test_repetition_is_minus_the_share_of_ngrams_seen_before(text: str, n: int, expected: float) -> None:
    assert reward("repetition", text, made=shape(repetition_ngram=n)) == pytest.approx(expected, abs=1e-12)


@given(words=st.lists(st.sampled_from("abc"), max_size=30), n=st.integers(1, 5))
def test_repetition_against_a_count_by_hand(words: list[str], n: int) -> None:
    seen: list[list[str]] = []
    again = 0
    for at in range(len(words) - n + 1):
        again += words[at : at + n] in seen
        seen.append(words[at : at + n])
    expected = -again / len(seen) if seen else 0.0
    assert reward("repetition", " ".join(words), made=shape(repetition_ngram=n)) == pytest.approx(expected)


# --- order and batch size

PIECES = st.sampled_from(
    [
        "<reasoning>",
        "</reasoning>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "}",
        "42",
        " a b",
        "\n",
        "$.",
    ]
)
ROLLOUT = st.tuples(
    st.lists(PIECES, max_size=12).map("".join), st.sampled_from(VERDICTS), st.integers(1, 130), st.booleans()
)


def graded(function: Callable[..., Any], batch: list[tuple[str, str, int, bool]]) -> list[float]:
    return list(
        function(
            prompts=["?"] * len(batch),
            completions=[[{"role": "assistant", "content": text}] if chat else text for text, _, _, chat in batch],
            completion_ids=[[0] * tokens for _, _, tokens, _ in batch],
            verdict=[verdict for _, verdict, _, _ in batch],
            gold=["42"] * len(batch),
            source=["s"] * len(batch),
            answer=[None] * len(batch),
            trainer_state=None,
        )
    )


@settings(max_examples=300)
@given(batch=st.lists(ROLLOUT, min_size=1, max_size=12), data=st.data())
def test_neither_order_nor_batch_size_nor_chat_form_changes_a_reward(batch: list[Any], data: st.DataObject) -> None:
    template = data.draw(st.sampled_from(["r1rl", "r1_zero", "r1rl_chat"]))
    answer_format = data.draw(st.sampled_from(["tagged", "boxed"]))
    order = data.draw(st.permutations(range(len(batch))))
    size = data.draw(st.integers(1, len(batch)))
    for function in rewards.make(list(REWARDS), shape(template, answer_format, repetition_ngram=2)):
        alone = [graded(function, [one])[0] for one in batch]
        shuffled = [batch[at] for at in order]
        parts = [graded(function, shuffled[at : at + size]) for at in range(0, len(batch), size)]
        assert [value for part in parts for value in part] == [alone[at] for at in order]
        assert graded(function, [(t, v, n, not c) for t, v, n, c in batch]) == alone


@settings(max_examples=500)
@given(text=st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=20).map("".join)), tokens=st.integers(0, 200))
def test_a_reward_is_a_number_in_its_range_whatever_the_completion(text: str, tokens: int) -> None:
    ranges = {
        "correctness": (0, 1),
        "simplerl_v0": (-1, 1),
        "format": (0, 1),
        "tag_count": (0, 1),
        "soft_overlong": (-1, 0),
        "repetition": (-1, 0),
    }
    assert ranges.keys() == REWARDS.keys()
    for name, (low, high) in ranges.items():
        value = reward(name, text, "wrong", tokens)
        assert isinstance(value, float) and low <= value <= high, name


def test_as_many_verdicts_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        rewards.make(["correctness"], shape())[0](
            completions=["a", "b"], completion_ids=[[1], [1]], verdict=["correct"]
        )


def test_the_names_under_which_trl_logs_them() -> None:
    assert [function.__name__ for function in rewards.make(list(REWARDS), shape())] == list(REWARDS)


# --- a function of the user's own

MINE = """
import math
def brevity(completions, **unused):
    return [-float(len(text)) for text in completions]
def everything(prompts, completions, completion_ids, gold, source, answer, verdict, **unused):
    return [None if a is None else (g == a) + len(i) for a, g, i in zip(answer, gold, completion_ids)]
def narrow(completions):
    return [0.0] * len(completions)
def one_short(completions, **unused):
    return [0.0] * (len(completions) - 1)
def a_number(completions, **unused):
    return 1.0
def texts(completions, **unused):
    return ["1"] * len(completions)
def not_a_number(completions, **unused):
    return [0.0, math.nan]
async def later(completions, **unused):
    return [0.0] * len(completions)
A_CONSTANT = 1
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the folder where the run is started."""
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / f"{name}_broken.py").write_text("import math\nmath.no_such_thing()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    return name


BATCH = {
    "prompts": ["?", "?"],
    "completions": ["a", "bcd"],
    "completion_ids": [[1], [1, 2]],
    "gold": ["1", "2"],
    "source": ["s", "s"],
    "answer": ["1", None],
    "verdict": ["correct", "unparsed"],
    "trainer_state": None,
    "log_extra": None,
    "log_metric": None,
}


def test_a_function_of_the_users_own_gets_every_column(mine: str) -> None:
    brevity, everything = rewards.make([f"{mine}:brevity", f"{mine}:everything"], shape())
    assert brevity(**BATCH) == [-1.0, -3.0]
    assert everything(**BATCH) == [2.0, None]
    assert (brevity.__name__, everything.__name__) == ("brevity", "everything")


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("one_short", "returned 1 values for 2 completions"),
        ("a_number", "returned 1.0, not a list"),
        ("texts", "returned '1' for completion 0 of the batch"),
        ("not_a_number", "returned nan for completion 1 of the batch"),
    ],
)
def test_a_function_that_breaks_its_contract_is_named(function: str, why: str, mine: str) -> None:
    (made,) = rewards.make([f"{mine}:{function}"], shape())
    with pytest.raises(RewardError) as error:
        made(**BATCH)
    assert str(error.value).startswith(f"reward function {mine}:{function}: {why}; return a list with one number")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{mine}:nothing", "is not in /"),
        ("{mine}:A_CONSTANT", "is a int, not a function"),
        ("{mine}:narrow", "cannot be called with the keywords prompts, completions, "),
        ("{mine}:later", "is async"),
        ("{mine}_broken:f", "cannot be imported: AttributeError: module 'math' has no attribute 'no_such_thing'"),
        ("no_such_module_at_all:f", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_had_stops_everything_before_it_starts(
    name: str, why: str, mine: str, run: Callable[..., Answer]
) -> None:
    name, why = name.format(mine=mine), why.format(mine=mine)
    with pytest.raises(RewardError) as error:
        rewards.make([name], shape())
    assert error.value.why.startswith(why) and error.value.name == name
    answer = run(TINY, "--reward_funcs", "correctness", name, "--dry-run")
    assert answer.code == 2 and f"reward_funcs = '{name}': {why}" in answer.err


def test_a_function_of_the_users_own_is_found_before_anything_starts(mine: str, run: Callable[..., Answer]) -> None:
    answer = run(TINY, "--reward_funcs", "correctness", f"{mine}:brevity", "--reward_weights", 1, 0.1, "--dry-run")
    assert answer.code == 0, answer.err


# --- in a recipe


def load(tmp_path: Path, **keys: Any) -> recipes.Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "org/model", "task": "gsm8k", **keys}))
    return recipes.load(path)


def test_the_functions_of_a_recipe_know_its_keys(tmp_path: Path) -> None:
    keys = {
        "reward_funcs": ["soft_overlong", "correctness", "format"],
        "reward_weights": [1, 2, 0.5],
        "max_completion_length": 10,
        "overlong_cache_tokens": 4,
        "correctness_scale": 3,
        "prompt_template": "r1_zero",
    }
    functions = load(tmp_path, **keys).reward_functions()
    batch = {"completions": ["<think>1</think><answer>1</answer>"], "completion_ids": [[1] * 8], "verdict": ["correct"]}
    assert [function(**batch) for function in functions] == [[-0.5], [3.0], [1.0]]
    assert load(tmp_path).own.reward_funcs == ["correctness"]


def test_a_recipe_read_again_has_the_same_rewards(tmp_path: Path) -> None:
    first = load(tmp_path, reward_funcs=["correctness", "format"], reward_weights=[1, 0.2])
    assert load(tmp_path, **first.resolved()).own == first.own
    assert load(tmp_path, **load(tmp_path).resolved()).own == load(tmp_path).own


def test_two_recipes_share_no_default(tmp_path: Path) -> None:
    load(tmp_path).own.reward_funcs.append("format")
    assert load(tmp_path).own.reward_funcs == ["correctness"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward_funcs": []}, "without a reward there is nothing to learn"),
        (
            {"reward_funcs": ["corectness"]},
            "reward_funcs = 'corectness': is not a reward\n    -> did you mean correctness?",
        ),
        ({"reward_funcs": "accuracy"}, "reward_funcs = 'accuracy': is not a reward\n    -> did you mean correctness?"),
        ({"reward_funcs": ["my.module"]}, "or a function of your own as module:function"),
        ({"reward_funcs": ["a:b:c"]}, "is not a reward"),
        ({"reward_funcs": [1]}, "expects list of str"),
        ({"reward_funcs": ["format", "a:format"]}, "two of them are called format and would share one metric"),
        (
            {"reward_funcs": ["correctness", "format"], "reward_weights": [1.0]},
            "reward_weights = [1.0]: has 1 weights for the 2 of reward_funcs: correctness, format",
        ),
        ({"reward_weights": [1.0, 0.5]}, "has 2 weights for the 1 of reward_funcs: correctness"),
        (
            {"reward_funcs": ["tag_count"], "prompt_template": "qwen_boxed"},
            "tag_count counts reasoning and answer tags, and this prompt_template or answer_format has none",
        ),
        ({"reward_funcs": ["tag_count"], "answer_format": "boxed"}, "tag_count counts reasoning and answer tags"),
        (
            {"overlong_cache_tokens": 5},
            "overlong_cache_tokens = 5: would have no effect here\n    -> add soft_overlong",
        ),
        ({"repetition_ngram": 5}, "add repetition to reward_funcs, or drop it"),
        ({"reward_funcs": ["format"], "correctness_scale": 2.0}, "add correctness to reward_funcs, or drop it"),
        (
            {"reward_funcs": ["soft_overlong"], "overlong_cache_tokens": 300, "max_completion_length": 256},
            "overlong_cache_tokens = 300: must be from 1 to max_completion_length, which is 256",
        ),
        ({"reward_funcs": ["soft_overlong"], "overlong_cache_tokens": 0}, "overlong_cache_tokens = 0: must be from 1"),
        (
            {"reward_funcs": ["soft_overlong"], "max_completion_length": None},
            "soft_overlong punishes what comes near it",
        ),
        ({"reward_funcs": ["repetition"], "repetition_ngram": 0}, "repetition_ngram = 0: must be at least 1 word"),
        ({"alert_unparsed": 1.5}, "alert_unparsed = 1.5: is a share, from 0 to 1"),
        ({"alert_timed_out": -0.1}, "alert_timed_out = -0.1: is a share, from 0 to 1"),
    ],
)
def test_rewards_that_cannot_be(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(recipes.RecipeError) as error:
        load(tmp_path, **keys)
    assert message in str(error.value) and len(error.value.faults) == 1


def test_a_wrong_template_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(recipes.RecipeError) as error:
        load(tmp_path, prompt_template="r2rl", reward_funcs=["tag_count"])
    assert [fault.key for fault in error.value.faults] == ["prompt_template"]


def test_every_name_that_another_project_uses_leads_to_one_of_ours(tmp_path: Path) -> None:
    for name, ours in (("think_format_reward", "format"), ("get_soft_overlong_punishment", "soft_overlong")):
        with pytest.raises(recipes.RecipeError, match=f"did you mean {ours}?"):
            load(tmp_path, reward_funcs=[name])
