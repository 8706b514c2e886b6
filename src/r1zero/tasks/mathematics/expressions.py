r"""Tokens of an expression as LaTeX that the parser cannot misread.

latex2sympy2-extended takes an integer beside anything that comes out rational for a mixed number: ``4(2)`` is 6 there,
``2\binom{3}{2}`` is 5. So every product is written with its sign here, every mixed number as a sum, and every decimal
as a fraction.
"""

import re

from r1zero.tasks.mathematics.latex import APPLIED, GREEK, KNOWN_COMMANDS, SIGNS, Token, closing, is_whole
from r1zero.tasks.mathematics.numerals import decimal, number
from r1zero.tasks.mathematics.values import Unreadable

MOST_EXPONENT = 5000  # larger powers are compared only as they are written
# No prime: the parser would drop it, and f'(x) is not f(x).
_PUNCTUATION = frozenset("+-/()[]{}^_|!,")
_PLAIN_FRACTION = re.compile(r"\\frac\{[+-]?n\}\{[+-]?n\}")
_ENDS_OPERAND = frozenset((")", "]", "}", r"\rfloor", r"\rceil"))
_BEGINS_OPERAND = frozenset(("(", "[", r"\frac", r"\binom", r"\sqrt", r"\lfloor", r"\lceil"))


def checked(tokens: list[Token]) -> list[Token]:
    """The tokens, if sympy may be given them: nothing unknown, nothing that explodes when it is evaluated.

    Raises:
        Unreadable: where it may not.
    """
    if not tokens:
        raise Unreadable("nothing where an answer should be")
    powers = 0
    has_binomial = any(token.text == r"\binom" for token in tokens)
    stack: list[bool] = []  # whether each open brace is an exponent
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else Token("", "")
        if token.kind == "word" and not (stack and before.text == "{"):
            raise Unreadable(f"the word {token.text!r}")
        if token.kind == "command" and token.text not in KNOWN_COMMANDS and not _are_degrees(tokens, index - 2):
            raise Unreadable(f"the command {token.text}")
        if token.kind == "punctuation" and token.text not in _PUNCTUATION:
            raise Unreadable(f"the character {token.text!r}")
        if token.text == "_" and not (before.kind in ("letter", "word") or before.text[1:] in GREEK | {"log"}):
            raise Unreadable("an index at something that is no symbol")
        if token.text == "{":
            stack.append(before.text == "^")
            powers += before.text == "^"
            if powers > 2:
                raise Unreadable("a tower of powers")
        elif token.text == "}":
            powers -= stack.pop()
        elif token.kind == "number":
            value = decimal(token.text)
            after = tokens[index + 1] if index + 1 < len(tokens) else Token("", "")
            if after.kind == "number":
                raise Unreadable("two numbers side by side")
            if value > MOST_EXPONENT and (powers or after.text == "!" or has_binomial):
                raise Unreadable("too large a number to compute")
    return tokens


def latex_of(tokens: list[Token]) -> str:
    """LaTeX of checked tokens."""
    arguments = _arguments(tokens)
    found: list[str] = []
    roots: list[bool] = []  # whether each open square bracket is the index of a root
    index = 0
    while index < len(tokens):
        token = tokens[index]
        before = tokens[index - 1] if index else Token("", "")
        if index not in arguments and _multiplies(before, token):
            found.append(r"\cdot")
        mixed = _mixed(tokens, index) if token.kind == "number" else 0
        if mixed:
            found += ["(", token.text, "+", latex_of(tokens[index + 1 : mixed]), ")"]
            index = mixed
            continue
        if token.kind in ("number", "letter") and _are_degrees(tokens, index + 1):
            found += ["(", _written(token, Token("", "")), r"\cdot \frac { \pi } { 180 }", ")"]
            index += 5
            continue
        if token.text == "[":
            roots.append(before.text == r"\sqrt")
            found.append("[" if roots[-1] else "(")
        elif token.text == "]":
            found.append("]" if roots and roots.pop() else ")")
        else:
            found.append(_written(token, tokens[index + 1] if index + 1 < len(tokens) else Token("", "")))
        index += 1
    return " ".join(found)


def _are_degrees(tokens: list[Token], at: int) -> bool:
    r"""Whether ^{\circ} stands at `at`."""
    return [token.text for token in tokens[max(at, 0) : at + 4]] == ["^", "{", r"\circ", "}"]


def _arguments(tokens: list[Token]) -> set[int]:
    """Where the arguments of functions begin: the 8 of \\log_{2} 8 is no factor."""
    found = set()
    for index, token in enumerate(tokens):
        if token.text in APPLIED:
            at = index + 1
            while at + 1 < len(tokens) and tokens[at].text in ("^", "_"):
                at = closing(tokens, at + 1) + 1
            found.add(at)
    return found


def _multiplies(before: Token, token: Token) -> bool:
    ends = before.kind == "number" or before.text in _ENDS_OPERAND
    return ends and (token.kind == "number" or token.text in _BEGINS_OPERAND)


def _mixed(tokens: list[Token], index: int) -> int:
    """Where the mixed number that begins at `index` ends; 0 where none does."""
    after = tokens[index + 1 : index + 10]
    shape = _PLAIN_FRACTION.match("".join("n" if token.kind == "number" else token.text for token in after))
    if shape is None:
        return 0
    length = 7 + sum(shape[0].count(sign) for sign in SIGNS)
    part = number(after[:length])
    if part is None or not 0 < part < 1 or not is_whole(tokens[index].text):
        raise Unreadable("a number beside a fraction")
    return index + 1 + length


def _written(token: Token, after: Token) -> str:
    if token.kind == "number":
        return _exact(token.text)
    is_named_e = token.text in ("e", "E") and after.text == "_"  # else the parser's number e
    return f"\\text{{{token.text}}}" if token.kind == "word" or is_named_e else token.text


def _exact(text: str) -> str:
    if is_whole(text):
        return text
    value = decimal(text)
    return f"( \\frac{{{value.numerator}}}{{{value.denominator}}} )" if value.denominator > 1 else str(value.numerator)
