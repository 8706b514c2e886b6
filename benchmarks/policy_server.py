"""What an adapter costs: publishing it, and generating through it against generating without, on one server.

    python benchmarks/policy_server.py MODEL_FOLDER [--completions 16 128] [--tokens 512] [--turns 3]

Starts `vllm serve` as a plan does (on the first GPU, or vLLM's CPU build where there is none) and publishes a LoRA of
rank 64 on all seven projections twelve times over. Base and adapter take turns. Weights may be random: `transformers`'
`Qwen2Config` of any shape, saved with any tokenizer, will do.
"""

import argparse
import os
import secrets
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from r1zero.hardware import free_ports
from r1zero.model_facts import PROJECTIONS
from r1zero.policy_client import PolicyClient
from r1zero.policy_server import serve_argv, serve_env, wait_until_ready
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from r1zero.training import policy_sync

RANK = 64
PUBLISHES = 12
PROMPT_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--completions", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    cpu = not torch.cuda.is_available()
    dtype = torch.float32 if cpu else torch.bfloat16
    (port,) = free_ports(1)
    token, url = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    argv = serve_argv(
        model=str(asked.model),
        port=port,
        gpu_memory_utilization=0.4,
        max_model_len=PROMPT_TOKENS + asked.tokens,
        max_num_seqs=max(asked.completions),
        dtype=str(dtype).removeprefix("torch."),
        lora_rank=RANK,
        lora_target_modules=PROJECTIONS,
        cpu=cpu,
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, tempfile.TemporaryFile() as log:
        secret = {TOKEN: token, PUBLISH_FOLDER: folder}
        env = {**os.environ, **dict(serve_env(adapters=True, cpu=cpu)), **secret}
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
        try:
            waited = wait_until_ready(url, deadline_s=900, check=lambda: _alive(server), token=token)
            print(f"server ready after {waited:.0f} s")
            with PolicyClient([url], token, generation_timeout_s=600) as client:
                adapter = publish(asked.model, dtype, client, Path(folder))
                for count in asked.completions:
                    generate(client, adapter, count, asked.tokens, asked.turns)
        finally:
            server.terminate()
            server.wait(60)


def publish(model: Path, dtype: torch.dtype, client: PolicyClient, folder: Path) -> str:
    """Publish a LoRA again and again; returns the name of the last one."""
    accelerator = Accelerator()
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(accelerator.device)
    policy = get_peft_model(policy, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS)))
    publisher = policy_sync.make(
        "adapter", policy, accelerator, client, publish_folder=folder, timeout_s=120, group_port=0, dtype=dtype
    )
    done = [publisher.publish(version) for version in range(PUBLISHES)]
    seconds = [each.seconds for each in done]
    print(
        f"publish {done[0].bytes / 1e6:.0f} MB: median {statistics.median(seconds):.3f} s, "
        f"{min(seconds):.3f} to {max(seconds):.3f}, the first {seconds[0]:.3f}"
    )
    assert publisher.adapter_name is not None  # noqa: S101 - it was published
    return publisher.adapter_name


def generate(client: PolicyClient, adapter: str, count: int, tokens: int, turns: int) -> None:
    """Tokens a second with and without the adapter, in turns."""
    sampling = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True, "temperature": 1.0}
    speeds: dict[str | None, list[float]] = {None: [], adapter: []}
    for turn in range(turns):
        for name, found in speeds.items():
            # Other prompts each time, or the prefix cache would have them.
            prompts = [[5 + (turn * 31 + i * 7 + j) % 90 for j in range(PROMPT_TOKENS)] for i in range(count)]
            began = time.perf_counter()
            made = client.collect(client.submit(prompts, sampling, model=name))
            found.append(sum(len(each.completion_ids) for each in made) / (time.perf_counter() - began))
    base, through = (statistics.median(found) for found in speeds.values())
    print(
        f"{count} completions of {tokens} tokens: base {base:,.0f} tokens/s {[round(x) for x in speeds[None]]}, "
        f"through the adapter {through:,.0f} {[round(x) for x in speeds[adapter]]}: {through / base:.2f} of that"
    )


def _alive(server: "subprocess.Popen[bytes]") -> None:
    if server.poll() is not None:
        raise SystemExit(f"the server ended with exit code {server.returncode}")


if __name__ == "__main__":
    main()
