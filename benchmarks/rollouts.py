"""What rollouts cost the server besides the model: as tokens, and through all of vLLM's own way.

    python benchmarks/rollouts.py MODEL_FOLDER [--prompts 16] [--group 32] [--tokens 108] [--rounds 3]

Starts `vllm serve` as a plan does and asks for the same completions in turns: with logprobs, as a trainer does,
answered from the engine (r1zero.serving.tokens); the same through vLLM's own handler; and without logprobs, as text.
Prints tokens a second, and the processor time of each of the server's processes by the token.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side.served import Served, served

PROMPT_TOKENS = 60
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
OWN_WAY = {"spaces_between_special_tokens": True}  # vLLM's default, and not among what tokens.py knows
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "as tokens": (True, {}),
    "vLLM's own way": (True, OWN_WAY),
    "text, no logprobs": (False, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=32, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=108, help="of each completion")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    count = asked.prompts * asked.group
    with served(
        asked.model, "rollouts", max_model_len=PROMPT_TOKENS + asked.tokens, max_num_seqs=count, dtype=dtype
    ) as server:
        found: dict[str, list[tuple[float, dict[str, float]]]] = {way: [] for way in WAYS}
        for number in range(-1, asked.rounds):  # one to warm up
            for way, (logprobs, more) in WAYS.items():
                measured = measure(server, asked, number, logprobs, more)
                if number >= 0:
                    found[way].append(measured)
    speeds = {way: [speed for speed, _ in each] for way, each in found.items()}
    for way, each in found.items():
        names = sorted({name for _, costs in each for name in costs})
        costs = ", ".join(f"{name} {statistics.median(cost[name] for _, cost in each):.1f}" for name in names)
        middle = statistics.median(speeds[way])
        ratio = middle / statistics.median(speeds["vLLM's own way"])
        print(
            f"{way}: {middle:,.0f} tokens/s ({min(speeds[way]):,.0f} to {max(speeds[way]):,.0f}), {ratio:.2f} of "
            f"vLLM's own way; microseconds a token: {costs}"
        )


def measure(
    server: Served, asked: argparse.Namespace, number: int, logprobs: bool, more: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Tokens a second, and microseconds of processor time a token by process."""
    sampling = {**PLAIN, **more, "max_tokens": asked.tokens, "min_tokens": asked.tokens}
    prompts = [[5 + (number + 7 * i + j) % 30 for j in range(PROMPT_TOKENS)] for i in range(asked.prompts)]
    before, own, began = spent(server.pid), time.process_time(), time.perf_counter()
    made = server.client.collect(server.client.submit(prompts, sampling, asked.group, logprobs=logprobs))
    seconds, own, after = time.perf_counter() - began, time.process_time() - own, spent(server.pid)
    count = sum(len(each.completion_ids) for each in made)
    costs = {name: (after[name] - before.get(name, 0.0)) / count * 1e6 for name in after}
    return count / seconds, {name: cost for name, cost in costs.items() if cost > 0.1} | {"client": own / count * 1e6}


def spent(pid: int) -> dict[str, float]:
    """Processor seconds of the server's processes so far."""
    front = psutil.Process(pid)
    found = {"front": _seconds(front)}
    for each in front.children(recursive=True):
        found[each.name()] = found.get(each.name(), 0.0) + _seconds(each)
    return found


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
