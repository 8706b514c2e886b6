"""What sympy and math-verify decide, for `equivalence`. Imported only in processes that can be killed."""

import logging
import random
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import Abs, Basic, Expr, Float, I, Rational, Symbol, exp, expand, nan, oo, simplify, together, zoo
from sympy.core.relational import Relational

from r1zero.tasks.mathematics import equivalence
from r1zero.tasks.mathematics.values import Unreadable

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off

# As it is written: X is not x, and nothing is unpacked that `equivalence` did not unpack.
_CONVERSION = ConversionConfig(
    interpret_as_mixed_fractions=False,
    interpret_simple_eq_as_assignment=False,
    interpret_contains_as_eq=False,
    lowercase_symbols=False,
)
_LETTER_I = Symbol("i", real=True)  # the imaginary unit, as the parser leaves it
_POINTS = 3  # where two expressions are compared by number before algebra is tried
_DIGITS = 60
_ROUNDING = Float("1e-40")
_MODEST = 1000
_NO_NUMBERS = (oo, -oo, zoo, nan)


def decide(gold: str, answer: str | None) -> str | None:
    """What a worker process is asked: `compare`, or `check` where there is no answer."""
    return check(gold) if answer is None else compare(gold, answer)


def compare(gold: str, answer: str) -> str:
    """ "correct", "wrong", or "unparsed" where the answer does not read as one."""
    try:
        return "correct" if equivalence.same(gold, answer, same_expression) else "wrong"
    except Unreadable:
        return "unparsed"


def check(gold: str) -> str | None:
    """None where the gold can be read and is equal to itself; else why not."""
    try:
        equivalence.check(gold, same_expression)
    except Unreadable as error:
        return str(error)
    return None


def warm_up() -> None:
    """Build the parser's tables before the first answer: an answer of a new shape takes four times as long."""
    for latex in _SHAPES:
        same_expression(latex, latex)
    compare(r"\frac{\sqrt{3}}{2} + x^2", r"x^2 + \sqrt{3}/2 + \sin^2 x - \sin^2 x")
    compare("y = 2x", "2x - y = 0")
    for gold, answer in _REWRITTEN:
        compare(gold, answer)


_SHAPES = (
    r"\frac { a _ { 1 } ^ { 2 } e ^ { - b t } } { \sqrt { 1 - c ^ { 2 } } } \cos ( \omega t + \pi / 4 )",
    r"\ln 3 - \log _ { 2 } 8",
    r"\lambda _ { n } ^ { 2 } e ^ { - \beta \lambda _ { n } t } \sin ( \lambda _ { n } \sqrt { 1 - \beta ^ { 2 } } t )",
    r"\lfloor \frac { n } { 2 } \rfloor + | x - 3 | + \binom { n } { 2 } + 5 ! - \sqrt [ 3 ] { 4 } \cdot 10 ^ { - 2 }",
    r"- \frac { 3 } { 4 } ( a + b ) ( c - d ) / 2 + 6 \pi i",
    r"2 x - 3 y \le 7",
)


# What sympy simplifies in its own ways, each of which imports and remembers much at first.
_REWRITTEN = (
    ("x + 1", r"\frac{x^2 - 1}{x - 1}"),
    (r"2 \sqrt{2} + \sqrt{3}", r"\sqrt{8} + \frac{3}{\sqrt{3}}"),
    (r"\cos 2 x", r"1 - 2 \sin^2 x"),
    (r"\ln 6 + \log_2 x", r"\ln 2 + \ln 3 + \frac{\ln x}{\ln 2}"),
    (r"\sqrt{5 + 2 \sqrt{6}}", r"\sqrt{2} + \sqrt{3}"),
    (r"n (n + 1) / 2", r"\binom{n + 1}{2}"),
    (r"e^{i \pi / 3}", r"\frac{1 + i \sqrt{3}}{2}"),
    (r"\frac{a^{3 x}}{2^{-n}}", r"(a^x)^3 \cdot 2^n"),
    (r"y = \frac{1}{x}", "x y = 1"),
    (r"2 x < 4 - y", r"x + \frac{y}{2} < 2"),
)


def same_expression(gold: str, answer: str) -> bool:
    """Whether two expressions, equations or inequalities are equal for all values of their symbols."""
    expected, given = _parsed(gold), _parsed(answer)
    if isinstance(expected, Relational) and isinstance(given, Relational):
        return _same_relation(expected, given)
    if not isinstance(expected, Expr) or not isinstance(given, Expr):
        return bool(verify(expected, given, timeout_seconds=None))
    if expected.has(*_NO_NUMBERS) or given.has(*_NO_NUMBERS):
        return expected == given and expected in (oo, -oo)
    return not _differ_by_number(expected, given) and _is_zero(expected - given)


def _same_relation(expected: Relational, given: Relational) -> bool:
    """Whether the differences of the two sides are multiples of each other, in the right direction."""
    one, other = expected.lhs - expected.rhs, given.lhs - given.rhs
    if expected.rel_op == given.rel_op == "==":
        # y = 1/x is xy = 1: what divides both sides says nothing about where they are equal.
        factor = _constant_ratio(*(together(side.doit()).as_numer_denom()[0] for side in (one, other)))
        return factor is not None and factor.is_zero is False
    factor = _constant_ratio(one, other)
    if factor is None:
        return False
    if expected.rel_op == given.rel_op:
        return bool(factor.is_positive)
    return bool(expected.rel_op == given.reversed.rel_op and factor.is_negative)


def _constant_ratio(one: Expr, other: Expr) -> Expr | None:
    """one / other where that is a number for all values of the symbols, else None."""
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    rng = random.Random(0)
    values = []
    for _ in range(_POINTS):  # most that are wrong are found so, and simplify is slow
        at = {symbol: 2 + Rational(rng.randrange(1, 1000), 997) for symbol in symbols}
        values.append((one / other).subs(at).evalf(_DIGITS))
    if not all(value.is_Float for value in values) or Abs(values[0] - values[-1]) > Abs(values[0]) * _ROUNDING:
        return None
    factor = simplify(one / other)
    return None if factor.free_symbols or factor.is_finite is False else factor


def _is_zero(difference: Expr) -> bool:
    r"""Whether an expression that is zero as far as numbers can tell is zero.

    Two numbers may agree to any number of digits and differ, as \pi and \pi + 10^{-99} do. So algebra has to prove it;
    a constant that holds only numbers of few digits may be shown by numbers, which cannot agree so far by chance.
    """
    difference = difference.doit()
    if difference.has(*_NO_NUMBERS):
        return False
    if difference == 0 or expand(difference) == 0 or expand(difference.rewrite(exp)) == 0 or simplify(difference) == 0:
        return True
    if difference.free_symbols or not _is_modest(difference):
        return False
    size = Abs(difference.evalf(_DIGITS))
    return bool(size.is_number and size < _ROUNDING)


def _is_modest(expression: Expr) -> bool:
    """Whether it holds only numbers of few digits."""
    numbers = expression.atoms(Rational)
    return not expression.atoms(Float) and all(abs(each.p) < _MODEST and each.q < _MODEST for each in numbers)


@lru_cache(maxsize=1024)
def _parsed(latex: str) -> Any:
    try:
        parsed = latex2sympy(
            latex, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONVERSION
        )
    except RecursionError:
        raise Unreadable("nested too deep") from None
    except MemoryError:
        raise
    except Exception as error:  # antlr, sympy and the grammar raise many kinds
        raise Unreadable(f"sympy cannot read it: {type(error).__name__}") from error
    if not isinstance(parsed, Basic) or parsed in (nan, zoo):
        raise Unreadable("no value")
    return parsed.subs(_LETTER_I, I)


def _differ_by_number(one: Any, other: Any) -> bool:
    """Whether the two differ at some point by more than rounding can. False where that cannot be told."""
    if not isinstance(one, Expr) or not isinstance(other, Expr):
        return False
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    rng = random.Random(0)
    for _ in range(_POINTS if symbols else 1):
        at = {symbol: 2 + Rational(rng.randrange(1, 1000), 997) for symbol in symbols}
        try:
            a, b = (each.subs(at).evalf(_DIGITS) for each in (one, other))
            distance, size = Abs(a - b), Abs(a) + Abs(b) + 1  # a zero comes out as some 1e-70
            if not (distance.is_Float and size.is_Float):
                return False  # a value that is no number, or none at that point
        except (TypeError, ValueError, OverflowError, AttributeError, ZeroDivisionError):
            return False
        if distance > size * _ROUNDING:
            return True
    return False
