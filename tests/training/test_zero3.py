"""What ZeRO-3 does to a model: to a language head of its own, beside a policy server, and to its positions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1zero.hardware import free_ports
from r1zero.restarts import Refusal
from r1zero.training.zero3 import restore_rotary_frequencies
from tests.training.resuming import run, steps, weights
from tests.training.test_overlap import recipe_for, serving, shared

__all__ = ["shared"]  # a fixture
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def untied(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a head of its own, so large (1e5 numbers) that DeepSpeed shards it."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    shutil.copytree(model, folder)
    made = AutoModelForCausalLM.from_pretrained(folder)
    made.resize_token_embeddings(1 + 100_000 // made.config.hidden_size)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(1.1 * made.lm_head.weight.detach())
    made.save_pretrained(folder)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= weights(folder).keys()
    return folder


def test_it_learns_what_ddp_learns(untied: Path, few: Path, tmp_path: Path) -> None:
    """After the probe, whose forward pass calls the head as training does not."""
    done = {}
    for way in ("ddp", "zero3"):
        with serving(tmp_path / f"server-{way}", untied) as server:
            made = recipe_for(way, tmp_path, untied, few, server, max_staleness=0, max_steps=2, save_strategy="no")
            done[way] = run(way, made, tmp_path / way)
    moved = {name: (each - weights(untied)[name]).abs().max() for name, each in weights(done["zero3"].model).items()}
    assert moved["lm_head.weight"] > 0
    for one, other in zip(steps(done["ddp"]), steps(done["zero3"]), strict=True):
        assert "probe/difference" in one
        for name in ("reward", "loss", "grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    expected = weights(done["ddp"].model)
    for name, found in weights(done["zero3"].model).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


LOADED = """
import json, sys
import deepspeed
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig
from r1zero.training.sft import SolutionTrainer

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # as a run on a CPU has it: nothing is compiled
sharded = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
config = SFTConfig(sys.argv[2], deepspeed=sharded, bf16=True, use_cpu=True, per_device_train_batch_size=1, report_to=[])
loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)  # as the trainer loads it
trainer = SolutionTrainer(
    model=sys.argv[1],
    args=config,
    train_dataset=Dataset.from_list([{"prompt": "1+1", "completion": "=2"}]),
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
)
said = {
    name: {key: each.double().tolist() for key, each in model.named_buffers() if key.endswith("inv_freq")}
    for name, model in (("loaded", loaded), ("trained", trainer.model))
}
print(json.dumps({**said, "sharded": hasattr(next(trainer.model.parameters()), "ds_id")}))
"""


def test_positions_are_as_exact_as_without_it(model: Path, tmp_path: Path) -> None:
    """DeepSpeed rounds the rotary frequencies to bf16 while it loads; at a thousand tokens that is another model."""
    given = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0]}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(model), str(tmp_path)],
        env=os.environ | {name: str(value) for name, value in given.items()} | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["sharded"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    expected = {key: each.double().tolist() for key, each in plain.named_buffers() if key.endswith("inv_freq")}
    assert expected and said["trained"] == expected
    assert said["loaded"] != expected  # else DeepSpeed has mended it, and `restore_rotary_frequencies` can go


def test_positions_that_cannot_be_made_exact_again_are_refused() -> None:
    class Rotary(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(4, dtype=torch.bfloat16), persistent=False)

    with pytest.raises(Refusal, match=r"rotary frequencies of Rotary .* set accelerate_config to zero2"):
        restore_rotary_frequencies(torch.nn.Sequential(Rotary()))
