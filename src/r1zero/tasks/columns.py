"""What the tasks read from the columns of a row: texts, golds, worked solutions."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from r1zero.tasks.problem import DatasetError

_ONE_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)


@dataclass(frozen=True)
class Columns:
    """The columns that a recipe names; None leaves one to the task."""

    question: str | None = None
    answer: str | None = None
    solution: str | None = None


def text(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds a text, None where none does.

    A list, such as OlympiadBench's solutions, stands for its first member.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value
    return None


def gold(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these columns that holds an answer, as text; None where none does.

    A whole float is written as an integer, any other number without an exponent. The members of a list are joined by
    commas. Dollar signs around a formula are dropped, what is inside stays as it is.

    >>> gold({"answer": 27.0}, ["answer"]), gold({"final_answer": ["$2n$"]}, ["answer", "final_answer"])
    ('27', '2n')
    """
    for name in names:
        value = row.get(name)
        members = value if isinstance(value, list) else [value]
        texts = [_one_gold(member) for member in members]
        if texts and all(texts):
            return ", ".join(texts)
    return None


def _one_gold(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    return without_dollars(str(value).strip())


def without_dollars(answer: str) -> str:
    r"""An answer that is formulas and nothing else, without the dollar signs around them; any other as it is.

    >>> without_dollars("$69$,$84$"), without_dollars(r"$x$ or $y$"), without_dollars(r"\$18")
    ('69, 84', '$x$ or $y$', '\\$18')
    """
    if r"\$" in answer:
        return answer
    between = _ONE_FORMULA.sub("", answer)
    if between == answer or between.strip(" ,;."):
        return answer
    return ", ".join(next(filter(None, found)).strip() for found in _ONE_FORMULA.findall(answer))


def missing(place: str, what: str, names: Iterable[str], row: Mapping[str, Any], key: str) -> DatasetError:
    """The error of a row without `what`, which was looked for in `names`."""
    looked = " or ".join(names)
    held = [f"column {name} holds {repr(row[name])[:60]}" for name in names if name in row]
    has = " and ".join(held) or f"there is no column {looked}, there are {list(row)}"
    return DatasetError(f"{place}: no {what}: {has}; name the column that holds it with {key}")


def refuse_gsm8k_form(place: str, answer: str) -> None:
    """A gold of GSM8K's form is a worked solution with the gold at its end: no answer could ever equal it.

    Raises:
        DatasetError: where it is of that form.
    """
    if "####" in answer:
        raise DatasetError(f"{place}: the gold {answer[-60:]!r} has GSM8K's form, which task gsm8k reads")
