"""What an answer can say, once it is read: numbers, words, expressions, and what is built of them."""

from dataclasses import dataclass
from fractions import Fraction


class Unreadable(ValueError):
    """A text that is not one answer in a notation known here."""


@dataclass(frozen=True)
class Number:
    r"""A plain number, with the unit that it was given.

    >>> Number(Fraction(2469, 2), unit="$")  # read(r"\$1{,}234.50")
    Number(value=Fraction(2469, 2), unit='$', percent=False)
    """

    value: Fraction
    unit: str = ""
    percent: bool = False


@dataclass(frozen=True)
class Based:
    """Digits with their base.

    >>> Based("1011", 2)  # read("1011_2")
    Based(digits='1011', base=2)
    """

    digits: str
    base: int


@dataclass(frozen=True)
class Text:
    """Words, lower-cased: east, evelyn, (a) as a."""

    words: str


@dataclass(frozen=True)
class Expression:
    """LaTeX of known commands, numbers made exact; `names` is its text where it is letters only."""

    latex: str
    unit: str = ""
    percent: bool = False
    names: str = ""


@dataclass(frozen=True)
class Assignment:
    """A lone symbol (or a function of one, such as f(x)) and what it is or lies in: x = 7, x in [0, 1]."""

    name: str
    value: "Answer"


@dataclass(frozen=True)
class Relation:
    """An equation or inequality that is no assignment: sides and the signs between them, as LaTeX."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Sequence:
    r"""Several answers. Brackets: "" (a list), "{}" (a set), "()" "[]" "(]" "[)" (a tuple or an interval), "<>"."""

    brackets: str
    items: tuple["Answer", ...]

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "or", "{}")


@dataclass(frozen=True)
class Union:
    """Intervals joined, in any order."""

    parts: tuple["Answer", ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple["Answer", ...], ...]


Answer = Number | Based | Text | Expression | Assignment | Relation | Sequence | Union | Matrix
