r"""Prompt templates: from a question to exactly what the model reads, and what completes it.

A published template is a fact of its method: each is quoted with its source, and a golden test holds its exact text. A
recipe may also write its own, as a text or as chat messages with ``{question}`` in it.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]  # role and content
Prompt = str | list[Message]  # plain text, or chat messages for the tokenizer's chat template

QUESTION = "{question}"
ROLES = ("system", "user", "assistant")
REASONING_TAGS = ("reasoning", "think")
_BOX = "\\boxed"


@dataclass(frozen=True)
class Template:
    r"""How a question becomes the prompt, and the form in which the prompt asks for the answer.

    >>> TEMPLATES["abel"].build("What is 12 + 30?")
    "Question:\nWhat is 12 + 30?\nAnswer:\nLet's think step by step.\n"

    Attributes:
        name: what a recipe calls it; "custom" for one that the recipe writes itself.
        text: what the model reads, with ``{question}`` where the question goes. A text is a plain prompt; (role,
            content) pairs are chat messages, rendered by the tokenizer's chat template. Where the last message is the
            assistant's, the model goes on inside it.
        answer_format: "tagged" (``<answer>``) or "boxed" (``\boxed``); None where the template asks for neither.
        reasoning_tag: "reasoning" or "think"; None where the reasoning stands in no tags.
        source: where it was published.
    """

    name: str
    text: str | tuple[tuple[str, str], ...]
    answer_format: str | None
    reasoning_tag: str | None
    source: str

    def build(self, question: str) -> Prompt:
        """The prompt of one question. Nothing but ``{question}`` is replaced: other braces stay as they are."""
        if isinstance(self.text, str):
            return self.text.replace(QUESTION, question)
        return [{"role": role, "content": content.replace(QUESTION, question)} for role, content in self.text]

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation, which the tokenizer's chat template renders."""
        return not isinstance(self.text, str)

    @property
    def opens_reasoning(self) -> bool:
        """Whether the prompt ends with the opening reasoning tag, so that a completion begins inside it."""
        last = self.text if isinstance(self.text, str) else self.text[-1][1]
        return self.reasoning_tag is not None and last.rstrip().endswith(f"<{self.reasoning_tag}>")

    def completion(self, solution: str, gold: str, answer_format: str) -> str:
        r"""The text that completes the prompt with `solution`, in the form that is graded as `answer_format`.

        >>> TEMPLATES["r1rl"].completion("12 + 30 = 42", "42", "tagged")
        '\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>'
        >>> TEMPLATES["qwen_boxed"].completion("12 + 30 = 42", "42", "boxed")
        '12 + 30 = 42\nThe answer is $\\boxed{42}$.'
        """
        steps = f"{solution}\n" if solution else ""
        if answer_format == "tagged":
            answer = f"<answer>\n{gold}\n</answer>"
        elif self.reasoning_tag is None and _BOX in solution:
            return f"{self._separator()}{solution}"
        else:
            answer = f"The answer is $\\boxed{{{gold}}}$."
        if self.reasoning_tag is None:
            return f"{self._separator()}{steps}{answer}"
        opening = "" if self.opens_reasoning else f"{self._separator()}<{self.reasoning_tag}>"
        return f"{opening}\n{steps}</{self.reasoning_tag}>\n{answer}"

    def _separator(self) -> str:
        """What stands between a plain prompt and its completion: the chat template has its own."""
        return "\n" if isinstance(self.text, str) and not self.text[-1].isspace() else ""


class TemplateError(ValueError):
    """A prompt template that cannot be used.

    Attributes:
        why: what is wrong with it.
        remedy: what to write instead.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(f"{why}; {remedy}")
        self.why = why
        self.remedy = remedy


# R1RL, src/r1rl/datasets/gsm8k.py (github.com/dhh1995/R1RL at 560bdb7): SYSTEM_PROMPT with its tags filled in.
R1RL_SYSTEM = """\
For the given question, think about the reasoning process in the mind, and respond in the following format:
<reasoning>
reasoning process here
</reasoning>
<answer>
answer here, contains only a single integer.
</answer>"""
_R1RL_CHAT = (("system", R1RL_SYSTEM), ("user", QUESTION))
_R1RL = "R1RL, src/r1rl/datasets/gsm8k.py, build_prompt"

# DeepSeek-R1, Table 1; "prompt" there is the question here.
_R1_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)

# simpleRL-reason (github.com/hkust-nlp/simpleRL-reason): v1 trains on these two, named as in the PROMPT_TEMPLATES of
# its evaluation; v0's is in its data, math_level3to5_data_processed_with_qwen_prompt.json, where no newline ends it.
_QWEN_BOXED = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_ABEL = "Question:\n{question}\nAnswer:\nLet's think step by step.\n"
_SIMPLERL_V0 = (
    "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n"
    "<|im_start|>assistant"
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template("r1rl", f"{R1RL_SYSTEM}\nQuestion: {QUESTION}\n<reasoning>", "tagged", "reasoning", _R1RL),
        Template("r1rl_no_prefix", f"{R1RL_SYSTEM}\nQuestion: {QUESTION}", "tagged", "reasoning", _R1RL),
        Template("r1rl_chat", _R1RL_CHAT, "tagged", "reasoning", _R1RL),
        Template("r1rl_chat_prefix", (*_R1RL_CHAT, ("assistant", "<reasoning>")), "tagged", "reasoning", _R1RL),
        Template("r1_zero", _R1_ZERO, "tagged", "think", "DeepSeek-R1, arXiv:2501.12948v1, Table 1"),
        Template("qwen_boxed", _QWEN_BOXED, "boxed", None, "simpleRL-reason v1, qwen-boxed"),
        # It asks for no box; simpleRL grades it by the box all the same.
        Template("abel", _ABEL, "boxed", None, "simpleRL-reason v1, abel"),
        Template("simplerl_v0", _SIMPLERL_V0, "boxed", None, "simpleRL-reason v0, qwen prompt"),
        Template("none", QUESTION, None, None, "the question alone"),
    )
}


def template(given: str | Sequence[Any]) -> Template:
    r"""The template that a recipe's ``prompt_template`` means: a name, a text, or a list of chat messages.

    A template of the user's own asks for the form that it shows: ``\boxed`` or ``<answer>``, ``<think>`` or
    ``<reasoning>``; where it shows both or neither, for none.

    >>> template("{question} Put your answer into \\boxed{}.").build("1 + 1?")
    '1 + 1? Put your answer into \\boxed{}.'

    Raises:
        TemplateError: unknown name, no ``{question}``, or messages that are none.
    """
    if not isinstance(given, str):
        return _custom(tuple(_message(number, each) for number, each in enumerate(given, start=1)))
    if given in TEMPLATES:
        return TEMPLATES[given]
    # A name is one word; whoever wrote more meant the text itself.
    if QUESTION in given or len(given.split()) > 1:
        return _custom(given)
    near = difflib.get_close_matches(given, TEMPLATES, n=1)
    names = f"one of {', '.join(TEMPLATES)}, or a text with {QUESTION} in it"
    raise TemplateError("is not a template", f"did you mean {near[0]}? A template is {names}" if near else names)


def chat_arguments(messages: Sequence[Message]) -> dict[str, bool]:
    """How a tokenizer's ``apply_chat_template`` ends a prompt: it opens the assistant's turn, or leaves it open.

    >>> chat_arguments([{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<reasoning>"}])
    {'add_generation_prompt': False, 'continue_final_message': True}
    """
    begun = messages[-1]["role"] == "assistant"
    return {"add_generation_prompt": not begun, "continue_final_message": begun}


def _custom(text: str | tuple[tuple[str, str], ...]) -> Template:
    shown = text if isinstance(text, str) else "\n".join(content for _, content in text)
    if QUESTION not in shown:
        raise TemplateError(f"has no {QUESTION}: the model would never see the question", f"write {QUESTION} into it")
    answer = [name for name, sign in (("tagged", "<answer>"), ("boxed", _BOX)) if sign in shown]
    reasoning = [tag for tag in REASONING_TAGS if f"<{tag}>" in shown]
    return Template(
        name="custom",
        text=text,
        answer_format=answer[0] if len(answer) == 1 else None,
        reasoning_tag=reasoning[0] if len(reasoning) == 1 else None,
        source="the recipe",
    )


def _message(number: int, given: object) -> tuple[str, str]:
    if not isinstance(given, Mapping) or set(given) != {"role", "content"} or not isinstance(given["content"], str):
        remedy = "write each message as {role: user, content: text}"
        raise TemplateError(f"message {number} is {given!r}, not a role with a content", remedy)
    if given["role"] not in ROLES:
        raise TemplateError(f"message {number} has the role {given['role']!r}", f"roles are {', '.join(ROLES)}")
    return given["role"], given["content"]
