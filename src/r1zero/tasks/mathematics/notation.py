r"""How an answer is written: from LaTeX or plain text to a value, a text, a list, an interval, or an expression.

A grammar, not a guess: what it does not know it refuses (`Unreadable`), so that ``42\text{ million}``,
``42 (could also be 17)`` or ``7=42`` never read as 42. Numbers are exact fractions; nothing is evaluated here, and the
work is bounded by the length of the text, so that it can run in the trainer itself. What is left over are expressions:
LaTeX of known commands only, which `algebra` hands to math-verify.
"""

import functools
import itertools

from r1zero.tasks.mathematics.expressions import checked, latex_of
from r1zero.tasks.mathematics.latex import (
    APPLIED,
    GREEK,
    KNOWN_COMMANDS,
    OPENING,
    RELATIONS,
    SIGNS,
    Token,
    closing,
    is_whole,
    prepared,
    split,
)
from r1zero.tasks.mathematics.numerals import number
from r1zero.tasks.mathematics.units import ADJECTIVES, CURRENCIES, UNITS
from r1zero.tasks.mathematics.values import (
    Answer,
    Assignment,
    Based,
    Expression,
    Matrix,
    Number,
    Relation,
    Sequence,
    Text,
    Union,
    Unreadable,
)

MOST_ITEMS = 64


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Answer:
    r"""What an answer says.

    >>> read("x = 7")
    Assignment(name='x', value=Number(value=Fraction(7, 1), unit='', percent=False))
    >>> read(r"\frac43").value
    Fraction(4, 3)

    Raises:
        Unreadable: where it says nothing, or more than one thing, or something in a notation unknown here.
    """
    return _answer(prepared(text))


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    r"""The text as far as spaces and typography do not matter: two answers with equal plain text are the same.

    >>> plain(r"$\left( 3, \dfrac{\pi}{2} \right)$") == plain(r"(3,\frac{\pi}2)")
    True

    Raises:
        Unreadable: as `read`.
    """
    return " ".join(token.text for token in prepared(text))


def _answer(tokens: list[Token]) -> Answer:
    """A list, or a single answer."""
    parts, separators = split(tokens, _BETWEEN)
    if not separators:
        return _single(tokens)
    if all(token.kind in ("word", "letter", "command") and token.text not in KNOWN_COMMANDS for token in tokens):
        return _text(tokens)  # "yes and no" is a sentence, not two answers
    # In "1, 2, and 3" two separators stand together.
    kept = [
        part
        for index, part in enumerate(parts)
        if part or index == 0 or separators[index - 1 : index + 1] != [",", r"\and"]
    ]
    return _joined(_items(kept)) if set(separators) == {r"\or"} else Sequence("", _items(kept))


def _joined(items: tuple[Answer, ...]) -> Answer:
    """x < -2 or x > 2 as a union of intervals, other alternatives as a list."""
    named = [item for item in items if isinstance(item, Assignment) and isinstance(item.value, Sequence)]
    if len(named) == len(items) and len({item.name for item in named}) == 1:
        return Assignment(named[0].name, Union(tuple(item.value for item in named)))
    return Sequence("or", items)


_BETWEEN = frozenset((",", ";", r"\or", r"\and"))


def _items(parts: list[list[Token]]) -> tuple[Answer, ...]:
    if len(parts) > MOST_ITEMS:
        raise Unreadable(f"more than {MOST_ITEMS} elements")
    items: list[Answer] = []
    for part in parts:
        item = _single(part)
        # \{1 \pm \sqrt5, -2\} has three elements.
        items += item.items if isinstance(item, Sequence) and item.brackets in ("", "or") else (item,)
    return tuple(items)


def _single(tokens: list[Token]) -> Answer:
    if not tokens:
        raise Unreadable("nothing where an answer should be")
    parts, _ = split(tokens, (r"\cup",))
    if len(parts) > 1:
        return Union(tuple(_single(part) for part in parts))
    parts, _ = split(tokens, (":",))
    if len(parts) > 1:
        return Sequence(":", _items(parts))
    if [token.text for token in tokens] == [r"\emptyset"]:
        return Sequence("{}", ())
    sides, signs = split(tokens, RELATIONS)
    if signs:
        return _relation(sides, [RELATIONS[sign] for sign in signs])
    if tokens[0].text == r"\begin":
        return _matrix(tokens)
    if tokens[0].kind in ("command", "punctuation") and tokens[0].text in OPENING and tokens[0].text != "{":
        end = closing(tokens, 0)
        if end == len(tokens) - 1 and (bracketed := _bracketed(tokens)) is not None:
            return bracketed
    count = sum(token.text == r"\pm" for token in tokens)
    if count == 1:
        both = [[Token("punctuation", sign) if token.text == r"\pm" else token for token in tokens] for sign in "+-"]
        return Sequence("", tuple(_single(one) for one in both))
    return _scalar(tokens)


def _bracketed(tokens: list[Token]) -> Answer | None:
    """A tuple, interval or set; None where the brackets only group."""
    opening, closing, inner = tokens[0].text, tokens[-1].text, tokens[1:-1]
    if opening == r"\{":
        return Sequence("{}", _items(split(inner, (",", ";"))[0]) if inner else ())
    if opening not in ("(", "[", r"\langle"):
        return None
    parts, separators = split(inner, (",", ";"))
    if separators:
        return Sequence("<>" if opening == r"\langle" else opening + closing, _items(parts))
    if opening + closing == "()":
        return _single(inner)
    raise Unreadable("brackets around a single answer")


def _relation(sides: list[list[Token]], signs: list[str]) -> Answer:
    if signs == ["="] or signs == [r"\in"]:
        name = _name(sides[0])
        if name and not _mentions(sides[1], name):
            value = _single(sides[1])
            if signs == [r"\in"] and isinstance(value, Number):
                raise Unreadable("a number is no set")
            return Assignment(name, value)
        if signs == ["="] and (values := _named_tuple(*sides)) is not None:
            return values
    if len(signs) > 1 and ("=" in signs or r"\in" in signs):
        raise Unreadable("a chain of equations")
    if (interval := _interval(sides, signs)) is not None:
        return interval
    if r"\in" in signs or len(signs) > 2:
        raise Unreadable("a chain of relations")
    return Relation(tuple(latex_of(checked(side)) for side in sides), tuple(signs))


def in_alphabet(names: list[str]) -> bool:
    """Whether symbols stand in the order in which a tuple gives their values: y = 1, x = 2 is the point (2, 1)."""
    keys = [name.lstrip("\\") for name in names]
    return all(keys) and all(one < other for one, other in itertools.pairwise(keys))


def _interval(sides: list[list[Token]], signs: list[str]) -> Answer | None:
    """An inequality of one lone symbol as the interval that it describes."""
    if not all(sign in ("<", ">", r"\le", r"\ge") for sign in signs):
        return None
    if len(signs) == 1:
        name, end, sign = _name(sides[0]), sides[1], signs[0]
        if not name:
            name, end, sign = _name(sides[1]), sides[0], _FLIPPED[signs[0]]
        if not name or (_name(sides[0]) and _name(sides[1])):
            return None
        bound, strict = _single(end), sign in "<>"
        if sign in ("<", r"\le"):
            return Assignment(name, Sequence("()" if strict else "(]", (Expression(r"-\infty"), bound)))
        return Assignment(name, Sequence("()" if strict else "[)", (bound, Expression(r"\infty"))))
    if len(signs) == 2 and (name := _name(sides[1])):
        low, high = sides[0], sides[2]
        first, second = signs
        if first in (">", r"\ge") and second in (">", r"\ge"):
            low, high, first, second = high, low, _FLIPPED[second], _FLIPPED[first]
        if first in ("<", r"\le") and second in ("<", r"\le"):
            brackets = ("(" if first == "<" else "[") + (")" if second == "<" else "]")
            return Assignment(name, Sequence(brackets, (_single(low), _single(high))))
    return None


def _mentions(tokens: list[Token], name: str) -> bool:
    """Whether x stands on the right as well: x = 2x + 3 does not say what x is."""
    return name in [token.text for token in tokens]


def _named_tuple(names: list[Token], values: list[Token]) -> Answer | None:
    """(x, y) = (1, 2) as the tuple."""
    if [token.text for token in names[:1] + names[-1:]] != ["(", ")"]:
        return None
    parts, _ = split(names[1:-1], (",",))
    value = _single(values)
    if not isinstance(value, Sequence) or value.brackets != "()" or len(parts) != len(value.items):
        return None
    return value if in_alphabet([_name(part) for part in parts]) else None


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


# Words that may stand for a symbol on the left of an equation. "not" = 42 is another matter.
_QUANTITIES = frozenset(
    ("answer", "ans", "area", "volume", "perimeter", "length", "width", "height", "distance", "speed", "time", "cost")
) | {"probability", "total", "sum", "product", "mean", "median", "slope", "radius", "profit"}


def _name(tokens: list[Token]) -> str:
    r"""The lone symbol that the tokens are: x, \theta, a_1, x', AB, f(x), \angle ABC, area; "" for anything else."""
    if tokens and tokens[0].text == r"\angle":
        tokens = tokens[1:]
    if not tokens:
        return ""
    head = 0
    while head < len(tokens) and (tokens[head].kind == "letter" or tokens[head].text[1:] in GREEK):
        head += 1
    if head == 0 and tokens[0].kind == "word" and tokens[0].text.lower() in _QUANTITIES:
        head = 1
    if head == 0 or (head > 1 and any(token.kind == "command" for token in tokens[:head])):
        return ""
    if head > 1 and any(token.kind == "letter" and not token.text.isupper() for token in tokens[:head]):
        return ""  # ab = 42 is a product
    rest = tokens[head:]
    name = " ".join(token.text for token in tokens[:head])
    while rest and rest[0].text == "'":
        name, rest = name + "'", rest[1:]
    if len(rest) >= 3 and rest[0].text == "_":
        end = closing(rest, 1)
        name, rest = name + "_" + "".join(token.text for token in rest[2:end]), rest[end + 1 :]
    if rest and rest[0].text == "(" and closing(rest, 0) == len(rest) - 1 and (argument := _name(rest[1:-1])):
        return f"{name}({argument})"
    return "" if rest else name


_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "array", "smallmatrix"))


def _matrix(tokens: list[Token]) -> Answer:
    if tokens[-1].text != "}" or len(tokens) < 8:
        raise Unreadable("an environment that is not closed")
    kind = tokens[2].text
    if [token.text for token in tokens[1:4]] != ["{", kind, "}"] or kind not in _MATRICES:
        raise Unreadable(f"the environment {kind!r}")
    if [token.text for token in tokens[-4:]] != [r"\end", "{", kind, "}"]:
        raise Unreadable("an environment that is not closed")
    rows, _ = split(tokens[4:-4], ("\\\\",))
    if rows and not rows[-1]:
        rows = rows[:-1]
    cells = [split(row, ("&",))[0] for row in rows]
    if len({len(row) for row in cells}) != 1 or sum(map(len, cells)) > MOST_ITEMS:
        raise Unreadable("rows of different length, or too many entries")
    return Matrix(tuple(tuple(_single(cell) for cell in row) for row in cells))


def _scalar(tokens: list[Token]) -> Answer:
    """A number with its unit, words, digits with a base, or an expression."""
    core, unit, percent = _without_unit(tokens)
    if core and (value := number(core)) is not None:
        return Number(value, unit, percent)
    if len(core) == 5 and [t.kind[0] for t in core[:3]] == ["n", "p", "p"] and core[1].text == "_":
        base = _BASES.get(core[3].text, core[3].text)
        if is_whole(core[0].text) and is_whole(base) and 2 <= int(base[:3]) <= 36:
            return Based(core[0].text, int(base))
        raise Unreadable("digits with a base that is none")
    if any(token.kind == "word" for token in tokens) and _is_text(tokens):
        return _text(tokens)
    return Expression(latex_of(checked(core)), unit, percent, _letters_only(core))


_BASES = {
    word: str(base)
    for base, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), start=2)
}


def _is_text(tokens: list[Token]) -> bool:
    if tokens[0].kind == "number":
        return False  # "42 million", "42 (could also be 17)": neither a number nor words
    return all(token.kind in ("word", "letter", "number") or token.text in _IN_SENTENCES for token in tokens)


_IN_SENTENCES = frozenset(("(", ")", "-", "'", ".", ",", "!", ":", r"\or", r"\and"))


def _text(tokens: list[Token]) -> Text:
    words = " ".join(token.text.lstrip("\\").lower() for token in tokens if token.text not in "().,!:'")
    return Text(words)


def _letters_only(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens).lower() if all(t.kind == "letter" for t in tokens) else ""


def _without_unit(tokens: list[Token]) -> tuple[list[Token], str, bool]:
    """Without currency, percent sign, degrees or unit; the unit; whether it was a percentage."""
    unit = ""
    sign = tokens[:1] if tokens[0].text in SIGNS else []
    rest = tokens[len(sign) :]
    if rest and rest[0].text in CURRENCIES:
        unit, tokens = CURRENCIES[rest[0].text], [*sign, *rest[1:]]
        if not rest[1:]:
            raise Unreadable("a currency without a number")
    if tokens[-1].text in (r"\%", "%") or tokens[-1].text.lower() == "percent":
        if unit:
            raise Unreadable("money in percent")
        return tokens[:-1], unit, True
    if tokens[-1].text in CURRENCIES:
        return tokens[:-1], CURRENCIES[tokens[-1].text], False
    if any(token.text in APPLIED for token in tokens):
        return tokens, unit, False  # in \\sin 30^\\circ the degrees are part of the argument
    scale = tokens[-1].text if len(tokens) > 5 and tokens[-1].text in ("C", "F") else ""
    bare = tokens[:-1] if scale else tokens
    if [token.text for token in bare[-4:]] == ["^", "{", r"\circ", "}"]:
        return bare[:-4], f"°{scale}", False
    if bare[-1].text == r"\circ":
        return bare[:-1], f"°{scale}", False
    for start in range(max(1, len(tokens) - 16), len(tokens)):
        found = _unit(tokens[start:])
        if found is not None and (tokens[start - 1].kind != "word"):
            return tokens[:start], unit or found, False
    return tokens, unit, False


def _unit(tokens: list[Token]) -> str | None:
    """The unit that the tokens are, all of them: cm, cm^2, m/s, square feet, miles per hour."""
    found: list[str] = []
    adjective = ""
    at = 0
    expected = True
    while at < len(tokens):
        word = tokens[at].text.lower()
        # km/h: after a stroke one letter is a unit, where alone it would be a symbol.
        if tokens[at].kind != "word" and not (tokens[at].kind == "letter" and found[-1:] == ["/"]):
            if expected or tokens[at].text not in ("/", r"\cdot"):
                return None
            found.append("/" if tokens[at].text == "/" else " ")
            at, expected = at + 1, True
            continue
        if word == "per" and not expected:
            found.append("/")
            at, expected = at + 1, True
            continue
        if word in ADJECTIVES and expected and not adjective:
            adjective, at = ADJECTIVES[word], at + 1
            continue
        if word not in UNITS:
            return None
        if not expected:
            found.append(" ")
        found.append(UNITS[word] + (adjective if UNITS[word] else ""))
        adjective, at, expected = "", at + 1, False
        power = [token.text for token in tokens[at : at + 5]]
        if len(power) >= 4 and power[:2] == ["^", "{"] and power[3] == "}" and is_whole(power[2]):
            found.append(f"^{power[2]}")
            at += 4
        elif len(power) == 5 and power[:3] == ["^", "{", "-"] and power[4] == "}" and is_whole(power[3]):
            found.append(f"^-{power[3]}")
            at += 5
    return None if expected else "".join(found)
