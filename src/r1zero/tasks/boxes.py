r"""Where ``\boxed{...}`` stands in a text, and what it holds."""

import re
from dataclasses import dataclass

OPENING = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a sign, not a bracket


@dataclass(frozen=True)
class Box:
    r"""One box, from its backslash to behind its closing brace, and its stripped content.

    >>> whole(r"So \boxed{\frac{1}{2}}.")
    [Box(start=3, end=22, content='\\frac{1}{2}')]
    """

    start: int
    end: int
    content: str


def whole(text: str) -> list[Box]:
    """The boxes that are closed, in their order; of nested ones the outermost."""
    found: list[Box] = []
    at = 0
    while (opening := OPENING.search(text, at)) is not None:
        end = closing_brace(text, opening.end())
        if end is None:
            break
        found.append(Box(opening.start(), end, text[opening.end() : end - 1].strip()))
        at = end
    return found


def closing_brace(text: str, at: int) -> int | None:
    """Where the brace that was opened before `at` is closed, one past it; None where it never is."""
    depth = 1
    for brace in _BRACE.finditer(text, at):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return brace.end()
    return None
