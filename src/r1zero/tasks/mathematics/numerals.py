"""Tokens that are a plain number, as an exact fraction."""

import re
from fractions import Fraction

from r1zero.tasks.mathematics.latex import SIGNS, Token, closing, is_whole
from r1zero.tasks.mathematics.values import Unreadable

MOST_DIGITS = 500  # of one number, and of its power of ten


def number(tokens: list[Token]) -> Fraction | None:
    """The exact value of a plain number, fraction, mixed number or number in scientific notation; else None."""
    sign = 1
    while tokens and tokens[0].text in SIGNS:
        sign, tokens = (-sign if tokens[0].text == "-" else sign), tokens[1:]
        if len(tokens) and tokens[0].text in SIGNS:
            return None  # --42 is no number that anybody writes
    value = _unsigned(tokens)
    return None if value is None else sign * value


def _unsigned(tokens: list[Token]) -> Fraction | None:
    texts = [token.text for token in tokens]
    kinds = [token.kind for token in tokens]
    if len(tokens) == 1 and kinds[0] == "number":
        return decimal(texts[0])
    if len(tokens) == 3 and texts[1] == "/" and kinds[0] == kinds[2] == "number":
        return _quotient(texts[0], texts[2])
    if texts[:2] == [r"\frac", "{"]:
        return _fraction(tokens)
    if len(tokens) > 2 and kinds[0] == "number" and is_whole(texts[0]):
        # 3\frac{1}{2}, 3 1/2; 3 7/2 and 3\frac{x}{2} are no mixed numbers.
        rest = tokens[1:]
        part = None
        if texts[1] == r"\frac":
            part = _fraction(rest)
        elif len(rest) == 3 and rest[0].spaced and is_whole(texts[1]) and texts[2] == "/" and is_whole(texts[3]):
            part = _quotient(texts[1], texts[3])
        if part is not None and 0 < part < 1:
            return int(texts[0]) + part
    if (
        len(tokens) == 6
        and texts[1] in (r"\cdot", r"\times")
        and texts[2:5] == ["10", "^", "{"]
        and kinds[0] == "number"
    ):
        return None
    return _scientific(tokens) or _repeating(tokens)


def _fraction(tokens: list[Token]) -> Fraction | None:
    """\\frac{a}{b} of two plain numbers, each with a sign at most."""
    middle = closing(tokens, 1)
    if middle + 1 >= len(tokens) or tokens[middle + 1].text != "{" or closing(tokens, middle + 1) != len(tokens) - 1:
        return None
    above, below = tokens[2:middle], tokens[middle + 2 : -1]
    values = []
    for part in (above, below):
        sign = -1 if part and part[0].text == "-" else 1
        if part and part[0].text in SIGNS:
            part = part[1:]
        if len(part) != 1 or part[0].kind != "number":
            return None
        values.append(sign * decimal(part[0].text))
    if values[1] == 0:
        raise Unreadable("a fraction over zero")
    return values[0] / values[1]


def _quotient(above: str, below: str) -> Fraction:
    if decimal(below) == 0:
        raise Unreadable("a fraction over zero")
    return decimal(above) / decimal(below)


def _scientific(tokens: list[Token]) -> Fraction | None:
    r"""4.2 \times 10^{3}, and 10^{3} alone."""
    if len(tokens) > 2 and tokens[0].kind == "number" and tokens[1].text in (r"\cdot", r"\times"):
        power = _power_of_ten(tokens[2:])
        return None if power is None else decimal(tokens[0].text) * power
    return _power_of_ten(tokens)


def _power_of_ten(tokens: list[Token]) -> Fraction | None:
    texts = [token.text for token in tokens]
    if texts[:3] != ["10", "^", "{"] or texts[-1:] != ["}"]:
        return None
    exponent = "".join(texts[3:-1])
    if not re.fullmatch(r"[+-]?[0-9]{1,3}", exponent) or abs(int(exponent)) > MOST_DIGITS:
        return None
    return Fraction(10) ** int(exponent)


def _repeating(tokens: list[Token]) -> Fraction | None:
    r"""0.1\overline{6}."""
    texts = [token.text for token in tokens]
    if len(texts) != 5 or texts[1:3] != [r"\overline", "{"] or texts[4] != "}" or not is_whole(texts[3]):
        return None
    if tokens[0].kind != "number" or "." not in texts[0] or "e" in texts[0].lower():
        return None
    places = len(texts[0].partition(".")[2])
    return decimal(texts[0]) + Fraction(int(texts[3]), (10 ** len(texts[3]) - 1) * 10**places)


def decimal(text: str) -> Fraction:
    mantissa, _, exponent = text.lower().partition("e")
    power = exponent.lstrip("+-").lstrip("0")
    if len(mantissa) > MOST_DIGITS or len(power) > len(str(MOST_DIGITS)) or int(power or 0) > MOST_DIGITS:
        raise Unreadable(f"a number of more than {MOST_DIGITS} digits")
    return Fraction(text if not mantissa.endswith(".") else f"{mantissa}0e{exponent or 0}")
