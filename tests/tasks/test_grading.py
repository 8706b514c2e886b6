"""R1RL's own rule, and which of a completion's answers counts. What equals what is in verdict_cases.py."""

import random

import pytest

from r1zero.tasks.verifier import Graded, Verdict, Verifier

# name: (completion, gold, answer, verdict), by R1RL's rule: the first <answer>, equal as text once commas are gone.
R1RL_CASES: dict[str, tuple[str, str, str | None, Verdict]] = {
    "right": ("12 + 30 = 42\n</reasoning>\n<answer>\n42\n</answer>", "42", "42", Verdict.CORRECT),
    "wrong": ("<answer>43</answer>", "42", "43", Verdict.WRONG),
    "whitespace around it": ("<answer> \t\n 42 \n</answer>", "42", "42", Verdict.CORRECT),
    "whitespace within it": ("<answer>4 2</answer>", "42", "4 2", Verdict.WRONG),
    "first wins, right": ("<answer>42</answer> Question: 2? <answer>2</answer>", "42", "42", Verdict.CORRECT),
    "first wins, wrong": ("<answer>2</answer> no: <answer>42</answer>", "42", "2", Verdict.WRONG),
    "comma": ("<answer>1,042</answer>", "1042", "1042", Verdict.CORRECT),
    "commas": ("<answer>1,042,000</answer>", "1042000", "1042000", Verdict.CORRECT),
    "negative": ("<answer>-7</answer>", "-7", "-7", Verdict.CORRECT),
    "other writing of the number": ("<answer>42.0</answer>", "42", "42.0", Verdict.WRONG),
    "unit": ("<answer>$42</answer>", "42", "$42", Verdict.WRONG),
    "empty": ("<answer></answer>", "42", None, Verdict.UNPARSED),
    "blank": ("<answer> \n </answer>", "42", None, Verdict.UNPARSED),
    "only a comma": ("<answer>,</answer>", "42", None, Verdict.UNPARSED),
    "empty one first": ("<answer></answer><answer>42</answer>", "42", None, Verdict.UNPARSED),
    "missing": ("The answer is 42.", "42", None, Verdict.UNPARSED),
    "unclosed": ("<answer>42", "42", None, Verdict.UNPARSED),
    "unopened": ("42</answer>", "42", None, Verdict.UNPARSED),
    "unclosed, then whole": ("<answer>42 <answer>42</answer>", "42", "42 <answer>42", Verdict.WRONG),
    "tag in capitals": ("<ANSWER>42</ANSWER>", "42", None, Verdict.UNPARSED),
    "nothing at all": ("", "42", None, Verdict.UNPARSED),
}


def r1rl(remove_commas: bool = True) -> Verifier:
    return Verifier(answer_format="tagged", answer_choice="first", answer_match="exact", remove_commas=remove_commas)


@pytest.mark.parametrize("name", R1RL_CASES)
def test_r1rls_rule(name: str) -> None:
    completion, gold, answer, verdict = R1RL_CASES[name]
    assert r1rl().grade([completion], [gold]) == [Graded(answer, verdict)]


def test_commas_count_where_the_recipe_keeps_them() -> None:
    verifier = r1rl(remove_commas=False)
    assert verifier.grade(["<answer>1,042</answer>"] * 2, ["1,042", "1042"]) == [
        Graded("1,042", Verdict.CORRECT),
        Graded("1,042", Verdict.WRONG),
    ]
    assert verifier.grade(["<answer>,</answer>"], [","]) == [Graded(",", Verdict.CORRECT)]


# name: (completion, answers under agreed, first and last), boxed; None: commits to none.
CHOICES: dict[str, tuple[str, str | None, str | None, str | None]] = {
    "one": (r"so \boxed{42}", "42", "42", "42"),
    "twice the same": (r"\boxed{42}, that is \boxed{42}", "42", "42", "42"),
    "two writings of one value": (r"\boxed{\frac{1}{2}} = \boxed{0.5}", "0.5", r"\frac{1}{2}", "0.5"),
    "contradiction": (r"\boxed{41} or rather \boxed{42}", None, "41", "42"),
    "side by side": (r"\boxed{41}\boxed{42}", None, "41", "42"),
    "an empty one beside it": (r"\boxed{} \boxed{42}", "42", None, "42"),
    "a box in a box": (r"\boxed{\boxed{42}}", "42", "42", "42"),
    "a framed one": (r"\fbox{42}", "42", "42", "42"),
    "space before the brace": (r"\boxed {42}", "42", "42", "42"),
    "braces inside": (
        r"\boxed{\frac{\sqrt{2}}{2}}",
        r"\frac{\sqrt{2}}{2}",
        r"\frac{\sqrt{2}}{2}",
        r"\frac{\sqrt{2}}{2}",
    ),
    "escaped braces inside": (r"\boxed{\{1, 2\}}", r"\{1, 2\}", r"\{1, 2\}", r"\{1, 2\}"),
    "never closed": (r"\boxed{42", None, None, None),
    "a whole one before one never closed": (r"\boxed{42} and \boxed{43", "42", "42", "42"),
    "before the reasoning ends": (r"\boxed{41}</think> \boxed{42}", "42", "42", "42"),
    "only in the reasoning": (r"<think>\boxed{42}</think> so it is", None, None, None),
    "reasoning that never ends": (r"<think> so \boxed{42}", None, None, None),
    "a second reasoning section": (r"<think>a</think>\boxed{42}<reasoning>\boxed{41}</reasoning>", "42", "42", "42"),
    "the prompt opened the reasoning": (r"hm \boxed{41} </reasoning> \boxed{42}", "42", "42", "42"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_answer_that_counts(name: str) -> None:
    completion, *expected = CHOICES[name]
    found = []
    for choice in ("agreed", "first", "last"):
        with Verifier(answer_choice=choice) as verifier:
            found.append(verifier.grade([completion], ["no such thing"])[0].answer)
    assert found == expected


def test_answers_that_contradict_each_other_are_none_even_if_one_is_right() -> None:
    with Verifier() as verifier:
        graded = verifier.grade(
            [r"\boxed{41} \boxed{42}", r"\boxed{42} \boxed{41}", r"\boxed{42} \boxed{x+1}"], ["42"] * 3
        )
    assert graded == [Graded(None, Verdict.UNPARSED, each.seconds) for each in graded]


def test_a_verdict_depends_on_nothing_but_its_own_completion_and_gold() -> None:
    rng = random.Random(0)
    pairs = [(completion, gold) for completion, gold, *_ in R1RL_CASES.values()] * 3
    for settings in ({"answer_match": "exact"}, {"answer_match": "math"}):
        with Verifier(answer_format="tagged", answer_choice="first", **settings) as verifier:
            alone = {pair: verifier.grade([pair[0]], [pair[1]])[0].verdict for pair in pairs}
            for size in (2, 7, len(pairs)):
                rng.shuffle(pairs)
                batch = pairs[:size]
                graded = verifier.grade([completion for completion, _ in batch], [gold for _, gold in batch])
                assert [each.verdict for each in graded] == [alone[pair] for pair in batch]


def test_as_many_golds_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        Verifier().grade([r"\boxed{1}"] * 2, ["1"])


@pytest.mark.parametrize("key", ["answer_format", "answer_choice", "answer_match"])
def test_a_setting_that_does_not_exist(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} 'other' is not one of"):
        Verifier(**{key: "other"})  # type: ignore[arg-type]
