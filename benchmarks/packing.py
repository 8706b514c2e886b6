"""What padding and repeated prompts cost the trainer: seconds of one optimizer step, padded, packed, and shared.

    python benchmarks/packing.py MODEL_FOLDER [--completions 64] [--mean 400 --cut 1024 --prompt 120] [--batch 8]
        [--budget 8192] [--group 8] [--without-spread 0] [--threads 16] [--rounds 3] [--dtype bfloat16]

Completion lengths are log-normal (sigma 0.6) around the mean and cut; each group's prompt is of a length around
`--prompt`. A step is what follows a generation: log-probabilities of all completions by the policy that made them
("score"), then forward and backward passes ("learn"), with gradient checkpointing and without the optimizer, whose part
is the same. Three ways take turns on the same tokens: "padded" as TRL does it, "packed" micro-batches in which each
completion repeats its prompt, and "shared", where a micro-batch has each prompt once.
Loss and gradients are compared, and before the first round it is proven that sequences keep apart. Without a GPU the
seconds are the processor's, of all threads, so that what else runs on the machine does not count. Weights may be
random: `transformers`' `LlamaConfig` of any shape, saved with any tokenizer, will do.
"""

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from r1zero.run_folder import RunFolder
from r1zero.tasks.verifier import Verifier
from r1zero.training import packed_rows
from r1zero.training.packing import MicroBatch
from r1zero.training.recorder import Recorder
from r1zero.training.trainer import PolicyTrainer

SIGMA = 0.6


def lengths(chosen: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Of prompts and completions, tokens; the prompt's is one for a group."""
    spread = torch.randn(chosen.completions).mul(SIGMA).exp().mul(chosen.mean / math.exp(SIGMA**2 / 2))
    prompts = torch.randn(chosen.completions // chosen.group).mul(0.25).exp().mul(chosen.prompt)
    return prompts.round().clamp(min=2).long().repeat_interleave(chosen.group), spread.round().clamp(
        1, chosen.cut
    ).long()


def window(chosen: argparse.Namespace, words: int, device: torch.device) -> dict[str, torch.Tensor]:
    """What TRL's trainer has after a generation, but for old log-probabilities."""
    prompts, completions = lengths(chosen)
    columns = torch.arange(int(prompts.max()))
    prompt_mask = (columns >= columns.numel() - prompts[:, None]).long()
    completion_mask = (torch.arange(int(completions.max())) < completions[:, None]).long()
    advantages = torch.randn(chosen.completions)
    silent = round(chosen.without_spread * chosen.completions / chosen.group)
    advantages[: silent * chosen.group] = 0.0
    asked = torch.randint(words, (chosen.completions // chosen.group, prompt_mask.shape[1]))
    order = torch.randperm(chosen.completions)  # as TRL shuffles a generation
    made = {
        "prompt_ids": asked.repeat_interleave(chosen.group, dim=0)[order],
        "prompt_mask": prompt_mask[order],
        "completion_ids": torch.randint(words, completion_mask.shape)[order],
        "completion_mask": completion_mask[order],
        "advantages": advantages[order],
        "num_items_in_batch": completion_mask.sum(),
    }
    return {name: value.to(device) for name, value in made.items()}


class Step:
    """One optimizer step's passes over a window, by a trainer whose packing can be switched."""

    def __init__(self, trainer: PolicyTrainer, batch: int, made: dict[str, torch.Tensor]) -> None:
        self.trainer, self.batch, self.window = trainer, batch, made
        self.passes = made["advantages"].numel() // batch
        self._tokens: list[int] = []
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs: self._tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )

    def run(self, budget: int | None, shares: bool = False) -> dict[str, Any]:
        """Seconds by phase, loss, gradients, peak memory and tokens learnt from; `budget` of None is padded."""
        trainer, made = self.trainer, self.window
        trainer.micro_batch_tokens = budget
        packed_rows.SHARING = shares
        trainer.current_gradient_accumulation_steps = self.passes
        trainer._step = 0
        trainer.model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = self._now()
        ids, mask = (torch.cat([made[f"prompt_{what}"], made[f"completion_{what}"]], dim=1) for what in ("ids", "mask"))
        with torch.no_grad():
            old, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, made["completion_ids"].shape[1], batch_size=self.batch
            )
        scored = self._now()
        self._tokens.clear()
        loss = 0.0
        for number in range(self.passes):
            places = slice(number * self.batch, (number + 1) * self.batch)
            own = {name: value[places] if value.ndim else value for name, value in made.items()}
            trainer.accelerator.gradient_state._set_sync_gradients(number == self.passes - 1)
            inputs = MicroBatch(own, old_per_token_logps=old[places])
            loss += float(trainer.training_step(trainer.model, inputs, None))
        learnt = self._now()
        gradients = torch.cat([each.grad.flatten().float().cpu() for each in trainer.model.parameters()])
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else math.nan
        seconds = {"score": scored - began, "learn": learnt - scored, "step": learnt - began}
        return seconds | {"loss": loss, "gradients": gradients, "peak": peak, "tokens": sum(self._tokens)}

    @staticmethod
    def _now() -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def measure(chosen: argparse.Namespace) -> None:
    """Print both ways' seconds by round, their ratio, and how far their loss and gradients are apart."""
    torch.manual_seed(chosen.seed)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    half = chosen.dtype != "float32"
    with tempfile.TemporaryDirectory() as place, Verifier() as verifier:
        folder = RunFolder(Path(place) / "run").create()
        passes = chosen.completions // chosen.batch
        trainer = PolicyTrainer(
            model=AutoModelForCausalLM.from_pretrained(chosen.model, dtype=getattr(torch, chosen.dtype)),
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=GRPOConfig(
                output_dir=str(folder.path),
                per_device_train_batch_size=chosen.batch,
                gradient_accumulation_steps=passes,
                num_generations=chosen.group,
                max_completion_length=chosen.cut,
                gradient_checkpointing=chosen.checkpointing,
                bf16=half,
                loss_type="dapo",
                report_to="none",
                seed=chosen.seed,
            ),
            train_dataset=Dataset.from_list([{"prompt": "?", "gold": "7", "source": "s"}] * chosen.completions),
            processing_class=AutoTokenizer.from_pretrained(chosen.model, padding_side="left"),
            recorder=Recorder(folder, active=False),
            verifier=verifier,
            micro_batch_tokens=chosen.budget,
        )
        if chosen.checkpointing:  # the trainer's own train() would, which is not called
            trainer.model.gradient_checkpointing_enable()
        made = window(chosen, trainer.model.config.vocab_size, trainer.accelerator.device)
        step = Step(trainer, chosen.batch, made)
        real = int(made["prompt_mask"].sum() + made["completion_mask"].sum())
        padded = made["prompt_mask"].numel() + made["completion_mask"].numel()
        print(f"{chosen.completions} completions: {real} tokens; padded to the window's longest: {padded}", flush=True)
        packed_rows.SHARING = True
        packed_rows.require_apart(trainer.model, trainer.accelerator.device, trainer.accelerator.autocast)
        trainer._known_apart = True
        ways: dict[str, tuple[Any, ...]] = {"padded": (None,), "packed": (chosen.budget,)}
        ways["shared"] = (chosen.budget, True)
        rounds = []
        for number in range(-1, chosen.rounds):  # one to warm up
            found, expected = {}, torch.empty(0)
            for way, how in ways.items():
                each = found[way] = step.run(*how)
                gradients = each.pop("gradients")
                expected = gradients if way == "padded" else expected
                print(
                    f"round {number}: {way} {each['step']:.2f} s (score {each['score']:.2f}, learn {each['learn']:.2f} "
                    f"from {each['tokens']} tokens); loss {each['loss']:.6f}, gradients "
                    f"{float((gradients - expected).norm() / expected.norm()):.1e} from padded; peak "
                    f"{each['peak']:.1f} GiB",
                    flush=True,
                )
            rounds.append(found)
        for slow, fast in (("padded", "packed"), ("packed", "shared"), ("padded", "shared")):
            ratios = {
                what: sorted(found[slow][what] / found[fast][what] for found in rounds[1:])
                for what in ("step", "learn")
            }
            said = (f"{what} {statistics.median(by):.2f} ({by[0]:.2f} to {by[-1]:.2f})" for what, by in ratios.items())
            print(f"{slow} over {fast}: {', '.join(said)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--completions", type=int, default=64)
    parser.add_argument("--mean", type=int, default=400, help="of completions, tokens")
    parser.add_argument("--cut", type=int, default=1024, help="longest completion, tokens")
    parser.add_argument("--prompt", type=int, default=120, help="median, tokens")
    parser.add_argument("--batch", type=int, default=8, help="completions of a padded pass")
    parser.add_argument("--budget", type=int, default=8192, help="of a packed pass, tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--without-spread", type=float, default=0.0, help="share of groups that teach nothing")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: its choice")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
