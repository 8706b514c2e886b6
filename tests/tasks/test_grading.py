"""From completion to verdict to reward: a table of cases, and what TRL is handed."""

import random
from typing import Any

import pytest

from r1zero.tasks.rewards import CorrectnessReward
from r1zero.tasks.verifier import Graded, Verdict, grade

# name: (completion, gold, answer, verdict)
CASES: dict[str, tuple[str, str, str | None, Verdict]] = {
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


@pytest.mark.parametrize("name", CASES)
def test_grade(name: str) -> None:
    completion, gold, answer, verdict = CASES[name]
    assert grade(completion, gold) == Graded(answer, verdict)


def test_commas_count_where_the_recipe_keeps_them() -> None:
    assert grade("<answer>1,042</answer>", "1,042", remove_commas=False) == Graded("1,042", Verdict.CORRECT)
    assert grade("<answer>1,042</answer>", "1042", remove_commas=False) == Graded("1,042", Verdict.WRONG)
    assert grade("<answer>,</answer>", ",", remove_commas=False) == Graded(",", Verdict.CORRECT)


class Log:
    """What TRL passes as log_extra and log_metric."""

    def __init__(self) -> None:
        self.extra: dict[str, list[Any]] = {}
        self.metrics: dict[str, float] = {}

    def __call__(self, reward: CorrectnessReward, completions: list[Any], gold: list[str]) -> list[float]:
        return reward(
            completions=completions,
            gold=gold,
            log_extra=self.extra.__setitem__,
            log_metric=self.metrics.__setitem__,
            prompts=["ignored"] * len(gold),
            trainer_state=None,
        )


@pytest.mark.parametrize("conversational", [False, True])
def test_the_reward_is_one_for_correct_and_zero_for_all_else(conversational: bool) -> None:
    texts = [completion for completion, *_ in CASES.values()]
    completions = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    log = Log()
    rewards = log(CorrectnessReward(), completions, [gold for _, gold, *_ in CASES.values()])
    assert rewards == [float(verdict is Verdict.CORRECT) for *_, verdict in CASES.values()]
    assert log.extra == {
        "answer": [answer for _, _, answer, _ in CASES.values()],
        "verdict": [verdict.value for *_, verdict in CASES.values()],
    }
    verdicts = [verdict for *_, verdict in CASES.values()]
    assert log.metrics == {f"verdict/{v.value}": verdicts.count(v) / len(verdicts) for v in Verdict}
    assert set(log.metrics) == {"verdict/correct", "verdict/wrong", "verdict/unparsed", "verdict/timed_out"}
    assert sum(log.metrics.values()) == pytest.approx(1)


def test_the_reward_keeps_commas_where_it_is_told_to() -> None:
    completions, gold = ["<answer>1,042</answer>"] * 2, ["1,042", "1042"]
    assert Log()(CorrectnessReward(remove_commas=False), completions, gold) == [1.0, 0.0]
    assert Log()(CorrectnessReward(remove_commas=True), completions, gold) == [0.0, 1.0]


def test_a_reward_depends_on_nothing_but_its_own_completion_and_gold() -> None:
    rng = random.Random(0)
    pairs = [(completion, gold) for completion, gold, *_ in CASES.values()] * 3
    reward = CorrectnessReward()
    alone = {pair: Log()(reward, [pair[0]], [pair[1]])[0] for pair in pairs}
    for size in (2, 7, len(pairs)):
        rng.shuffle(pairs)
        batch = pairs[:size]
        assert Log()(reward, [c for c, _ in batch], [g for _, g in batch]) == [alone[pair] for pair in batch]


def test_as_many_golds_as_completions() -> None:
    with pytest.raises(ValueError, match="zip"):
        Log()(CorrectnessReward(), ["<answer>1</answer>"] * 2, ["1"])


def test_the_name_under_which_trl_logs_it() -> None:
    assert CorrectnessReward().__name__ == "correctness"
