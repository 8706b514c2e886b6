"""The guard, through its door: what it lets pass, what it stops, and that looking changes nothing in the trainer.

The two sides of the simulation differ as two engines do: by rounding that is drawn anew wherever the weights changed,
more of it for some tokens than for others, and by nothing where they did not change.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import Qwen2Config, Qwen2ForCausalLM

from r1zero.training.probe import PolicyMismatch, Probe, trainer_logprobs
from tests.training.conftest import one_process

TOLERANCE = 0.1
LENGTHS = (121, 131, 131, 133)  # of the sequences; one logprob less each, of which the first is not judged
DISTINCT = [list(range(place, place + length)) for place, length in enumerate(LENGTHS)]
BF16, FP32 = 0.02, 2e-6  # rounding between two engines, nats


@dataclass
class TwoSides:
    """Trainer and server of a simulated run, in float64.

    Attributes:
        noise: of rounding, mean over tokens; nats.
        repeats: whether the server says the same again where its weights did not change.
    """

    noise: float
    seed: int = 0
    repeats: bool = True
    version: int = 0
    policy: torch.Tensor = field(init=False)
    rng: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = torch.Generator().manual_seed(self.seed)
        self.policy = -self.draw().exp()
        spread = self.draw().exp()  # unlikely tokens have more rounding
        self.each = self.noise * spread / spread.mean()
        self.trainer = self.policy + self.rounding()
        self.served, self.server = self.policy, self.policy + self.rounding()

    def draw(self) -> torch.Tensor:
        return torch.randn(sum(LENGTHS) - 2 * len(LENGTHS), generator=self.rng, dtype=torch.float64)

    def rounding(self) -> torch.Tensor:
        return self.each * self.draw() / 2**0.5

    def train(self, size: float) -> None:
        """A step that changes logprobs by `size`, root mean square."""
        self.version += 1
        if size:
            self.policy = self.policy + size * self.draw()
            self.trainer = self.policy + self.rounding()

    def publish(self, arrives: bool = True) -> None:
        if (arrives and self.served is not self.policy) or not self.repeats:
            self.served = self.policy if arrives else self.served
            self.server = self.served + self.rounding()

    def into(self, probe: Probe) -> dict[str, float]:
        return probe.compare(self.version, split(self.trainer), [split(self.server)])


def split(values: torch.Tensor) -> list[list[float]]:
    """Of each sequence the logprobs: first the one that is not judged, then those of `values` that are its."""
    return [[-1.0, *each.tolist()] for each in values.split([length - 2 for length in LENGTHS])]


@pytest.fixture
def probe(tmp_path: Path) -> Probe:
    return Probe(DISTINCT, TOLERANCE, tmp_path / "probe.json")


# --- a healthy run passes


def warm_up(steps: int, largest: float) -> Iterator[float]:
    """Nothing moves at first, then more with each step, as the learning rate rises from zero."""
    for step in range(steps):
        yield 0.0 if step < 5 else largest * min(1.0, (step / 100) ** 3)


@pytest.mark.parametrize("repeats", [True, False], ids=["repeats", "jitters"])
@pytest.mark.parametrize("noise", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("largest", [1e-7, 1e-3, 0.01, 0.05])
def test_a_server_that_follows_never_raises_an_alarm(
    noise: float, largest: float, repeats: bool, tmp_path: Path
) -> None:
    for seed in range(3):
        probe = Probe(DISTINCT, TOLERANCE, tmp_path / "probe.json")
        sides = TwoSides(noise, seed, repeats)
        for size in warm_up(200, largest):
            sides.publish()
            sides.into(probe)
            sides.train(size)
    assert not (tmp_path / "probe.json").exists()


def test_a_version_published_twice_is_no_alarm(probe: Probe) -> None:
    sides = TwoSides(BF16)
    assert set(sides.into(probe)) == {"probe/difference", "probe/difference_max"}
    assert sides.into(probe)["probe/moved"] == 0.0


# --- a server that stayed behind is stopped


@pytest.mark.parametrize("steps_before", [0, 30])
def test_a_server_that_repeats_itself_is_stopped_at_the_first_publish_that_did_not_arrive(
    probe: Probe, steps_before: int, tmp_path: Path
) -> None:
    sides = TwoSides(BF16)
    for _ in range(steps_before):
        sides.into(probe)
        sides.train(1e-3)
        sides.publish()
    sides.into(probe)
    sides.train(1e-3)  # far less than rounding makes
    sides.publish(arrives=False)
    with pytest.raises(PolicyMismatch, match=r"answers the same to the last bit.*publish of \d+ did not arrive"):
        sides.into(probe)
    evidence = json.loads((tmp_path / "probe.json").read_text())
    assert evidence["version"] == steps_before + 1 and evidence["probe_tolerance"] == TOLERANCE
    assert evidence["server"] == split(sides.server) and evidence["trainer"] == split(sides.trainer)
    assert [len(each) for each in evidence["tokens"]] == list(LENGTHS)
    assert [len(each) for each in evidence["anchor"]["server"]] == [length - 1 for length in LENGTHS]


@pytest.mark.parametrize("seed", range(10))
def test_a_server_that_jitters_is_stopped_long_before_the_tolerance(seed: int, probe: Probe) -> None:
    sides = TwoSides(BF16, seed, repeats=False)
    sides.into(probe)
    moved = 0.0
    with pytest.raises(PolicyMismatch, match="has not followed"):
        for _ in range(400):
            sides.train(0.01)
            sides.publish(arrives=False)
            moved = sides.into(probe)["probe/moved"]
    assert 0.04 < moved < 0.16, "small steps must add up, and be told as soon as they stand out"


@pytest.mark.parametrize("seed", range(10))
def test_in_float32_the_first_step_tells(seed: int, probe: Probe) -> None:
    sides = TwoSides(FP32, seed, repeats=False)
    sides.into(probe)
    sides.train(1e-3)
    sides.publish(arrives=False)
    with pytest.raises(PolicyMismatch, match=r"made -?0\.00 \+- 0\.00 of that change"):
        sides.into(probe)


def test_a_server_that_stays_behind_later_is_stopped(probe: Probe) -> None:
    sides = TwoSides(FP32, repeats=False)
    for _ in range(20):
        sides.into(probe)
        sides.train(1e-3)
        sides.publish()
    assert sides.into(probe)["probe/followed"] == pytest.approx(1, abs=0.01)
    sides.train(1e-3)
    sides.publish(arrives=False)
    with pytest.raises(PolicyMismatch, match="since version 20"):
        sides.into(probe)


# --- another policy is stopped


def test_a_server_with_another_base_is_stopped_by_the_tolerance(probe: Probe, tmp_path: Path) -> None:
    sides = TwoSides(BF16)
    sides.server = sides.server + 0.2 * sides.draw()
    with pytest.raises(PolicyMismatch) as stopped:
        sides.into(probe)
    said = str(stopped.value)
    assert said.startswith("the policy server does not have version 0 of the trainer's policy: its log-probabilities")
    assert "probe_tolerance = 0.1" in said and str(tmp_path / "probe.json") in said


def test_what_is_not_a_number_is_no_agreement(probe: Probe) -> None:
    sides = TwoSides(BF16)
    sides.server[7] = float("nan")
    with pytest.raises(PolicyMismatch, match="differ"):
        sides.into(probe)


def test_an_answer_for_other_tokens_is_named(probe: Probe) -> None:
    sides = TwoSides(BF16)
    with pytest.raises(PolicyMismatch, match="reads other tokens than it was sent"):
        probe.compare(0, split(sides.trainer), [split(sides.server)[:-1]])


def test_of_several_servers_the_one_that_is_off_is_named(probe: Probe) -> None:
    sides = TwoSides(BF16)
    off = sides.server + 0.2 * sides.draw()
    metrics = probe.compare(0, split(sides.trainer), [split(sides.trainer), split(sides.server)])
    assert metrics["probe/difference"] > 0.01, "the metric is that of the server farthest off"
    with pytest.raises(PolicyMismatch, match="policy server 2 of 2 does not have version 1"):
        probe.compare(1, split(sides.trainer), [split(sides.server), split(off)])


# --- the trainer's own answer


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
    )
    made = Qwen2ForCausalLM(config)
    made.gradient_checkpointing_enable()
    return made.train()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with one_process():
        yield Accelerator(cpu=True)


SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]


def test_the_trainers_logprobs_are_those_of_the_model_in_evaluation(
    model: Qwen2ForCausalLM, accelerator: Accelerator
) -> None:
    answered = trainer_logprobs(model, accelerator, SEQUENCES)
    model.eval()
    for ids, logprobs in zip(SEQUENCES, answered, strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        assert logprobs == pytest.approx([float(expected[i, token]) for i, token in enumerate(ids[1:])], abs=1e-6)


def test_looking_leaves_the_model_and_the_random_numbers_alone(
    model: Qwen2ForCausalLM, accelerator: Accelerator
) -> None:
    model.model.layers[0].mlp.eval()  # modules need not all be in one mode
    modes = [module.training for module in model.modules()]
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    numbers = torch.get_rng_state()
    trainer_logprobs(model, accelerator, SEQUENCES)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())
    assert all(each.grad is None for each in model.parameters())


def test_a_model_that_fails_is_left_in_its_mode(model: Qwen2ForCausalLM, accelerator: Accelerator) -> None:
    with pytest.raises(IndexError):
        trainer_logprobs(model, accelerator, [[1, 200]])
    assert model.training


def test_the_door_asks_the_servers_and_answers_metrics(
    model: Qwen2ForCausalLM, accelerator: Accelerator, tmp_path: Path
) -> None:
    probe = Probe(SEQUENCES, TOLERANCE, tmp_path / "probe.json")

    def server(shift: float) -> list[list[list[float]]]:
        own = trainer_logprobs(model, accelerator, probe.sequences)
        return [[[value + shift for value in each] for each in own]]

    metrics = probe.check(model, accelerator, 0, server(0.01))
    assert probe.sequences == SEQUENCES
    assert metrics["probe/difference"] == pytest.approx(0.01, abs=1e-6) and metrics["probe/seconds"] > 0
    with pytest.raises(PolicyMismatch):
        probe.check(model, accelerator, 1, server(0.5))


def test_what_the_first_token_predicts_is_not_judged(probe: Probe) -> None:
    sides = TwoSides(BF16)
    answered = split(sides.server)
    for each in answered:
        each[0] -= 9.0
    assert probe.compare(0, split(sides.trainer), [answered])["probe/difference_max"] < 1.0
    for each in answered:
        each[1] -= 9.0
    assert probe.compare(0, split(sides.trainer), [answered])["probe/difference_max"] > 8.0


def test_a_beginning_that_sequences_share_counts_once(tmp_path: Path) -> None:
    template = list(range(50))
    sequences = [[*template, *range(start, start + 25)] for start in (100, 200, 300, 400)]
    probe = Probe(sequences, 1.0, tmp_path / "probe.json")
    trainer = [[-1.0] * 74 for _ in sequences]
    server = [[-1.0] * 3 + [-2.0] + [-1.0] * 70 for _ in sequences]  # off by 1 nat in the template
    counted = 48 + 4 * 25  # of the template all but the first two tokens, which nothing and one token come before
    assert probe.compare(0, trainer, [server])["probe/difference"] == pytest.approx(1 / counted)
    server[3][60] = -2.0  # and in a part of the fourth's own
    assert probe.compare(0, trainer, [server])["probe/difference"] == pytest.approx(2 / counted)


@pytest.mark.parametrize("sequences", [[], [[1]], [[1, 2], [3, 4]]])
def test_sequences_that_say_nothing_are_refused(sequences: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        Probe(sequences, TOLERANCE, tmp_path / "probe.json")
