"""Prompt templates by name: from a question to exactly what the model reads.

A template is a published fact of its method: each is quoted with its source, and a golden test holds its exact text.
"""

from collections.abc import Callable

Prompt = str | list[dict[str, str]]  # plain text, or chat messages for the tokenizer's chat template

# R1RL, src/r1rl/datasets/gsm8k.py (github.com/dhh1995/R1RL).
R1RL_SYSTEM = """\
For the given question, think about the reasoning process in the mind, and respond in the following format:
<reasoning>
reasoning process here
</reasoning>
<answer>
answer here, contains only a single integer.
</answer>"""


def r1rl(question: str) -> Prompt:
    """R1RL's plain prompt with its reasoning prefix, as its published curves used: the model goes on inside the tag."""
    return f"{R1RL_SYSTEM}\nQuestion: {question}\n<reasoning>"


def r1rl_chat(question: str) -> Prompt:
    """R1RL's chat mode, without the prefix: the tokenizer's own chat template adds the generation prompt."""
    return [{"role": "system", "content": R1RL_SYSTEM}, {"role": "user", "content": question}]


def r1rl_completion(solution: str, answer: str) -> str:
    r"""What completes `r1rl`'s prompt, in the form that it asks for: the model is already inside ``<reasoning>``.

    >>> r1rl_completion("12 + 30 = 42", "42")
    '\n12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>'
    """
    steps = f"{solution}\n" if solution else ""
    return f"\n{steps}</reasoning>\n<answer>\n{answer}\n</answer>"


def none(question: str) -> Prompt:
    """The question alone."""
    return question


TEMPLATES: dict[str, Callable[[str], Prompt]] = {"r1rl": r1rl, "r1rl_chat": r1rl_chat, "none": none}
