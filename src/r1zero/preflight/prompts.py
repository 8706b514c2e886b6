"""Whether prompts fit, and whether a completion can end. Needs the tokenizer, not the model."""

from collections.abc import Sequence
from typing import Any

from r1zero.preflight import model_files
from r1zero.preflight.findings import Finding
from r1zero.preflight.model_files import ModelFiles
from r1zero.recipe import Recipe
from r1zero.tasks.problem import Problem
from r1zero.tasks.prompts import Prompt

BINS = 8
BAR = 40


SHOWN_CHARACTERS = 300


def look(recipe: Recipe, problems: Sequence[Problem]) -> list[Finding]:
    """Lengths of all prompts against the limits, and what ends a completion."""
    from r1zero.training.data import prompt_ids

    model = model_files.read(recipe)
    if recipe.template.is_chat and not model.tokenizer.chat_template:
        remedy = "a prompt_template that is a text, such as r1rl, or a chat model"
        return [Finding("fault", "prompt_template is a conversation, and the tokenizer has no chat template", remedy)]
    lengths = [len(prompt_ids(problem, recipe, model.tokenizer)) for problem in problems]
    prompt = recipe.template.build(problems[0].question)
    return [
        *_lengths(lengths, recipe, model.positions),
        *_form(prompt, recipe, model),
        *_ending(prompt, recipe, model),
        *_own_rewards(problems[0], recipe),
    ]


def _form(prompt: Prompt, recipe: Recipe, model: ModelFiles) -> list[Finding]:
    """How the question is put, and where its answer is looked for."""
    text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
    short = (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    )
    place = "<answer>" if recipe.answer_format == "tagged" else "\\boxed{}"
    findings = [Finding("note", f"answers are read in {place}; the first prompt: {short!r}")]
    if recipe.template.name == "custom" and recipe.template.answer_format != recipe.answer_format:
        said = f"prompt_template does not show the model the form {place} in which its answer is read"
        findings.append(Finding("warning", said, f"ask for {place} in it, or set answer_format"))
    return findings


def _own_rewards(problem: Problem, recipe: Recipe) -> list[Finding]:
    """Call each reward once with two made-up completions: a user's function fails here and not at the first step."""
    prompt = recipe.template.build(problem.question)
    texts = [f" {problem.gold}", ""]
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    columns: dict[str, Any] = {
        "prompts": [prompt] * 2,
        "completions": texts if isinstance(prompt, str) else chat,
        "completion_ids": [[0], []],
        "question": [problem.question] * 2,
        "gold": [problem.gold] * 2,
        "source": [problem.source] * 2,
        "answer": [problem.gold, None],
        "verdict": ["correct", "unparsed"],
    }
    findings = []
    for name, function in zip(recipe.own.reward_funcs, recipe.reward_functions(), strict=True):
        try:
            function(**columns)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            said = f"reward function {name} cannot reward two made-up completions: {type(error).__name__}: {error}"
            findings.append(Finding("fault", said, "mend it, or leave it out of reward_funcs"))
    return findings


def _lengths(lengths: Sequence[int], recipe: Recipe, positions: int | None) -> list[Finding]:
    limit = recipe.own.max_prompt_tokens
    ordered = sorted(lengths)
    middle, late = ordered[len(ordered) // 2], ordered[int(0.95 * (len(ordered) - 1))]
    text = f"prompts: {ordered[0]} to {ordered[-1]} tokens, median {middle}, 95 % have at most {late}"
    findings = [Finding("note", text + _histogram(ordered, limit))]
    kept = [length for length in ordered if limit is None or length <= limit]
    if limit is not None and len(kept) < len(ordered):
        dropped = len(ordered) - len(kept)
        text = (
            f"max_prompt_tokens = {limit}: {dropped} of {len(ordered)} problems have a longer prompt and are left out"
        )
        level = "warning" if dropped > len(ordered) / 10 else "note"
        findings.append(Finding(level, text, "raise max_prompt_tokens" if level == "warning" else ""))
    completion = recipe["max_completion_length"]
    if positions is not None and kept and completion is not None and kept[-1] + completion > positions:
        text = (
            f"the longest prompt has {kept[-1]} tokens, with max_completion_length = {completion} that is "
            f"{kept[-1] + completion}, and the model has {positions} positions"
        )
        remedy = f"max_completion_length at most {positions - kept[-1]}, or a smaller max_prompt_tokens"
        findings.append(Finding("fault", text, remedy))
    return findings


def _histogram(ordered: Sequence[int], limit: int | None) -> str:
    """Eight bars of the prompt lengths; those beyond the limit are marked."""
    low, width = ordered[0], max(1, -(-(ordered[-1] - ordered[0] + 1) // BINS))
    counts = [0] * (1 + (ordered[-1] - low) // width)
    for length in ordered:
        counts[(length - low) // width] += 1
    lines = []
    for index, count in enumerate(counts):
        first, last = low + index * width, low + (index + 1) * width - 1
        mark = " over max_prompt_tokens" if limit is not None and first > limit else ""
        lines.append(f"\n      {first:>5} to {last:<5} {count:>6} {'#' * round(BAR * count / max(counts))}{mark}")
    return "".join(lines)


def _ending(prompt: Prompt, recipe: Recipe, model: ModelFiles) -> list[Finding]:
    findings: list[Finding] = []
    tokenizer, ends = model.tokenizer, model.ends
    eos = tokenizer.eos_token_id
    if eos is None:
        remedy = "use a tokenizer with an end token, or its chat model's"
        return [Finding("fault", "the tokenizer has no end token (eos_token): no completion could end", remedy)]
    known = [("eos_token", eos), ("pad_token", tokenizer.pad_token_id), ("bos_token", tokenizer.bos_token_id)]
    for name, token in known:
        if token is not None and token >= model.vocabulary:
            text = f"the tokenizer's {name} has the id {token}, the model knows {model.vocabulary} tokens"
            findings.append(
                Finding("fault", text, "model and tokenizer do not belong together: mend model_name_or_path")
            )
    stops = recipe.own.stop_strings or []
    if not isinstance(prompt, str):
        turn_end = _turn_end(tokenizer)
        if turn_end is not None and turn_end not in ends and tokenizer.decode([turn_end]) not in stops:
            shown, ids = tokenizer.decode([turn_end]), ", ".join(map(str, sorted(ends)))
            text = (
                f"the chat template ends a turn with {shown} (id {turn_end}), generation ends at the ids {ids} only: "
                "completions would run on to max_completion_length"
            )
            findings.append(Finding("warning", text, f"stop_strings: [{shown!r}]"))
    elif prompt != prompt.rstrip(" "):
        text = "the prompt ends with a space: most tokenizers have that space in the next word's token"
        findings.append(Finding("warning", text, "end prompt_template without it"))
    shown = ", ".join(f"{tokenizer.decode([each])!r} ({each})" for each in sorted(ends))
    also = f", or the text {', '.join(map(repr, stops))}" if stops else ""
    return [*findings, Finding("note", f"a completion ends at {shown}{also}")]


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts after what the assistant said; None where it has none."""
    said = "42"
    turn = [{"role": "user", "content": "1"}, {"role": "assistant", "content": said}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    after = text[text.rindex(said) + len(said) :]
    special = [
        token for token in tokenizer(after, add_special_tokens=False)["input_ids"] if token in tokenizer.all_special_ids
    ]
    return special[0] if special else None
