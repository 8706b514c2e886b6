"""The ratio of trainer to sampler, made while learning: TRL's own, without TRL's pass for it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from r1zero.training.correction import METRICS, CorrectedWhileLearning, ratio
from tests.training import resuming
from tests.training.resuming import as_killed_after, weights
from tests.training.test_overlap import Served, recipe, server, shared

__all__ = ["recipe", "server", "shared"]  # fixtures
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("bounds", [(None, 3.0), (0.5, 2.0), (0.5, None), (None, None)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_a_ratio_is_cut_off_or_masked(mode: str, bounds: tuple[float | None, float | None]) -> None:
    torch.manual_seed(0)
    trainer, sampler = -torch.rand(5, 4) * 3, -torch.rand(5, 4) * 3
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    sampler[3, 1] = math.nan
    found = ratio(trainer, sampler, mask, mode, *bounds)
    of_tokens = mode.startswith("token")
    assert found.shape == ((5, 4) if of_tokens else (5, 1))
    least, most = -math.inf if bounds[0] is None else bounds[0], math.inf if bounds[1] is None else bounds[1]
    for i in range(5):
        own = [
            0.0 if not mask[i, j] or math.isnan(sampler[i, j]) else float(trainer[i, j] - sampler[i, j])
            for j in range(4)
        ]
        for j, value in enumerate(own if of_tokens else [sum(own)]):
            plain = math.exp(value)
            cut = min(max(plain, least), most)
            expected = cut if mode.endswith("truncate") else plain * (cut == plain)
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"vllm_importance_sampling_mode": "sequence_mask"},
        {"vllm_importance_sampling_mode": "token_truncate", "beta": 0.02},
        {
            "vllm_importance_sampling_mode": "token_mask",
            "vllm_importance_sampling_clip_max": 1.1,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 2,
            "per_device_train_batch_size": 8,
        },
        {"vllm_importance_sampling_mode": "sequence_truncate", "micro_batch_tokens": 128},
    ],
    ids=["sequence_mask", "token_truncate", "token_mask", "packed"],
)
def test_a_run_is_the_one_that_scores_first(
    server: Served,
    recipe: Callable[..., Path],
    tmp_path: Path,
    in_process: Any,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, Any],
) -> None:
    """What is learnt from was made by the policy before, so that there is something to correct."""
    scored: list[bool] = []
    asked = GRPOTrainer._get_per_token_logps_and_entropies

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        scored.append(True)
        return asked(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counting)
    written = recipe(server, max_steps=3, save_strategy="no", **keys)
    code, ours, err = in_process(written, tmp_path / "ours")
    assert code == 0, err
    passes = len(scored)
    monkeypatch.setattr(CorrectedWhileLearning, "begin_correcting", lambda self: None)
    code, theirs, err = in_process(written, tmp_path / "theirs")
    assert code == 0, err
    if "micro_batch_tokens" not in keys:
        assert passes < len(scored) - passes, "a pass less of each window"
    lines = zip(resuming.steps(ours), resuming.steps(theirs), strict=True)
    for one, other in lines:
        assert one.keys() == other.keys() >= set(METRICS)
        for name, value in other.items():
            if isinstance(value, float) and not name.startswith(("publish/", "probe/")):
                assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert max(line["sampling/sampling_logp_difference/max"] for line in resuming.steps(ours)) > 1e-3
    expected, found = weights(theirs.model), weights(ours.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_what_was_found_is_not_lost_with_a_line_for_several_steps(
    server: Served, recipe: Callable[..., Path], tmp_path: Path, in_process: Any
) -> None:
    """Three steps a line, and killed after the checkpoint of the second."""
    written = recipe(server, max_steps=3, logging_steps=3, save_steps=2)
    code, once, err = in_process(written, tmp_path / "once")
    assert code == 0, err
    (tmp_path / "again").mkdir()
    checkpoint = as_killed_after(once, 2, tmp_path / "again")
    code, again, err = in_process(written, tmp_path / "again", "--resume", checkpoint)
    assert code == 0, err
    (expected,), (found,) = resuming.steps(once), resuming.steps(again)
    assert expected.keys() >= set(METRICS)
    assert {name: found.get(name) for name in METRICS} == {name: expected[name] for name in METRICS}
