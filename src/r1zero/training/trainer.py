"""GRPOTrainer with a clock and a notebook: the algorithm is TRL's, untouched.

Written against TRL 1.16.0. Two of its methods are wrapped, `_generate_single_turn` and `_calculate_rewards`; a test
fails when their signatures move.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from r1zero.training.recorder import Recorder, clipped, prompt_text


class PolicyTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer, which also writes down every rollout and where the time of a step went."""

    def __init__(self, *args: Any, recorder: Recorder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorder = recorder
        self.clock = Clock()
        self.add_callback(StepRecorder(recorder, self.clock))
        if self.use_vllm:
            publish = self.vllm_generation.sync_weights

            def timed_publish() -> None:
                with self.clock.phase("sync"):
                    publish()

            self.vllm_generation.sync_weights = timed_publish

    @property
    def policy_version(self) -> int:
        """The optimizer step whose weights make the completions."""
        return int(self._last_loaded_step if self.use_vllm else self.state.global_step)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        with self.clock.phase("grade"):
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
        weights = self.reward_weights.to(rewards.device)
        own = (rewards[first : first + len(prompts)] * weights).nansum(dim=1).tolist()
        # What the reward functions wrote beside each completion through TRL's log_extra, before TRL clears it.
        extra = self._pending_extra_logs
        rows = [
            {
                "step": self.state.global_step + 1,
                "prompt": prompt_text(prompts[i]),
                "completion": completions[i] if isinstance(completions[i], str) else completions[i][-1]["content"],
                "gold": inputs[i]["gold"],
                "answer": extra["answer"][i],
                "verdict": extra["verdict"][i],
                "reward": own[i],
                "length": len(completion_ids[i]),
                "clipped": clipped(completion_ids[i], self.eos_token_ids),
                "policy_version": self.policy_version,
                "source": inputs[i]["source"],
            }
            for i in range(len(prompts))
        ]
        gathered = gather_object(rows)
        if self.recorder.active:
            self.recorder.add_rollouts(gathered)


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
        seconds = self.clock.read(steps)
        self._recent.append(seconds["seconds/step"])
        left = sum(self._recent) / len(self._recent) * (state.max_steps - state.global_step)
        self.recorder.step(
            {"step": state.global_step, "steps": state.max_steps, **logs, **seconds, "seconds_left": round(left, 1)}
        )
