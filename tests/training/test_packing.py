"""Packed and padded learning are the same learning: losses, gradients, log-probabilities, metrics, whole runs."""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from r1zero import model_facts
from r1zero import recipe as recipes
from r1zero.restarts import Refusal
from r1zero.run_folder import RunFolder
from r1zero.tasks.verifier import Verifier
from r1zero.training import arguments, packed_rows
from r1zero.training.filling import Pool, Prompt, fill, teaching
from r1zero.training.packing import PackedPasses
from r1zero.training.recorder import Recorder
from r1zero.training.trainer import PolicyTrainer, without_spread
from tests.training import fixed_completions
from tests.training.conftest import one_process, write_recipe
from tests.training.resuming import as_killed_after, assert_same_run, run, steps, weights

TOLERANCE = 1e-5  # fp32; the bar's
PACKABLE = ("grpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
FIXED = Path(fixed_completions.__file__)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- who gets what


@given(data=st.data(), shares=st.integers(1, 4), budget=st.integers(1, 60))
@settings(deadline=None)
def test_every_sequence_comes_once_and_all_have_equally_many_passes(data: Any, shares: int, budget: int) -> None:
    count = shares * data.draw(st.integers(1, 8))
    lengths = st.lists(st.integers(1, 40), min_size=count, max_size=count)
    pools = data.draw(st.lists(lengths, min_size=1, max_size=3))
    filled = fill(pools, shares, budget)
    assert len({len(passes) for passes in filled}) == 1  # in every pool
    for pool, passes in zip(pools, filled, strict=True):
        assert all(len(each) == shares for each in passes)
        micro_batches = [places for each in passes for places in each]
        assert all(micro_batches)
        assert sorted(place for places in micro_batches for place in places) == list(range(count))
        for places in micro_batches:
            assert len(places) == 1 or sum(pool[place] for place in places) <= budget


@given(data=st.data(), shares=st.integers(1, 8), budget=st.integers(1, 60))
@settings(deadline=None)
def test_whoever_is_left_out_the_budget_holds(data: Any, shares: int, budget: int) -> None:
    count = shares * data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    learnt = [data.draw(st.integers(0, length)) for length in lengths]
    moves = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    kept = teaching(lengths, learnt, moves, shares)
    assert {place for place in range(count) if moves[place] and learnt[place]} <= set(kept)
    if any(learnt):
        assert any(learnt[place] for place in kept), "something is said of them"
    ((*passes,),) = fill([[lengths[place] for place in kept]], shares, budget)
    for places in (places for each in passes for places in each):
        assert places
        assert len(places) == 1 or sum(lengths[kept[place]] for place in places) <= budget


@given(data=st.data(), shares=st.integers(1, 4), budget=st.integers(1, 90))
@settings(deadline=None)
def test_a_shared_prompt_is_counted_once_in_each_micro_batch(data: Any, shares: int, budget: int) -> None:
    """And all that holds without: each sequence once, equally many passes, the budget; and never more passes."""
    count = shares * data.draw(st.integers(1, 8))
    pools, prompts = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        shared = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
        numbers = data.draw(st.lists(st.integers(0, len(shared) - 1), min_size=count, max_size=count))
        prompts.append([Prompt(number, shared[number]) for number in numbers])
        own = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
        pools.append([shared[number] + tokens for number, tokens in zip(numbers, own, strict=True)])
    filled = fill(pools, shares, budget, prompts)
    assert len({len(passes) for passes in filled}) == 1
    assert len(filled[0]) <= len(fill(pools, shares, budget)[0])
    for pool, begun, passes in zip(pools, prompts, filled, strict=True):
        assert all(len(each) == shares for each in passes)
        micro_batches = [places for each in passes for places in each]
        assert all(micro_batches)
        assert sorted(place for places in micro_batches for place in places) == list(range(count))
        for places in micro_batches:
            laid_down = sum(pool[place] - begun[place].shared for place in places)
            laid_down += sum(shared for _, shared in {begun[place] for place in places})
            assert laid_down == Pool(pool, begun).tokens(places)
            assert len(places) == 1 or laid_down <= budget


def spread(count: int, mean: int, seed: int = 1) -> list[int]:
    """Completions' lengths as in the benchmarks, log-normal and cut at 1024."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=generator).mul(0.6).exp().mul(mean / math.exp(0.18)).clamp(1, 1024)
    return [int(each) for each in drawn]


@pytest.mark.parametrize("group", [8, 16, 32])
@pytest.mark.parametrize("mean", [150, 400])
@pytest.mark.parametrize("processes", [1, 4, 8])
def test_shared_prompts_cost_little_balance(group: int, mean: int, processes: int) -> None:
    """512 completions with prompts of 120; what processes wait for, against each prompt once and no waiting at all."""
    lengths = [120 + each for each in spread(512, mean)]
    prompts = [Prompt(place // group, 119) for place in range(512)]
    ((*passes,),) = fill([lengths], processes, 16384, [prompts])
    pool = Pool(lengths, prompts)
    assert len(passes) <= math.ceil(1.1 * pool.tokens(range(512)) / (processes * 16384))
    waited_for = sum(max(map(pool.tokens, micro_batches)) for micro_batches in passes)
    assert waited_for * processes < 1.05 * pool.tokens(range(512))


@pytest.mark.parametrize(
    ("count", "budget", "waiting", "uneven"), [(512, 16384, 1.002, 1.0002), (96, 2048, 1.03, 1.002)]
)
def test_work_is_balanced_in_every_pass_and_over_all(count: int, budget: int, waiting: float, uneven: float) -> None:
    """Lengths as in the benchmarks, with a prompt of 120; four processes."""
    lengths = [each + 120 for each in spread(count, 400)]
    ((*passes,),) = fill([lengths], 4, budget)
    loads = torch.tensor([[sum(lengths[place] for place in places) for places in each] for each in passes])
    assert len(passes) <= math.ceil(1.2 * sum(lengths) / (4 * budget))
    assert (loads.max(1).values / loads.float().mean(1)).max() < waiting
    assert loads.sum(0).max() / loads.sum(0).float().mean() < uneven


# --- the same numbers


def tiny(family: str, vocabulary: int) -> Any:
    """Two layers whose weights are large enough that every token matters to every later one."""
    torch.manual_seed(4)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.25,
        "sliding_window": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def trainer(request: Any, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    place = tmp_path_factory.mktemp("trainer")
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tiny(request.param, len(tokenizer)).save_pretrained(place / "model")
    keys = {"per_device_train_batch_size": 4, "num_generations": 2}
    recipe = recipes.load(write_recipe(place / "r.yaml", place / "model", data, **keys, temperature=0.9))
    folder = RunFolder(place / "run").create()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices as small as these
    with one_process(), Verifier(answer_format="tagged", numbers=True) as verifier:
        yield PolicyTrainer(
            model=str(place / "model"),
            reward_funcs=recipe.reward_functions(),
            args=arguments.config_for(recipe, folder),
            train_dataset=Dataset.from_list([{"prompt": "?", "gold": "7", "source": "s"}] * 16),
            processing_class=tokenizer,
            recorder=Recorder(folder, active=False),
            verifier=verifier,
            micro_batch_tokens=64,
        )
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a step learns from.

    Attributes:
        lengths: of prompt and completion, by process, in the order of its window.
        batch: sequences of a pass of TRL's.
        slices: passes of TRL's that one generation feeds, of which an optimizer step takes `accumulation`.
        accumulation: at most `slices`.
        budget: tokens of a micro-batch.
        loss_type: TRL's.
        level: of the importance sampling.
        extras: whether there are a reference, old log-probabilities and a server's.
        pads: columns of padding beyond what is needed.
        seed: of tokens, advantages and log-probabilities.
        group: sequences of one prompt, one after the other, through all processes.
        shares: whether a micro-batch has the prompt once.
    """

    lengths: tuple[tuple[tuple[int, int], ...], ...]
    batch: int
    slices: int
    accumulation: int
    budget: int
    loss_type: str
    level: str
    extras: bool
    pads: int
    seed: int
    group: int = 1
    shares: bool = True


@st.composite
def cases(draw: Any) -> Case:
    world, batch, slices, group = draw(st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 9)))
    prompts: dict[int, int] = {}
    lengths = []
    for number in range(world * batch * slices):
        prompt = prompts.setdefault(number // group, draw(st.integers(1, 9)))
        lengths.append((prompt, draw(st.integers(1, 12))))
    per = batch * slices
    return Case(
        lengths=tuple(tuple(lengths[rank * per : (rank + 1) * per]) for rank in range(world)),
        batch=batch,
        slices=slices,
        accumulation=draw(st.integers(1, slices)),
        budget=draw(st.integers(1, 90)),
        loss_type=draw(st.sampled_from(PACKABLE)),
        level=draw(st.sampled_from(["token", "sequence"])),
        extras=draw(st.booleans()),
        pads=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**20)),
        group=group,
        shares=draw(st.booleans()),
    )


def windows(case: Case, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """By process, what TRL's `_generate_and_score_completions` returns."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = sum(completion for own in case.lengths for _, completion in own)
    prompts: dict[int, torch.Tensor] = {}
    made: list[dict[str, torch.Tensor]] = []
    for own in case.lengths:
        left = case.pads + max(prompt for prompt, _ in own)
        right = case.pads + max(completion for _, completion in own)
        prompt_mask, completion_mask = (torch.zeros(len(own), width, dtype=torch.long) for width in (left, right))
        for place, (prompt, completion) in enumerate(own):
            prompt_mask[place, left - prompt :] = 1
            completion_mask[place, :completion] = 1
        prompt_ids = torch.randint(vocabulary, prompt_mask.shape, generator=generator)
        for place, (prompt, _) in enumerate(own):
            asked = prompts.setdefault((len(made) * len(own) + place) // case.group, prompt_ids[place, left - prompt :])
            prompt_ids[place, left - prompt :] = asked
        window = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": torch.randint(vocabulary, completion_mask.shape, generator=generator),
            "completion_mask": completion_mask,
            "advantages": torch.randn(len(own), generator=generator),
            "num_items_in_batch": torch.tensor(tokens),
        }
        if case.extras:
            for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
                near = -3 + 0.1 * torch.randn(completion_mask.shape, generator=generator)
                window[name] = near * completion_mask
            ratio = torch.rand(completion_mask.shape, generator=generator) + 0.5
            window["importance_sampling_ratio"] = ratio.where(completion_mask > 0, 1.0)  # as TRL's is
        made.append(window)
    return made


class World:
    """A trainer that is each process of several in turn; what they would gather, it has at hand."""

    def __init__(self, trainer: Any, case: Case, patch: pytest.MonkeyPatch) -> None:
        self.trainer, self.case = trainer, case
        self.windows = windows(case, trainer.model.config.vocab_size)
        self.count = len(self.windows)
        self.rank = 0
        patch.setattr(packed_rows, "SHARING", case.shares)
        patch.setattr(Accelerator, "num_processes", property(lambda _: self.count))
        patch.setattr(Accelerator, "process_index", property(lambda _: self.rank))
        patch.setattr(GRPOTrainer, "_prepare_inputs", lambda _, inputs: inputs)
        patch.setattr(trainer, "_gathered", self._gathered)
        for name in ("steps_per_generation", "per_device_train_batch_size"):
            patch.setattr(trainer.args, name, {"s": case.slices, "p": case.batch}[name[0]])
        patch.setattr(trainer, "loss_type", case.loss_type)
        patch.setattr(trainer, "importance_sampling_level", case.level)
        patch.setattr(trainer, "beta", 0.1 if case.extras else 0.0)
        patch.setattr(trainer, "use_vllm", case.extras)
        self.patch = patch

    def _gathered(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 0:
            return value
        values = [window[name][self.now] for window in self.windows]
        width = max(each.shape[-1] for each in values)

        def padded(tensor: torch.Tensor, dim: int, pad_index: int = 0, pad_first: bool = False) -> torch.Tensor:
            missing = width - tensor.shape[dim]
            return torch.nn.functional.pad(tensor, (missing, 0) if pad_first else (0, missing), value=pad_index)

        self.patch.setattr(self.trainer.accelerator, "pad_across_processes", padded)
        return torch.cat([PackedPasses._gathered(self.trainer, name, each) for each in values])

    def learn(self, budget: int | None) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
        """One optimizer step's loss and gradients, as DDP has them: means over processes; and its metrics."""
        trainer, case, batch = self.trainer, self.case, self.case.batch
        self.patch.setattr(trainer, "micro_batch_tokens", budget)
        self.now = slice(0, batch * case.accumulation)
        trainer.current_gradient_accumulation_steps = case.accumulation
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        loss = 0.0
        for rank in range(self.count):
            self.rank = rank
            trainer._step = 0
            for number in range(case.accumulation):
                places = slice(number * batch, (number + 1) * batch)
                inputs = {k: v[places] if v.ndim else v for k, v in self.windows[self.rank].items()}
                GradientState()._set_sync_gradients(number == case.accumulation - 1)
                loss += float(trainer.training_step(trainer.model, inputs, None)) / self.count
            GradientState()._set_sync_gradients(True)
            assert trainer._step == case.accumulation and trainer._gathering == []
        gradients = {name: each.grad / self.count for name, each in trainer.model.named_parameters()}
        metrics = {name: values for name, values in trainer._metrics["train"].items() if name != "step_time"}
        return loss, copy.deepcopy(gradients), metrics


# Rows of one sequence and of two, which share their prompt.
UNEVEN = Case((((9, 12), (9, 2), (9, 1)), ((9, 3), (9, 4), (1, 12))), 3, 1, 1, 24, "grpo", "token", True, 2, 0, group=5)


@given(case=cases())
@QUICK
def test_loss_and_gradients_are_those_of_padded_passes(trainer: Any, case: Case) -> None:
    assert_same_learning(trainer, case)


@pytest.mark.parametrize("loss_type", PACKABLE)
def test_each_type_of_loss(trainer: Any, loss_type: str) -> None:
    assert_same_learning(trainer, dataclasses.replace(UNEVEN, loss_type=loss_type))


def assert_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A number of it is a sum of others that may be as large as its largest one, in another order."""
    atol = TOLERANCE * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=atol)


def assert_same_learning(trainer: Any, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        world = World(trainer, case, patch)
        loss, expected, _ = world.learn(None)
        packed, found, metrics = world.learn(case.budget)
    assert packed == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    for name, each in expected.items():
        assert_gradient(found[name], each)
    assert max(float(each.abs().max()) for each in expected.values()) > 0
    assert all(len(values) == len(case.lengths) for values in metrics.values())  # one of each process's step


@given(case=cases())
@QUICK
def test_log_probabilities_and_entropies_are_those_of_padded_sequences(trainer: Any, case: Case) -> None:
    """Of the old policy and the reference too: they are asked for by the same door, in passes of their own."""
    window = windows(case, trainer.model.config.vocab_size)[0]
    ids, mask = (torch.cat([window[f"prompt_{what}"], window[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
    keep = window["completion_ids"].shape[1]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(packed_rows, "SHARING", case.shares)
        for batch_size in (None, case.batch):  # of a loss, of scoring
            patch.setattr(trainer, "micro_batch_tokens", case.budget)
            ask = trainer._get_per_token_logps_and_entropies
            found = ask(trainer.model, ids, mask, keep, batch_size=batch_size, compute_entropy=True)
            patch.setattr(trainer, "micro_batch_tokens", None)
            expected = ask(trainer.model, ids, mask, keep, batch_size=batch_size, compute_entropy=True)
            for here, there in zip(found[:2], expected[:2], strict=True):
                torch.testing.assert_close(here, there, rtol=TOLERANCE, atol=TOLERANCE)
        assert float(expected[0][:, 0].max()) < -0.01


@pytest.mark.parametrize(("shares", "tokens"), [(False, 37), (True, 31)])
def test_nothing_that_is_padded_or_another_sequences_goes_through_the_model(
    trainer: Any, shares: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    monkeypatch.setattr(trainer, "_known_apart", True)
    hook = trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    case = Case((((3, 4), (3, 9), (5, 2), (5, 6)),), 2, 2, 2, 19, "dapo", "token", False, 3, 1, 2, shares)
    try:
        with pytest.MonkeyPatch.context() as patch:
            world = World(trainer, case, patch)
            world.learn(case.budget)
            packed, rows[:] = list(rows), []
            world.learn(None)
    finally:
        hook.remove()
    assert sum(packed) == tokens and max(packed) <= 19
    assert sum(rows) == 4 * (5 + 9 + 6)


FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def scores(model: Any, lengths: Sequence[tuple[int, int]], group: int = 1) -> list[tuple[torch.Tensor, Any]]:
    """Log-probabilities and entropies, packed and padded."""
    case = Case((tuple(lengths),), len(lengths), 1, 1, 1, "grpo", "token", False, 2, 5, group)
    window = {name: value.to(model.device) for name, value in windows(case, model.config.vocab_size)[0].items()}
    ids, mask = (torch.cat([window[f"prompt_{what}"], window[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
    keep = window["completion_ids"].shape[1]
    packed = packed_rows.log_probabilities(model, ids, mask, keep)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-keep] = -100
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    return [packed, (outputs.log_probs[:, -keep:], outputs.entropy[:, -keep:])]


def prepared(family: str) -> Any:
    model = tiny(family, 64)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    packed_rows.prepare(model)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("lengths", "group"),
    [([(3, 4), (1, 9), (5, 1), (2, 6)], 1), ([(6, 4), (6, 9), (6, 1), (2, 6), (2, 3)], 3)],
    ids=["repeated", "shared"],
)
def test_each_family_and_adapters_on_it_keep_sequences_apart(
    family: str, lengths: list[tuple[int, int]], group: int
) -> None:
    """With dropout off, and activations that are computed again in the backward pass."""
    assert set(FAMILIES) == set(model_facts.FAMILIES)
    model = get_peft_model(prepared(family), LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    gradients = []
    for logps, _ in scores(model.train(), lengths, group):
        model.zero_grad()
        logps.square().sum().backward()
        gradients.append({name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad})
    packed, padded = scores(model, lengths, group)
    for here, there in zip(packed, padded, strict=True):
        torch.testing.assert_close(here, there, rtol=TOLERANCE, atol=TOLERANCE)
    largest = max(float(each.abs().max()) for each in gradients[1].values())
    for name, each in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], each, rtol=TOLERANCE, atol=TOLERANCE * largest)
    packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)
    assert "packed" not in str(model.get_base_model().config.to_dict())  # a checkpoint loads anywhere


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts_q: Any, starts_k: Any, *longest: int, **how: Any
) -> torch.Tensor:
    """What torch's kernel for various lengths computes by its documentation; causal is aligned to the last key."""
    assert how["window_size"] == (-1, 0) and starts_q.dtype == starts_k.dtype == torch.int32
    assert longest == (int(starts_q.diff().max()), int(starts_k.diff().max()))
    assert query.shape[1] == key.shape[1] or how["enable_gqa"]
    outputs = []
    for number in range(len(starts_q) - 1):
        (first, stop), (begin, end) = (starts[number : number + 2].tolist() for starts in (starts_q, starts_k))
        scores = query[first:stop].transpose(0, 1) @ key[begin:end].permute(1, 2, 0).repeat_interleave(
            query.shape[1] // key.shape[1], dim=0
        )
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(end - begin - (stop - first) + 1)
        weights = (scores * how["scale"]).masked_fill(later, -math.inf).softmax(-1)
        values = value[begin:end].transpose(0, 1).repeat_interleave(query.shape[1] // key.shape[1], dim=0)
        outputs.append((weights @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("grouped", [False, True])
def test_what_the_kernel_is_asked_for(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a GPU only; here something slow takes its place."""
    options = frozenset({"scale", "window_size"} | ({"enable_gqa"} if grouped else set()))
    model, calls = prepared("qwen2"), []
    monkeypatch.setattr(packed_rows, "_kernel_takes", lambda *_: True)
    monkeypatch.setattr(packed_rows, "_kernel_options", lambda: options)
    monkeypatch.setattr(packed_rows, "varlen_attn", lambda *args, **how: calls.append(how) or varlen(*args, **how))
    gradients = []
    for logps, _ in scores(model, [(6, 4), (6, 9), (6, 1), (2, 6), (2, 3)], 3):
        model.zero_grad()
        logps.square().sum().backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    assert len(calls) == model.config.num_hidden_layers
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < TOLERANCE
    packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)


def test_a_model_that_looks_at_other_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("qwen2")
    packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)
    attend = packed_rows.attend
    everything = {"packed_lengths": (16,), "packed_key_lengths": (16,)}
    AttentionInterface.register(packed_rows.OURS, lambda *args, **more: attend(*args, **more | everything))
    try:
        with pytest.raises(Refusal, match="does not keep packed sequences apart"):
            packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)
    finally:
        AttentionInterface.register(packed_rows.OURS, attend)


@pytest.mark.parametrize(
    "wrong", ["sees its neighbours", "does not see its prompt", "sees as much as if it came first"]
)
def test_a_model_that_does_not_keep_completions_of_one_prompt_apart_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prepared("qwen2")
    attend = packed_rows.attend

    def sees(*args: Any, packed_keys: Any = None, **more: Any) -> Any:
        if packed_keys is not None and wrong == "sees its neighbours":
            more |= {"packed_lengths": (args[1].shape[2],), "packed_key_lengths": (args[1].shape[2],)}
        elif packed_keys is not None and wrong == "does not see its prompt":
            more |= {"packed_key_lengths": more["packed_lengths"]}
        else:
            more |= {"packed_keys": packed_keys}
        return attend(*args, **more)

    if wrong == "sees as much as if it came first":
        no_later = packed_rows._no_later
        monkeypatch.setattr(packed_rows, "_no_later", lambda *args: no_later(*args).fill_(True).tril())
    AttentionInterface.register(packed_rows.OURS, sees)
    try:
        with pytest.raises(Refusal, match="does not keep completions of one prompt apart"):
            packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)
        monkeypatch.setattr(packed_rows, "SHARING", False)
        packed_rows.require_apart(model, torch.device("cpu"), contextlib.nullcontext)
    finally:
        AttentionInterface.register(packed_rows.OURS, attend)


def test_attention_that_was_not_shown_to_keep_sequences_apart_is_refused() -> None:
    with pytest.raises(Refusal, match="attention is eager"):
        other = tiny("qwen2", 64)
        other.set_attn_implementation("eager")
        packed_rows.prepare(other)


@given(case=cases(), chosen=st.integers(0, 2**16))
@QUICK
def test_what_teaches_nothing_stays_out_and_the_loss_is_the_same(trainer: Any, case: Case, chosen: int) -> None:
    rows: list[int] = []
    hook = trainer.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    case = dataclasses.replace(case, extras=False)  # without a reference
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "_known_apart", True)
            world = World(trainer, case, patch)
            left = 0
            for window in world.windows:
                for place in range(len(window["advantages"])):
                    chosen, silent = divmod(chosen, 2)
                    window["advantages"][place] *= 1 - silent
                    left += silent and place < case.batch * case.accumulation
            loss, expected, _ = world.learn(None)
            rows.clear()
            packed, found, metrics = world.learn(case.budget)
            each = [
                (float(window["advantages"][place]) != 0, sum(lengths[place]), rank * len(lengths) + place)
                for rank, (window, lengths) in enumerate(zip(world.windows, case.lengths, strict=True))
                for place in range(case.batch * case.accumulation)
            ]
    finally:
        hook.remove()
    assert packed == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    for name, gradient in expected.items():
        assert_gradient(found[name], gradient)
    teaching = [(tokens, number) for moves, tokens, number in each if moves]
    silent = sorted((tokens, number) for moves, tokens, number in each if not moves)
    # Each process has a pass, and all have equally many sequences to choose from.
    teaching += silent[: max(1, math.ceil(len(teaching) / world.count)) * world.count - len(teaching)]
    whole = sum(tokens for tokens, _ in teaching)
    if not case.shares:
        assert sum(rows) == whole
    assert sum(rows) <= whole
    share = 1 - len(teaching) / len(each)
    assert metrics["completions/left_out_ratio"] == pytest.approx([share] * world.count)


def test_a_reference_teaches_groups_without_spread_too(trainer: Any) -> None:
    case = dataclasses.replace(UNEVEN, extras=True)
    with pytest.MonkeyPatch.context() as patch:
        world = World(trainer, case, patch)
        for window in world.windows:
            window["advantages"].zero_()
        loss, expected, _ = world.learn(None)
        packed, found, metrics = world.learn(case.budget)
    assert packed == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE) and loss != 0
    for name, each in expected.items():
        assert_gradient(found[name], each)
    assert set(metrics["completions/left_out_ratio"]) == {0.0}


def test_no_spread_is_no_advantage(trainer: Any) -> None:
    """Of eight rewards of 0.2 the mean is another number in float32."""
    rewards = torch.full((16, 1), 0.2)
    assert float((rewards[:8].mean() - rewards[0]).abs()) > 0
    rewards[8] = 0.3
    assert without_spread(rewards, 8).tolist() == [True] * 8 + [False] * 8
    nothing = torch.full((4, 2), math.nan)
    nothing[3, 1] = 1.0
    assert without_spread(nothing, 2).tolist() == [True, True, False, False]


def test_what_a_truncated_completion_was_is_not_learnt_from(trainer: Any) -> None:
    """mask_truncated_completions leaves its prompt, and a mask of zeros."""
    case = Case((((3, 4), (3, 9), (5, 2), (5, 6)),), 4, 1, 1, 20, "grpo", "token", False, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        world = World(trainer, case, patch)
        world.windows[0]["completion_mask"][1] = 0
        world.windows[0]["num_items_in_batch"] -= 9
        loss, expected, _ = world.learn(None)
        packed, found, _ = world.learn(case.budget)
    assert packed == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
    for name, each in expected.items():
        assert_gradient(found[name], each)


# --- whole runs


# Generations of three passes and steps of two: they end in the middle of each other.
RUN = {
    "per_device_train_batch_size": 8,
    "steps_per_generation": 3,
    "gradient_accumulation_steps": 2,
    "num_iterations": 2,
    "beta": 0.02,
    "eval_count": 0,
    "max_steps": 4,
    "max_completion_length": 24,
}


def test_a_run_has_one_trajectory_packed_and_padded(
    in_process: Callable[..., Any], model: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PolicyTrainer, "_generate_here", fixed_completions.completions)
    recipe = write_recipe(tmp_path / "r.yaml", model, few, **RUN | {"learning_rate": 1e-4})
    made = []
    for name, words in (("padded", ()), ("packed", ("--micro_batch_tokens", 400))):
        code, folder, err = in_process(recipe, tmp_path / name, *words)
        assert code == 0, err
        made.append(folder)
    padded, packed = (steps(folder) for folder in made)
    for line, other in zip(packed, padded, strict=True):
        assert line.keys() ^ other.keys() == {"completions/left_out_ratio"}
    for name in ("loss", "grad_norm", "reward", "completions/mean_length", "num_tokens"):
        expected, found = ([line[name] for line in each if name in line] for each in (padded, packed))
        assert len(expected) > 1 and found == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    for name in ("kl", "entropy"):  # means of tokens here, means of passes' means there
        expected, found = ([line[name] for line in each] for each in (padded, packed))
        assert found == pytest.approx(expected, rel=0.2, abs=1e-3), name
    assert max(abs(line["loss"]) for line in padded) > 0.001
    one, other = (weights(folder.model) for folder in made)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


def test_a_packed_run_that_was_killed_goes_on_exactly(
    in_process: Callable[..., Any], model: Path, few: Path, tmp_path: Path
) -> None:
    """In the middle of a generation, with completions that are drawn."""
    keys = RUN | {"save_strategy": "steps", "save_steps": 1, "micro_batch_tokens": 300}
    recipe = write_recipe(tmp_path / "r.yaml", model, few, **keys)
    code, once, err = in_process(recipe, tmp_path / "once")
    assert code == 0, err
    for step in (1, 2):
        (tmp_path / f"again-{step}").mkdir()
        checkpoint = as_killed_after(once, step, tmp_path / f"again-{step}")
        code, again, err = in_process(recipe, tmp_path / f"again-{step}", "--resume", checkpoint)
        assert code == 0, err
        assert_same_run(once, again)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["ddp", "zero2", "zero3"])
def test_however_the_work_is_shared_packed_runs_go_one_way(
    way: str, model: Path, few: Path, tmp_path: Path, in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step takes a whole generation: how TRL shuffles one depends on the process.
    keys = RUN | {"learning_rate": 1e-4, "micro_batch_tokens": 150, "max_steps": 3, "steps_per_generation": 2}
    shared = write_recipe(tmp_path / "two.yaml", model, few, **keys | {"per_device_train_batch_size": 4})
    two = run(way, shared, tmp_path / "two", script=FIXED)
    monkeypatch.setattr(PolicyTrainer, "_generate_here", fixed_completions.completions)
    alone = write_recipe(tmp_path / "one.yaml", model, few, **keys | {"micro_batch_tokens": None})
    code, one, err = in_process(alone, tmp_path / "one")
    assert code == 0, err
    for name in ("loss", "grad_norm", "reward"):
        expected, found = ([line[name] for line in steps(folder) if name in line] for folder in (one, two))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), name
    expected, found = weights(one.model), weights(two.model)
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-4
