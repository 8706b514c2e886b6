"""A prompt template is a published fact: its text is held whole, character by character."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from r1zero import recipe, tiny
from r1zero.tasks import prompts
from r1zero.tasks.prompts import TEMPLATES, TemplateError, chat_arguments

GOLDEN = Path(__file__).parent.parent / "golden"
QUESTION = "What is 12 + 30?"

# The form of Qwen's chat template, without its default system message and tools.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# R1RL's own words, src/r1rl/datasets/gsm8k.py of github.com/dhh1995/R1RL at 560bdb7: SYSTEM_PROMPT, its tags filled
# in, and what `build_prompt` makes of it.
R1RL_SYSTEM = (
    "For the given question, think about the reasoning process in the mind, and respond in the following format:\n"
    "<reasoning>\nreasoning process here\n</reasoning>\n"
    "<answer>\nanswer here, contains only a single integer.\n</answer>"
)
R1RL_MESSAGES = [{"role": "system", "content": R1RL_SYSTEM}, {"role": "user", "content": QUESTION}]
PUBLISHED = {
    "r1rl": R1RL_SYSTEM + "\nQuestion: " + QUESTION + "\n<reasoning>",  # is_chat=False, add_reasoning_prefix=True
    "r1rl_no_prefix": R1RL_SYSTEM + "\nQuestion: " + QUESTION,
    "r1rl_chat": R1RL_MESSAGES,
    "r1rl_chat_prefix": [*R1RL_MESSAGES, {"role": "assistant", "content": "<reasoning>"}],
    # Table 1 of the DeepSeek-R1 report, its "prompt" filled in.
    "r1_zero": "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: prompt. Assistant:".replace(
        "prompt", QUESTION
    ),
    # PROMPT_TEMPLATES of simpleRL-reason's evaluation, its "{input}" filled in.
    "qwen_boxed": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    + QUESTION
    + "\nPlease "
    "reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n",
    "abel": "Question:\n" + QUESTION + "\nAnswer:\nLet's think step by step.\n",
    # The column "input" of simpleRL-reason v0's training data.
    "simplerl_v0": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant",
    "none": QUESTION,
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny.make_tokenizer()
    made.chat_template = CHATML
    return made


def rendered(prompt: prompts.Prompt, tokenizer: Any) -> str:
    """What the model reads, as a text."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, **chat_arguments(prompt)))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_that_the_model_reads(name: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    text = rendered(TEMPLATES[name].build(QUESTION), tokenizer)
    golden = GOLDEN / f"prompt_{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_every_template_is_as_it_was_published() -> None:
    assert {name: template.build(QUESTION) for name, template in TEMPLATES.items()} == PUBLISHED


def test_a_conversation_goes_on_where_the_assistant_has_begun(tokenizer: Any) -> None:
    begun = rendered(TEMPLATES["r1rl_chat_prefix"].build(QUESTION), tokenizer)
    assert begun == rendered(TEMPLATES["r1rl_chat"].build(QUESTION), tokenizer) + "<reasoning>"


def test_a_golden_for_each_template_and_none_besides() -> None:
    assert {path.stem.removeprefix("prompt_") for path in GOLDEN.glob("prompt_*.txt")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_put_in_once_and_as_it_is(name: str, tokenizer: Any) -> None:
    odd = "Is {x} % of\n<b>'\"€</b> {question} \\boxed{1}?  "
    template = TEMPLATES[name]
    plain = rendered(template.build("QUESTION"), tokenizer)
    assert plain.count("QUESTION") == 1
    assert rendered(template.build(odd), tokenizer) == plain.replace("QUESTION", odd)


def test_what_each_template_asks_for() -> None:
    asked = {name: (each.answer_format, each.reasoning_tag, each.opens_reasoning) for name, each in TEMPLATES.items()}
    assert asked == {
        "r1rl": ("tagged", "reasoning", True),
        "r1rl_no_prefix": ("tagged", "reasoning", False),
        "r1rl_chat": ("tagged", "reasoning", False),
        "r1rl_chat_prefix": ("tagged", "reasoning", True),
        "r1_zero": ("tagged", "think", False),
        "qwen_boxed": ("boxed", None, False),
        "abel": ("boxed", None, False),
        "simplerl_v0": ("boxed", None, False),
        "none": (None, None, False),
    }
    assert all(each.source for each in TEMPLATES.values())


# --- templates of the user's own

OWN: dict[str, tuple[Any, Any, tuple[str | None, str | None, bool]]] = {
    "braces stay": (
        "{question} {x} {} {{}} Answer in \\boxed{}.",
        "1 + 1? {x} {} {{}} Answer in \\boxed{}.",
        ("boxed", None, False),
    ),
    "twice": ("{question} Again: {question}", "1 + 1? Again: 1 + 1?", (None, None, False)),
    "a name in braces": ("{question}", "1 + 1?", (None, None, False)),
    "tags": ("{question} Use <think></think><answer></answer>.\n<think>\n", ..., ("tagged", "think", True)),
    "a tag inside only": ("Use <think> and <answer>. {question}", ..., ("tagged", "think", False)),
    "both forms": ("{question} <answer>\\boxed{}</answer>", ..., (None, None, False)),
    "both kinds of reasoning": ("{question} <think> or <reasoning>", ..., (None, None, False)),
    "chat": (
        [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Q: {question}"}],
        [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Q: 1 + 1?"}],
        (None, None, False),
    ),
    "chat with examples and a beginning": (
        [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "\\boxed{4}"},
            {"role": "user", "content": "{question}"},
            {"role": "assistant", "content": "<think>"},
        ],
        ...,
        ("boxed", "think", True),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_template_of_the_users_own(name: str) -> None:
    given, prompt, asked = OWN[name]
    template = prompts.template(given)
    if prompt is not ...:
        assert template.build("1 + 1?") == prompt
    assert (template.answer_format, template.reasoning_tag, template.opens_reasoning) == asked


@pytest.mark.parametrize(
    ("given", "why", "remedy"),
    [
        ("r1rl_chatt", "is not a template", "did you mean r1rl_chat? A template is one of r1rl, r1rl_no_prefix"),
        ("qwen-boxed", "is not a template", "did you mean qwen_boxed?"),
        ("", "is not a template", "one of r1rl, r1rl_no_prefix"),
        ("Solve this:", "has no {question}", "write {question} into it"),
        ("{ question } please", "has no {question}", "write {question} into it"),
        ([], "has no {question}", "write {question} into it"),
        ([{"role": "user", "content": "Solve."}], "has no {question}", "write {question} into it"),
        (
            [{"role": "system", "content": "x"}, {"role": "human", "content": "{question}"}],
            "message 2 has the role 'human'",
            "roles are system, user, assistant",
        ),
        ([{"role": "user"}], "message 1 is {'role': 'user'}", "write each message as"),
        ([{"role": "user", "content": ["{question}"]}], "message 1 is", "write each message as"),
        (["{question}"], "message 1 is '{question}'", "write each message as"),
    ],
)
def test_a_template_that_cannot_be_used(given: Any, why: str, remedy: str) -> None:
    with pytest.raises(TemplateError) as error:
        prompts.template(given)
    assert error.value.why.startswith(why) and error.value.remedy.startswith(remedy)


# --- what completes a prompt

SOLUTION, GOLD = "12 + 30 = 42", "42"
COMPLETIONS = {
    ("r1rl", "tagged"): "\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>",
    ("r1rl_no_prefix", "tagged"): "\n<reasoning>\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>",
    ("r1rl_chat", "tagged"): "<reasoning>\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>",
    ("r1rl_chat_prefix", "tagged"): "\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>",
    ("r1_zero", "tagged"): "\n<think>\n12 + 30 = 42\n</think>\n<answer>\n42\n</answer>",
    ("r1_zero", "boxed"): "\n<think>\n12 + 30 = 42\n</think>\nThe answer is $\\boxed{42}$.",
    ("qwen_boxed", "boxed"): "12 + 30 = 42\nThe answer is $\\boxed{42}$.",
    ("abel", "boxed"): "12 + 30 = 42\nThe answer is $\\boxed{42}$.",
    ("simplerl_v0", "boxed"): "\n12 + 30 = 42\nThe answer is $\\boxed{42}$.",
    ("none", "boxed"): "\n12 + 30 = 42\nThe answer is $\\boxed{42}$.",
    ("none", "tagged"): "\n12 + 30 = 42\n<answer>\n42\n</answer>",
}


@pytest.mark.parametrize(("name", "answer_format"), COMPLETIONS)
def test_a_solution_in_the_form_that_the_template_asks_for(name: str, answer_format: str) -> None:
    assert TEMPLATES[name].completion(SOLUTION, GOLD, answer_format) == COMPLETIONS[name, answer_format]


def test_a_solution_that_boxes_its_answer_is_not_given_another_box() -> None:
    boxed = "Thus $x = \\boxed{42}$."
    assert TEMPLATES["qwen_boxed"].completion(boxed, GOLD, "boxed") == boxed
    assert TEMPLATES["simplerl_v0"].completion(boxed, GOLD, "boxed") == f"\n{boxed}"
    assert TEMPLATES["r1_zero"].completion(boxed, GOLD, "boxed").endswith("</think>\nThe answer is $\\boxed{42}$.")


# --- in a recipe


def load(tmp_path: Path, *words: str, **keys: Any) -> recipe.Recipe:
    given = {"model_name_or_path": "org/model", "task": "gsm8k", **keys}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(given))
    return recipe.load(path, words)


@pytest.mark.parametrize(
    ("keys", "answer_format"),
    [
        ({"prompt_template": "r1rl"}, "tagged"),
        ({"prompt_template": "qwen_boxed"}, "boxed"),
        ({"prompt_template": "r1rl", "answer_format": "boxed"}, "boxed"),
        ({"prompt_template": "none"}, "tagged"),
        ({"prompt_template": "{question}", "task": "arithmetic"}, "tagged"),
        ({"prompt_template": "{question} \\boxed{}", "task": "arithmetic"}, "boxed"),
        ({"prompt_template": "{question} \\boxed{}", "answer_format": "tagged"}, "tagged"),
    ],
)
def test_where_the_answer_is_read(keys: dict[str, Any], answer_format: str, tmp_path: Path) -> None:
    assert load(tmp_path, **keys).answer_format == answer_format


def test_a_template_of_the_users_own_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "{question}"}]
    assert load(tmp_path, prompt_template=messages).template.build("1?") == [{"role": "user", "content": "1?"}]
    written = load(tmp_path, "--prompt_template", "{question}\nAnswer in \\boxed{}:")
    assert written.template.build("1?") == "1?\nAnswer in \\boxed{}:"
    assert load(tmp_path, "--prompt_template", "[{role: user, content: '{question}'}]").own.prompt_template == messages
    again = load(tmp_path, **load(tmp_path, prompt_template=messages).resolved())
    assert again.own.prompt_template == messages


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("r1_zeroo", "prompt_template = 'r1_zeroo': is not a template\n    -> did you mean r1_zero?"),
        ("Solve this.", "has no {question}"),
        ([{"role": "tool", "content": "{question}"}], "message 1 has the role 'tool'"),
        (7, "prompt_template = 7: expects str or list of dict"),
    ],
)
def test_a_recipe_with_a_template_that_cannot_be_used(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(recipe.RecipeError) as error:
        load(tmp_path, prompt_template=given)
    assert message in str(error.value) and len(error.value.faults) == 1


def test_stop_strings_must_be_texts_and_go_with_completions_that_count(tmp_path: Path) -> None:
    assert load(tmp_path, "--stop_strings", "</answer>").own.stop_strings == ["</answer>"]
    assert load(tmp_path, "--stop_strings", "</answer>", "\n\n").own.stop_strings == ["</answer>", "\n\n"]
    with pytest.raises(recipe.RecipeError, match="an empty text stops everything"):
        load(tmp_path, stop_strings=[""])
    with pytest.raises(
        recipe.RecipeError, match="mask_truncated_completions = True: TRL takes a completion that ended"
    ):
        load(tmp_path, stop_strings=["</answer>"], mask_truncated_completions=True)
    assert load(tmp_path, mask_truncated_completions=True).own.stop_strings is None


def test_help_names_every_template() -> None:
    assert all(name in recipe.own_keys()["prompt_template"].help for name in TEMPLATES)
