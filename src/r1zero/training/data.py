"""Problems as the datasets that TRL's trainers read."""

from typing import Any

from datasets import Dataset

from r1zero.recipe import Recipe
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.prompts import chat_arguments


def within_limit(problems: list[Problem], recipe: Recipe, tokenizer: Any) -> list[Problem]:
    """Those whose prompt has at most `max_prompt_tokens` tokens, all of them where the recipe sets no limit."""
    limit = recipe.own.max_prompt_tokens
    if limit is None:
        return problems
    kept = [each for each in problems if len(prompt_ids(each, recipe, tokenizer)) <= limit]
    if not kept:
        raise DatasetError(f"max_prompt_tokens = {limit}: every one of {len(problems)} prompts is longer; raise it")
    return kept


def for_grpo(problems: list[Problem], recipe: Recipe) -> Dataset:
    """Columns: prompt (text or chat messages), question, gold, source."""
    template = recipe.template
    rows = [
        {
            "prompt": template.build(each.question),
            "question": each.question,
            "gold": each.gold,
            "source": each.source,
        }
        for each in problems
    ]
    return Dataset.from_list(rows)


def for_sft(problems: list[Problem], recipe: Recipe) -> Dataset:
    """Columns: prompt, completion. TRL then puts the loss on the completion only.

    The completion answers in the form that the template asks for and GRPO later grades.
    """
    template = recipe.template
    rows: list[dict[str, Any]] = []
    for each in problems:
        if not each.solution:
            raise DatasetError(f"{each.source}: {each.question!r} has no worked solution to learn from")
        prompt = template.build(each.question)
        completion = template.completion(each.solution, each.gold, recipe.answer_format)
        if isinstance(prompt, str):
            rows.append({"prompt": prompt, "completion": completion})
            continue
        # A chat template knows whole messages only: what the prompt begins of the assistant's is learnt with the rest.
        begun = prompt.pop()["content"] if prompt[-1]["role"] == "assistant" else ""
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": begun + completion}]})
    return Dataset.from_list(rows)


def prompt_ids(problem: Problem, recipe: Recipe, tokenizer: Any) -> list[int]:
    """The tokens of the problem's prompt, through the chat template where it is a conversation."""
    prompt = recipe.template.build(problem.question)
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    settings = recipe.library.get("chat_template_kwargs") or {}
    rendered = tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, **chat_arguments(prompt), **settings
    )
    return list(rendered["input_ids"])
