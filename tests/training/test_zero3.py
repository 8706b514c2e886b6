"""ZeRO-3 with a language head of its own, beside a policy server: most models beyond 3B have one."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

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
