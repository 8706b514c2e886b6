"""The estimate of GPU memory, against what was measured on GPUs, and against itself."""

from pathlib import Path

import pytest

from r1zero import memory, recipe
from r1zero.memory import GIB, Need
from r1zero.model_facts import PROJECTIONS, ModelShape
from tests.conftest import PROJECT

QWEN = ModelShape(2048, 36, 16, 2, 128, 11008, 151936, tied_embeddings=True)
QLORA = PROJECT / "recipes/qwen2.5-3b/gsm8k_qlora.yaml"


def trainer(*words: str, **more: int | bool) -> Need:
    return memory.trainer(QWEN, recipe.load(QLORA, words), **{"processes": 1, **more})


def part(need: Need, what: str) -> float:
    return dict(need.parts)[what]


def test_the_server_that_was_measured() -> None:
    """vLLM at a share of 10.53 GiB with 97k tokens of KV cache and slots of rank 64: 13.2 GB in use."""
    need = memory.server(QWEN, context=97_000, completions=1, sequences=memory.DEFAULT_SEQUENCES, rank=64)
    assert need.total == pytest.approx(13.2, rel=0.05)
    assert need.total - memory.SERVER_BEYOND_SHARE_GIB == pytest.approx(10.53, rel=0.05)


def test_the_4_bit_model_that_was_measured() -> None:
    """3.17 GB loaded, with embeddings and adapter in fp32; here both are held in bf16."""
    adapter = QWEN.lora_parameters(64, PROJECTIONS)
    in_bf16 = 2 * (QWEN.embedding_parameters + adapter)
    assert part(trainer(), "weights") * GIB == pytest.approx(3.17e9 - in_bf16, rel=0.03)


@pytest.mark.parametrize(("batch", "peak"), [(1, 12.2e9), (2, 19.9e9), (4, 35.0e9)])
def test_the_passes_that_were_measured(batch: int, peak: float) -> None:
    """Without gradient checkpointing. Logits were kept whole there: 1,006 tokens x 151,936 words x 12 bytes."""
    need = trainer("--per_device_train_batch_size", str(batch), "--gradient_checkpointing", "false")
    logits = batch * 1006 * 151_936 * 12
    loaded = 3.17e9
    assert part(need, "activations") * GIB + logits + loaded == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize(
    ("shape", "stage", "processes", "gib"),
    [
        (ModelShape(1536, 28, 12, 2, 128, 8960, 151_936, tied_embeddings=True), 2, 2, 23.3),
        (ModelShape(3584, 28, 28, 4, 128, 18_944, 152_064, tied_embeddings=False), 3, 3, 55.4),
    ],
)
def test_the_sharded_trainers_that_were_measured(
    shape: ModelShape, stage: int, processes: int, gib: float, tmp_path: Path
) -> None:
    """In use by nvidia-smi, of H200s whose trainer process publishes nothing; passes of 8 x (256 + 768) tokens."""
    keys = {"use_vllm": "true", "vllm_mode": "server", "dtype": "bfloat16", "gradient_checkpointing": "true"}
    keys |= {"max_prompt_tokens": "256", "max_completion_length": "768", "per_device_train_batch_size": "8"}
    keys |= {"gradient_accumulation_steps": "2", "model_name_or_path": "m", "num_generations": "8", "beta": "0.0"}
    place = tmp_path / "full.yaml"
    place.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    need = memory.trainer(shape, recipe.load(place, ()), processes=processes, zero_stage=stage)
    assert need.total == pytest.approx(gib, rel=0.08)


def test_gradient_checkpointing_and_smaller_passes_need_less() -> None:
    with_it, without = trainer(), trainer("--gradient_checkpointing", "false")
    assert part(with_it, "activations") < part(without, "activations") / 5
    assert trainer("--per_device_train_batch_size", "1").total < with_it.total
    assert trainer("--max_completion_length", "100").total < with_it.total


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        ("adamw_torch_fused", 4),  # the adapter of a 4-bit model is in bf16, and so are torch's moments
        ("adamw_8bit", 2),
        ("adamw_torch_4bit", 1),
        ("lion_32bit", 4),
        ("lion_8bit", 1),
        ("sgd", 0),
        ("paged_adamw_8bit", 0),
    ],
)
def test_the_state_of_an_optimizer(optim: str, bytes_each: int) -> None:
    adapter = QWEN.lora_parameters(64, PROJECTIONS)
    assert part(trainer("--optim", optim), "optimizer") * GIB == pytest.approx(bytes_each * adapter)


FULL = ("--use_peft", "false", "--load_in_4bit", "false", "--optim", "adamw_torch_fused", "--beta", "0")
HELD = ("weights", "reference model", "gradients", "optimizer")


def held(*words: str, **more: int | bool) -> list[float]:
    """Bytes for each parameter: weights, reference model, gradients, optimizer state."""
    need = trainer(*FULL, *words, **more)
    return [part(need, what) * GIB / QWEN.parameters for what in HELD]


def test_full_fine_tuning() -> None:
    assert held() == pytest.approx([2, 0, 2, 4])
    assert held("--dtype", "float32") == pytest.approx([4 + 2, 0, 4, 8])  # and autocast's copies in bf16
    assert held("--dtype", "float32", "--bf16", "false") == pytest.approx([4, 0, 4, 8])
    assert held("--beta", "0.1") == pytest.approx([2, 2, 2, 4])
    assert held(processes=4) == pytest.approx([2, 0, 2 * 2, 4])  # DDP's buckets hold the gradients once more
    assert held(zero_stage=1, processes=4) == pytest.approx([2, 0, 2 * 2, (4 + 4) / 4])


def test_deepspeed_keeps_weights_in_bf16_a_copy_in_fp32_and_adds_gradients_up_in_bf16() -> None:
    """Whatever type they were loaded in. So it keeps them, as the fields of DeepSpeed 0.19.8's optimizers show."""
    for dtype in ("float32", "bfloat16"):
        words = ("--dtype", dtype, "--beta", "0.1")
        # The second half of the gradients: what earlier passes of the step left, and what this one adds to it.
        assert held(*words, zero_stage=2, processes=4) == pytest.approx([2, 2, 2 * 2 / 4, 12 / 4])
        one_pass = (*words, "--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "16")
        assert held(*one_pass, zero_stage=2, processes=4) == pytest.approx([2, 2, 2 / 4, 12 / 4])
        gathered = 2 * memory.ZERO3_LIVE / QWEN.parameters
        assert held(*words, zero_stage=3, processes=4) == pytest.approx([2 / 4 + gathered, 2 / 4, 2 / 4, 12 / 4])
        assert held(*words, zero_stage=3, processes=4, offload=True) == pytest.approx([gathered, 0, 0, 0])
    assert held("--dtype", "float32", "--bf16", "false", zero_stage=2, processes=1)[0] == pytest.approx(4)


def test_packed_passes_are_as_large_as_their_budget() -> None:
    whole = ("--max_prompt_tokens", "256", "--max_completion_length", "768", "--per_device_train_batch_size", "16")
    padded = trainer(*whole)
    packed = [trainer(*whole, "--micro_batch_tokens", str(budget)) for budget in (16 * 1024, 4096, 1024, 64)]
    activations = [part(need, "activations") for need in packed]
    assert activations[0] == part(padded, "activations") and packed[0].total == padded.total
    assert activations[0] > activations[1] > activations[2] == activations[3]  # one sequence has to fit
    # However many completions TRL has in a pass, there may be several passes.
    one_pass = ("--gradient_accumulation_steps", "1", "--per_device_train_batch_size", "16", "--beta", "0.1")
    budget = ("--micro_batch_tokens", "16384")
    assert held(*one_pass, *budget, zero_stage=2, processes=4) == pytest.approx([2, 2, 2 * 2 / 4, 12 / 4])


def test_a_small_model_is_gathered_whole_and_no_further() -> None:
    tiny = ModelShape(64, 2, 2, 2, 32, 128, 200, tied_embeddings=True)
    need = memory.trainer(tiny, recipe.load(QLORA, FULL), processes=2, zero_stage=3)
    assert part(need, "weights") * GIB == pytest.approx(tiny.parameters * 2 * 1.5)


def test_the_optimizers_step_comes_on_top_of_a_pass() -> None:
    short = ("--max_prompt_tokens", "8", "--max_completion_length", "8", "--per_device_train_batch_size", "1")
    accumulate = ("--gradient_accumulation_steps", "16")
    stepping = trainer(*FULL, *short, *accumulate, zero_stage=2, processes=1)
    assert part(stepping, "optimizer step") * GIB == pytest.approx(4 * QWEN.parameters)  # gradients in fp32
    assert part(stepping, "activations") > 0  # torch's allocator keeps their blocks
    passing = trainer(*FULL, zero_stage=2, processes=8)
    assert part(passing, "buckets") * GIB == pytest.approx(2 * 2 * memory.ZERO_BUCKET)
    in_turns = trainer(*FULL, *short, *accumulate, zero_stage=3, processes=1)
    assert part(in_turns, "optimizer step") * GIB == pytest.approx(4 * memory.ZERO3_STEP)
    sharded = [trainer(*FULL, zero_stage=3, processes=n).total for n in (2, 4, 8)]
    assert sharded == sorted(sharded, reverse=True)
    assert trainer(*FULL, zero_stage=3, processes=4, offload=True).total < sharded[1]


def test_an_adapter_under_deepspeed() -> None:
    adapter = QWEN.lora_parameters(64, PROJECTIONS)
    words = ("--load_in_4bit", "false", "--optim", "adamw_torch_fused")
    zero2, zero3 = (trainer(*words, zero_stage=stage, processes=2) for stage in (2, 3))
    assert part(zero2, "optimizer") * GIB == pytest.approx(12 * adapter / 2)
    assert part(zero2, "weights") * GIB == pytest.approx(2 * (QWEN.parameters + adapter))
    assert part(zero3, "weights") < part(zero2, "weights")
    assert part(zero2, "reference model") == 0


def test_an_adapter_on_whole_or_8_bit_weights() -> None:
    each = QWEN.parameters / GIB
    whole, eight = (
        trainer("--load_in_4bit", "false"),
        trainer("--load_in_4bit", "false", "--load_in_8bit", "true", "--use_vllm", "false"),
    )
    assert part(whole, "weights") > 2 * each > part(eight, "weights") > part(trainer(), "weights")


def test_a_trainer_that_generates_by_itself_holds_the_keys_and_values() -> None:
    need = trainer("--use_vllm", "false", "--per_device_train_batch_size", "1", generated=512)
    assert part(need, "KV cache") == pytest.approx(512 * 1006 * 36_864 / GIB)


def test_a_server_over_several_gpus_or_in_4_bits_needs_less_of_each() -> None:
    def weights(**more: int | bool) -> float:
        return part(memory.server(QWEN, context=1, completions=1, sequences=1, **more), "weights")

    assert weights(tensor_parallel=2) == pytest.approx(weights() / 2)
    assert weights(four_bit=True) < weights() / 2


LEAST, MOST = Need((("weights", 6.0), ("CUDA", 2.6)), resting=2.6), Need((("weights", 9.0), ("CUDA", 2.6)), resting=2.6)
TRAIN = Need((("weights", 2.0), ("activations", 5.0)), resting=3.0)


@pytest.mark.parametrize(
    ("available", "sleep", "server"),
    [
        (30.0, False, 11.6),  # all that it can use
        (17.0, False, 10.0),  # what the trainer leaves
        (15.0, False, 8.6),  # the least, although the trainer then has too little
        (13.0, True, 10.0),  # what the resting trainer leaves
    ],
)
def test_sharing(available: float, sleep: bool, server: float) -> None:
    chosen = memory.share(LEAST, MOST, TRAIN, card_gib=80, available_gib=available, sleep=sleep)
    assert chosen.server_gib == pytest.approx(server)
    assert chosen.utilization == pytest.approx((server - 2.6) / 80, abs=0.0011)
    assert chosen.utilization >= (server - 2.6) / 80
    assert chosen.trainer_gib == pytest.approx(available - (2.6 if sleep else server))


def test_what_both_need_awake_and_in_turn() -> None:
    assert memory.least_needed(LEAST, TRAIN, sleep=False) == pytest.approx(8.6 + 7.0)
    assert memory.least_needed(LEAST, TRAIN, sleep=True) == pytest.approx(8.6 + 3.0)
    longer = Need((*TRAIN.parts, ("more activations", 9.0)), resting=3.0)
    assert memory.least_needed(LEAST, longer, sleep=True) == pytest.approx(2.6 + 16.0)


def test_parts_that_are_nothing_are_not_shown() -> None:
    assert Need((("weights", 1.26), ("adapter slots", 0.0))).text() == "weights 1.3"


def test_lengths_without_a_limit_are_taken_for_granted(tmp_path: Path) -> None:
    unlimited = trainer("--max_prompt_tokens", "null", "--max_completion_length", "null")
    assert part(unlimited, "activations") == pytest.approx(part(trainer(), "activations"), rel=0.05)
