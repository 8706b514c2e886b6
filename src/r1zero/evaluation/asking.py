"""What is asked of one model on one benchmark, and what it answers: prompts in tokens, completions in tokens and text.

Two engines answer: `serving.ServerEngine` through a policy server, `in_process.InProcessEngine` with transformers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Protocol as Interface

from r1zero.evaluation.benchmarks import Questions
from r1zero.evaluation.models import Candidate, ModelError
from r1zero.evaluation.protocol import Protocol
from r1zero.tasks.prompts import chat_arguments
from r1zero.training.stop_strings import StopStrings


@dataclass(frozen=True)
class Ask:
    """One model on one benchmark.

    Attributes:
        candidate: the model.
        questions: of the benchmark.
        protocol: how they are asked.
        prompt_ids: of each question.
        limits: tokens that each question's completion may have: the protocol's, or what the model's positions leave.
        stop: the stop strings in the model's tokens.
        end_ids: tokens that end a completion.
        tokenizer: of the model.
    """

    candidate: Candidate
    questions: Questions
    protocol: Protocol
    prompt_ids: tuple[tuple[int, ...], ...]
    limits: tuple[int, ...]
    stop: StopStrings
    end_ids: tuple[int, ...]
    tokenizer: Any

    @property
    def completions(self) -> int:
        """How many there will be."""
        return len(self.prompt_ids) * self.protocol.samples

    def finished(self, ids: Sequence[int], cut_off: bool) -> "Completion":
        """The completion of these tokens, up to its first stop string.

        Args:
            ids: as they were made, the end token included.
            cut_off: whether generation ended at the limit.
        """
        (kept,), _ = self.stop.cut([list(ids)], None)
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        stopped = bool(self.stop) and self.stop.ended(kept)
        return Completion(str(text), len(kept), cut_off and not stopped)


@dataclass(frozen=True)
class Completion:
    """One answer of a model.

    >>> Completion("The answer is 42.", 6, False).length
    6

    Attributes:
        text: without special tokens.
        length: in tokens, with the one that ended it.
        clipped: whether it was cut off at its limit.
    """

    text: str
    length: int
    clipped: bool


@dataclass(frozen=True)
class Answered:
    """All completions of one `Ask`.

    Attributes:
        ask: what was asked.
        completions: shape (questions, samples).
    """

    ask: Ask
    completions: tuple[tuple[Completion, ...], ...]


OnProgress = Callable[[str, int, int], None]  # what goes on, completions done, of


class Engine(Interface):
    """Answers what is asked."""

    def answer(self, asks: Sequence[Ask], on_progress: OnProgress) -> Iterator[Answered]:
        """Each as soon as it is complete."""
        ...

    def description(self) -> dict[str, Any]:
        """What generated, for the result."""
        ...


def make(candidate: Candidate, questions: Questions, protocol: Protocol, context: int | None, tokenizer: Any) -> Ask:
    """One model and one benchmark, made ready.

    Args:
        candidate: the model.
        questions: of the benchmark.
        protocol: how they are asked.
        context: positions of the model, tokens; None: it does not say.
        tokenizer: of the model.

    Raises:
        ModelError: a question is longer than the model can read.
    """
    template = protocol.template
    settings = (candidate.recipe.library.get("chat_template_kwargs") if candidate.recipe else None) or {}
    prompts = [template.build(problem.question) for problem in questions.problems]
    ids = tuple(tuple(_ids(prompt, tokenizer, settings)) for prompt in prompts)
    longest = max(map(len, ids))
    if context is not None and longest >= context:
        why = f"a question of {questions.name} has {longest} tokens in this template, the model {context} positions"
        raise ModelError(f"{candidate.label}: {why}; leave that benchmark out")
    limits = [protocol.max_tokens if context is None else min(protocol.max_tokens, context - len(each)) for each in ids]
    return Ask(
        candidate=candidate,
        questions=questions,
        protocol=protocol,
        prompt_ids=ids,
        limits=tuple(limits),
        stop=StopStrings(protocol.stop_strings, tokenizer),
        end_ids=end_ids(candidate, tokenizer),
        tokenizer=tokenizer,
    )


def end_ids(candidate: Candidate, tokenizer: Any) -> tuple[int, ...]:
    """The tokens with which a model ends: its tokenizer's, and those that its generation settings name."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id} - {None}
    for place in dict.fromkeys((candidate.weights, candidate.base)):
        try:
            named = GenerationConfig.from_pretrained(place, revision=candidate.revision or "main").eos_token_id
        except (OSError, ValueError):  # it has none
            continue
        found |= set(named if isinstance(named, list) else [named]) - {None}
    return tuple(sorted(int(each) for each in found))


def _ids(prompt: Any, tokenizer: Any, settings: dict[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    rendered = tokenizer.apply_chat_template(
        prompt, tokenize=True, return_dict=True, **chat_arguments(prompt), **settings
    )
    return list(rendered["input_ids"])
