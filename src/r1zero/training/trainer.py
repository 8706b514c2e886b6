"""GRPOTrainer with a clock, a notebook, a verifier and our own policy server: the algorithm is TRL's, untouched.

Written against TRL 1.16.0. Three of its methods are wrapped, `_tokenize_prompts`, `_generate_single_turn` and
`_calculate_rewards`, and `VLLMGeneration` is replaced where a policy server is in use; a test fails when they move.
"""

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from r1zero.policy_client import Rollout
from r1zero.tasks.prompts import chat_arguments
from r1zero.tasks.rewards import text_of
from r1zero.tasks.verifier import Verdict, Verifier
from r1zero.training.alarm import Alarm
from r1zero.training.generation import PolicyServer, in_place_of_vllm
from r1zero.training.recorder import Recorder, clipped, prompt_text
from r1zero.training.rollouts import InProcessRollouts, Rollouts
from r1zero.training.stop_strings import StopStrings


class PolicyTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, which also grades each batch once and writes down every rollout and where a step's time went.

    Args:
        recorder: where rollouts, metrics and alerts go.
        verifier: grades every completion, before any reward function sees it.
        stop_strings: a completion ends with the first of them.
        alerts: by verdict, the share of completions above which to say so.
        server: makes the policy server's side of the trainer, given what TRL gives a `VLLMGeneration`; None where
            completions are generated in this process.
    """

    def __init__(
        self,
        *args: Any,
        recorder: Recorder,
        verifier: Verifier,
        stop_strings: Sequence[str] = (),
        alerts: Mapping[str, float] | None = None,
        server: Callable[..., PolicyServer] | None = None,
        **kwargs: Any,
    ) -> None:
        with in_place_of_vllm(server):
            super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.verifier = verifier
        self.stop = StopStrings(stop_strings, self.processing_class)
        self.alarms = [Alarm(verdict, share) for verdict, share in (alerts or {}).items()]
        self.several_sources = len(self.train_dataset.unique("source")) > 1
        self.clock = Clock()
        self.add_callback(StepRecorder(recorder, self.clock))
        self.server: PolicyServer | None = self.vllm_generation if server else None
        self.rollouts: Rollouts = (
            self.server.rollouts if self.server else InProcessRollouts(self._generate_here, lambda: self.version_here)
        )
        self._versions: list[int | None] = []
        if self.server:
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

    def complete(self, prompt_ids: Sequence[Sequence[int]], group: int, **sampling: Any) -> list[Rollout]:
        """One completion for each prompt, by the policy as it is now. A collective.

        Args:
            prompt_ids: the prompts' tokens, in runs of `group` equal ones.
            group: completions of one prompt.
            sampling: of the policy server, in place of the trainer's own.
        """
        if self.server:
            self._publish()
            with self.clock.phase("generate"):
                ticket = self.rollouts.submit(prompt_ids, group, {**self.server.sampling, **sampling})
                completed = self.rollouts.collect(ticket)
            self.server.rest()
            return completed
        with self.clock.phase("generate"):
            return self.rollouts.collect(self.rollouts.submit(prompt_ids, group, sampling))

    def _publish(self) -> None:
        """Give the policy server the weights of this step, where it does not have them yet."""
        assert self.server is not None  # noqa: S101 - its callers know
        if self.server.version == self.state.global_step:
            self.server.wake()
            return
        with self.clock.phase("publish"):
            metrics = self.server.publish(self.state.global_step)
        with self.clock.phase("probe"):
            metrics |= self.server.prove()
        self._last_loaded_step = self.state.global_step
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _generate_single_turn(
        self,
        prompt_ids: Any,
        images: Any,
        multimodal_fields: Any,
        num_generations: int,
        has_tool_images: bool = False,
    ) -> Any:
        completed = self.complete(prompt_ids, num_generations)
        self._versions = [each.policy_version for each in completed]
        ids = [list(each.completion_ids) for each in completed]
        logprobs = [list(each.logprobs or ()) for each in completed] if self.use_vllm else None
        return self.stop.cut(ids, logprobs)

    def _generate_here(self, prompt_ids: list[list[int]], group: int) -> tuple[list[list[int]], Any]:
        """By TRL, with transformers or a vLLM engine inside of this process."""
        return super()._generate_single_turn(prompt_ids, None, {}, group)  # type: ignore[no-any-return]

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _peak_memory() -> dict[str, float]:
    """The most that this process has held of its GPU so far, in GiB; nothing on a CPU."""
    if not torch.cuda.is_available():
        return {}
    return {"memory/peak_gib": torch.cuda.max_memory_reserved() / 2**30}


class Clock:
    """Seconds by phase since the last reading. Phases may nest: the inner one's time is not counted in the outer."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self._seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    def read(self, steps: int) -> dict[str, float]:
        """Mean seconds by phase over the last `steps` steps, and start anew. "train" is all that no phase took."""
        now = time.perf_counter()
        total = now - self._since
        seconds = {f"seconds/{name}": value / steps for name, value in self._seconds.items()}
        seconds["seconds/train"] = (total - sum(self._seconds.values())) / steps
        seconds["seconds/step"] = total / steps
        self._seconds.clear()
        self._since = now
        return seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens inside is no part of any step, such as a measurement before the step is logged."""
        began, before = time.perf_counter(), dict(self._seconds)
        try:
            yield
        finally:
            self._seconds = defaultdict(float, before)
            self._since += time.perf_counter() - began

    def restart(self) -> None:
        """Forget what went before."""
        self._seconds.clear()
        self._since = time.perf_counter()


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Hands each logged step to the recorder, with seconds by phase and seconds left."""

    def __init__(self, recorder: Recorder, clock: Clock) -> None:
        self.recorder = recorder
        self.clock = clock
        self._last_step = 0
        self._recent: deque[float] = deque(maxlen=20)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self._last_step = state.global_step
        self.clock.restart()
        self.recorder.phase("training", 0, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.recorder.flush_rollouts(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **unused: Any,
    ) -> None:
        steps = state.global_step - self._last_step
        if steps < 1 or logs is None or "train_runtime" in logs:
            return  # the closing summary of transformers' Trainer, not a step
        self._last_step = state.global_step
        seconds = self.clock.read(steps) | _peak_memory()
        self._recent.append(seconds["seconds/step"])
        left = sum(self._recent) / len(self._recent) * (state.max_steps - state.global_step)
        self.recorder.step(
            {"step": state.global_step, "steps": state.max_steps, **logs, **seconds, "seconds_left": round(left, 1)}
        )
