"""Importance-sampling correction (TRL's, for completions by vLLM) without a forward pass of its own.

TRL asks for the trainer's log-probabilities of each completion twice: without gradients when a window is scored, to
compare them with the sampler's, and with gradients when it is learnt from. Where the weights do not change in between,
since a window is one optimizer step and learnt from once, both are the same numbers. So here the ratio is made from the
second, and the first pass, a quarter of the trainer's work (forward 1, backward 2, scoring 1), is left out.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer
from trl.trainer.utils import nanmax, nanmin

METRICS = (
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)


def ratio(
    trainer: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, mode: str, least: float | None, most: float | None
) -> torch.Tensor:
    """By how much more likely the trainer's policy makes what the sampler has drawn, truncated or masked.

    TRL's ``vllm_importance_sampling_mode`` (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"; masked: Liu et al. 2025, "When speed kills stability").

    >>> logps = torch.tensor([[-1.0, -2.0]])
    >>> ratio(logps, logps - math.log(4), torch.tensor([[1, 0]]), "token_truncate", None, 3.0).tolist()
    [[3.0, 1.0]]

    Args:
        trainer: log-probabilities, (sequences, tokens); nats.
        sampler: likewise; NaN where it gave none, which counts as the trainer's.
        mask: likewise, 1 for tokens of completions.
        mode: token_truncate, token_mask, sequence_truncate or sequence_mask.
        least: below it a ratio is raised to it, or set to 0 by a mask; None: nothing is.
        most: above it likewise.

    Returns:
        (sequences, tokens), 1 at padding; (sequences, 1) by sequence.
    """
    difference = ((trainer - sampler) * mask).nan_to_num(nan=0.0)
    if mode.startswith("sequence_"):
        difference = difference.sum(dim=-1, keepdim=True)
    found = difference.exp()
    if mode.endswith("_truncate"):
        return found if least is None and most is None else found.clamp(least, most)
    outside = (found < (-math.inf if least is None else least)) | (found > (math.inf if most is None else most))
    return found.masked_fill(outside, 0.0)


class CorrectedWhileLearning(Trainer):  # type: ignore[misc]
    """Makes the ratio in TRL's loss. Mixed in before TRL's trainer.

    Attributes:
        corrects_while_learning: whether it does; else the correction is TRL's, or there is none.
    """

    corrects_while_learning = False
    vllm_importance_sampling_correction: bool
    _learning: dict[str, Any] | None = None

    def begin_correcting(self) -> None:
        """Where it gives the same, correct while learning from now on; after TRL's ``__init__``."""
        window = self.args.steps_per_generation * self.num_iterations
        one_step = self.args.gradient_accumulation_steps % window == 0  # as TRL asks where vLLM does not sample
        self.corrects_while_learning = (
            one_step and self.use_vllm and self.vllm_importance_sampling_correction and not self.args.use_liger_kernel
        )
        self._found: dict[str, list[torch.Tensor]] = {name: [] for name in METRICS}

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with self._left_to_the_loss():
            scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return scored

    @contextmanager
    def _left_to_the_loss(self) -> Iterator[None]:
        """TRL scores as if nothing had to be corrected."""
        corrects = self.vllm_importance_sampling_correction
        if self.corrects_while_learning:
            self.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = corrects

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        if self.corrects_while_learning:
            self._learning = inputs
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self._learning = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.correct(found[0])
        return found

    def correct(self, logps: torch.Tensor) -> None:
        """Where these are what is learnt from: put the ratio where TRL's loss looks for it, and keep it for metrics.

        Args:
            logps: of the completions that the loss was called with, by the model; (sequences, tokens).
        """
        if self._learning is None:
            return
        inputs, trainer = self._learning, logps.detach()
        sampler, mask = inputs["sampling_per_token_logps"], inputs["completion_mask"]
        if inputs.get("tool_mask") is not None:
            mask = mask * inputs["tool_mask"]
        settings = self.args
        made = ratio(
            trainer,
            sampler,
            mask,
            settings.vllm_importance_sampling_mode,
            settings.vllm_importance_sampling_clip_min,
            settings.vllm_importance_sampling_clip_max,
        )
        inputs["importance_sampling_ratio"] = made
        here = mask.bool()
        difference = (trainer - sampler).abs()[here & ~sampler.isnan()]
        of_sequences = made.shape[1] == 1 and mask.shape[1] > 1
        ratios = made[here.any(dim=1)].flatten() if of_sequences else made[here]
        for name in METRICS:
            values = difference if "difference" in name else ratios
            self._found[name].append(_summary(values, _kind(name)))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Before a step is logged and saved: one value for it of each metric, as TRL has them. A collective."""
        for name, found in self._found.items() if self.corrects_while_learning else ():
            if found:
                self._metrics["train"][name].append(self._together(found, _kind(name)))
                found.clear()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _together(self, found: list[torch.Tensor], kind: str) -> float:
        """One number of all passes and processes."""
        gathered: torch.Tensor = self.accelerator.gather(torch.stack(found))
        if kind == "mean":
            total, count = gathered.sum(dim=0).tolist()
            return float(total / count) if count else 0.0
        return float((nanmin if kind == "min" else nanmax)(gathered))


def _kind(name: str) -> str:
    """Of a metric: mean, min or max."""
    return name.rpartition("/")[2]


def _summary(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Sum and count for a mean, else the least or the most; NaN where there is nothing."""
    if kind == "mean":
        return torch.stack([values.sum().float(), torch.tensor(float(values.numel()), device=values.device)])
    if not values.numel():
        return torch.tensor(math.nan, device=values.device)
    return (values.min() if kind == "min" else values.max()).float()
