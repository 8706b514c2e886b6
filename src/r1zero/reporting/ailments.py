"""What can hold a run back: each ailment is one rule over the recorded steps. No torch.

A rule says nothing where its metrics are absent or the steps too few, so runs that have just begun, failed, or are
older than a metric can be looked at like any other. The doctor shows what the rules find in a run (`doctor`);
``stop_on`` has them looked at while it trains (`training.alarm`). docs/doctor.md explains each, held to this by a test.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1zero import hardware, library_keys

# How far a rule looks. One step's batch is small, and its shares jump by a tenth by chance alone.
RECENT = 10  # steps that make up "now", the least that a rule needs; as many generations as alert_unparsed looks at
EARLY = 5  # steps that make up "at the start": before a warm-up has taught much

# What is normal, with the reason beside it; docs/doctor.md shows them.
MANY_CLIPPED = 0.2  # as the look before training; GSM8K runs of a 135M model began with 0.13 and were well
MOSTLY = 0.5
MANY_UNPARSED = 0.5  # a base model begins with 0.6 to 0.9 and comes below this within tens of steps
STILL = 0.75  # of the share at the start: what has fallen below that is mending itself
MANY_WITHOUT_SPREAD = 0.7  # as the look before training: two thirds of the batch and more is computed for nothing
SOLVED = 0.9  # right answers: from here on groups without spread are the sign of success
HOT = 1.2  # temperature; published recipes sample at 0.6 to 1.2
COLD = 0.7
COLLAPSED_ENTROPY = 0.05  # of the entropy at the start
LOST = 0.5  # of the best reward that a run had
GAINED = 0.1  # of a reward: less is no height to fall from
JUMP = 0.3  # of a share; between batches of 64 completions shares jump by 0.1 by chance
MOVES_NOTHING = 1e-7  # sum of learning rates; AdamW moves a weight by about the rate a step, and weights are about 0.02
PROBE_MOVED = 1e-4  # nats: what float32 makes of equal weights stays below
STALE = 0.03  # share of tokens beyond the clipping range; 0.004 in a healthy run that learns from each rollout twice
GREW = 1.5  # of the length at the start
CERTAIN = 3.0  # standard errors: one healthy run in some 700 looks so by chance
FLAT_STEPS = 30  # before that a slow start looks the same
LOGPROB_DIFFERENCE = 0.1  # nats a token between server and trainer; healthy runs on two H200: 0.017 to 0.037
UNLEARNT_RATIO = 0.05  # trainer over server, of whole completions; 768 tokens at 0.02 nats had 0.82 to 0.89 on H200s
NEAR_TOLERANCE = 0.9  # of probe_tolerance; runs of three cold starts on H200s had up to 0.084 of 0.1 nats
PUBLISH_SHARE = 0.25  # of a step; healthy runs: 0.03 (one GPU) to 0.1
GRADING_SHARE = 0.25  # of a step; 512 completions took 0.02 of it
GENERATING_SHARE = 0.75  # of a step; two H200 at work: 0.42 with full fine-tuning, 0.52 with an adapter
TRAINING_SHARE = 0.9  # of a step: completions are next to free; the tiny recipe, all in one process, has up to 0.8
MANY_IDLE = 0.25  # of a step: as much as publishing and grading may take; more work at once saves that at most
BUSY = 0.1  # a side that is idle for less of a step is the one that the other waits for
MEMORY_SHARE = 0.5  # of the GPU at the peak: twice the batch would fit
SMALL_GAIN = 0.05  # of the held-out problems: what an evaluation should be able to show
TINY_GAIN = 0.01  # less is not worth the evaluation that would show it
INTERVAL = 1.96  # standard errors on each side of a 95 % interval

BROKEN, HINDERED, SLOW = "broken", "hindered", "slow"
SEVERITIES = (BROKEN, HINDERED, SLOW)  # learns nothing; learns less than it could; takes longer than it must


@dataclass(frozen=True)
class Sign:
    """What a rule saw: numbers, remedy, and the severity where it is not the ailment's usual one."""

    evidence: str
    remedy: str
    severity: str | None = None


class Signs:
    """What the rules look at: the recipe and the steps so far.

    Args:
        recipe: flat, as recipe.yaml has it.
        steps: lines of metrics.jsonl in the order of their steps; a metric that is no number is None there.
        evaluations: likewise.
        reason: why the run failed; empty where it did not.
        gpus: of the run's machines, by name.
    """

    def __init__(
        self,
        recipe: Mapping[str, Any],
        steps: Sequence[Mapping[str, Any]],
        evaluations: Sequence[Mapping[str, Any]] = (),
        reason: str = "",
        gpus: Sequence[str] = (),
    ) -> None:
        self.recipe, self.steps, self.evaluations = recipe, steps, evaluations
        self.reason, self.gpus = reason, gpus

    def key(self, name: str, default: Any = None) -> Any:
        """The value in effect for a key of the recipe: its own, else TRL's default, else `default`."""
        if name in self.recipe:
            return self.recipe[name]
        known = library_keys.load(str(self.recipe.get("method", "grpo"))).get(name)
        return default if known is None else known.default

    def values(self, name: str) -> list[float]:
        """A metric of all steps that have it as a number."""
        found = (line.get(name) for line in self.steps)
        return [float(each) for each in found if isinstance(each, int | float) and math.isfinite(each)]

    def last(self, name: str) -> list[float]:
        """A metric of the last `RECENT` steps; empty where fewer have it."""
        found = self.values(name)
        return found[-RECENT:] if len(found) >= RECENT else []

    def now(self, name: str) -> float | None:
        """Its mean over the last `RECENT` steps; None where fewer have it."""
        return _mean(self.last(name))

    def early(self, name: str) -> float | None:
        """Its mean over the first `EARLY` steps; None where there are fewer than `RECENT`."""
        found = self.values(name)
        return _mean(found[:EARLY]) if len(found) >= RECENT else None

    def share_of_step(self, *phases: str) -> float | None:
        """The part of the time of the later half of the steps that went into these phases; None without any."""
        lines = self._later_half("seconds/step")
        parts = [[line.get(f"seconds/{phase}") or 0.0 for line in lines] for phase in phases]
        if len(lines) < RECENT or not all(map(any, parts)):
            return None
        return float(sum(map(sum, parts)) / sum(line["seconds/step"] for line in lines))

    def idle(self) -> tuple[float, float] | None:
        """The part of the time of the later half of the steps in which server and trainer were idle, where known."""
        lines = self._later_half("seconds/step", "idle/server", "idle/trainer")
        if len(lines) < RECENT:
            return None
        seconds = sum(line["seconds/step"] for line in lines)
        server, trainer = (
            sum(line[f"idle/{side}"] * line["seconds/step"] for line in lines) / seconds
            for side in ("server", "trainer")
        )
        return server, trainer

    def _later_half(self, *names: str) -> list[Mapping[str, Any]]:
        """Of the steps that have these metrics; `RECENT` at least, where there are so many."""
        lines = [line for line in self.steps if all(_is_finite(line.get(name)) for name in names)]
        return lines[-max(RECENT, len(lines) // 2) :]  # completions that serve several steps are in the first of them

    @property
    def served(self) -> bool:
        """Whether a policy server generates, beside the trainer."""
        return bool(self.key("use_vllm")) and self.key("vllm_mode") == "server"

    @property
    def server_gpus(self) -> int:
        """Of the run's own policy servers, as one node is shared out; 0 where they have none to themselves."""
        if not self.served or self.key("vllm_server_base_url"):
            return 0
        asked = self.key("server_gpus")
        alone = int(self.key("vllm_tensor_parallel_size") or 1) if len(self.gpus) > 1 else 0
        return alone if asked is None else int(asked)

    @property
    def trainer_gpus(self) -> int:
        """Of the trainer, likewise; at least 1."""
        return max(1, int(self.key("trainer_gpus") or len(self.gpus) - self.server_gpus))

    @property
    def could_overlap(self) -> bool:
        """Whether server and trainer take turns, each on its own GPUs, and the recipe would take max_staleness: 1."""
        apart = bool(self.server_gpus or (self.key("vllm_server_base_url") and self.values("memory/total_gib")))
        refused = self.key("vllm_enable_sleep_mode") or not self.key("vllm_importance_sampling_correction")
        return self.served and apart and not refused and not self.key("max_staleness")


@dataclass(frozen=True)
class Ailment:
    """What can be wrong with a run.

    Attributes:
        name: as findings and ``stop_on`` name it.
        severity: the usual one.
        what: in plain words, as one clause.
        rule: what it is told by.
        explains: ailments that follow from this one, and are not named beside it.
        stops: whether ``stop_on`` may name it.
    """

    name: str
    severity: str
    what: str
    rule: Callable[[Signs], Sign | None]
    explains: tuple[str, ...] = ()
    stops: bool = False


# --- the rules


def _nan(signs: Signs) -> Sign | None:
    names = ("loss", "grad_norm", "reward", "entropy", "kl")
    bad = [[name for name in names if name in line and not _is_finite(line[name])] for line in signs.steps]
    since = len(bad)
    while since and bad[since - 1]:
        since -= 1
    # The loss scale of fp16 begins too high, and finds its place by steps that are skipped.
    if len(bad) - since < (EARLY if signs.key("fp16") else 1):
        if "probability tensor contains" not in signs.reason:  # torch's words where it samples from such weights
            return None
        return Sign(f"the run failed with {signs.reason[:120]!r}", _lower_rate(signs, 10))
    evidence = f"{' and '.join(bad[since])} since step {signs.steps[since]['step']}"
    if not _is_finite(signs.steps[since].get("reward", 0.0)):
        given = ", ".join(map(str, signs.key("reward_funcs") or ()))
        return Sign(evidence, f"reward_funcs: make each of {given} return a finite number for every completion")
    return Sign(evidence, f"{_lower_rate(signs, 10)}; go on from the last checkpoint before that step")


def _logprob_mismatch(signs: Signs) -> Sign | None:
    tolerance = float(signs.key("probe_tolerance", LOGPROB_DIFFERENCE))
    probe, sampled = signs.now("probe/difference"), signs.now("sampling/sampling_logp_difference/mean")
    mode = str(signs.key("vllm_importance_sampling_mode", "sequence_mask"))
    ratio = signs.now("sampling/importance_sampling_ratio/mean") if mode.startswith("sequence") else None
    if signs.key("max_staleness"):  # the policy has moved on since, which is no mismatch
        sampled = ratio = None
    ignored = ""
    if ratio is not None and ratio < UNLEARNT_RATIO:
        ignored = f"the correction weighs what is learned from them by {ratio:.3f}"
    if "does not have version" in signs.reason:
        evidence, severity = f"the guard stopped the run: {signs.reason[:200]}", BROKEN
    elif probe is not None and probe > NEAR_TOLERANCE * tolerance:
        evidence, severity = f"they differ by {probe:.3f} nats on the probe (probe_tolerance {tolerance:g})", HINDERED
    elif sampled is not None and sampled > LOGPROB_DIFFERENCE:
        evidence, severity = f"they differ by {sampled:.3f} nats a token on the rollouts", HINDERED
        if ignored:
            evidence, severity = f"{evidence}, and {ignored}", BROKEN
    elif ignored:
        length = signs.now("completions/mean_length")
        told = f"{ignored}: over {length:.0f} tokens even rounding adds up" if length is not None else ignored
        return Sign(told, f"vllm_importance_sampling_mode: {mode} -> token_truncate", BROKEN)
    else:
        return None
    if signs.key("load_in_4bit") and signs.key("server_base") != "rounded":
        return Sign(evidence, f"server_base: {signs.key('server_base')} -> rounded", severity)
    if signs.key("use_peft") and signs.key("lora_dropout"):
        return Sign(evidence, f"lora_dropout: {signs.key('lora_dropout'):g} -> 0", severity)
    if signs.key("fp16"):
        return Sign(evidence, "fp16: true -> false, with bf16: true", severity)
    remedy = "bf16: true -> false for both sides in float32, which tells rounding from a fault; probe.json has both"
    return Sign(evidence, remedy, severity)


def _learning_rate_too_high(signs: Signs) -> Sign | None:
    rewards, now = signs.values("reward"), signs.now("reward")
    if now is None:
        return None
    if sign := _falling(signs, rewards):
        return sign
    best = max(statistics.fmean(pair) for pair in itertools.pairwise(rewards))
    if best < GAINED or now > LOST * best:
        return None
    # A batch of easy problems makes a peak too. What broke down also writes otherwise than in its first two steps.
    told = []
    for name, what in (
        ("verdict/unparsed", "unreadable answers"),
        ("completions/clipped_ratio", "completions cut off"),
        ("frac_reward_zero_std", "groups without spread"),
    ):
        first, last = _mean(signs.values(name)[:2]), signs.now(name)
        if first is not None and last is not None and last - first > JUMP:
            told.append(f"{what} rose from {_percent(first)} to {_percent(last)}")
    if not told:
        return None
    return Sign(", ".join([f"the reward fell from {best:.2f} to {now:.2f}", *told]), _lower_rate(signs, 10))


def _falling(signs: Signs, rewards: Sequence[float]) -> Sign | None:
    """A reward that sinks slowly over the whole run: each step's noise moves the weights more than what it learns."""
    ends = _ends(rewards)
    if len(rewards) < FLAT_STEPS or ends is None:
        return None
    before, after, error = ends
    if before < GAINED or before - after <= CERTAIN * error:
        return None
    evidence = f"the reward sinks: {before:.3f} in the first third of {len(rewards)} steps, {after:.3f} in the last"
    return Sign(f"{evidence} (+- {error:.3f})", _lower_rate(signs, 5), HINDERED)


def _too_hot(signs: Signs) -> Sign | None:
    temperature = float(signs.key("temperature", 1.0))
    clipped, unparsed = signs.now("completions/clipped_ratio"), signs.now("verdict/unparsed")
    if temperature <= HOT or clipped is None or unparsed is None or max(clipped, unparsed) < MOSTLY:
        return None
    evidence = f"{_percent(unparsed)} of the completions have no readable answer, {_percent(clipped)} do not end"
    return Sign(evidence, f"temperature: {temperature:g} -> 1.0")


def _verifier_timeouts(signs: Signs) -> Sign | None:
    share, most = signs.now("verdict/timed_out"), float(signs.key("alert_timed_out", 0.01))
    if share is None or share <= most:
        return None
    evidence = f"it gave up on {_percent(share)} of the completions (alert_timed_out {most:g})"
    grading = signs.share_of_step("grade")
    if grading is not None and grading > GRADING_SHARE:
        evidence += f", and grading takes {_percent(grading)} of a step"
    remedy = "answer_match: math -> exact where golds are plain; else leave out problems with such golds"
    return Sign(evidence, remedy, BROKEN if share > MOSTLY else None)


def _length_explosion(signs: Signs) -> Sign | None:
    now, early = signs.now("completions/mean_length"), signs.early("completions/mean_length")
    clipped, clipped_early = signs.now("completions/clipped_ratio"), signs.early("completions/clipped_ratio")
    if now is None or not early or clipped is None or clipped_early is None:
        return None
    if now < GREW * early or clipped < MANY_CLIPPED or clipped_early > MANY_CLIPPED / 2:
        return None
    evidence = (
        f"from {early:.0f} to {now:.0f} tokens on average, and {_percent(clipped)} are cut off, which "
        f"{_percent(clipped_early)} were at the start"
    )
    used = [str(each) for each in signs.key("reward_funcs") or ()]
    limit = signs.key("max_completion_length")
    if "soft_overlong" not in used:
        kept = used if "correctness" in used else ["correctness"]
        return Sign(evidence, f"reward_funcs: {_listed(used)} -> {_listed([*kept, 'soft_overlong'])}")
    return Sign(evidence, f"max_completion_length: {limit} -> {2 * limit}, or a greater weight of soft_overlong")


def _clipped(signs: Signs) -> Sign | None:
    share, limit = signs.now("completions/clipped_ratio"), signs.key("max_completion_length")
    if share is None or share <= MANY_CLIPPED:
        return None
    factor = 4 if share > MOSTLY else 2
    evidence = f"{_percent(share)} of the completions were cut off at {limit} tokens"
    remedy = f"max_completion_length: {limit} -> {factor * limit}"
    if not signs.key("stop_strings"):
        remedy += ", or stop_strings where the model goes on after its answer"
    return Sign(evidence, remedy, BROKEN if share > MOSTLY else None)


def _unparsed(signs: Signs) -> Sign | None:
    share, early = signs.now("verdict/unparsed"), signs.early("verdict/unparsed")
    if share is None or early is None or share <= MANY_UNPARSED or share < STILL * early:
        return None
    clipped = signs.now("completions/clipped_ratio") or 0.0
    if clipped > MOSTLY * share:
        return None  # what was cut off could not be read either
    template, form = signs.key("prompt_template"), signs.key("answer_format") or "the template's"
    named = template if isinstance(template, str) and len(template) < 30 else "your own"
    evidence = f"{_percent(share)} of the completions, of which {_percent(clipped)} were cut off"
    remedy = (
        f"prompt_template: {named} -> one in whose form the model answers, and answer_format: {form} -> that form; "
        "where it knows none, a cold start first (method: sft)"
    )
    return Sign(evidence, remedy)


def _zero_reward(signs: Signs) -> Sign | None:
    rewards, spread, right = signs.last("reward"), signs.last("reward_std"), signs.now("verdict/correct")
    if not rewards or not spread or max(spread) > 0 or right is None or not 0 < right < SOLVED:
        return None
    used = [str(each) for each in signs.key("reward_funcs") or ()]
    evidence = f"each got {rewards[-1]:g}, although {_percent(right)} are right"
    return Sign(evidence, f"reward_funcs: {_listed(used)} -> [correctness], or mend what gives the same to all")


def _never_right(signs: Signs) -> Sign | None:
    right, wrong = signs.last("verdict/correct"), signs.now("verdict/wrong")
    if not right or max(right) > 0 or wrong is None or wrong < MOSTLY:
        return None
    remedy = (
        "dataset_name or answer_column: compare gold and answer of some rollouts first; where the golds are right, "
        "levels one or two lower, or a cold start (method: sft)"
    )
    return Sign(f"{_percent(wrong)} are read, and wrong", remedy)


def _entropy_collapse(signs: Signs) -> Sign | None:
    now, early = signs.now("entropy"), signs.early("entropy")
    right, flat = signs.now("verdict/correct"), signs.now("frac_reward_zero_std")
    if now is None or not early or right is None or flat is None:
        return None
    if now > COLLAPSED_ENTROPY * early or right >= SOLVED or flat < MOSTLY:
        return None
    evidence = (
        f"the entropy fell from {early:.3g} to {now:.3g} nats a token, {_percent(right)} of the answers are right, and "
        f"{_percent(flat)} of the groups have no spread"
    )
    bonus = float(signs.key("entropy_coef") or 0.0)
    if bonus < 0:
        return Sign(evidence, f"entropy_coef: {bonus:g} -> 0: below 0 it pays for being sure")
    return Sign(evidence, f"{_lower_rate(signs, 3)}; epsilon_high: {_epsilon_high(signs)} -> 0.28 (DAPO)")


def _too_cold(signs: Signs) -> Sign | None:
    temperature = float(signs.key("temperature", 1.0))
    flat, right = signs.now("frac_reward_zero_std"), signs.now("verdict/correct")
    if temperature >= COLD or flat is None or right is None or flat <= MANY_WITHOUT_SPREAD or right >= SOLVED:
        return None
    evidence = f"in {_percent(flat)} of the groups all answers are worth the same, and {_percent(right)} are right"
    return Sign(evidence, f"temperature: {temperature:g} -> 1.0")


def _too_easy(signs: Signs) -> Sign | None:
    begun, flat = signs.values("verdict/correct")[:RECENT], signs.now("frac_reward_zero_std")
    if len(begun) < RECENT or statistics.fmean(begun) < SOLVED or flat is None or flat <= MOSTLY:
        return None
    evidence = (
        f"{_percent(statistics.fmean(begun))} were right in the first {RECENT} steps, and in {_percent(flat)} of the "
        "groups there is nothing to tell apart"
    )
    return Sign(evidence, "levels or dataset_name: problems of which the model solves 20 to 80 %")


def _zero_spread(signs: Signs) -> Sign | None:
    flat, right = signs.now("frac_reward_zero_std"), signs.now("verdict/correct")
    if flat is None or flat <= MANY_WITHOUT_SPREAD or (right is not None and right >= SOLVED):
        return None
    group = int(signs.key("num_generations"))
    evidence = f"in {_percent(flat)} of the groups all {group} completions have the same reward"
    enough = None if right is None else _group_with_spread(right)
    if enough is None or enough <= group:
        return Sign(evidence, "levels or dataset_name: problems of which the model solves 20 to 80 %")
    return Sign(evidence, f"num_generations: {group} -> {enough}, or easier problems (levels)")


def _frozen(signs: Signs) -> Sign | None:
    rates, norms, flat = signs.values("learning_rate"), signs.last("grad_norm"), signs.now("frac_reward_zero_std")
    moved = signs.values("probe/moved")
    if len(rates) < RECENT:
        return None
    rate, warmup = float(signs.key("learning_rate")), signs.key("warmup_steps") or 0
    if sum(rates) < MOVES_NOTHING:
        evidence = f"the learning rates of {len(rates)} steps add up to {sum(rates):.1g}"
        if warmup > len(rates) and rate > MOVES_NOTHING:
            steps = int(signs.steps[-1].get("steps") or len(rates))
            return Sign(evidence, f"warmup_steps: {warmup} -> {max(1, steps // 20)}")
        usual = 1e-5 if signs.key("use_peft") else 1e-6
        return Sign(evidence, f"learning_rate: {rate:g} -> {usual:g}")
    if len(norms) >= RECENT and max(norms) == 0 and flat is not None and flat < MANY_WITHOUT_SPREAD:
        evidence = f"no gradient in {RECENT} steps, although {_percent(1 - flat)} of the groups have spread"
        return Sign(evidence, "lora_target_modules: name modules that the model has and uses; all-linear finds them")
    if len(moved) >= RECENT and max(moved) < PROBE_MOVED:
        evidence = f"the probe's log-probabilities moved by {max(moved):.1g} nats in {len(moved)} publishes"
        return Sign(evidence, f"learning_rate: {rate:g} -> {10 * rate:g}")
    return None


def _stale(signs: Signs) -> Sign | None:
    sampled = signs.now("sampling/sampling_logp_difference/mean")
    if signs.key("max_staleness") and sampled is not None and sampled > LOGPROB_DIFFERENCE:
        evidence = (
            f"the policy is {sampled:.3f} nats a token from the one that made what it learns from, a window before"
        )
        return Sign(evidence, "max_staleness: 1 -> 0")
    share = signs.now("clip_ratio/region_mean")
    if share is None or share <= STALE:
        return None
    evidence = f"{_percent(share)} of the tokens are beyond the clipping range when they are learned from"
    for key in ("num_iterations", "steps_per_generation"):
        times = signs.key(key) or 1
        if times > 1:
            return Sign(evidence, f"{key}: {times} -> {max(1, times // 4)}")
    return Sign(evidence, _lower_rate(signs, 3))


def _reward_hacked(signs: Signs) -> Sign | None:
    first, last = _ends(signs.values("reward")), _ends(signs.values("verdict/correct"))
    if first is None or last is None:
        return None
    (before, after, error), (right_before, right_after, right_error) = first, last
    if after - before < CERTAIN * error or right_before - right_after <= max(
        CERTAIN * right_error, right_before * (1 - STILL)
    ):
        return None
    used = [str(each) for each in signs.key("reward_funcs") or ()]
    evidence = (
        f"the reward rose from {before:.2f} to {after:.2f} while right answers fell from {_percent(right_before)} to "
        f"{_percent(right_after)}"
    )
    if "correctness" not in used:
        return Sign(evidence, f"reward_funcs: {_listed(used)} -> {_listed(['correctness', *used])}")
    return Sign(evidence, "reward_weights: at least twice the sum of the others for correctness")


def _no_progress(signs: Signs) -> Sign | None:
    rewards, flat = signs.values("reward"), signs.now("frac_reward_zero_std")
    ends = _ends(rewards)
    if len(rewards) < FLAT_STEPS or ends is None or flat is None or flat > MANY_WITHOUT_SPREAD:
        return None
    before, after, error = ends
    right = signs.early("verdict/correct")
    if after - before > 2 * error or (right is not None and right >= SOLVED):
        return None
    rate = float(signs.key("learning_rate"))
    evidence = f"{before:.3f} in the first third of {len(rewards)} steps, {after:.3f} in the last (+- {error:.3f})"
    early, now = signs.early("entropy"), signs.now("entropy")
    if early is not None and now is not None and now < STILL * early:
        evidence += f"; the entropy fell from {early:.2f} to {now:.2f} nats, so the steps are not too small"
        return Sign(evidence, f"twice the completions a step, or {_lower_rate(signs, 3)}")
    return Sign(evidence, f"learning_rate: {rate:g} -> {3 * rate:g}, or twice the completions a step")


def _evaluation_flat(signs: Signs) -> Sign | None:
    if len(signs.evaluations) < 2:
        return None
    first, last = signs.evaluations[0], signs.evaluations[-1]
    if last["step"] - first["step"] < RECENT:
        return None
    error = math.hypot(*((each["high"] - each["low"]) / (2 * INTERVAL) for each in (first, last)))
    gain = last["mean"] - first["mean"]
    if gain > INTERVAL * error or first["mean"] >= SOLVED:
        return None
    evidence = (
        f"{_percent(first['mean'])} at step {first['step']}, {_percent(last['mean'])} at step {last['step']}, and a "
        f"difference below {_percent(INTERVAL * error)} is within the interval"
    )
    if gain < -INTERVAL * error:
        return Sign(evidence, _lower_rate(signs, 3), BROKEN)
    sought = gain if gain > TINY_GAIN else SMALL_GAIN
    times = math.ceil((INTERVAL * error / sought) ** 2)
    if times > 1:
        count = first["questions"]
        return Sign(evidence, f"eval_count: {count} -> {times * count}, which would show a gain of {_percent(sought)}")
    steps = int(last["step"])
    return Sign(evidence, f"max_steps: {steps} -> {3 * steps}, where the reward still rises; else harder to overfit")


def _publish_slow(signs: Signs) -> Sign | None:
    parts = [name for name in ("publish", "probe") if signs.last(f"seconds/{name}")]
    share = signs.share_of_step(*parts) if "publish" in parts else None
    if share is None or share <= PUBLISH_SHARE:
        return None
    seconds = {name: signs.now(f"seconds/{name}") or 0.0 for name in parts}
    evidence = " and ".join(f"{name} {each:.2f} s" for name, each in seconds.items()) + f", {_percent(share)} of a step"
    times = int(signs.key("steps_per_generation") or signs.key("gradient_accumulation_steps") or 1)
    longer = f"steps_per_generation: {times} -> {2 * times}, so that each publish serves twice the steps"
    if signs.key("use_peft") or seconds["publish"] < seconds.get("probe", 0.0):
        return Sign(evidence, longer)
    return Sign(evidence, f"use_peft: false -> true, which sends an adapter alone; or {longer}")


def _grading_slow(signs: Signs) -> Sign | None:
    share = signs.share_of_step("grade")
    if share is None or share <= GRADING_SHARE:
        return None
    own = [str(each) for each in signs.key("reward_funcs") or () if ":" in str(each)]
    evidence = f"{signs.now('seconds/grade'):.1f} s a step, {_percent(share)} of it"
    if own:
        return Sign(evidence, f"reward_funcs: make {_listed(own)} quicker; it is given the whole batch at once")
    return Sign(evidence, "answer_match: math -> exact where golds are plain, or more CPUs for the trainer")


def _server_bound(signs: Signs) -> Sign | None:
    idle = signs.idle()
    found = _server_bound_by_phase(signs) if idle is None else _server_bound_by_idle(signs, idle)
    return found and replace(found, remedy=found.remedy + _more_engines(signs))


def _server_bound_by_idle(signs: Signs, idle: tuple[float, float]) -> Sign | None:
    server, trainer = idle
    evidence, learning = _idle_evidence(signs, idle), signs.share_of_step("train") or 0.0
    saved = min(trainer, learning) if signs.could_overlap else 0.0
    if saved > MANY_IDLE and trainer >= learning:
        return Sign(evidence, f"{_overlap(signs, saved)}; then {_more_server(signs)}")
    if trainer <= (MANY_IDLE if signs.key("max_staleness") else GENERATING_SHARE):
        return None
    step = signs.now("seconds/step") or 0.0
    if signs.server_gpus:
        # Twice the servers halve what the servers do, of which only the trainer's waiting is saved.
        left = step * (1 - min(trainer, (1 - server) / 2))
        return Sign(evidence, f"{_more_server(signs)}; a step then takes about {left:.1f} s")
    return Sign(evidence, _more_server(signs))


def _server_bound_by_phase(signs: Signs) -> Sign | None:
    """Without a policy server, or in a run that is older than the idle shares."""
    # Where the server is ahead of the trainer, what counts is how long the trainer waits for it all the same.
    share = signs.share_of_step("wait" if signs.key("max_staleness") else "generate")
    if share is None or share <= GENERATING_SHARE:
        return None
    step = signs.now("seconds/step") or 0.0
    generate = share * step
    evidence = f"{generate:.1f} s of the {step:.1f} s of a step, {_percent(share)}"
    if not signs.key("use_vllm"):
        return Sign(evidence, "use_vllm: false -> true, with vllm_mode: server")
    if signs.server_gpus:
        return Sign(evidence, f"{_more_server(signs)}; a step then takes about {step - generate / 2:.1f} s")
    return Sign(evidence, _more_server(signs))


def _trainer_bound(signs: Signs) -> Sign | None:
    share, idle = signs.share_of_step("train"), signs.idle()
    if share is None or not signs.values("seconds/generate"):
        return None
    if idle is None:
        if share <= TRAINING_SHARE:
            return None
        step = signs.now("seconds/step") or 0.0
        return Sign(f"{share * step:.1f} s of the {step:.1f} s of a step, {_percent(share)}", _quicker_trainer(signs))
    server, trainer = idle
    evidence, saved = _idle_evidence(signs, idle), min(trainer, share) if signs.could_overlap else 0.0
    if saved > MANY_IDLE and share > trainer:
        return Sign(evidence, f"{_overlap(signs, saved)}; then {_quicker_trainer(signs)}")
    # A trainer that waits for the server all the same is not what makes a step long.
    slower = trainer < BUSY and server > MANY_IDLE if signs.key("max_staleness") else server > GENERATING_SHARE
    if not slower or share <= MOSTLY:
        return None
    remedy, more = _quicker_trainer(signs), _more_trainer(signs)
    return Sign(evidence, remedy if remedy == more else f"{remedy}; or {more}")


def _idle_evidence(signs: Signs, idle: tuple[float, float]) -> str:
    server, trainer = idle
    step = signs.now("seconds/step") or 0.0
    return (
        f"of {step:.1f} s a step the policy server is idle for {_percent(server)}, the trainer for {_percent(trainer)}"
    )


def _overlap(signs: Signs, saved: float) -> str:
    """Generating and learning at the same time saves the smaller of the two; all else stays between them."""
    left = (1 - saved) * (signs.now("seconds/step") or 0.0)
    return f"max_staleness: 0 -> 1, with which both work at once and a step takes about {left:.1f} s (docs/overlap.md)"


def _more_server(signs: Signs) -> str:
    if signs.server_gpus:
        return f"server_gpus: {signs.server_gpus} -> {2 * signs.server_gpus}"
    if signs.key("vllm_server_base_url"):
        return "vllm_server_base_url: add the address of another server"
    longest = signs.key("max_completion_length")
    return (
        f"server_gpus: 1 or more on a machine with another GPU; else max_completion_length: {longest} -> as few as fit"
    )


def _more_engines(signs: Signs) -> str:
    """What a small model's servers gain by at no further GPU: one of their own engines is bound by its processor."""
    shared = not signs.server_gpus  # where the plan, if it is left to it, has two for so small a model
    several = int(signs.key("servers_per_gpu") or (2 if shared else 1))
    ours = signs.served and not signs.key("vllm_server_base_url") and signs.gpus
    if not ours or int(signs.key("vllm_tensor_parallel_size") or 1) > 1 or 2 * several > hardware.MOST_SERVERS_PER_GPU:
        return ""
    return f"; for a model of up to half a billion weights also servers_per_gpu: {several} -> {2 * several}"


def _more_trainer(signs: Signs) -> str:
    if signs.key("trainer_gpus") == 0:
        return "trainer_gpus: 0 -> 1 on a machine with a GPU"
    return f"trainer_gpus: {signs.trainer_gpus} -> {2 * signs.trainer_gpus}"


def _quicker_trainer(signs: Signs) -> str:
    """What costs no GPU, where there is something; else another one."""
    batch, passes = signs.key("per_device_train_batch_size"), int(signs.key("gradient_accumulation_steps") or 1)
    if passes > 1 and not signs.key("micro_batch_tokens"):  # packed, a step takes as few passes as it can
        fewer = max(1, passes // 4)
        return (
            f"per_device_train_batch_size: {batch} -> {passes // fewer * batch}, with gradient_accumulation_steps: "
            f"{passes} -> {fewer}: the same batch in fewer passes"
        )
    if (signs.key("num_iterations") or 1) > 1:
        return f"num_iterations: {signs.key('num_iterations')} -> 1: the same rollouts are learned from once"
    if signs.gpus and signs.key("gradient_checkpointing"):
        return "gradient_checkpointing: true -> false, where memory allows"
    return _more_trainer(signs)


def _memory_unused(signs: Signs) -> Sign | None:
    peak, total = signs.values("memory/peak_gib"), signs.now("memory/total_gib")
    if not peak or not total or (signs.served and len(signs.gpus) < 2):
        return None  # a GPU that the server shares is the plan's to fill
    share, passes = max(peak) / total, int(signs.key("gradient_accumulation_steps") or 1)
    if share >= MEMORY_SHARE:
        return None
    evidence = f"{max(peak):.0f} of {total:.0f} GiB at the peak, {_percent(share)}"
    batch, packed = signs.key("per_device_train_batch_size"), signs.key("micro_batch_tokens")
    if packed:
        return Sign(evidence, f"micro_batch_tokens: {packed} -> {2 ** int(math.log2(0.8 / share)) * packed}")
    factor = min(passes, 2 ** int(math.log2(0.8 / share)))
    if factor > 1:
        remedy = f"per_device_train_batch_size: {batch} -> {factor * batch}, with gradient_accumulation_steps: {passes}"
        return Sign(evidence, f"{remedy} -> {passes // factor}")
    if signs.key("gradient_checkpointing"):
        return Sign(evidence, "gradient_checkpointing: true -> false")
    return None


# --- the table: from causes to what follows from them

_USELESS = ("zero_spread", "no_progress", "evaluation_flat")  # what follows where little is left to learn from
_GARBAGE = ("clipped", "unparsed", "never_right", "length_explosion", "stale", *_USELESS)
AILMENTS: tuple[Ailment, ...] = (
    Ailment(
        "nan",
        BROKEN,
        "numbers of the training have become infinite, or none at all",
        _nan,
        explains=(
            "logprob_mismatch",
            "learning_rate_too_high",
            "frozen",
            "zero_reward",
            "too_cold",
            "entropy_collapse",
            *_GARBAGE,
        ),
        stops=True,
    ),
    Ailment(
        "logprob_mismatch",
        HINDERED,
        "policy server and trainer do not agree how likely tokens are, so rollouts are not the policy's own",
        _logprob_mismatch,
        stops=True,
    ),
    Ailment(
        "too_hot",
        BROKEN,
        "completions are sampled too hot and turn to noise",
        _too_hot,
        explains=("entropy_collapse", "learning_rate_too_high", *_GARBAGE),
    ),
    Ailment(
        "entropy_collapse",
        BROKEN,
        "the policy has settled on one way to answer before it was right, and tries nothing else",
        _entropy_collapse,
        explains=("learning_rate_too_high", "never_right", *_USELESS),
        stops=True,
    ),
    Ailment(
        "learning_rate_too_high",
        BROKEN,
        "the policy was good and has broken down, as it does when steps are too large",
        _learning_rate_too_high,
        explains=_GARBAGE,
        stops=True,
    ),
    Ailment(
        "verifier_timeouts",
        HINDERED,
        "the verifier gives up on answers, which are then worth nothing, right or wrong",
        _verifier_timeouts,
        explains=("grading_slow", *_USELESS),
        stops=True,
    ),
    Ailment(
        "length_explosion",
        HINDERED,
        "completions grow until they are cut off",
        _length_explosion,
        explains=("clipped", "unparsed", "reward_hacked", *_USELESS),
        stops=True,
    ),
    Ailment(
        "clipped",
        HINDERED,
        "completions are cut off before they end, and what they would have answered is never rewarded",
        _clipped,
        explains=("unparsed", "never_right", *_USELESS),
        stops=True,
    ),
    Ailment(
        "unparsed",
        BROKEN,
        "no answer can be read from the completions, so none is rewarded",
        _unparsed,
        explains=("zero_reward", *_USELESS),
        stops=True,
    ),
    Ailment(
        "zero_reward",
        BROKEN,
        "every completion gets the same reward, the right ones too",
        _zero_reward,
        explains=_USELESS,
        stops=True,
    ),
    Ailment(
        "never_right",
        BROKEN,
        "answers can be read, and none is right",
        _never_right,
        explains=("too_cold", *_USELESS),
        stops=True,
    ),
    Ailment(
        "too_cold",
        BROKEN,
        "completions are sampled too cold, so a group holds the same answer many times",
        _too_cold,
        explains=_USELESS,
    ),
    Ailment(
        "too_easy",
        HINDERED,
        "the model could solve the problems from the start",
        _too_easy,
        explains=_USELESS,
    ),
    Ailment(
        "zero_spread",
        HINDERED,
        "in most groups all completions have the same reward, and nothing is learned from those",
        _zero_spread,
        explains=("no_progress", "evaluation_flat"),
        stops=True,
    ),
    Ailment(
        "frozen",
        BROKEN,
        "the policy does not move",
        _frozen,
        explains=("no_progress", "evaluation_flat"),
        stops=True,
    ),
    Ailment(
        "stale",
        HINDERED,
        "the policy moves away from the rollouts while it still learns from them",
        _stale,
        explains=("no_progress", "evaluation_flat"),
        stops=True,
    ),
    Ailment(
        "reward_hacked",
        HINDERED,
        "the reward rises for something else than right answers",
        _reward_hacked,
        explains=("zero_spread", "no_progress", "evaluation_flat", "entropy_collapse"),
        stops=True,
    ),
    Ailment(
        "no_progress",
        HINDERED,
        "the reward does not rise",
        _no_progress,
        explains=("evaluation_flat",),
    ),
    Ailment(
        "evaluation_flat",
        HINDERED,
        "held-out accuracy is not shown to be better than before",
        _evaluation_flat,
    ),
    Ailment(
        "publish_slow",
        SLOW,
        "sending weights to the policy server, and proving that they arrived, takes a great part of each step",
        _publish_slow,
    ),
    Ailment(
        "grading_slow",
        SLOW,
        "rewards take a great part of each step",
        _grading_slow,
    ),
    Ailment(
        "server_bound",
        SLOW,
        "making completions takes longer than all else: the trainer waits for them",
        _server_bound,
    ),
    Ailment(
        "trainer_bound",
        SLOW,
        "learning from completions takes longer than making them: they are there, and the trainer is not done",
        _trainer_bound,
    ),
    Ailment(
        "memory_unused",
        SLOW,
        "the trainer's GPU is less than half full, and could take fewer and larger passes",
        _memory_unused,
    ),
)
BY_NAME = {each.name: each for each in AILMENTS}


def stoppable(method: str) -> tuple[str, ...]:
    """The names that ``stop_on`` takes. The cold start has no rewards, entropy and rollouts to judge."""
    return tuple(each.name for each in AILMENTS if each.stops and (method == "grpo" or each.name == "nan"))


# --- arithmetic


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ends(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean of the first and the last third, and the standard error of their difference; None under 2 `RECENT`."""
    third = len(values) // 3
    if len(values) < 2 * RECENT:
        return None
    first, last = values[:third], values[-third:]
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    return statistics.fmean(first), statistics.fmean(last), error


def _group_with_spread(right: float) -> int | None:
    """The power of two of completions of which in most groups not all are worth the same.

    Of G completions that are each right with probability p, all are right or all wrong with p^G + (1 - p)^G.

    >>> _group_with_spread(0.05), _group_with_spread(0.0)
    (16, None)
    """
    if not 0 < right < 1:
        return None
    return next((2**n for n in range(1, 8) if right**2**n + (1 - right) ** 2**n < MOSTLY), None)


def _lower_rate(signs: Signs, times: int) -> str:
    rate = float(signs.key("learning_rate"))
    return f"learning_rate: {rate:g} -> {rate / times:g}"


def _epsilon_high(signs: Signs) -> str:
    return f"{signs.key('epsilon_high') or signs.key('epsilon'):g}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share == 0 or share >= 0.1 else 1}f} %"


def _listed(names: Iterable[str]) -> str:
    return f"[{', '.join(names)}]"
