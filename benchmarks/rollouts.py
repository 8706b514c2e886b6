"""What rollouts cost the server besides the model: as tokens, and through all of vLLM's own way.

    python benchmarks/rollouts.py MODEL_FOLDER [--prompts 16] [--group 32] [--tokens 108] [--rounds 3]
    python benchmarks/rollouts.py MODEL_FOLDER --servers 1 2 4      # so many on one GPU, in turns

Starts `vllm serve` as a plan does and asks for the same completions in turns: with logprobs, as a trainer does,
answered from the engine (r1zero.serving.tokens); the same through vLLM's own handler; and without logprobs, as text.
With `--servers` as a trainer does, the prompts dealt to so many servers. Prints tokens a second, and the processor time
of the servers' processes by the token.
"""

import argparse
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side.served import served

from r1zero.policy_client import PolicyClient

PROMPT_TOKENS = 60
# Where several start at once vLLM cannot measure what is left for keys and values. Enough for 512 x 168 tokens of 1.5B.
KV_CACHE_BYTES = 4 * 2**30
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}
OWN_WAY = {"spaces_between_special_tokens": True}  # vLLM's default, and not among what tokens.py knows
AS_TOKENS, VLLMS_WAY = "as tokens", "vLLM's own way"
WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    AS_TOKENS: (True, {}),
    VLLMS_WAY: (True, OWN_WAY),
    "text, no logprobs": (False, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--group", type=int, default=32, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=108, help="of each completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", type=int, nargs="+", help="on one GPU")
    asked = parser.parse_args()
    count, most = asked.prompts * asked.group, max(asked.servers or [1])
    settings: dict[str, Any] = {"token": secrets.token_hex(16), "share": 0.4 if most == 1 else 0.8 / most}
    settings |= {"max_model_len": PROMPT_TOKENS + asked.tokens, "max_num_seqs": count}
    settings |= {"dtype": "bfloat16" if torch.cuda.is_available() else "float32"}
    if most > 1 and torch.cuda.is_available():
        settings["kv_cache_bytes"] = KV_CACHE_BYTES
    with ExitStack() as ending:
        with ThreadPoolExecutor(most) as starting:
            start = [served(asked.model, f"rollouts, server {number}", **settings) for number in range(most)]
            started = list(starting.map(ending.enter_context, start))
        clients = {
            servers: ending.enter_context(
                PolicyClient([each.url for each in started[:servers]], settings["token"], generation_timeout_s=600)
            )
            for servers in asked.servers or [1]
        }
        turns, beside = [(way, 1, *told) for way, told in WAYS.items()], VLLMS_WAY
        if asked.servers:
            beside = f"{asked.servers[0]} on one GPU"
            turns = [(f"{servers} on one GPU", servers, *WAYS[AS_TOKENS]) for servers in asked.servers]
        found: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name, *_ in turns}
        for number in range(-1, asked.rounds):  # one to warm up
            for name, servers, logprobs, more in turns:
                pids = [each.pid for each in started[:servers]]
                measured = measure(clients[servers], pids, asked, number, logprobs, more)
                if number >= 0:
                    found[name].append(measured)
    for name, each in found.items():
        speeds, processes = [speed for speed, _ in each], sorted({process for _, costs in each for process in costs})
        middles = {process: statistics.median(costs.get(process, 0.0) for _, costs in each) for process in processes}
        costs_told = ", ".join(f"{process} {middle:.1f}" for process, middle in middles.items())
        speed = f"{statistics.median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})"
        ratio = statistics.median(speeds) / statistics.median(speed for speed, _ in found[beside])
        print(f"{name}: {speed}, {ratio:.2f} of {beside}; microseconds a token: {costs_told}")


def measure(
    client: PolicyClient,
    pids: Sequence[int],
    asked: argparse.Namespace,
    number: int,
    logprobs: bool,
    more: dict[str, Any],
) -> tuple[float, dict[str, float]]:
    """Tokens a second, and microseconds of processor time a token by process."""
    sampling = {**PLAIN, **more, "max_tokens": asked.tokens, "min_tokens": asked.tokens}
    prompts = [[5 + (number + 7 * i + j) % 30 for j in range(PROMPT_TOKENS)] for i in range(asked.prompts)]
    before, own, began = spent(pids), time.process_time(), time.perf_counter()
    made = client.collect(client.submit(prompts, sampling, asked.group, logprobs=logprobs))
    seconds, own, after = time.perf_counter() - began, time.process_time() - own, spent(pids)
    count = sum(len(each.completion_ids) for each in made)
    costs = {name: (after[name] - before.get(name, 0.0)) / count * 1e6 for name in after}
    return count / seconds, {name: cost for name, cost in costs.items() if cost > 0.1} | {"client": own / count * 1e6}


def spent(pids: Sequence[int]) -> dict[str, float]:
    """Processor seconds so far of the processes of the servers with these fronts, by kind."""
    found: dict[str, float] = {}
    for front in map(psutil.Process, pids):
        found["front"] = found.get("front", 0.0) + _seconds(front)
        for each in front.children(recursive=True):
            found[each.name()] = found.get(each.name(), 0.0) + _seconds(each)
    return found


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
