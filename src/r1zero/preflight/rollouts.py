"""One batch of completions from the policy server, graded as training will grade it, and what it forebodes."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1zero.policy_client import PolicyClient, Rollout
from r1zero.preflight import model_files
from r1zero.preflight.findings import Finding
from r1zero.recipe import Recipe
from r1zero.serving import TOKEN
from r1zero.tasks.problem import Problem
from r1zero.tasks.verifier import Verifier

MOST_COMPLETIONS = 256
SHOWN_CHARACTERS = 400

# Shares from which on something deserves a word.
MANY_CLIPPED = 0.2
MANY_WITHOUT_SPREAD = 0.7
MANY_UNPARSED = 0.5


@dataclass(frozen=True)
class Sample:
    """One completion and what became of it."""

    text: str
    token_ids: tuple[int, ...]
    clipped: bool
    answer: str | None
    verdict: str
    reward: float


def look(recipe: Recipe, problems: list[Problem], base_url: str) -> list[Finding]:
    """Draw one batch of completions, grade it, judge it.

    Raises:
        PolicyServerError: when the server does not answer as vLLM does, or not in time.
    """
    from r1zero.training.data import prompt_ids, within_limit

    tokenizer = model_files.read(recipe).tokenizer
    kept = within_limit(problems, recipe, tokenizer)
    count = min(len(kept), max(1, MOST_COMPLETIONS // recipe["num_generations"]))
    drawn = random.Random(recipe["seed"]).sample(kept, count)
    with recipe.verifier() as verifier:
        groups = _draw(drawn, lambda problem: prompt_ids(problem, recipe, tokenizer), recipe, verifier, base_url)
    return _judge(groups, recipe)


def _draw(
    problems: Sequence[Problem],
    prompt_ids: Callable[[Problem], list[int]],
    recipe: Recipe,
    verifier: Verifier,
    base_url: str,
) -> list[list[Sample]]:
    """Groups of `num_generations` completions, one group a problem, with the rewards that training would give."""
    group = recipe["num_generations"]
    sampling = {
        "max_tokens": recipe["max_completion_length"],
        "temperature": recipe["temperature"],
        "top_p": recipe["top_p"],
        "top_k": recipe["top_k"],
        "min_p": recipe["min_p"] or 0.0,
        "repetition_penalty": recipe["repetition_penalty"],
        **({"stop": recipe.own.stop_strings, "include_stop_str_in_output": True} if recipe.own.stop_strings else {}),
    }
    prompts = [prompt_ids(problem) for problem in problems]
    timeout_s = recipe.own.generation_timeout
    # The base model, which a server of ours has from its start; no policy version was published yet.
    with PolicyClient([base_url], os.environ.get(TOKEN), generation_timeout_s=timeout_s) as client:
        rollouts = client.collect(client.submit(prompts, sampling, group, logprobs=False))
    answers = [rollouts[start : start + group] for start in range(0, len(rollouts), group)]
    return [_graded(problem, each, recipe, verifier) for problem, each in zip(problems, answers, strict=True)]


def _graded(problem: Problem, completions: Sequence[Rollout], recipe: Recipe, verifier: Verifier) -> list[Sample]:
    texts = [each.text for each in completions]
    graded = verifier.grade(texts, [problem.gold] * len(texts), [problem.question] * len(texts))
    prompt = recipe.template.build(problem.question)
    chat = [[{"role": "assistant", "content": text}] for text in texts]  # as TRL hands them over
    columns: dict[str, Any] = {
        "prompts": [prompt] * len(texts),
        "completions": texts if isinstance(prompt, str) else chat,
        "completion_ids": [list(each.completion_ids) for each in completions],
        "question": [problem.question] * len(texts),
        "gold": [problem.gold] * len(texts),
        "source": [problem.source] * len(texts),
        "answer": [each.answer for each in graded],
        "verdict": [each.verdict.value for each in graded],
    }
    functions = recipe.reward_functions()
    weights = recipe["reward_weights"] or [1.0] * len(functions)
    totals = [0.0] * len(texts)
    for function, weight in zip(functions, weights, strict=True):
        for index, value in enumerate(function(**columns)):
            totals[index] += weight * (value or 0.0)
    return [
        Sample(each.text, each.completion_ids, each.clipped, one.answer, one.verdict.value, total)
        for each, one, total in zip(completions, graded, totals, strict=True)
    ]


def _judge(groups: Sequence[Sequence[Sample]], recipe: Recipe) -> list[Finding]:
    """What the rollouts say about the training to come."""
    flat = [sample for group in groups for sample in group]
    count = len(flat)
    clipped = sum(sample.clipped for sample in flat) / count
    unparsed = sum(sample.verdict == "unparsed" for sample in flat) / count
    correct = sum(sample.verdict == "correct" for sample in flat) / count
    flat_groups = [group for group in groups if len({sample.reward for sample in group}) == 1]
    no_spread = len(flat_groups) / len(groups)
    lengths = sum(len(sample.token_ids) for sample in flat) / count
    findings = [
        Finding(
            "note",
            f"rollouts: {count} completions of {len(groups)} prompts, {lengths:.0f} tokens on average: "
            f"{_percent(correct)} correct, {_percent(unparsed)} without a readable answer, "
            f"{_percent(clipped)} cut off, {_percent(no_spread)} of the groups without reward spread",
        ),
        Finding("note", f"one of them: {_shown(flat[0].text)}\n      answer {flat[0].answer!r}: {flat[0].verdict}"),
    ]
    if clipped > MANY_CLIPPED:
        text = f"{_percent(clipped)} of the completions were cut off at {recipe['max_completion_length']} tokens"
        remedy = "raise max_completion_length, or end them earlier: stop_strings"
        findings.append(Finding("warning", f"{text}: what they would have answered is never rewarded", remedy))
    if unparsed > MANY_UNPARSED:
        text = f"{_percent(unparsed)} of the completions hold no answer that can be read as {recipe.answer_format}"
        remedy = "another prompt_template or answer_format, or a cold start with method: sft"
        findings.append(Finding("warning", text, remedy))
    if no_spread > MANY_WITHOUT_SPREAD:
        findings.append(_no_spread(no_spread, correct, recipe))
    return findings


def _no_spread(share: float, correct: float, recipe: Recipe) -> Finding:
    group = recipe["num_generations"]
    text = f"in {_percent(share)} of the groups all {group} completions have the same reward: they teach nothing"
    if correct > 0.5:
        return Finding("warning", f"{text}; most are right already", "harder problems: dataset_name, levels")
    if correct == 0.0:
        remedy = "easier problems (dataset_name, levels), a cold start (method: sft), or a stronger model_name_or_path"
        return Finding("warning", f"{text}; none is right", remedy)
    return Finding("warning", text, f"raise num_generations above {group}, or give easier problems: levels")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")
