r"""Whether an answer is the gold: structure by structure here, expression against expression by math-verify.

Lists are compared element by element with the same count, so nothing can hide in a set; numbers are exact fractions, so
0.3333 is not 1/3; a unit, a name or a base counts where both sides give one. `compare` runs without sympy as long as no
two expressions have to be compared: it then asks the function that it was given.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from fractions import Fraction

from r1zero.tasks.mathematics.notation import in_alphabet, plain, read
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

MOST_WORDS = 6  # of a gold
SameExpression = Callable[[str, str], bool]  # LaTeX of the gold, LaTeX of the answer


def same(gold: str, answer: str, same_expression: SameExpression) -> bool:
    """Whether `answer` says what `gold` says.

    Args:
        gold: trusted text, LaTeX or plain.
        answer: a model's text.
        same_expression: asked for what only algebra can tell; may raise.

    Raises:
        Unreadable: when the answer is not one answer in a known notation, and not the gold's own text.
    """
    try:
        if plain(gold) == plain(answer):
            return True
        read_gold = read(gold)
    except Unreadable:
        # Such a gold can only be matched as it is written.
        read(answer)
        return gold.strip() == answer.strip()
    return same_answer(read_gold, read(answer), same_expression)


def is_number(text: str) -> bool:
    """Whether a text is a plain number, perhaps with its unit or as x = 7."""
    answer = read(text)
    return isinstance(answer.value if isinstance(answer, Assignment) else answer, Number)


def check(gold: str, same_expression: SameExpression) -> None:
    """That a gold can be read and equals itself by value, not because it is the same text.

    Raises:
        Unreadable: when it cannot, or does not.
    """
    if gold.rstrip().endswith("\\"):
        raise Unreadable("a backslash at its end: no box could hold it")
    answer = read(gold)
    _check_words(answer)
    if not same_answer(answer, answer, same_expression):
        raise Unreadable("does not equal itself")


def _check_words(gold: Answer) -> None:
    """A gold may be a few words, such as \\text{June 20}, but not a sentence, nor words among values."""
    if isinstance(gold, Text) and len(gold.words.split()) > MOST_WORDS:
        raise Unreadable(f"a text of more than {MOST_WORDS} words")
    if isinstance(gold, Expression) and gold.names in ("nan", "none", "null"):
        raise Unreadable("no value")
    if isinstance(gold, Relation) and not any(letter.isalpha() for side in gold.sides for letter in side):
        raise Unreadable("a relation without a symbol")
    if isinstance(gold, Sequence):
        texts = [isinstance(item, Text) or len(getattr(item, "names", "")) > 1 for item in gold.items]
        if any(texts) and not all(texts):
            raise Unreadable("words among values")


def same_answer(gold: Answer, answer: Answer, ask: SameExpression) -> bool:
    gold, answer = _common_form(gold, answer)
    match gold, answer:
        case Number(), Number():
            return _same_number(gold, answer)
        case Number() | Expression(), Number() | Expression():
            if not _same_unit(gold.unit, answer.unit) or gold.percent != answer.percent:
                return False
            return ask(_as_latex(gold), _as_latex(answer))
        case Text(), Text():
            return gold.words == answer.words
        case Text(), Expression():
            return gold.words == answer.names
        case Expression(), Text():
            return gold.names == answer.words
        case Based(), Based():
            return (gold.base, gold.digits.lstrip("0")) == (answer.base, answer.digits.lstrip("0"))
        case Based(), Number():
            # The question names the base; digits alone are what was asked for.
            return answer == Number(Fraction(gold.digits))
        case Number(), Based():
            return answer.base == 10 and gold == Number(Fraction(answer.digits))
        case Assignment(), Assignment():
            return gold.name == answer.name and same_answer(gold.value, answer.value, ask)
        case Relation(), Relation() if len(gold.sides) == len(answer.sides) == 2:
            return ask(_relation_latex(gold), _relation_latex(answer))
        case Sequence(), Sequence():
            return _same_sequence(gold, answer, ask)
        case Union(), Union():
            return _same_items(gold.parts, answer.parts, ask, ordered=False)
        case Matrix(), Matrix():
            shape = [len(row) for row in gold.rows]
            return shape == [len(row) for row in answer.rows] and all(
                _same_items(one, other, ask, ordered=True) for one, other in zip(gold.rows, answer.rows, strict=True)
            )
        case _:
            return False


def _common_form(gold: Answer, answer: Answer) -> tuple[Answer, Answer]:
    """x = 7 and 7 as 7 and 7; an equation beside an assignment as two equations; a column beside a tuple as tuples."""
    if isinstance(gold, Assignment) and isinstance(answer, Relation):
        gold = _as_relation(gold)
    elif isinstance(gold, Relation) and isinstance(answer, Assignment):
        answer = _as_relation(answer)
    elif isinstance(gold, Assignment) and isinstance(answer, Assignment):
        if gold.name != answer.name and isinstance(gold.value, Expression) and isinstance(answer.value, Expression):
            # y = -2x may come as x = -y/2.
            gold, answer = _as_relation(gold), _as_relation(answer)
    elif isinstance(answer, Assignment) and not isinstance(gold, Text):
        answer = answer.value
    elif isinstance(gold, Assignment):
        gold = gold.value
    if isinstance(gold, Matrix) and isinstance(answer, Sequence) and answer.brackets in ("()", "<>"):
        gold = _as_tuple(gold)
    elif isinstance(answer, Matrix) and isinstance(gold, Sequence) and gold.brackets in ("()", "<>"):
        answer = _as_tuple(answer)
    return gold, answer


def _as_relation(answer: Assignment) -> Answer:
    if not isinstance(answer.value, (Number, Expression)):
        return answer
    return Relation((answer.name, _as_latex(answer.value)), ("=",))


def _as_tuple(matrix: Matrix) -> Answer:
    if len(matrix.rows) > 1 and len(matrix.rows[0]) > 1:
        return matrix
    return Sequence("()", tuple(cell for row in matrix.rows for cell in row))


def _same_unit(gold: str, answer: str) -> bool:
    return not gold or not answer or gold == answer


def _same_number(gold: Number, answer: Number) -> bool:
    r"""Equal values; one reading of a percent sign for each gold.

    42\% is 42 where the gold is 42, or 42\%; where the gold is a share (0.5, \frac12) it is its hundredth.
    """
    if not _same_unit(gold.unit, answer.unit):
        return False
    if gold.percent == answer.percent:
        return gold.value == answer.value
    if gold.percent:
        is_share = 0 < abs(answer.value) < 1 and abs(gold.value) >= 1
        return gold.value == (answer.value * 100 if is_share else answer.value)
    is_share = 0 < abs(gold.value) < 1
    return gold.value == (answer.value / 100 if is_share else answer.value)


def _same_sequence(gold: Sequence, answer: Sequence, ask: SameExpression) -> bool:
    if gold.ordered and answer.ordered:
        tuples = {"()", "<>"}
        brackets = gold.brackets == answer.brackets or {gold.brackets, answer.brackets} == tuples
        return brackets and _same_items(gold.items, answer.items, ask, ordered=True)
    if gold.ordered != answer.ordered:
        # 1, 2 for (1, 2), or the other way round: the same values in the same order; x = 1, y = 2 as well.
        loose = {gold.brackets, answer.brackets} in ({"", "()"}, {"", "<>"})
        names = [item.name for item in (*gold.items, *answer.items) if isinstance(item, Assignment)]
        return loose and in_alphabet(names) and _same_items(gold.items, answer.items, ask, ordered=True)
    return _same_items(gold.items, answer.items, ask, ordered=False)


def _same_items(gold: Items[Answer], answer: Items[Answer], ask: SameExpression, ordered: bool) -> bool:
    if len(gold) != len(answer):
        return False
    if ordered:
        return all(same_answer(one, other, ask) for one, other in zip(gold, answer, strict=True))
    left = list(answer)
    for one in sorted(gold, key=lambda item: isinstance(item, Expression)):
        # What is written alike first: algebra is slow.
        found = next((each for each in left if each == one), None)
        if found is None:
            found = next((each for each in left if same_answer(one, each, ask)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _as_latex(answer: Number | Expression) -> str:
    if isinstance(answer, Expression):
        return answer.latex
    value = answer.value
    return f"{value.numerator}" if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _relation_latex(relation: Relation) -> str:
    return " ".join((relation.sides[0], relation.signs[0], relation.sides[1]))
