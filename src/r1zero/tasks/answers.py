r"""From a completion to the one answer it commits to.

Two seeds, two places: R1RL reads ``<answer>...</answer>``, simpleRL-reason ``\boxed{...}``. Only text after the
reasoning counts. What to do with several answers is the recipe's choice: ``agreed`` (they must be one value, else the
completion commits to none), ``first`` (R1RL: what a base model rambles on with must not replace its answer) or ``last``
(simpleRL-reason).
"""

import re

from r1zero.tasks import boxes

ANSWER_FORMATS = ("tagged", "boxed")
ANSWER_CHOICES = ("agreed", "first", "last")

_REASONING = re.compile(r"<(/?)(?:think|reasoning)>")
_MOST_ANSWERS = 64  # of one completion; one that boxes more is not committing to anything
_MOST_DIFFERENT = 8  # texts of one answer
_MOST_NESTED = 8  # boxes around a box


def after_reasoning(completion: str) -> str:
    """The completion without its reasoning sections.

    A section that the prompt opened ends at the first closing tag; one that never closes takes all that follows.

    >>> after_reasoning("12 + 30 = 41? no: 42</reasoning> 42 <think>again")
    ' 42 '
    """
    kept: list[str] = []
    at = 0
    inside = False
    for tag in _REASONING.finditer(completion):
        closes = bool(tag[1])
        if closes and not inside and not kept:
            at = tag.end()  # the prompt opened it: all before is reasoning
            kept.append("")
        elif closes and inside:
            inside, at = False, tag.end()
        elif not closes and not inside:
            kept.append(completion[at : tag.start()])
            inside = True
    if not inside:
        kept.append(completion[at:])
    return "".join(kept)


def committed(completion: str, answer_format: str = "boxed", answer_choice: str = "agreed") -> tuple[str, ...]:
    r"""The answers that a completion commits to, stripped; none, where it gives none.

    More than one are returned only where all of them must be right for the completion to be right; whether they agree
    is the verifier's to say. An empty answer that is chosen is no answer.

    >>> committed(r"So \boxed{42}.")
    ('42',)
    >>> committed("<answer>42</answer> Question: 1 + 1? <answer>2</answer>", "tagged", "first")
    ('42',)
    """
    found = _tagged(after_reasoning(completion)) if answer_format == "tagged" else _boxed(after_reasoning(completion))
    if not found or len(found) > _MOST_ANSWERS:
        return ()
    if answer_choice == "first":
        found = found[:1]
    elif answer_choice == "last":
        found = found[-1:]
    answers = tuple(dict.fromkeys(answer for answer in found if answer))
    return answers if len(answers) <= _MOST_DIFFERENT else ()


def _tagged(text: str) -> list[str]:
    found: list[str] = []
    at = 0
    while (start := text.find("<answer>", at)) >= 0:
        end = text.find("</answer>", start)
        if end < 0:
            break
        found.append(text[start + len("<answer>") : end].strip())
        at = end + len("</answer>")
    return found


def _boxed(text: str) -> list[str]:
    return [_innermost(box.content) for box in boxes.whole(text)]


def _innermost(content: str) -> str:
    """A box that holds nothing but a box is that box."""
    for _ in range(_MOST_NESTED):
        found = boxes.whole(content)
        if len(found) != 1 or (found[0].start, found[0].end) != (0, len(content)):
            break
        content = found[0].content
    return content
