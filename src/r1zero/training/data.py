"""Problems as the datasets that TRL's trainers read."""

from typing import Any

from datasets import Dataset

from r1zero.recipe import Recipe
from r1zero.tasks import load_problems
from r1zero.tasks.problem import DatasetError, Problem
from r1zero.tasks.prompts import TEMPLATES, r1rl_completion


def problems_of(recipe: Recipe, split: str) -> list[Problem]:
    return load_problems(recipe.own.task, split, recipe["dataset_name"], recipe.own.remove_commas)


def within_limit(problems: list[Problem], recipe: Recipe, tokenizer: Any) -> list[Problem]:
    """Those whose prompt has at most `max_prompt_tokens` tokens, all of them where the recipe sets no limit."""
    limit = recipe.own.max_prompt_tokens
    if limit is None:
        return problems
    template = TEMPLATES[recipe.own.prompt_template]
    kept = [each for each in problems if _tokens(template(each.question), tokenizer) <= limit]
    if not kept:
        raise DatasetError(f"max_prompt_tokens = {limit}: every one of {len(problems)} prompts is longer; raise it")
    return kept


def for_grpo(problems: list[Problem], recipe: Recipe) -> Dataset:
    """Columns: prompt (text or chat messages), gold, source."""
    template = TEMPLATES[recipe.own.prompt_template]
    rows = [{"prompt": template(each.question), "gold": each.gold, "source": each.source} for each in problems]
    return Dataset.from_list(rows)


def for_sft(problems: list[Problem], recipe: Recipe) -> Dataset:
    """Columns: prompt, completion. TRL then puts the loss on the completion only.

    The completion answers in the form that the template asks for and GRPO later grades.
    """
    template = TEMPLATES[recipe.own.prompt_template]
    rows: list[dict[str, Any]] = []
    for each in problems:
        if not each.solution:
            raise DatasetError(f"{each.source}: {each.question!r} has no worked solution to learn from")
        prompt = template(each.question)
        inside = r1rl_completion(each.solution, each.gold)
        if not isinstance(prompt, str):
            rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": f"<reasoning>{inside}"}]})
        elif prompt.endswith("<reasoning>"):
            rows.append({"prompt": prompt, "completion": inside})
        else:
            rows.append({"prompt": prompt, "completion": f"\n<reasoning>{inside}"})
    return Dataset.from_list(rows)


def _tokens(prompt: Any, tokenizer: Any) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    )
