"""Tokens a second of launch/evaluate.py's engine against vLLM's own: same model, prompts and lengths.

    python benchmarks/evaluation_throughput.py MODEL [--data FOLDER] [--samples 8] [--tokens 256] [--rounds 3]

Both answer every GSM8K test question `--samples` times with exactly `--tokens` tokens, in turns; loading and the first
round, which compiles and warms up, are not counted. vLLM's own is `LLM.generate` with all prompts at once in a process
of its own, which is what `vllm bench throughput` times; `vllm bench serve` goes over HTTP and is slower.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from r1zero import hardware
from r1zero.evaluation import asking, benchmarks
from r1zero.evaluation.models import find
from r1zero.evaluation.protocol import Protocol
from r1zero.evaluation.serving import MOST_SEQUENCES, ServerEngine, Settings

OFFLINE = """
import json, sys, time
from vllm import LLM, SamplingParams
asked = json.load(open(sys.argv[1]))
if __name__ == "__main__":
    llm = LLM(asked["model"], dtype=asked["dtype"], max_model_len=asked["context"], max_num_seqs=asked["sequences"],
              gpu_memory_utilization=0.9)
    sampling = SamplingParams(n=asked["samples"], temperature=1.0, max_tokens=asked["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": each} for each in asked["prompts"]]
    speeds = []
    for _ in range(asked["rounds"] + 1):
        began = time.perf_counter()
        made = llm.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(one.token_ids) for each in made for one in each.outputs)
        speeds.append(tokens / (time.perf_counter() - began))
        print("vLLM offline, a round:", round(speeds[-1]), "tokens/s", flush=True)
        llm.reset_prefix_cache()
    json.dump(speeds[1:], open(sys.argv[2], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", help="a folder with gsm8k/test.jsonl; else the hub")
    parser.add_argument("--count", type=int, help="questions; default: all")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    here = hardware.of_nodes((hardware.this_node(),))
    cpu = here.torch_cpu_only or not here.gpus_per_node
    (candidate,) = find([f"measured={asked.model}"])
    questions = benchmarks.read("gsm8k", asked.data, asked.count)
    tokenizer = AutoTokenizer.from_pretrained(candidate.tokenizer)
    protocol = Protocol(samples=asked.samples, temperature=1.0, max_tokens=asked.tokens)
    ask = asking.make(candidate, questions, protocol, None, tokenizer)
    # No token ends a completion: both make exactly so many.
    ask = replace(ask, end_ids=())
    with tempfile.TemporaryDirectory() as folder:
        # Each is said as soon as it is known: the second may be cut off.
        print(f"{len(ask.prompt_ids)} prompts x {asked.samples} x {asked.tokens} tokens, tokens/s")
        ours = evaluated(ask, asked.rounds, here, Path(folder))
        print(f"ours {statistics.median(ours):,.0f} {[round(each) for each in ours]}", flush=True)
        theirs = offline(ask, asked, cpu, Path(folder))
    share = statistics.median(ours) / statistics.median(theirs)
    print(
        f"vLLM offline {statistics.median(theirs):,.0f} {[round(each) for each in theirs]}: ours is {share:.1%} of that"
    )


def evaluated(ask: asking.Ask, rounds: int, here: hardware.Hardware, folder: Path) -> list[float]:
    """Tokens a second of each round but the first, through the evaluator's server."""
    speeds = []
    with (
        ServerEngine(folder, here, Settings(), 0) as engine,
        engine._servers([ask], lambda *_: None) as served,
    ):
        for _ in range(rounds + 1):
            began = time.perf_counter()
            (answered,) = engine._answers(served, None, [ask], lambda *_: None)
            tokens = sum(each.length for own in answered.completions for each in own)
            speeds.append(tokens / (time.perf_counter() - began))
            served._post("/reset_prefix_cache", None)
    return speeds[1:]


def offline(ask: asking.Ask, asked: argparse.Namespace, cpu: bool, folder: Path) -> list[float]:
    """The same by vLLM alone."""
    content = {
        "model": ask.candidate.base,
        "dtype": "float32" if cpu else "bfloat16",
        "context": max(map(len, ask.prompt_ids)) + asked.tokens + 1,
        "sequences": MOST_SEQUENCES[cpu],
        "samples": asked.samples,
        "tokens": asked.tokens,
        "rounds": asked.rounds,
        "prompts": ask.prompt_ids,
    }
    (folder / "asked.json").write_text(json.dumps(content))
    (folder / "offline.py").write_text(OFFLINE)
    subprocess.run(
        [sys.executable, str(folder / "offline.py"), str(folder / "asked.json"), str(folder / "speeds.json")],
        check=True,
        timeout=3600,
    )
    speeds: list[float] = json.loads((folder / "speeds.json").read_text())
    return speeds


if __name__ == "__main__":
    main()
