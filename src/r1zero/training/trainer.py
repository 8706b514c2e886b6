"""GRPOTrainer with a clock, a notebook, a verifier and our own policy server: the algorithm is TRL's, untouched.

Written against TRL 1.16.0. Three of its methods are wrapped, `_tokenize_prompts`, `_generate_single_turn` and
`_calculate_rewards`; the sampler of the prompts is ours; `VLLMGeneration` is replaced where a policy server is in use;
where a window is one step, the correction of the server's log-probabilities is made while learning; with packing,
`_get_per_token_logps_and_entropies` is ours, and what rounding makes of no spread is no advantage. A test fails when
they move.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from r1zero.policy_client import PolicyServerError, Rollout, WrongPolicyVersion
from r1zero.tasks.prompts import chat_arguments
from r1zero.tasks.rewards import text_of
from r1zero.tasks.verifier import Verdict, Verifier
from r1zero.training.alarm import Alarm
from r1zero.training.checkpoints import ResumableTrainer
from r1zero.training.correction import CorrectedWhileLearning
from r1zero.training.generation import PolicyServer, in_place_of_vllm
from r1zero.training.next_window import NextWindow
from r1zero.training.packing import MicroBatch, PackedPasses
from r1zero.training.recorder import Recorder, clipped, prompt_text
from r1zero.training.rollouts import InProcessRollouts, Rollouts
from r1zero.training.sampler import WindowSampler
from r1zero.training.stop_strings import StopStrings
from r1zero.training.stopping import LOOK_S, any_rank
from r1zero.training.zero3 import gather_head_with_model

LENGTH_QUANTILES = (0.1, 0.5, 0.9)
GIVEN_UP = (
    "the completions of the next window {}: a run that goes on from here asks for them anew, of the newest policy, and "
    "is not exactly the one that never stopped"
)
NO_TIME = "were not there, and there was no time to wait for them, of which more preemption_grace leaves more"


class PolicyTrainer(CorrectedWhileLearning, ResumableTrainer, GRPOTrainer, PackedPasses):  # type: ignore[misc]
    """TRL's trainer, which also grades each batch once and writes down every rollout and where a step's time went.

    Args:
        recorder: where rollouts, metrics and alerts go.
        verifier: grades every completion, before any reward function sees it.
        stop_strings: a completion ends with the first of them.
        alerts: by verdict, the share of completions above which to say so.
        server: makes the policy server's side of the trainer, given what TRL gives a `VLLMGeneration`; None where
            completions are generated in this process.
        seed_rollouts: whether each completion that a policy server is asked for has a seed of its own.
        max_staleness: with 1 the policy server makes the next window while the trainer learns from this one.
        micro_batch_tokens: learn from packed micro-batches of so many tokens; None: as TRL does, padded.
    """

    def __init__(
        self,
        *args: Any,
        recorder: Recorder,
        verifier: Verifier,
        stop_strings: Sequence[str] = (),
        alerts: Mapping[str, float] | None = None,
        server: Callable[..., PolicyServer] | None = None,
        seed_rollouts: bool = False,
        max_staleness: int = 0,
        micro_batch_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        with in_place_of_vllm(server):
            super().__init__(*args, **kwargs)
        self.begin_correcting()
        self.begin_packing(micro_batch_tokens, [] if self.ref_model is None else [self.ref_model])
        self.begin_recording(recorder)
        self.verifier = verifier
        self.seed_rollouts, self.max_staleness = seed_rollouts, max_staleness
        self.next_window: NextWindow | None = None
        self.stop = StopStrings(stop_strings, self.processing_class)
        self.alarms = [Alarm(verdict, share) for verdict, share in (alerts or {}).items()]
        self.several_sources = len(self.train_dataset.unique("source")) > 1
        self.server: PolicyServer | None = self.vllm_generation if server else None
        self.rollouts: Rollouts = (
            self.server.rollouts if self.server else InProcessRollouts(self._generate_here, lambda: self.version_here)
        )
        self._versions: list[int | None] = []
        if self.server:
            self.clock.watch(self.server.client.busy, gather_object)
            self.server.sampling |= self.stop.for_vllm() if self.stop else {}
        elif self.use_vllm:  # inside of this process, by TRL
            publish = self.vllm_generation.sync_weights

            def timed_publish() -> None:
                with self.clock.phase("publish"):
                    publish()

            self.vllm_generation.sync_weights = timed_publish
            if self.stop:
                self.vllm_generation.generation_kwargs.update(self.stop.for_vllm())

    @property
    def version_here(self) -> int:
        """The optimizer step whose weights make the completions that are generated in this process."""
        return int(self._last_loaded_step if self.use_vllm else self.state.global_step)

    def close(self) -> None:
        """Leave the policy servers, where there are any."""
        if self.server:
            self.server.close()

    def clipped(self, completion_ids: Sequence[int]) -> bool:
        """Whether a completion was cut off, ended neither by its end token nor by a stop string."""
        return clipped(completion_ids, self.eos_token_ids) and not self.stop.ended(completion_ids)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """TRL opens a new turn after every conversation; one that ends in the assistant's turn goes on inside it."""
        if isinstance(prompts[0], str) or not chat_arguments(prompts[0])["continue_final_message"]:
            return super()._tokenize_prompts(prompts)
        tokenized = self.processing_class.apply_chat_template(
            prompts, tokenize=True, return_dict=True, **chat_arguments(prompts[0]), **self.chat_template_kwargs
        )
        return tokenized["input_ids"], None, {}

    def _get_train_sampler(self, dataset: Any = None) -> WindowSampler:
        return WindowSampler(
            self.train_dataset if dataset is None else dataset,
            group=self.num_generations,
            window=self.args.generation_batch_size // self.num_generations,
            repeats=self._batches_of_a_window,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    @property
    def _batches_of_a_window(self) -> int:
        """How many batches each process learns from before completions are generated anew."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def facts(self) -> dict[str, Any]:
        names = ("num_generations", "steps_per_generation", "num_iterations")
        own = {"max_staleness": self.max_staleness}
        return super().facts() | {name: getattr(self.args, name) for name in names} | own

    def restore(self) -> None:
        gather_head_with_model(self.accelerator.unwrap_model(self.model_wrapped))
        super().restore()

    def between_steps(self) -> dict[str, Any]:
        return super().between_steps() | {
            "batches": self._step,
            # At its end a window is not needed any more.
            "window": self._buffered_inputs if self._step % self._batches_of_a_window else None,
            "alarms": [alarm.state() for alarm in self.alarms],
        }

    def restore_between_steps(self, between: Mapping[str, Any]) -> None:
        super().restore_between_steps(between)
        self._step = between["batches"]
        self._buffered_inputs = between["window"]
        for alarm, state in zip(self.alarms, between["alarms"], strict=True):
            alarm.restore(state)
        if "next_window" in between:
            self.next_window = NextWindow.restored(between["next_window"])

    def complete(
        self, prompt_ids: Sequence[Sequence[int]], group: int, seed: int | None = None, **sampling: Any
    ) -> list[Rollout]:
        """One completion for each prompt, by the policy as it is now. A collective.

        Args:
            prompt_ids: the prompts' tokens, in runs of `group` equal ones.
            group: completions of one prompt.
            seed: of the first completion, where a policy server is to draw with seeds; the next has the next one.
            sampling: of the policy server, in place of the trainer's own.

        Raises:
            Stopped: when the run was asked to stop, and nothing is lost by doing so here.
        """
        self._stop_if_asked()
        if self.server:
            self._wait_for_next_window()
            prove = self._publish()
            with self.clock.phase("generate"):
                ticket = self.rollouts.submit(prompt_ids, group, {**self.server.sampling, **sampling}, seed)
            prove()
            with self.clock.phase("generate"):
                completed = self._collect(ticket)
            self.server.rest()
            return completed
        with self.clock.phase("generate"):
            completed = self.rollouts.collect(self.rollouts.submit(prompt_ids, group, sampling))
        self._stop_if_asked()
        return completed

    def _stop_if_asked(self) -> None:
        """Where gradients of a step are gathered already, it is finished first."""
        if not self._on_the_way:
            self.stop_request.check()

    def _collect(self, ticket: Any) -> list[Rollout]:
        """Wait for a round, with an eye on whether to stop: all processes give it up together, or none does."""
        if self._on_the_way:
            return self.rollouts.collect(ticket)
        completed: list[Rollout] | None = None
        while True:
            if completed is None and self.rollouts.wait(ticket, LOOK_S):
                completed = self.rollouts.collect(ticket)
            stop, unfinished = any_rank(self.accelerator, self.stop_request.seen_here(), completed is None)
            if stop:
                self.rollouts.cancel(ticket)
                raise self.stop_request.stopped()
            if not unfinished and completed is not None:
                return completed

    def _complete_window(self, prompt_ids: Sequence[Sequence[int]], group: int) -> list[Rollout]:
        """This process's completions of the window that begins now; the servers go on with the next. A collective."""
        number, share = self._step // self._batches_of_a_window, len(prompt_ids)
        prove = _proven
        if self.next_window is None:
            completed = self.complete(prompt_ids, group, self._seed_of_window(number, share))
        else:
            self._stop_if_asked()
            self._wait_for_next_window()
            completed = self.next_window.take(number, prompt_ids)
            self.next_window = None
            prove = self._publish()
        if self.max_staleness and self._another_window_follows():
            self.next_window = self._begin_window(number + 1, group, share)
        prove()
        return completed

    def _begin_window(self, number: int, group: int, share: int) -> NextWindow:
        """Ask for the `share` completions that this process will learn from in a window to come."""
        assert self.server is not None and self.server.version is not None  # noqa: S101 - it has just been published to
        first = int(self.accelerator.process_index) * share
        indices = self._get_train_sampler().window(number)[first : first + share]
        prompt_ids, _, _ = self._tokenize_prompts([self.train_dataset[index]["prompt"] for index in indices])
        seed = self._seed_of_window(number, share)
        ticket = self.rollouts.submit(prompt_ids, group, self.server.sampling, seed)
        return NextWindow(number, self.server.version, self.rollouts, ticket)

    def _another_window_follows(self) -> bool:
        """Whether this run will begin a window after the one that begins now."""
        accumulated = self.args.gradient_accumulation_steps
        batches_of_an_epoch = self._get_train_sampler().windows * self._batches_of_a_window
        epochs, batches = divmod(self._step + self._batches_of_a_window, batches_of_an_epoch)
        # An epoch ends with a step, of less batches where it does not come out even.
        return bool(
            epochs * -(-batches_of_an_epoch // accumulated) + batches // accumulated < int(self.state.max_steps)
        )

    def _wait_for_next_window(self) -> None:
        """Until the servers have made the next window, so that they have nothing to do. A collective.

        Raises:
            Stopped: when the run was asked to stop meanwhile; a checkpoint will wait for what is left.
        """
        while self.next_window is not None:
            with self.clock.phase("wait"):
                waiting = not self.next_window.wait(LOOK_S)
                asked = self.stop_request.seen_here() and not self._on_the_way
                stop, waiting = any_rank(self.accelerator, asked, waiting)
            if stop:
                raise self.stop_request.stopped()
            if not waiting:
                return

    def under_way(self) -> dict[str, Any]:
        """The next window, with all its completions.

        They are given up where the time to stop is too short for them, or where they will not come: what was learnt so
        far can be saved all the same.

        Raises:
            WrongPolicyVersion: they are not of the policy that was published.
        """
        failure: PolicyServerError | None = None
        while self.next_window is not None:
            waiting = True
            with self.clock.phase("wait"):
                try:
                    waiting = not self.next_window.wait(LOOK_S)
                except WrongPolicyVersion:
                    raise
                except PolicyServerError as error:
                    failure = error
                pressing = self.stop_request.pressing()
                pressing, failed, waiting = any_rank(self.accelerator, pressing, failure is not None, waiting)
            if not waiting:
                return {"next_window": self.next_window.state()}
            if pressing or failed:
                self.next_window.cancel()
                self.next_window = None
                why = "will not come" + (f" ({failure})" if failure else "") if failed else NO_TIME
                self.recorder.alert(self.state.global_step, GIVEN_UP.format(why))
        return {}

    def _publish(self) -> Callable[[], None]:
        """Give the policy server the weights of this step, where it does not have them yet.

        Returns:
            What proves that they arrived: a collective, called once completions have been asked for, so that the server
            makes these while the trainer computes its own side.
        """
        server = self.server
        assert server is not None  # noqa: S101 - its callers know
        if server.version == self.state.global_step:
            server.wake()
            return _proven
        with self.clock.phase("publish"):
            metrics = server.publish(self.state.global_step)
        with self.clock.phase("probe"):
            compare = server.begin_proof()
        self._last_loaded_step = self.state.global_step

        def prove() -> None:
            with self.clock.phase("probe"):
                found = compare()
            for name, value in {**metrics, **found}.items():
                self._metrics["train"][name].append(value)

        return prove

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        completed = self._complete_window(prompt_ids, num_generations)
        self._versions = [each.policy_version for each in completed]
        ids = [list(each.completion_ids) for each in completed]
        logprobs = [list(each.logprobs or ()) for each in completed] if self.use_vllm else None
        return self.stop.cut(ids, logprobs)

    def _seed_of_window(self, window: int, share: int) -> int | None:
        """The seed of this process's first completion of a window of which it makes `share`.

        It depends on the window and the place in it, not on how many processes or servers there are.
        """
        if not self.seed_rollouts:
            return None
        return seed_of(self.args.seed, window) + int(self.accelerator.process_index) * share

    def _generate_here(self, prompt_ids: list[list[int]], group: int) -> tuple[list[list[int]], Any]:
        """By TRL, with transformers or a vLLM engine inside of this process."""
        return super()._generate_single_turn(prompt_ids, None, {}, group)  # type: ignore[no-any-return]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """A micro-batch is prepared; all else is TRL's to generate or to look up."""
        return (
            generation_batch if isinstance(generation_batch, MicroBatch) else super()._prepare_inputs(generation_batch)
        )

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.micro_batch_tokens is not None:
            # The mean of eight rewards of 0.2 is not 0.2 in float32, and TRL divides the rest by 1e-4.
            scored["advantages"] = scored["advantages"].masked_fill(self._without_spread, 0.0)
        return scored

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if self.micro_batch_tokens is None:
            return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **more
            )
        at_once = batch_size is None  # by TRL's loss, of a micro-batch
        with self.accelerator.autocast():
            logps, entropies = self.packed_log_probabilities(model, input_ids, attention_mask, logits_to_keep, at_once)
        self.correct(logps)
        return logps, entropies if compute_entropy else None, None

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss * inputs.weight if isinstance(inputs, MicroBatch) else loss

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        with self.clock.phase("grade"):
            graded = self.verifier.grade(
                [text_of(each) for each in completions],
                [each["gold"] for each in inputs],
                [each["question"] for each in inputs],
            )
            # Every reward function gets the columns of its examples: answer and verdict are two of them from here on.
            inputs = [
                {**example, "answer": each.answer, "verdict": each.verdict.value}
                for example, each in zip(inputs, graded, strict=True)
            ]
            rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        group = self.num_generations if self.model.training else self.num_generations_eval
        self._without_spread = without_spread(rewards, group)[first : first + len(prompts)]
        with self.clock.phase("record"):
            self._record(inputs, prompts, completions, completion_ids_list, rewards)
        return rewards

    def _record(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        rewards: torch.Tensor,
    ) -> None:
        """Gather this generation's rollouts on the main process. `rewards`, (completions, functions), is already."""
        first = self.accelerator.process_index * len(prompts)
        own = rewards[first : first + len(prompts)]
        weighted = (own * self.reward_weights.to(rewards.device)).nansum(dim=1).tolist()
        rows = [
            {
                "step": self.state.global_step + 1,
                "prompt": prompt_text(prompts[i]),
                "completion": text_of(completions[i]),
                "gold": inputs[i]["gold"],
                "answer": inputs[i]["answer"],
                "verdict": inputs[i]["verdict"],
                "reward": weighted[i],
                "rewards": [
                    (name, None if math.isnan(value) else value)
                    for name, value in zip(self.reward_func_names, own[i].tolist(), strict=True)
                ],
                "length": len(completion_ids[i]),
                "clipped": self.clipped(completion_ids[i]),
                "policy_version": self._versions[i],
                "source": inputs[i]["source"],
            }
            for i in range(len(prompts))
        ]
        gathered = gather_object(rows)
        if self.recorder.active:
            self.recorder.add_rollouts(gathered)
            self._measure(gathered)

    def _measure(self, rows: list[dict[str, Any]]) -> None:
        """The metrics of one generation that TRL does not know, from the rollouts of all processes."""
        metrics = self._metrics["train"]
        lengths_of_all = np.quantile([row["length"] for row in rows], LENGTH_QUANTILES).tolist()
        for quantile, length in zip(LENGTH_QUANTILES, lengths_of_all, strict=True):
            metrics[f"completions/p{100 * quantile:.0f}_length"].append(length)
        metrics["staleness"].append(float(max(row["step"] - 1 - row["policy_version"] for row in rows)))
        for verdict in Verdict:
            metrics[f"verdict/{verdict.value}"].append(_mean([row["verdict"] == verdict.value for row in rows]))
        for source in sorted({row["source"] for row in rows}) if self.several_sources else ():
            of_source = [row for row in rows if row["source"] == source]
            metrics[f"source/{source}/reward"].append(_mean([row["reward"] for row in of_source]))
            metrics[f"source/{source}/correct"].append(_mean([row["verdict"] == "correct" for row in of_source]))
        if self.stop:
            # TRL counts what has no end token as cut off.
            metrics["completions/clipped_ratio"][-1] = _mean([row["clipped"] for row in rows])
            lengths = [row["length"] for row in rows if not row["clipped"]] or [0]
            for name, value in (("mean", _mean(lengths)), ("min", min(lengths)), ("max", max(lengths))):
                metrics[f"completions/{name}_terminated_length"][-1] = float(value)
        for alarm in self.alarms:
            share = alarm.add(metrics[f"verdict/{alarm.verdict}"][-1])
            if share is not None:
                self.recorder.alert(self.state.global_step + 1, alarm.message(share))


def _proven() -> None:
    """Nothing was published, so there is nothing to prove."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def without_spread(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Which completions are of a group that every reward function gives one reward; (completions,).

    >>> without_spread(torch.tensor([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2], [0.0, 0.2]]), group=2).tolist()
    [True, True, False, False]

    Args:
        rewards: (completions, functions), NaN where a function gave none.
        group: completions of one prompt.
    """
    grouped = rewards.view(-1, group, rewards.shape[1])
    first = grouped[:, :1]
    same = (grouped == first) | (grouped.isnan() & first.isnan())
    return same.all(dim=2).all(dim=1).repeat_interleave(group)


def seed_of(*what: int) -> int:
    """A seed from numbers, with room above it for a million million completions in vLLM's 64 bits.

    >>> seed_of(0, 1) != seed_of(1, 0), seed_of(2, 3) < 2**62
    (True, True)
    """
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest()) >> 2
