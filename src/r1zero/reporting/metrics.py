"""Every number of metrics.jsonl, defined once: name, unit, meaning, where it is computed. No torch.

docs/metrics.md is this table (``python -m r1zero.reporting.metrics > docs/metrics.md``), and a test holds the two
together, and both to the lines that a real run writes.
"""

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase

STEP, EVALUATION = "step", "evaluation"
TRL, TRANSFORMERS = "TRL", "transformers"
CLOCK, PROBE, TRAINER = "training/clock.py", "training/probe.py", "training/trainer.py"
IDLE = "training/idle.py"
HELD_OUT, SCORES = "training/held_out.py", "evaluation/scores.py"
RECORDER, PUBLISH, PACKING = "training/recorder.py", "training/generation.py", "training/packing.py"

INTRODUCTION = """\
# Metrics

One line of `metrics.jsonl` for each optimizer step (`kind: step`) and each measurement (`kind: evaluation`). W&B shows
the same names, measurements under `evaluation/`; TensorBoard and trackio have those of TRL and transformers under
`train/`. Mean over all processes unless it says otherwise. A number that could not be computed is null; one that does
not apply is left out. `python -m r1zero.reporting.metrics` writes this page."""
OTHER_KINDS = """\
Other kinds of lines: `phase` (what goes on), `alert`, `restart` (server and trainer were started again, with the
cause), `resume` (the run went back to a checkpoint: later steps on record before this line do not count).
"""


@dataclass(frozen=True)
class Metric:
    """One number, or several whose names differ in one part.

    >>> Metric("seconds/*", "s", "of the step that a phase took", CLOCK).is_of("seconds/generate")
    True

    Attributes:
        name: as in metrics.jsonl; `*` stands for what the meaning says in angle brackets.
        unit: empty where it has none.
        meaning: of the number in one line of metrics.jsonl.
        where: who computes it: TRL's GRPOTrainer, transformers' Trainer, or a module of ours.
        kind: of the lines that have it, step or evaluation.
    """

    name: str
    unit: str
    meaning: str
    where: str
    kind: str = STEP

    def is_of(self, name: str) -> bool:
        """Whether this is the definition of `name`."""
        return fnmatchcase(name, self.name)


METRICS = (
    Metric("step", "", "optimizer steps made, this one included", TRANSFORMERS),
    Metric("steps", "", "optimizer steps of the whole run", TRANSFORMERS),
    Metric("time", "s", "when the line was written, unix time", RECORDER),
    Metric("epoch", "", "passes over the training problems so far", TRANSFORMERS),
    # What is learnt from.
    Metric("reward", "", "mean of the weighted sum of the rewards over the completions of the step", TRL),
    Metric("reward_std", "", "standard deviation of the same over all completions", TRL),
    Metric("frac_reward_zero_std", "share", "of the groups in which all completions have one reward", TRL),
    Metric("rewards/*/mean", "", "mean of <the reward function>, unweighted", TRL),
    Metric("rewards/*/std", "", "standard deviation of <the reward function>, unweighted", TRL),
    Metric("source/*/reward", "", "reward of the completions to problems of <the source>", TRAINER),
    Metric("source/*/correct", "share", "right among those of <the source>", TRAINER),
    Metric("verdict/*", "share", "of the completions: <correct, wrong, unparsed, timed_out>", TRAINER),
    # Completions.
    Metric("completions/mean_length", "tokens", "of a completion", TRL),
    Metric("completions/min_length", "tokens", "the shortest", TRL),
    Metric("completions/max_length", "tokens", "the longest", TRL),
    Metric("completions/p*_length", "tokens", "<10, 50 or 90> % are no longer", TRAINER),
    Metric("completions/clipped_ratio", "share", "without an end: cut off at max_completion_length", TRL),
    Metric(
        "completions/left_out_ratio",
        "share",
        "left out of forward and backward pass: no advantage and no KL, or nothing to learn from; with packing",
        PACKING,
    ),
    Metric("completions/*_terminated_length", "tokens", "<mean, min or max> of those that ended by themselves", TRL),
    Metric("num_tokens", "tokens", "of prompts and completions so far; in a cold start, of its texts", TRL),
    Metric("tokens_per_second", "tokens/s", "growth of num_tokens since the line before, by time", CLOCK),
    # The update.
    Metric("loss", "", "as minimised; GRPO's is near 0 by construction and says nothing of the policy", TRL),
    Metric("policy_loss", "", "of loss the part without the entropy bonus; with entropy_coef", TRL),
    Metric("entropy_coef", "", "weight of the entropy bonus", TRL),
    Metric("entropy", "nats", "of the policy's next token, mean over the tokens learnt from", TRL),
    Metric("kl", "nats", "to the reference model, per token (k3, Schulman 2020); with beta > 0", TRL),
    Metric("grad_norm", "", "of all gradients together, before clipping", TRANSFORMERS),
    Metric("learning_rate", "", "of this step", TRANSFORMERS),
    Metric("mean_token_accuracy", "share", "of tokens whose most likely prediction is right; cold start", TRL),
    Metric("clip_ratio/*", "share", "of tokens outside the trust region, <low, high, either; mean or extreme>", TRL),
    # Server against trainer.
    Metric("sampling/sampling_logp_difference/*", "nats", "<mean, max> of |server - trainer| on sampled tokens", TRL),
    Metric("sampling/importance_sampling_ratio/*", "", "<min, mean, max> of trainer / server, cut off above", TRL),
    Metric("probe/difference", "nats", "mean of |server - trainer| on the fixed tokens, after a publish", PROBE),
    Metric("probe/difference_max", "nats", "the largest of them", PROBE),
    Metric("probe/moved", "nats", "root mean square of the trainer's own change since the anchor version", PROBE),
    Metric("probe/followed", "share", "of that change which the server made too, where that can be told", PROBE),
    Metric(
        "probe/seconds", "s", "that comparing took, the trainer's part of it while the servers make completions", PROBE
    ),
    Metric("publish/seconds", "s", "from the trainer's weights to a server that serves them", PUBLISH),
    Metric("publish/bytes", "B", "sent or laid down for it", PUBLISH),
    Metric("staleness", "steps", "from the policy that made the completions to the one that begins to learn", TRAINER),
    # Time and memory.
    Metric(
        "seconds/*",
        "s",
        "of the step: <publish, probe, generate, wait (for the next window), grade, record, save (the checkpoint "
        "before it), train; step: all>",
        CLOCK,
    ),
    Metric(
        "idle/server",
        "share",
        "of the step without a request for completions under way, as while weights are published; several servers: "
        "the mean of each one's own share",
        IDLE,
    ),
    Metric("idle/trainer", "share", "of the step that the trainer waited for completions of a policy server", IDLE),
    Metric("seconds_left", "s", "to the last step, at the pace of the last 20", CLOCK),
    Metric("step_time", "s", "of the step without what comes between two steps", TRL),
    Metric("memory/peak_gib", "GiB", "the most that the first trainer process has held of its GPU", CLOCK),
    Metric("memory/total_gib", "GiB", "what that GPU has", CLOCK),
    # Measurements.
    Metric("step", "", "optimizer steps made before it", HELD_OUT, EVALUATION),
    Metric("time", "s", "when the line was written, unix time", RECORDER, EVALUATION),
    Metric("mean", "share", "of right completions, mean over the questions", SCORES, EVALUATION),
    Metric("low", "share", "lower end of its 95 % interval, questions as clusters", SCORES, EVALUATION),
    Metric("high", "share", "upper end", SCORES, EVALUATION),
    Metric("questions", "", "measured on", SCORES, EVALUATION),
    Metric("samples", "", "completions of each question", SCORES, EVALUATION),
    Metric("temperature", "", "of the sampling", HELD_OUT, EVALUATION),
    Metric("mean_length", "tokens", "of a completion", HELD_OUT, EVALUATION),
    Metric("clipped", "share", "cut off at the length limit", HELD_OUT, EVALUATION),
    Metric("verdict/*", "share", "as above", HELD_OUT, EVALUATION),
    Metric("seconds", "s", "that measuring took", HELD_OUT, EVALUATION),
)


def definition(name: str, kind: str = STEP) -> Metric | None:
    """The definition of a metric; None of what is no metric of ours, such as one that a reward function logs.

    >>> definition("verdict/wrong").unit
    'share'
    """
    return next((each for each in METRICS if each.kind == kind and each.is_of(name)), None)


def page() -> str:
    """docs/metrics.md."""
    lines = [INTRODUCTION]
    for kind, title in ((STEP, "A step"), (EVALUATION, "A measurement")):
        lines += ["", f"## {title}", "", "| name | unit | meaning | where |", "|---|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.where} |" for m in METRICS if m.kind == kind]
    lines += ["", OTHER_KINDS]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
