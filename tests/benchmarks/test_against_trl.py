"""The comparison with stock TRL without running either: its arithmetic, its lengths, and what it keeps."""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.side_by_side import gpus, results
from benchmarks.side_by_side.lengths import Law, Places
from benchmarks.side_by_side.results import Spread, Step, Turn

from benchmarks import against_trl
from r1zero.model_facts import ModelShape

SPREAD = Law("spread", mean=400, cut=1024, group=8, seed=0)
QWEN_1_5B = ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied_embeddings=True)


def step(seconds: float, train: float = 1.0, lengths: tuple[int, ...] = (10, 30)) -> Step:
    phases = dict.fromkeys(results.PHASES, 0.0) | {"generate": seconds - train, "train": train}
    return Step(seconds, phases, prompt_tokens=10.0, lengths=list(lengths))


def turn(mode: str, number: int, *seconds: float) -> Turn:
    return Turn(mode, "", number, [step(each) for each in seconds], trainer_gpus=1, gpus=2)


def test_lengths_depend_on_seed_prompt_and_place_alone() -> None:
    first, second = Places(SPREAD), Places(SPREAD)
    one, other = [1, 2, 3], [4, 5]
    in_order = [first.next_length(one) for _ in range(8)] + [first.next_length(other) for _ in range(8)]
    mixed = [second.next_length(prompt) for _ in range(8) for prompt in (other, one)]
    assert mixed[1::2] + mixed[0::2] == in_order
    assert len(set(in_order[:8])) > 4
    assert [first.next_length(one) for _ in range(8)] == in_order[:8]
    assert in_order != [Law("spread", 400, 1024, 8, seed=1).length(one, place) for place in range(8)] + in_order[8:]


def test_a_request_before_training_moves_no_group() -> None:
    """A server is tried out first: whatever is asked for then, each group of a step has the lengths it would have."""
    places = Places(SPREAD)
    places.next_length([7])
    assert sorted(places.next_length([7]) for _ in range(8)) == sorted(SPREAD.length([7], at) for at in range(8))


def test_the_spread_is_log_normal_with_its_mean_and_cut() -> None:
    uncut = Law("spread", mean=400, cut=10**9, group=8, seed=0)
    drawn = [uncut.length([prompt], place) for prompt in range(2000) for place in range(8)]
    assert statistics.fmean(drawn) == pytest.approx(400, rel=0.02)
    assert statistics.median(drawn) == pytest.approx(400 / 2.718281828 ** (0.6**2 / 2), rel=0.03)
    cut = [SPREAD.length([prompt], 0) for prompt in range(2000)]
    assert max(cut) == 1024
    assert min(cut) >= 1
    assert {Law("fixed", 400, 96, 8, 0).length([prompt], 3) for prompt in range(50)} == {96}


def test_training_flops_are_those_of_palm() -> None:
    """6 N + 12 L H Q T a token; the 1.5B shape has 1.54e9 weights with its language head."""
    weights = QWEN_1_5B.parameters
    a_token = 6 * weights + 12 * 28 * 12 * 128 * 1000
    assert results.training_flops(QWEN_1_5B, [1000.0]) == pytest.approx(1000 * a_token)
    assert results.forward_flops(QWEN_1_5B, [1000.0] * 2) == pytest.approx(2 * 1000 * a_token / 3)


def test_an_embedding_that_is_not_tied_is_looked_up_and_not_counted() -> None:
    untied = ModelShape(1536, 28, 12, 2, 128, 8960, 151936, tied_embeddings=False)
    assert results.training_flops(untied, [10.0]) == results.training_flops(QWEN_1_5B, [10.0])


def test_utilisation_counts_the_trainers_gpus_while_training_and_all_gpus_over_the_step() -> None:
    measured = turn("r1zero", 0, 4.0)  # one of the four seconds trains; prompts of 5 tokens
    training, whole = measured.mfu(QWEN_1_5B, peak=100.0)
    work = results.training_flops(QWEN_1_5B, [15.0, 35.0])
    assert training == pytest.approx(work / (1.0 * 1 * 100e12))
    assert whole == pytest.approx((work + work / 3) / (4.0 * 2 * 100e12))


def test_ratios_are_taken_round_by_round() -> None:
    turns = [turn("r1zero", 0, 2.0), turn("trl-server", 0, 4.0), turn("r1zero", 1, 4.0), turn("trl-server", 1, 12.0)]
    assert results.ratios(turns, "r1zero", "trl-server") == Spread(2.5, 2.0, 3.0)
    assert results.ratios(turns, "r1zero", "trl-colocate") is None
    assert "r1zero is 2.50 (2.00 to 3.00) x as fast as trl-server" in results.table(turns, QWEN_1_5B, 989.5)


def test_large_numbers_are_written_out() -> None:
    assert str(Spread.of([41250.4, 1000.4, 3.14159])) == "1,000 (3.14 to 41,250)"
    assert str(Spread.of([2.0])) == "2 (2 to 2)"


def test_unequal_work_is_said() -> None:
    same, more = turn("r1zero", 0, 2.0, 2.0), Turn("trl-server", "", 0, [step(4.0), step(4.0, lengths=(10, 31))])
    assert not results.unequal_work([same, turn("trl-server", 0, 9.0, 9.0)])
    assert "NOT THE SAME WORK" in results.table([same, more], None, None)


def test_how_idle_a_side_says_that_it_was() -> None:
    idle = [{}, {"server": 0.2, "trainer": 0.4}, {"server": 0.4, "trainer": 0.0}]
    steps = [replace(step(seconds), idle=each) for seconds, each in zip((9.0, 1.0, 3.0), idle, strict=True)]
    said = results.table([Turn("r1zero", "", 0, steps), turn("trl-server", 0, 2.0)], None, None)
    assert "r1zero by its own clock: policy servers idle 35 %, trainer 10 %" in said
    assert said.count("by its own clock") == 1


def test_steps_are_read_from_what_either_side_writes() -> None:
    lines = [
        {"time": 100.0, "num_tokens": 60, "seconds/generate": 9.0, "seconds/train": 1.0, "seconds/step": 10.0},
        {"time": 103.0, "num_tokens": 120, "seconds/grade": 0.5, "seconds/train": 2.0, "seconds/probe": 0.25}
        | {"idle/server": 0.75, "idle/trainer": 0.125},
    ]
    # Two processes, two calls each, and a call for a step that never came.
    notes = [{"time": t, "lengths": [n]} for t, n in ((1.0, 20), (1.1, 20), (2.1, 30), (2.0, 10), (3.0, 99))]
    (only,) = results.steps_of(lines, notes, completions=2, skip=1)
    assert only.seconds == 3.0
    assert only.lengths == [10, 30]
    assert only.prompt_tokens == 20
    assert only.idle == {"server": 0.75, "trainer": 0.125}
    assert only.phases == {"generate": 0.0, "score": 0.5, "publish": 0.0, "train": 2.0, "other": 0.25}
    with pytest.raises(ValueError, match="5 completions were rewarded in 2 steps of 3"):
        results.steps_of(lines, notes, completions=3, skip=1)


def test_what_was_measured_is_read_again_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [turn("r1zero", 0, 2.0), Turn("trl-server", "a=1", 0, [step(5.0)], {"0": 0.25}, {"0": 80.0}, 1, 2)]
    for number, each in enumerate(kept):
        results.save(each, tmp_path / f"turn-00-{number}.json")
    assert results.load(tmp_path) == kept
    (tmp_path / "ceiling.json").write_text(json.dumps({"tokens_per_second": [100.0]}))
    against_trl.make_model("tiny", tmp_path / "model", None, seed=0)
    words = [str(tmp_path / "model"), "--out", str(tmp_path), "--rounds", "0"]
    monkeypatch.setattr(sys, "argv", ["against_trl.py", *words, "--modes", "r1zero"])
    assert against_trl.main() == 0
    said = capsys.readouterr().out
    assert "r1zero is 2.50 (2.50 to 2.50) x as fast as trl-server a=1" in said
    assert "| trl-server a=1 | 1 | 5 (5 to 5) | 4 | 0 | 0 | 1 | 0 | 8 (8 to 8) | - | - | 25 % | 80 | 0 |" in said
    picture = (tmp_path / "phases.svg").read_text()
    assert picture.count("train 1 s") == 2
    assert (tmp_path / "summary.md").read_text().strip() in said


def test_what_nvidia_smi_says() -> None:
    assert gpus.read_line("0, 25, 1024", 3.0) == gpus.Look(3.0, 0, 0.25, 1.0)
    assert gpus.read_line("0, [N/A], 1024", 3.0) is None
    assert results.peak_tflops("NVIDIA H200") == 989.5
    assert results.peak_tflops("NVIDIA H100 PCIe") == 756.5
    assert results.peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert results.peak_tflops("NVIDIA L40") is None
