"""vLLM alone: `python -m benchmarks.side_by_side.offline SETTINGS.json` writes completion tokens a second of one batch.

`LLM.generate` with all prompts of a step at once, in a process of its own with the whole GPU, without logprobs and
without decoding to text: more than any trainer can get out of the same vLLM.
"""

import json
import sys
import time
from pathlib import Path

from benchmarks.side_by_side.lengths import force_in_vllm


def main() -> None:
    from vllm import LLM, SamplingParams

    force_in_vllm()
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    engine = LLM(model=settings["model"], **settings["engine"])
    tokenizer = engine.get_tokenizer()
    prompts = [{"prompt_token_ids": tokenizer(text)["input_ids"]} for text in settings["prompts"]]
    sampling = SamplingParams(n=settings["group"], temperature=1.0, max_tokens=settings["longest"], detokenize=False)
    speeds, counts = [], []
    for _ in range(settings["rounds"] + 1):  # the first warms up
        began = time.perf_counter()
        made = engine.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(one.token_ids) for each in made for one in each.outputs)
        speeds.append(tokens / (time.perf_counter() - began))
        counts.append(tokens)
        engine.reset_prefix_cache()
    Path(settings["out"]).write_text(
        json.dumps({"tokens_per_second": speeds[1:], "tokens": counts[1:]}), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
