"""Stock TRL's GRPOTrainer with a stopwatch: `python -m benchmarks.side_by_side.stock SETTINGS.json`.

SETTINGS.json: `config` (GRPOConfig's arguments), `model`, `data` (JSON lines with prompt and answer), `steps_file`.
The subclass changes nothing: each override calls TRL's own method and takes the time. The clock is r1zero's, so that
phases mean the same on both sides, and as there no phase waits for the GPU: what is queued at the end of a step ends
in the next phase that needs a result.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.side_by_side import lengths
from benchmarks.side_by_side.reward import reward
from datasets import load_dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from r1zero.training.clock import Clock


class TimedTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's, timed. Loading the weights into vLLM is "publish", as r1zero calls it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()
        super().__init__(*args, **kwargs)
        if self.use_vllm:
            publish = self.vllm_generation.sync_weights

            def timed_publish() -> None:
                with self.clock.phase("publish"):
                    publish()

            self.vllm_generation.sync_weights = timed_publish

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.phase("score"):
            return super()._calculate_rewards(*args, **kwargs)


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Writes a line for each step."""

    def __init__(self, file: Path, trainer: TimedTrainer) -> None:
        self.file, self.trainer = file, trainer

    def on_train_begin(self, *unused: Any, **more: Any) -> None:
        self.trainer.clock.restart()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **unused: Any) -> None:
        if not state.is_world_process_zero or not logs or "num_tokens" not in logs:
            return
        line = {"step": state.global_step, "time": time.time(), "num_tokens": logs["num_tokens"], "loss": logs["loss"]}
        if torch.cuda.is_available():
            line["memory/peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **self.trainer.clock.read(1)}) + "\n")


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = GRPOConfig(**settings["config"])
    (lengths.force_in_vllm if config.use_vllm else lengths.force_in_transformers)()
    trainer = TimedTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=settings["data"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
    )
    trainer.add_callback(_Steps(Path(settings["steps_file"]), trainer))
    trainer.train()


if __name__ == "__main__":
    main()
