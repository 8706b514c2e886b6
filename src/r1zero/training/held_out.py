"""Measure the policy on held-out problems, from inside the trainer and through the same generation as training.

Nothing of the training state moves: random numbers are drawn from a fork with a seed of its own.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import gather_object

from r1zero.evaluation.benchmarks import subset as subset  # what is measured on, the same draw for every run
from r1zero.evaluation.scores import Score, mean_score
from r1zero.recipe import OwnKeys
from r1zero.tasks import prompts as templates
from r1zero.tasks.problem import Problem
from r1zero.tasks.verifier import Verdict
from r1zero.training.recorder import prompt_text
from r1zero.training.trainer import PolicyTrainer, seed_of

SEED = 20261121  # of every measurement, so that two of them draw alike


def measure(trainer: PolicyTrainer, problems: list[Problem], keys: OwnKeys, label: str) -> Score:
    """Sample, grade and record `keys.eval_samples` completions of each problem. A collective: all processes call it.

    Raises:
        Stopped: between two rounds, when the run was asked to stop; then nothing is recorded.
    """
    began = time.monotonic()
    accelerator, step = trainer.accelerator, trainer.state.global_step
    samples = keys.eval_samples
    template = templates.template(keys.prompt_template)
    prompts = [template.build(problem.question) for problem in problems]
    # Every process takes the same number of problems; the last ones are repeated where it does not come out even.
    share = -(-len(problems) // accelerator.num_processes)
    first = accelerator.process_index * share
    own = [min(index, len(problems) - 1) for index in range(first, first + share)]
    per_round = max(1, _completions_at_a_time(trainer) // samples)
    rows: list[tuple[int, dict[str, Any]]] = []
    trainer.recorder.phase(label, 0, len(problems))
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _sampling(trainer, keys.eval_temperature):
        torch.manual_seed(SEED + accelerator.process_index)
        for at in range(0, share, per_round):
            indices = [index for index in own[at : at + per_round] for _ in range(samples)]
            seed = seed_of(SEED) + own[at] * samples if trainer.seed_rollouts else None
            completed = _complete(trainer, [prompts[i] for i in indices], samples, keys.eval_temperature, seed)
            grades = trainer.verifier.grade(
                [text for text, _, _ in completed],
                [problems[i].gold for i in indices],
                [problems[i].question for i in indices],
            )
            for index, (text, ids, version), graded in zip(indices, completed, grades, strict=True):
                row = {
                    "step": step,
                    "prompt": prompt_text(prompts[index]),
                    "completion": text,
                    "gold": problems[index].gold,
                    "answer": graded.answer,
                    "verdict": graded.verdict.value,
                    "reward": float(graded.verdict is Verdict.CORRECT),
                    "length": len(ids),
                    "clipped": trainer.clipped(ids),
                    "policy_version": version,
                    "source": problems[index].source,
                }
                rows.append((index, row))
            done = min(len(problems), (at + per_round) * accelerator.num_processes)
            trainer.recorder.phase(label, done, len(problems))
    by_problem: dict[int, list[dict[str, Any]]] = {}
    for index, row in gather_object(rows):
        by_problem.setdefault(index, []).append(row)
    kept = {index: by_problem[index][:samples] for index in sorted(by_problem)}
    score = mean_score([[row["reward"] for row in each] for each in kept.values()])
    flat = [row for each in kept.values() for row in each]
    share_of = {v.value: sum(row["verdict"] == v.value for row in flat) / len(flat) for v in Verdict}
    trainer.recorder.evaluation(
        {
            "step": step,
            **asdict(score),
            "temperature": keys.eval_temperature,
            "mean_length": sum(row["length"] for row in flat) / len(flat),
            "clipped": sum(row["clipped"] for row in flat) / len(flat),
            **{f"verdict/{name}": value for name, value in share_of.items()},
            "seconds": round(time.monotonic() - began, 1),
        },
        flat,
    )
    return score


def _completions_at_a_time(trainer: PolicyTrainer) -> int:
    """How many completions one process asks for at once: vLLM queues them, transformers must hold them in memory."""
    if trainer.use_vllm:
        return 4096 // int(trainer.accelerator.num_processes)
    return int(trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation)


@contextmanager
def _sampling(trainer: PolicyTrainer, temperature: float) -> Iterator[None]:
    """TRL's generation in this process at another temperature; as it was afterwards."""
    if trainer.server:
        yield
        return
    if trainer.use_vllm:
        vllm = trainer.vllm_generation
        before = vllm.temperature
        vllm.temperature = temperature
        try:
            yield
        finally:
            vllm.temperature = before
        return
    config = trainer.generation_config
    before = config.temperature, config.do_sample
    config.do_sample = temperature > 0
    config.temperature = temperature if temperature > 0 else 1.0
    try:
        yield
    finally:
        config.temperature, config.do_sample = before


def _complete(
    trainer: PolicyTrainer, prompts: list[Any], samples: int, temperature: float, seed: int | None
) -> list[tuple[str, list[int], int | None]]:
    """(text, token ids, policy version) of one completion for each of `prompts`: runs of `samples` equal ones."""
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    completed = trainer.complete(prompt_ids, samples, seed, temperature=temperature)
    ids, _ = trainer.stop.cut([list(each.completion_ids) for each in completed], None)
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    return [(text, one, each.policy_version) for text, one, each in zip(texts, ids, completed, strict=True)]
