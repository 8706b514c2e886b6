"""The arithmetic of the comparison: what a turn measured, what that says, and how turns compare. Pure, no torch.

**Model FLOPs utilisation** (MFU): floating point operations that the mathematics needs, over what the hardware could
have done meanwhile. Forward and backward take 6 N + 12 L H Q T operations a token: Chowdhery et al. 2022 (PaLM,
arXiv:2204.02311), appendix B, with N weights, L layers, H heads of width Q and sequences of T tokens; a forward alone
takes a third of it (Kaplan et al. 2020, arXiv:2001.08361, section 2.1: 2 N forward, twice that backward). As there,
attention is not halved for causality. N here are the weights that each token is multiplied by: projections and language
head, not the look-up of the embedding (the same matrix where embeddings are tied, counted once). Not counted, since the
mathematics does not need it: padding, recomputed activations, the forward for old log-probabilities.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1zero.model_facts import ModelShape

PHASES = ("generate", "score", "publish", "train", "other")

# Dense bf16, TFLOP/s, as the vendor's data sheets have it; the longest name that fits counts.
PEAK_TFLOPS = {
    "NVIDIA H200": 989.5,
    "NVIDIA H100": 989.5,  # SXM
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100": 312.0,
    "NVIDIA A10": 125.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
}


def peak_tflops(gpu: str) -> float | None:
    """Of a GPU as nvidia-smi names it; None where it is not in the table.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("NVIDIA A10G")
    (989.5, None)
    """
    fitting = [name for name in PEAK_TFLOPS if gpu == name or gpu.startswith((f"{name} ", f"{name}-"))]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def forward_flops(shape: ModelShape, lengths: Sequence[float]) -> float:
    """Operations of one forward over sequences of `lengths` tokens, a third of the module's formula."""
    weights = shape.projection_parameters + shape.vocab_size * shape.hidden_size
    attention = 4 * shape.layers * shape.heads * shape.head_dim
    return sum(length * (2 * weights + attention * length) for length in lengths)


def training_flops(shape: ModelShape, lengths: Sequence[float]) -> float:
    """Operations of forward and backward over sequences of `lengths` tokens."""
    return 3 * forward_flops(shape, lengths)


@dataclass(frozen=True)
class Step:
    """One optimizer step of one side.

    Attributes:
        seconds: from the end of the step before to its own, on the wall clock.
        phases: seconds by name, of `PHASES`.
        prompt_tokens: of all completions' prompts, each counted as often as it has completions.
        lengths: of its completions; tokens.
        idle: share of the time by "server" and "trainer", of a side that says so itself.
    """

    seconds: float
    phases: dict[str, float]
    prompt_tokens: float
    lengths: list[int]
    idle: dict[str, float] = field(default_factory=dict)

    @property
    def sequences(self) -> list[float]:
        """Prompt and completion together; prompts are taken as equally long."""
        prompt = self.prompt_tokens / len(self.lengths)
        return [prompt + length for length in self.lengths]


@dataclass(frozen=True)
class Turn:
    """One start of one side: what was measured after its first steps, which warm up.

    Attributes:
        mode: "r1zero", "trl-server", "trl-colocate" or "trl-transformers".
        variant: keys that differ from the mode's usual ones, as text; empty: none.
        round: counted from 0.
        steps: those that count.
        idle: by GPU, the mean share of time in which no kernel ran, 0 to 1; empty without GPUs.
        memory_gib: by GPU, the most that was in use, by all processes.
        trainer_gpus: GPUs that train.
        gpus: GPUs in all.
        started_s: from the command to the first step's end.
        settings: all that the side was given.
    """

    mode: str
    variant: str
    round: int
    steps: list[Step]
    idle: dict[str, float] = field(default_factory=dict)
    memory_gib: dict[str, float] = field(default_factory=dict)
    trainer_gpus: int = 0
    gpus: int = 0
    started_s: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.mode} {self.variant}".strip()

    @property
    def seconds(self) -> float:
        """The mean step: a turn's steps have the same work on both sides, one by one and together."""
        return statistics.fmean(step.seconds for step in self.steps)

    def phase(self, name: str) -> float:
        """Mean seconds of a phase."""
        return statistics.fmean(step.phases.get(name, 0.0) for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens over the seconds of the steps."""
        return sum(sum(step.lengths) for step in self.steps) / sum(step.seconds for step in self.steps)

    def mfu(self, shape: ModelShape, peak: float) -> tuple[float, float] | None:
        """Of the trainer's GPUs while they train, and of all GPUs over whole steps, where a forward generates.

        Args:
            shape: of the model.
            peak: of each GPU, TFLOP/s.
        """
        train_s = sum(step.phases.get("train", 0.0) for step in self.steps)
        if not self.trainer_gpus or not train_s:
            return None
        trained = sum(training_flops(shape, step.sequences) for step in self.steps)
        generated = sum(forward_flops(shape, step.sequences) for step in self.steps)
        whole_s = sum(step.seconds for step in self.steps)
        return (
            trained / (train_s * self.trainer_gpus * peak * 1e12),
            (trained + generated) / (whole_s * self.gpus * peak * 1e12),
        )


@dataclass(frozen=True)
class Spread:
    """Median, least and most of the rounds.

    >>> print(Spread.of([3.0, 1.0, 2.0]))
    2 (1 to 3)
    """

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        median, least, most = (
            f"{each:,.0f}" if each >= 1000 else f"{each:.3g}" for each in (self.median, self.least, self.most)
        )
        return f"{median} ({least} to {most})"


def ratios(turns: Sequence[Turn], ours: str, theirs: str) -> Spread | None:
    """How many times as fast `ours` is as `theirs`, round by round; None where no round has both.

    The two of a round ran one after the other, so that a slow hour of the machine meets both.
    """
    by_round = {(turn.name, turn.round): turn.seconds for turn in turns}
    rounds = sorted({turn.round for turn in turns})
    found = [
        by_round[theirs, each] / by_round[ours, each]
        for each in rounds
        if (ours, each) in by_round and (theirs, each) in by_round
    ]
    return Spread.of(found) if found else None


def unequal_work(turns: Sequence[Turn]) -> list[str]:
    """Where two turns of a round did not train on equally many and equally long completions, step by step."""
    faults = []
    for number in sorted({turn.round for turn in turns}):
        first, *others = [turn for turn in turns if turn.round == number]
        for other in others:
            pairs = zip(first.steps, other.steps, strict=False)
            different = [at for at, (a, b) in enumerate(pairs) if sorted(a.lengths) != sorted(b.lengths)]
            if different:
                faults.append(f"round {number}: {first.name} and {other.name} differ in lengths, steps {different}")
    return faults


def table(turns: Sequence[Turn], shape: ModelShape | None, peak: float | None, ceiling: Sequence[float] = ()) -> str:
    """The comparison as Markdown: a row for each side, medians over the rounds, least and most behind them."""
    names = list(dict.fromkeys(turn.name for turn in turns))
    lines = [
        "| side | rounds | seconds a step | " + " | ".join(PHASES) + " | completion tokens/s | MFU training | MFU all |"
        " idle by GPU | peak GiB by GPU | to the first step, s |",
        "|---|---|---|" + "---|" * (len(PHASES) + 6),
    ]
    for name in names:
        own = [turn for turn in turns if turn.name == name]
        used = [each for each in (turn.mfu(shape, peak) for turn in own) if each] if shape and peak else []
        utilised = [f"{100 * statistics.median(each[i] for each in used):.1f} %" if used else "-" for i in (0, 1)]
        cells = [
            *(name, str(len(own)), str(Spread.of(turn.seconds for turn in own))),
            *(f"{statistics.median(turn.phase(phase) for turn in own):.3g}" for phase in PHASES),
            str(Spread.of(turn.tokens_per_second for turn in own)),
            *utilised,
            _by_gpu([turn.idle for turn in own], lambda share: f"{100 * share:.0f} %"),
            _by_gpu([turn.memory_gib for turn in own], lambda gib: f"{gib:.0f}"),
            f"{statistics.median(turn.started_s for turn in own):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ours = [name for name in names if name.startswith("r1zero")]
    lines.append("")
    for mine in ours:
        for theirs in (name for name in names if name not in ours):
            found = ratios(turns, mine, theirs)
            if found:
                lines.append(
                    f"{mine} is {found.median:.2f} ({found.least:.2f} to {found.most:.2f}) x as fast as {theirs}"
                )
    for name in names:
        idle = [(step.seconds, step.idle) for turn in turns if turn.name == name for step in turn.steps if step.idle]
        if idle:
            whole = sum(seconds for seconds, _ in idle)
            server, trainer = (
                100 * sum(s * share[side] for s, share in idle) / whole for side in ("server", "trainer")
            )
            lines.append(f"{name} by its own clock: policy servers idle {server:.0f} %, trainer {trainer:.0f} %")
    if ceiling:
        lines.append(f"vLLM alone, offline: {Spread.of(ceiling)} completion tokens/s while it generates")
        for name in names:
            speeds = [
                sum(sum(s.lengths) for s in turn.steps) / sum(s.phases["generate"] for s in turn.steps)
                for turn in turns
                if turn.name == name and turn.phase("generate")
            ]
            if speeds:
                share = 100 * statistics.median(speeds) / statistics.median(ceiling)
                lines.append(f"  {name}: {Spread.of(speeds)} a second of its phase generate, {share:.0f} % of that")
    lines += [f"NOT THE SAME WORK: {fault}" for fault in unequal_work(turns)]
    return "\n".join(lines)


def _by_gpu(found: Sequence[Mapping[str, float]], text: Any) -> str:
    gpus = sorted({gpu for each in found for gpu in each})
    return ", ".join(text(statistics.median(each[gpu] for each in found if gpu in each)) for gpu in gpus) or "-"


def save(turn: Turn, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(turn), indent=1), encoding="utf-8")


def load(folder: Path) -> list[Turn]:
    """The turns that were kept in `folder`, in the order of their rounds and names."""
    turns = []
    for file in sorted(folder.glob("turn-*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        turns.append(Turn(**{**content, "steps": [Step(**step) for step in content["steps"]]}))
    return sorted(turns, key=lambda turn: (turn.round, turn.name))


def steps_of(
    lines: Sequence[Mapping[str, Any]], notes: Sequence[Mapping[str, Any]], completions: int, skip: int
) -> list[Step]:
    """A turn's steps, from what either side wrote.

    Args:
        lines: of the steps, with `time`, `num_tokens` (prompts and completions so far) and `seconds/...` by phase;
            r1zero's metrics.jsonl and stock's steps file have the same names for these.
        notes: of the reward's notebook, of all processes, one line for each call; `time` and `lengths`.
        completions: of a step. A side that works ahead may have rewarded some of a step that never came.
        skip: steps that warm up, at least 1: a step is timed from the end of the one before.

    Raises:
        ValueError: when fewer completions were rewarded than the steps have.
    """
    lengths = [length for note in sorted(notes, key=lambda note: note["time"]) for length in note["lengths"]]
    if len(lengths) < completions * len(lines):
        raise ValueError(f"{len(lengths)} completions were rewarded in {len(lines)} steps of {completions}")
    steps = []
    for at in range(max(skip, 1), len(lines)):
        line, before = lines[at], lines[at - 1]
        own = lengths[at * completions : (at + 1) * completions]
        tokens = line["num_tokens"] - before["num_tokens"]
        idle = {key.removeprefix("idle/"): value for key, value in line.items() if key.startswith("idle/")}
        steps.append(Step(line["time"] - before["time"], _phases(line), tokens - sum(own), own, idle))
    return steps


def _phases(line: Mapping[str, Any]) -> dict[str, float]:
    names = {"generate": "generate", "score": "score", "grade": "score", "publish": "publish", "train": "train"}
    found = dict.fromkeys(PHASES, 0.0)
    for key, value in line.items():
        kind, _, name = key.partition("/")
        if kind == "seconds" and name != "step":
            found[names.get(name, "other")] += value
    return found
