"""The embedded model: a base model small enough to make on a laptop in under a minute, with no network.

It differs from a model of the hub in three ways.

- It is made, not downloaded: `ensure` trains it on first use and finds it in the user's cache ever after. The same
  constants give the same weights, bit for bit, on the same machine.
- Its tokenizer reads characters (printable ASCII and newline; others are dropped). Each of the four tags is one token,
  and so is the whole of R1RL's system prompt: that text never changes, and as 239 characters it would make each step of
  training several times longer without teaching anything. The tags are not special tokens, so they survive decoding:
  grading reads the decoded text.
- It is careless on purpose. It learns to add from faultless solutions and then reads careless ones
  (`arithmetic.careless_solution`), wrong more often than right; both of train pairs only. So there is something for
  reinforcement learning to find: the model can add, but seldom takes the trouble.
"""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from r1zero.recipe import TINY_MODEL
from r1zero.tasks import arithmetic
from r1zero.tasks.prompts import R1RL_SYSTEM, TEMPLATES

PROMPT = TEMPLATES["r1rl"]
PAD, EOS = "<pad>", "<eos>"
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))

MAX_LENGTH = 512  # tokens, prompt and completion together

VERSION = "1"  # raise when a change of this file or of the task's text makes a different model of the same constants
THREADS = 2  # sums of floats depend on how threads share them: a fixed number keeps the weights reproducible
IGNORED = -100  # the label that the loss of transformers leaves out

Progress = Callable[[int, int, float], None]  # steps done, steps in all, loss


@dataclass(frozen=True)
class Pretraining:
    """All that decides the weights: the shape of the model and how it is trained.

    >>> Pretraining(steps=5).steps
    5

    Attributes:
        hidden_size: width; with 4 times as much in the MLP.
        layers: each costs time for each generated token, and two suffice to look digits up and to add them.
        heads: attention heads, with as many key-value heads.
        steps: optimizer steps.
        careful_share: the first part of the steps, which reads faultless solutions. Learning to add from careless ones
            alone takes several times as long.
        batch_size: solutions a step.
        learning_rate: the peak, after a tenth of the steps; from there it falls linearly to zero.
        seed: of the weights, the pairs and the slips.
    """

    hidden_size: int = 192
    layers: int = 2
    heads: int = 4
    steps: int = 420
    careful_share: float = 0.65
    batch_size: int = 32
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        """Names the model in the cache: two models of the same name have the same weights."""
        rates = (arithmetic.GUESS_RATE, arithmetic.SLIP_RATE, arithmetic.FORGOTTEN_CARRY_RATE, arithmetic.HELD_OUT_SEED)
        constants = [VERSION, asdict(self), CHARACTERS, TAGS, R1RL_SYSTEM, THREADS, rates, arithmetic.HELD_OUT_PAIRS]
        return hashlib.sha256(json.dumps(constants).encode()).hexdigest()[:12]


def cache_path() -> Path:
    """Where made models live: ``R1ZERO_CACHE`` if set, else the user's cache folder."""
    override = os.environ.get("R1ZERO_CACHE")
    return Path(override).expanduser() if override else user_cache_path("r1zero")


def ensure(pretraining: Pretraining | None = None, progress: Progress | None = None) -> Path:
    """The folder of the embedded model, made now if it is not there yet.

    Processes that ask at once wait for the first of them. The folder appears under its name only when complete, so one
    that was interrupted leaves nothing that looks like a model.
    """
    pretraining = pretraining or Pretraining()
    folder = cache_path() / f"tiny-arithmetic-{pretraining.fingerprint}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                _make(aside, pretraining, progress)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, a tag, or R1RL's system prompt; decoding puts nothing in between."""
    characters = {character: index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(BPE(vocab=characters, merges=[]))
    tokenizer.decoder = Fuse()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*TAGS, R1RL_SYSTEM)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )


def make_model(pretraining: Pretraining, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The untrained model, in a shape that every library here knows.

    Not Qwen2: for that model type transformers 5 replaces whatever tokenizer the folder names by Qwen2's own.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=pretraining.hidden_size,
        intermediate_size=4 * pretraining.hidden_size,
        num_hidden_layers=pretraining.layers,
        num_attention_heads=pretraining.heads,
        num_key_value_heads=pretraining.heads,
        head_dim=pretraining.hidden_size // pretraining.heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def _make(folder: Path, pretraining: Pretraining, progress: Progress | None) -> None:
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]), _threads(THREADS):
        torch.manual_seed(pretraining.seed)
        model = make_model(pretraining, tokenizer)
        _pretrain(model, tokenizer, pretraining, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pretrain(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pretraining: Pretraining,
    progress: Progress | None,
) -> None:
    """Next-token prediction; the loss leaves out the prompt, whose numbers nobody can predict."""
    prompt = PROMPT.build(arithmetic.question(10, 10))  # as long for all two-digit numbers
    prompt_length = len(tokenizer(prompt)["input_ids"])
    steps = pretraining.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=pretraining.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warmup = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
    )
    model.train()
    for step, texts in enumerate(_batches(pretraining), start=1):
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        labels[:, :prompt_length] = IGNORED
        # Padding is on the right, where causal attention never looks: no mask means the faster kernel.
        loss = model(input_ids=batch["input_ids"], labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress:
            progress(step, steps, loss.item())
    model.eval()


def _batches(pretraining: Pretraining) -> Iterator[list[str]]:
    """Prompts and solutions of train pairs: faultless first, so that the model learns to add, then careless."""
    rng = random.Random(pretraining.seed)
    train = arithmetic.pairs("train")
    for step in range(pretraining.steps):
        texts = []
        for a, b in rng.choices(train, k=pretraining.batch_size):
            careful = step < pretraining.careful_share * pretraining.steps
            faultless = arithmetic.worked_solution(a, b), a + b
            solution, answer = faultless if careful else arithmetic.careless_solution(a, b, rng)
            completion = PROMPT.completion(solution, str(answer), "tagged")
            texts.append(f"{PROMPT.build(arithmetic.question(a, b))}{completion}{EOS}")
        yield texts


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Make the embedded model, showing how far it is, and say where it lies."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    console = Console()
    columns = (TextColumn("making " + TINY_MODEL), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bar:
        task = bar.add_task("pretraining", total=None, loss=float("nan"), visible=False)
        folder = ensure(
            progress=lambda done, total, loss: bar.update(task, completed=done, total=total, loss=loss, visible=True)
        )
    console.print(str(folder), soft_wrap=True)


if __name__ == "__main__":
    main()
