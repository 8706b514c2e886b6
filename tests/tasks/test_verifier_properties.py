"""What holds for whatever a model may write: a verdict, the same in any company, and never a wrong "correct"."""

import random
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from r1zero.tasks.verifier import Verdict, Verifier

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

BATCH = 20
Value = tuple[str, Fraction]  # LaTeX and what it is worth
Pair = tuple[str, str]  # completion and gold


def short_and_soak(examples: int, soak: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The test twice: a short run that is the same each time, and one of `soak` new examples for `make soak`."""

    def both(test: Callable[..., None]) -> Callable[..., None]:
        def run(verifiers: dict[str, tuple[Verifier, Verifier]], count: int) -> None:
            chosen = settings(
                max_examples=count,
                deadline=None,
                database=None,
                derandomize=count == examples,
                suppress_health_check=list(HealthCheck),
                # Shrinking a batch takes minutes, and the failing assertion names the one at fault.
                phases=[Phase.explicit, Phase.generate],
            )
            chosen(test)(verifiers)

        run.__doc__ = test.__doc__
        marks = [pytest.mark.soak, pytest.mark.timeout(7_200)]
        return pytest.mark.parametrize("count", [examples, pytest.param(soak, marks=marks)])(run)

    return both


@pytest.fixture(scope="module")
def verifiers() -> Iterator[dict[str, tuple[Verifier, Verifier]]]:
    """Two for each format, so that one has never seen a pair in the company in which the other has."""
    each = {
        place: (Verifier(answer_format=place, workers=1), Verifier(answer_format=place, workers=1))
        for place in ("boxed", "tagged")
    }
    yield each
    for pair in each.values():
        for verifier in pair:
            verifier.close()


digits = st.integers(0, 99).map(str)
numbers = st.one_of(digits, st.decimals(-50, 50, places=2).map(str), st.integers(1_000, 9_999_999).map("{:,}".format))
symbols = st.sampled_from(["x", "y", "n", "e", "i", r"\pi", r"\theta", "x_1", "a_{12}", r"\alpha", r"\infty"])
words = st.sampled_from([r"\text{east}", r"\text{(A)}", "B", r"\text{ or }", r"\text{ and }", "Evelyn", r"\text{no}"])
units = st.sampled_from(["", r"\text{ cm}", r"\%", r"^\circ", r"\text{ cm}^2", " dollars", r"\text{ million}"])


def _joined(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Expressions of these parts."""
    few = st.lists(parts, min_size=1, max_size=4)
    two = st.tuples(parts, parts)
    return st.one_of(
        two.map(lambda t: f"{t[0]}+{t[1]}"),
        two.map(lambda t: f"{t[0]}-{t[1]}"),
        two.map(lambda t: f"{t[0]}{t[1]}"),
        two.map(lambda t: rf"{t[0]} \cdot {t[1]}"),
        two.map(lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"),
        two.map(lambda t: rf"\frac{t[0]}{t[1]}"),
        two.map(lambda t: f"{{{t[0]}}}^{{{t[1]}}}"),
        two.map(lambda t: f"{t[0]}={t[1]}"),
        two.map(lambda t: rf"{t[0]}\le {t[1]}"),
        two.map(lambda t: f"({t[0]},{t[1]}]"),
        two.map(lambda t: rf"[{t[0]},{t[1]})\cup({t[1]},\infty)"),
        two.map(lambda t: rf"{t[0]}\pm {t[1]}"),
        parts.map(lambda part: rf"\sqrt{{{part}}}"),
        parts.map(lambda part: rf"\left({part}\right)"),
        parts.map(lambda part: f"|{part}|"),
        parts.map(lambda part: f"-{part}"),
        parts.map(lambda part: f"{part}!"),
        parts.map(lambda part: f"x = {part}"),
        parts.map(lambda part: rf"\sin {part}"),
        st.tuples(parts, units).map("".join),
        few.map(",".join),
        few.map(lambda items: rf"\{{{', '.join(items)}\}}"),
        few.map(lambda items: f"({','.join(items)})"),
        few.map(lambda items: rf"\begin{{pmatrix}}{' & '.join(items)}\end{{pmatrix}}"),
    )


expressions = st.recursive(st.one_of(numbers, symbols, words), _joined, max_leaves=6)
_COMMANDS = (
    r"\frac \sqrt \text \left \right \pm \cup \binom \over \in \le \, \% \$ \\ \{ \} \begin{pmatrix} \end{pmatrix}"
)
_CHARACTERS = "{}()[]|^_!,:;=<>+-/.?~&'$%#@\\0123456789xei½²₂×°①٢४−，\u200b\u202e\ud800\x00\n"
scraps = st.sampled_from([*_COMMANDS.split(), *_CHARACTERS, "E5", " or "])


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """An expression into which something has been put, or from which something is missing."""
    text = draw(expressions)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(scraps) + text[at + draw(st.integers(0, 2)) :]
    return text


answers = st.one_of(expressions, damaged(), st.lists(scraps, max_size=12).map("".join), st.text(max_size=20))
prose = st.one_of(
    st.sampled_from(["", " so ", "\n</think>\n", "<think>", "</reasoning>", "<answer>", "</answer>", r"\boxed{", "}"]),
    st.text(max_size=10),
)


@st.composite
def completions(draw: st.DrawFn) -> str:
    """Prose and answers in boxes and tags, closed or not."""
    parts = []
    for answer in draw(st.lists(answers, max_size=3)):
        place = draw(st.sampled_from([r"\boxed{%s}", "<answer>%s</answer>", r"<answer>\boxed{%s}</answer>", "%s"]))
        parts += [draw(prose), place.replace("%s", answer)]
    return "".join([*parts, draw(prose)])


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """A completion and a gold; often an answer that is made of the gold."""
    gold = draw(st.one_of(expressions, st.sampled_from(["42", "x+1", r"\frac{1}{2}", "(1,2)", "[0,1)", "1,2", r"\pi"])))
    if draw(st.booleans()):
        return draw(completions()), gold
    before, after = draw(st.sampled_from(["", "x=", "-", r"\text{not }", r"\approx "])), draw(st.one_of(units, scraps))
    return rf"{draw(prose)}\boxed{{{before}{gold}{after}}}<answer>{before}{gold}{after}</answer>", gold


@short_and_soak(75, 1_000)
@given(st.lists(pairs(), min_size=BATCH, max_size=BATCH), st.randoms(use_true_random=False))
def test_each_completion_has_a_verdict_that_no_company_changes(
    verifiers: dict[str, tuple[Verifier, Verifier]], batch: list[Pair], rng: random.Random
) -> None:
    """1,500 completions, and 20,000."""
    order = rng.sample(range(BATCH), BATCH)
    cut = rng.randrange(BATCH + 1)
    for together, apart in verifiers.values():
        found = together.grade([completion for completion, _ in batch], [gold for _, gold in batch])
        assert len(found) == BATCH
        for graded in found:
            assert isinstance(graded.verdict, Verdict)
            assert graded.seconds >= 0
            assert graded.answer is None or graded.answer.strip()
            assert graded.answer is not None or graded.verdict is Verdict.UNPARSED
        again = {}
        for part in (order[:cut], order[cut:]):
            graded_part = apart.grade([batch[n][0] for n in part], [batch[n][1] for n in part])
            again |= dict(zip(part, graded_part, strict=True))
        for n in range(BATCH):
            one, other = found[n], again[n]
            if Verdict.TIMED_OUT not in (one.verdict, other.verdict):  # how long it takes is not up to the verifier
                assert (one.answer, one.verdict) == (other.answer, other.verdict), batch[n]


@short_and_soak(15, 1_000)  # each starts a pool for its golds
@given(st.lists(st.one_of(expressions, damaged()), min_size=BATCH, max_size=BATCH))
def test_a_gold_that_passes_its_check_is_answered_by_itself(
    verifiers: dict[str, tuple[Verifier, Verifier]], golds: list[str]
) -> None:
    verifier = verifiers["boxed"][0]
    reasons = verifier.check_golds(golds)
    good = [
        gold
        for gold, reason in zip(golds, reasons, strict=True)
        if reason is None and gold.count("{") == gold.count("}") and "box" not in gold
    ]
    graded = verifier.grade([rf"So \boxed{{{gold}}}" for gold in good], good)
    allowed = (Verdict.CORRECT, Verdict.TIMED_OUT)
    assert [gold for gold, one in zip(good, graded, strict=True) if one.verdict not in allowed] == []


values: st.SearchStrategy[Value] = st.recursive(
    st.one_of(
        st.integers(0, 30).map(lambda n: (str(n), Fraction(n))),
        st.decimals(0, 9, places=1).map(lambda d: (str(d), Fraction(d))),
        st.tuples(st.integers(0, 9), st.integers(2, 9)).map(lambda t: (rf"\frac{{{t[0]}}}{{{t[1]}}}", Fraction(*t))),
        st.tuples(st.integers(1, 9), st.integers(2, 9)).map(
            lambda t: (rf"{t[0]}\frac{{1}}{{{t[1]}}}", t[0] + Fraction(1, t[1]))
        ),
    ),
    lambda parts: st.one_of(
        st.tuples(parts, parts).map(lambda t: (f"({t[0][0]})+({t[1][0]})", t[0][1] + t[1][1])),
        st.tuples(parts, parts).map(lambda t: (f"({t[0][0]})-({t[1][0]})", t[0][1] - t[1][1])),
        st.tuples(parts, parts).map(lambda t: (rf"({t[0][0]})\cdot ({t[1][0]})", t[0][1] * t[1][1])),
        st.tuples(parts, parts).map(lambda t: (f"({t[0][0]})({t[1][0]})", t[0][1] * t[1][1])),
        st.tuples(parts, parts)
        .filter(lambda t: t[1][1] != 0)
        .map(lambda t: (rf"\frac{{{t[0][0]}}}{{{t[1][0]}}}", t[0][1] / t[1][1])),
        parts.map(lambda part: (f"({part[0]})^2", part[1] ** 2)),
        parts.map(lambda part: (f"-({part[0]})", -part[1])),
        parts.map(lambda part: (rf"\sqrt{{({part[0]})^2}}", abs(part[1]))),
    ),
    max_leaves=4,
)


@short_and_soak(50, 500)
@given(st.lists(st.tuples(values, st.sampled_from([-1, 0, 0, 1])), min_size=BATCH, max_size=BATCH))
def test_a_number_is_correct_where_exact_arithmetic_says_so(
    verifiers: dict[str, tuple[Verifier, Verifier]], batch: list[tuple[Value, int]]
) -> None:
    """Against the value itself, and against one a little beside it."""
    golds = [str(value + Fraction(off, 1_000)) for (_, value), off in batch]
    graded = verifiers["boxed"][0].grade([rf"\boxed{{{latex}}}" for (latex, _), _ in batch], golds)
    mistaken = [
        f"{latex} against {gold}: {one.verdict}"
        for ((latex, _), off), gold, one in zip(batch, golds, graded, strict=True)
        if one.verdict is not Verdict.TIMED_OUT and (one.verdict is Verdict.CORRECT) != (off == 0)
    ]
    assert mistaken == []
