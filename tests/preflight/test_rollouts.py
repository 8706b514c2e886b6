"""One batch of rollouts from a policy server; a stand-in says what a real one would have to be made to say."""

from collections.abc import Callable
from pathlib import Path

import pytest

from r1zero.policy_client import PolicyServerError, PolicyServerTimeout
from r1zero.preflight import rollouts
from r1zero.recipe import Recipe
from r1zero.serving import TOKEN
from r1zero.tasks.problem import Problem
from tests.stand_in_server import serving

Model = Callable[..., Path]
Load = Callable[..., Recipe]
PROBLEMS = [Problem(f"What is {n} + 2?", "42", "arithmetic/train") for n in range(8)]
RIGHT, WRONG, NONE = "</reasoning><answer>42</answer>", "</reasoning><answer>41</answer>", "I do not know"


def look(recipe: Recipe, *completions: tuple[str, str]) -> tuple[str, str]:
    """Notes and warnings."""
    with serving(completions=completions) as (url, _):
        findings = rollouts.look(recipe, PROBLEMS, url)
    notes = [each.line() for each in findings if each.level == "note"]
    return "\n".join(notes), "\n".join(each.line() for each in findings if each.level == "warning")


def test_a_healthy_batch_is_summed_up_without_a_warning(model: Model, arithmetic: Load) -> None:
    notes, warnings = look(arithmetic(model()), (RIGHT, "stop"), (WRONG, "stop"), (NONE, "stop"), (RIGHT, "stop"))
    assert (
        "rollouts: 64 completions of 8 prompts, 2 tokens on average: 50 % correct, 25 % without a readable answer, "
        "0 % cut off, 0 % of the groups without reward spread"
    ) in notes
    assert f"one of them: {RIGHT!r}\n      answer '42': correct" in notes
    assert warnings == ""


def test_completions_that_are_cut_off(model: Model, arithmetic: Load) -> None:
    _, warnings = look(arithmetic(model()), (RIGHT, "length"), (WRONG, "stop"))
    assert "warning: 50 % of the completions were cut off at 40 tokens" in warnings
    assert "-> raise max_completion_length" in warnings


def test_completions_without_an_answer(model: Model, arithmetic: Load) -> None:
    _, warnings = look(arithmetic(model()), (RIGHT, "stop"), (NONE, "stop"), (NONE, "stop"), (NONE, "stop"))
    assert "warning: 75 % of the completions hold no answer that can be read as tagged" in warnings
    assert "prompt_template or answer_format" in warnings


@pytest.mark.parametrize(
    ("completion", "why", "key"),
    [(WRONG, "none is right", "method: sft"), (RIGHT, "most are right already", "levels")],
)
def test_groups_that_teach_nothing(model: Model, arithmetic: Load, completion: str, why: str, key: str) -> None:
    _, warnings = look(arithmetic(model()), (completion, "stop"))
    assert "warning: in 100 % of the groups all 8 completions have the same reward: they teach nothing" in warnings
    assert why in warnings
    assert key in warnings


def test_the_rewards_are_those_of_the_recipe(model: Model, arithmetic: Load) -> None:
    spread_by_form = ["--reward_funcs", "correctness", "format", "--reward_weights", "1", "0.5"]
    completions = ((WRONG, "stop"), (f"{WRONG} and so on", "stop"))
    assert "without reward spread" in look(arithmetic(model()), *completions)[0]
    assert "teach nothing" in look(arithmetic(model()), *completions)[1]
    assert look(arithmetic(model(), *spread_by_form), *completions)[1] == ""


def test_the_runs_token_is_sent(model: Model, arithmetic: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(token="secret") as (url, _):
        with pytest.raises(PolicyServerError, match=f"answered 401: .*{TOKEN}"):
            rollouts.look(arithmetic(model()), PROBLEMS, url)
        monkeypatch.setenv(TOKEN, "secret")
        assert rollouts.look(arithmetic(model()), PROBLEMS, url)


def test_a_server_that_is_not_one(model: Model, arithmetic: Load) -> None:
    with (
        serving(mode="error") as (url, _),
        pytest.raises(PolicyServerError, match=r"/v1/completions: answered 500: .*engine is dead"),
    ):
        rollouts.look(arithmetic(model()), PROBLEMS, url)
    with pytest.raises(PolicyServerError, match=r"127.0.0.1:9: .*the connection failed"):
        rollouts.look(arithmetic(model()), PROBLEMS, "http://127.0.0.1:9")


def test_a_server_that_hangs(model: Model, arithmetic: Load) -> None:
    recipe = arithmetic(model(), "--generation_timeout", "0.5")
    with (
        serving(mode="hang-after-health") as (url, _),
        pytest.raises(PolicyServerTimeout, match=r"within 0.5 s; .* raise generation_timeout"),
    ):
        rollouts.look(recipe, PROBLEMS, url)
