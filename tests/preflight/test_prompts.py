"""Prompt lengths against the limits, and whether a completion can end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1zero.preflight import prompts
from r1zero.preflight.findings import Finding
from r1zero.recipe import Recipe
from r1zero.tasks.problem import Problem
from tests.preflight.conftest import CHAT

Model = Callable[..., Path]
Load = Callable[..., Recipe]
# The prompt none is the question alone: its length in tokens is that in characters.
PROBLEMS = [Problem("x" * length, "1", "arithmetic/train") for length in (10, 20, 20, 30, 80, 90)]


def said(findings: list[Finding], level: str) -> str:
    return "\n".join(finding.line() for finding in findings if finding.level == level)


def test_lengths_are_shown_as_a_histogram(model: Model, arithmetic: Load) -> None:
    findings = prompts.look(arithmetic(model(), "--prompt_template", "none"), PROBLEMS)
    notes = said(findings, "note")
    assert "prompts: 10 to 90 tokens, median 30, 95 % have at most 80" in notes
    assert "         10 to 20         3 ########################################" in notes
    assert "         21 to 31         1 #############" in notes
    assert "         32 to 42         0 \n" in notes
    assert said(findings, "warning") == said(findings, "fault") == ""


def test_what_the_limit_leaves_out_is_counted(model: Model, arithmetic: Load) -> None:
    recipe = arithmetic(model(), "--prompt_template", "none", "--max_prompt_tokens", "70")
    findings = prompts.look(recipe, PROBLEMS)
    assert said(findings, "warning") == (
        "warning: max_prompt_tokens = 70: 2 of 6 problems have a longer prompt and are left out\n"
        "    -> raise max_prompt_tokens"
    )
    assert "         87 to 97         1 ############# over max_prompt_tokens" in said(findings, "note")


def test_a_few_long_prompts_are_no_warning(model: Model, arithmetic: Load) -> None:
    many = PROBLEMS[:3] * 10 + PROBLEMS[-1:]
    recipe = arithmetic(model(), "--prompt_template", "none", "--max_prompt_tokens", "70")
    findings = prompts.look(recipe, many)
    assert said(findings, "warning") == ""
    assert "1 of 31 problems have a longer prompt and are left out" in said(findings, "note")


def test_prompt_and_completion_beyond_the_models_positions(model: Model, arithmetic: Load) -> None:
    folder = model(max_position_embeddings=128)
    fits = arithmetic(folder, "--prompt_template", "none", "--max_completion_length", "38")
    assert said(prompts.look(fits, PROBLEMS), "fault") == ""
    long = arithmetic(folder, "--prompt_template", "none", "--max_completion_length", "39")
    assert said(prompts.look(long, PROBLEMS), "fault") == (
        "fault: the longest prompt has 90 tokens, with max_completion_length = 39 that is 129, and the model has 128 "
        "positions\n    -> max_completion_length at most 38, or a smaller max_prompt_tokens"
    )
    limited = [*("--prompt_template", "none", "--max_completion_length", "39"), "--max_prompt_tokens", "89"]
    assert said(prompts.look(arithmetic(folder, *limited), PROBLEMS), "fault") == ""


def test_a_tokenizer_without_an_end_token(model: Model, arithmetic: Load) -> None:
    def endless(tokenizer: Any) -> None:
        tokenizer.eos_token = None

    findings = prompts.look(arithmetic(model(endless)), PROBLEMS)
    assert "fault: the tokenizer has no end token (eos_token): no completion could end" in said(findings, "fault")


def test_a_tokenizer_of_another_model(model: Model, arithmetic: Load) -> None:
    findings = prompts.look(arithmetic(model(vocab_size=50)), PROBLEMS)
    assert "the tokenizer's eos_token has the id 101, the model knows 50 tokens" in said(findings, "fault")


def test_a_chat_template_whose_turns_end_otherwise_than_generation(model: Model, arithmetic: Load) -> None:
    def chat(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT

    folder = model(chat)
    findings = prompts.look(arithmetic(folder, "--prompt_template", "r1rl_chat"), PROBLEMS)
    assert "warning: the chat template ends a turn with <|im_end|> (id " in said(findings, "warning")
    assert "generation ends at the ids 101 only" in said(findings, "warning")
    assert "-> stop_strings: ['<|im_end|>']" in said(findings, "warning")
    mended = arithmetic(folder, "--prompt_template", "r1rl_chat", "--stop_strings", "<|im_end|>")
    findings = prompts.look(mended, PROBLEMS)
    assert said(findings, "warning") == ""
    assert "a completion ends at '<eos>' (101), or the text '<|im_end|>'" in said(findings, "note")


def test_a_turn_that_the_models_own_configuration_ends_is_fine(model: Model, arithmetic: Load) -> None:
    def chat(tokenizer: Any) -> None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT

    folder = model(chat)
    (folder / "generation_config.json").write_text('{"eos_token_id": [101, 104]}')
    findings = prompts.look(arithmetic(folder, "--prompt_template", "r1rl_chat"), PROBLEMS)
    assert said(findings, "warning") == ""


def test_a_prompt_that_ends_with_a_space(model: Model, arithmetic: Load) -> None:
    findings = prompts.look(arithmetic(model(), "--prompt_template", "Q: {question} A: "), PROBLEMS)
    assert "the prompt ends with a space" in said(findings, "warning")
