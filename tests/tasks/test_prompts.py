"""A prompt template is a published fact: its text is held whole, character by character."""

import json
from pathlib import Path

import pytest

from r1zero import recipe
from r1zero.tasks.prompts import TEMPLATES

GOLDEN = Path(__file__).parent.parent / "golden"
QUESTION = "What is 12 + 30?"

# R1RL's own words, src/r1rl/datasets/gsm8k.py of github.com/dhh1995/R1RL at 560bdb7: SYSTEM_PROMPT, its tags filled
# in, and `build_prompt` with is_chat=False, add_reasoning_prefix=True.
R1RL_PUBLISHED = (
    "For the given question, think about the reasoning process in the mind, and respond in the following format:\n"
    "<reasoning>\nreasoning process here\n</reasoning>\n"
    "<answer>\nanswer here, contains only a single integer.\n</answer>"
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_of_a_template(name: str, request: pytest.FixtureRequest) -> None:
    prompt = TEMPLATES[name](QUESTION)
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, indent=1) + "\n"
    golden = GOLDEN / f"prompt_{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_r1rl_is_the_published_prompt() -> None:
    assert TEMPLATES["r1rl"](QUESTION) == R1RL_PUBLISHED + "\nQuestion: " + QUESTION + "\n<reasoning>"


def test_r1rl_chat_is_the_published_conversation() -> None:
    assert TEMPLATES["r1rl_chat"](QUESTION) == [
        {"role": "system", "content": R1RL_PUBLISHED},
        {"role": "user", "content": QUESTION},
    ]


def test_a_recipe_may_name_each_template_and_no_other() -> None:
    assert set(recipe.TEMPLATES) == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_put_in_as_it_is(name: str) -> None:
    odd = "Is {x} % of\n<b>'\"€</b>?  "
    prompt = TEMPLATES[name](odd)
    assert odd in (prompt if isinstance(prompt, str) else prompt[-1]["content"])
