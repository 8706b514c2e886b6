r"""Rewards by name, shaped as TRL wants them: keyword lists in, one number for each completion out.

Each of ours is a function of one completion, so neither order nor batch size can change it. None of them grades: the
trainer asks the verifier once for a batch and hands answer and verdict to all, a user's own function among them.
"""

import difflib
import importlib
import inspect
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1zero.tasks import boxes
from r1zero.tasks.prompts import Template

# What every reward function is called with, all of them keywords, besides TRL's trainer_state, log_extra, log_metric.
KEYWORDS = ("prompts", "completions", "completion_ids", "question", "gold", "source", "answer", "verdict")

# DAPO's own share: a cache of 4,096 tokens in a limit of 20,480 (arXiv:2503.14476, section 4.1).
OVERLONG_CACHE_SHARE = 5

_OWN_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# Closes the sentence, the formula or the emphasis that the box stands in.
_AFTER_BOX = re.compile(r"[\s$.,;!*)\]\\]*")
# How other projects call what is here.
_ELSEWHERE = {
    "accuracy": "correctness",
    "accuracy_reward": "correctness",
    "correctness_reward_func": "correctness",
    "format_reward": "format",
    "think_format_reward": "format",
    "get_soft_overlong_punishment": "soft_overlong",
    "soft_overlong_punishment": "soft_overlong",
    "repetition_penalty": "repetition",
}

RewardFunction = Callable[..., list[float | None]]


class RewardError(ValueError):
    """A reward function that cannot be used.

    Attributes:
        name: the function as the recipe names it.
        why: what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, name: str, why: str, remedy: str) -> None:
        super().__init__(f"reward function {name}: {why}; {remedy}")
        self.name = name
        self.why = why
        self.remedy = remedy


@dataclass(frozen=True)
class Completion:
    """What a reward of ours sees of one completion.

    Attributes:
        text: without its special tokens.
        tokens: its length, with the token that ends it.
        verdict: the verifier's, as text.
    """

    text: str
    tokens: int
    verdict: str


@dataclass(frozen=True)
class Shape:
    """What the rewards of a run depend on besides the completion.

    Attributes:
        template: how the questions are asked.
        answer_format: "tagged" or "boxed", as the answers are read.
        max_completion_length: where a completion is cut off; tokens.
        correctness_scale: what a correct answer is worth.
        overlong_cache_tokens: how long before that limit the punishment begins; None: a fifth of the limit.
        repetition_ngram: words in one n-gram.
    """

    template: Template
    answer_format: str
    max_completion_length: int
    correctness_scale: float = 1.0
    overlong_cache_tokens: int | None = None
    repetition_ngram: int = 20


def correctness(completion: Completion, shape: Shape) -> float:
    """``correctness_scale`` for a correct answer, else 0 (R1RL's correctness_reward_func and its env_reward_scale)."""
    return shape.correctness_scale if completion.verdict == "correct" else 0.0


def simplerl_v0(completion: Completion, shape: Shape) -> float:
    r"""1 for a correct answer, -0.5 for one that is not, -1 where there is none.

    simpleRL-reason v0, preprocess_box_response_for_qwen_prompt: no answer means that the word "boxed" does not occur;
    a comparison that timed out counts as not correct. With tagged answers the sign of an answer is ``<answer>``.
    """
    if ("<answer>" if shape.answer_format == "tagged" else "boxed") not in completion.text:
        return -1.0
    return 1.0 if completion.verdict == "correct" else -0.5


def form(completion: Completion, shape: Shape) -> float:
    r"""1 where the whole completion has the form that is asked for, else 0.

    That is: one reasoning section in the template's tags (where it has tags; the opening one is the prompt's, where the
    prompt ends with it), then one answer, then nothing. A tagged answer must not be empty. A boxed one is the only
    ``\boxed{...}`` of the completion, in a sentence of its own or not, which ends with it.
    """
    text, tag = completion.text, shape.template.reasoning_tag
    if tag is not None:
        given = f"<{tag}>" if shape.template.opens_reasoning else ""
        before, opening, text = (given + text).partition(f"<{tag}>")
        inside, closing, text = text.partition(f"</{tag}>")
        if before.strip() or not opening or not closing or _has_tags(inside, tag) or boxes.OPENING.search(inside):
            return 0.0
    if shape.answer_format == "tagged":
        before, _, rest = text.partition("<answer>")
        answer, closing, after = rest.partition("</answer>")
        # Reasoning without tags of its own stands before the answer.
        stray = _has_tags(before + answer, tag) or after.strip() or (tag is not None and before.strip())
        return float(bool(closing and answer.strip() and not stray))
    return float(not _has_tags(text, tag) and _ends_with_its_only_box(text))


def tag_count(completion: Completion, shape: Shape) -> float:
    """0.25 for each of the four tags that occurs exactly once; the one that the prompt ends with has occurred."""
    tag = shape.template.reasoning_tag
    given = f"<{tag}>" if shape.template.opens_reasoning else ""
    text = given + completion.text
    return 0.25 * sum(text.count(each) == 1 for each in (f"<{tag}>", f"</{tag}>", "<answer>", "</answer>"))


def soft_overlong(completion: Completion, shape: Shape) -> float:
    """Soft overlong punishment, DAPO (arXiv:2503.14476) equation 13, in [-1, 0].

    0 up to L_max - L_cache tokens, from there linearly down to -1 at L_max, and -1 beyond.
    """
    cache = overlong_cache(shape.max_completion_length, shape.overlong_cache_tokens)
    beyond = completion.tokens - (shape.max_completion_length - cache)
    return max(-max(beyond, 0) / cache, -1.0)


def repetition(completion: Completion, shape: Shape) -> float:
    """Minus the share of n-grams that occurred before in the completion, in (-1, 0]; words in lower case.

    The scalar form of the n-gram repetition penalty of Yeo et al. 2025 (arXiv:2502.03373, appendix): their
    implementation multiplies this share by a maximal penalty, which here is the function's weight. Their Algorithm 1
    also has a form for single tokens, which a reward for a whole completion cannot have.
    """
    words = completion.text.lower().split()
    count = len(words) - shape.repetition_ngram + 1
    if count < 1:
        return 0.0
    different = {tuple(words[at : at + shape.repetition_ngram]) for at in range(count)}
    return len(different) / count - 1.0


REWARDS: dict[str, Callable[[Completion, Shape], float]] = {
    "correctness": correctness,
    "simplerl_v0": simplerl_v0,
    "format": form,
    "tag_count": tag_count,
    "soft_overlong": soft_overlong,
    "repetition": repetition,
}


def overlong_cache(max_completion_length: int, overlong_cache_tokens: int | None) -> int:
    """L_cache of `soft_overlong`: tokens before the limit within which the punishment grows."""
    return overlong_cache_tokens or max(max_completion_length // OVERLONG_CACHE_SHARE, 1)


def check_name(name: str) -> None:
    """Whether a recipe may name this reward, judged by its spelling alone: nothing is imported.

    Raises:
        RewardError: it is none of ours and not ``module:function``.
    """
    if name in REWARDS or _OWN_FUNCTION.fullmatch(name):
        return
    near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, REWARDS, n=1)
    legal = f"one of {', '.join(REWARDS)}, or a function of your own as module:function"
    raise RewardError(name, "is not a reward", f"did you mean {near[0]}? A reward is {legal}" if near else legal)


def metric_name(name: str) -> str:
    """Under which name TRL logs it, as rewards/NAME/mean.

    >>> metric_name("format"), metric_name("my.rewards:brevity")
    ('format', 'brevity')
    """
    return name.rpartition(":")[2]


def make(names: Sequence[str], shape: Shape) -> list[RewardFunction]:
    """The functions that a recipe names, in its order, each with the ``__name__`` that TRL logs it under.

    Raises:
        RewardError: one of the user's own cannot be had.
    """
    return [_Reward(name, REWARDS[name], shape) if name in REWARDS else _UsersOwn(name) for name in names]


def text_of(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion in TRL's plain or conversational form."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class _Reward:
    """A reward of ours in TRL's shape."""

    def __init__(self, name: str, score: Callable[[Completion, Shape], float], shape: Shape) -> None:
        self.__name__ = metric_name(name)
        self._score = score
        self._shape = shape

    def __call__(
        self, *, completions: Sequence[Any], completion_ids: Sequence[Any], verdict: Sequence[str], **unused: Any
    ) -> list[float | None]:
        return [
            self._score(Completion(text_of(text), len(ids), one), self._shape)
            for text, ids, one in zip(completions, completion_ids, verdict, strict=True)
        ]


class _UsersOwn:
    """A reward function of the user's, held to its contract at every call."""

    def __init__(self, name: str) -> None:
        self.__name__ = metric_name(name)
        self._name = name
        self._function = _imported(name)

    def __call__(self, **keywords: Any) -> list[float | None]:
        rewards = self._function(**keywords)
        expected = len(keywords["completions"])
        remedy = "return a list with one number, or None, for each completion"
        if not isinstance(rewards, Sequence) or isinstance(rewards, str):
            raise RewardError(self._name, f"returned {rewards!r:.100}, not a list", remedy)
        if len(rewards) != expected:
            raise RewardError(self._name, f"returned {len(rewards)} values for {expected} completions", remedy)
        return [None if each is None else self._number(each, at, remedy) for at, each in enumerate(rewards)]

    def _number(self, value: object, at: int, remedy: str) -> float:
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise RewardError(self._name, f"returned {value!r:.100} for completion {at} of the batch", remedy)
        return float(value)


def _imported(name: str) -> Callable[..., Any]:
    """The function behind ``module:function``. The launch directory is looked in last, so that it shadows nothing."""
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # the user's module may raise anything while it is imported
        why = f"cannot be imported: {type(error).__name__}: {error}"
        raise RewardError(name, why, f"put {module} where Python finds it, or start from its folder") from error
    found = getattr(loaded, function, None)
    if found is None:
        raise RewardError(name, f"is not in {getattr(loaded, '__file__', module)}", f"mend the name {function}")
    remedy = "give a function that returns a list of numbers"
    if not callable(found):
        raise RewardError(name, f"is a {type(found).__name__}, not a function", remedy)
    if inspect.iscoroutinefunction(found):
        raise RewardError(name, "is async, and would not be waited for", remedy)
    try:
        inspect.signature(found).bind(**dict.fromkeys((*KEYWORDS, "trainer_state", "log_extra", "log_metric")))
    except (TypeError, ValueError) as error:
        why = f"cannot be called with the keywords {', '.join(KEYWORDS)}: {error}"
        raise RewardError(name, why, "take those you need by name, and the others as **unused") from error
    function_found: Callable[..., Any] = found
    return function_found


def _has_tags(text: str, tag: str | None) -> bool:
    """Whether one of the tags that give a completion its form stands in a part that should have none."""
    reasoning = (f"<{tag}>", f"</{tag}>") if tag is not None else ()
    return any(each in text for each in (*reasoning, "<answer>", "</answer>"))


def _ends_with_its_only_box(text: str) -> bool:
    found = boxes.whole(text)
    if len(found) != 1 or len(boxes.OPENING.findall(text)) != 1:
        return False
    return bool(found[0].content) and _AFTER_BOX.fullmatch(text, found[0].end) is not None
