"""How long each completion is: drawn from a law, and forced in the same way on both sides.

A random model never ends by itself, and a trained one would answer the two sides with different lengths. So the
length of a completion is a function of the seed, its prompt and its place among the prompt's completions, and of
nothing else: not of the order in which requests arrive, of the client that sends them or of the step. Both sides get
the same prompts, so each step has the same lengths on both, which `results.Turn` checks from what was trained on.

It is forced where vLLM's front end hands a request to its engine: `max_tokens` becomes the drawn length and the end
token is ignored. That holds for each completion of a request with `n` of them, costs nothing a token (a logits
processor would, and would change which of vLLM's paths is taken), and is the same line of code for `vllm serve` under
stock TRL, `vllm serve` under r1zero, and the engine inside of stock TRL's trainer. Requests that ask for another
`max_tokens` than the run's, such as a probe of the server, are left alone. What is not real about it: no completion
has an end token, so each counts as cut off; neither side treats those differently by default.

Where completions are made by transformers (a rehearsal without vLLM), a logits processor forces the end token.
"""

import copy
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

LAW = "R1ZERO_BENCHMARK_LENGTHS"  # the environment variable that carries the law to every process


@dataclass(frozen=True)
class Law:
    """How lengths are distributed.

    >>> Law("fixed", mean=8, cut=8, group=4, seed=0).length([1, 2, 3], 0)
    8

    Attributes:
        kind: "fixed": every completion has `cut` tokens; "spread": log-normal.
        mean: of the log-normal law before it is cut; tokens.
        cut: no completion is longer; also the max_tokens of the run.
        group: completions of a prompt.
        seed: another one gives other lengths.
        sigma: standard deviation of the logarithm. 0.6 puts the longest twentieth of completions, uncut, above 2.2
            times the mean, so that at a mean of 400 some 4 % are cut at 1024.
    """

    kind: str
    mean: float
    cut: int
    group: int
    seed: int
    sigma: float = 0.6

    def length(self, prompt_ids: Sequence[int], place: int) -> int:
        """Tokens of the completion at `place` among those of its prompt; the places repeat after `group`.

        They are drawn by inversion, from a hash: a log-normal variable has the mean exp(mu + sigma^2 / 2).
        """
        if self.kind == "fixed":
            return self.cut
        key = repr((self.seed, place % self.group, list(prompt_ids))).encode()
        uniform = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") + 0.5) / 2**64
        mu = math.log(self.mean) - self.sigma**2 / 2
        return max(1, min(self.cut, round(math.exp(mu + self.sigma * NormalDist().inv_cdf(uniform)))))

    def dump(self) -> str:
        return json.dumps(asdict(self))


def from_environment() -> Law | None:
    """The law that the benchmark has set; None where completions have their natural lengths."""
    text = os.environ.get(LAW)
    return Law(**json.loads(text)) if text else None


class Places:
    """Counts how often each prompt was asked for, which gives a completion its place."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self._seen: Counter[bytes] = Counter()

    def next_length(self, prompt_ids: Sequence[int]) -> int:
        key = hashlib.blake2b(repr(list(prompt_ids)).encode(), digest_size=16).digest()
        place = self._seen[key]
        self._seen[key] += 1
        return self.law.length(prompt_ids, place)


def force_in_vllm() -> None:
    """Have this process's vLLM front end force lengths, where the benchmark has set a law.

    The clients in `vllm.v1.engine.core_client` are the same in 0.26 and 0.31.
    """
    law = from_environment()
    if law is None:
        return
    from vllm.v1.engine import core_client

    places = Places(law)

    def forced(request: Any) -> Any:
        sampling = request.sampling_params
        if sampling is None or sampling.max_tokens != law.cut or getattr(sampling, "prompt_logprobs", None) is not None:
            return request
        sampling = copy.copy(sampling)  # the completions of one request share it
        sampling.max_tokens = places.next_length(request.prompt_token_ids)
        sampling.ignore_eos, sampling.min_tokens, sampling.stop_token_ids = True, 0, []
        if hasattr(sampling, "_eos_token_id"):  # 0.31; 0.26 looks at ignore_eos alone
            sampling._eos_token_id = None
        request.sampling_params = sampling
        return request

    # With data parallelism another client takes the requests, which neither side uses here.
    for owner in (core_client.InprocClient, core_client.SyncMPClient):
        owner.add_request = _with(owner.add_request, forced)
    core_client.AsyncMPClient.add_request_async = _with(core_client.AsyncMPClient.add_request_async, forced)


def _with(original: Any, forced: Any) -> Any:
    def add_request(self: Any, request: Any) -> Any:
        return original(self, forced(request))

    return add_request


def force_in_transformers() -> None:
    """Have `generate` of this process's transformers force lengths, where the benchmark has set a law."""
    law = from_environment()
    if law is None:
        return
    from transformers import GenerationMixin

    places, original = Places(law), GenerationMixin._get_logits_processor

    def with_forced_end(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors = original(self, generation_config, *args, **kwargs)
        processors.append(_ForcedEnd(places, generation_config))
        return processors

    GenerationMixin._get_logits_processor = with_forced_end


class _ForcedEnd:
    """A logits processor of transformers that allows the end token at a completion's length, and only there."""

    def __init__(self, places: Places, config: Any) -> None:
        self._places = places
        self._ends = config._eos_token_tensor.tolist()
        self._pad = int(config._pad_token_tensor)
        self._prompt_width = 0
        self._lengths: list[int] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not self._lengths:
            self._prompt_width = input_ids.shape[1]
            for row in input_ids.tolist():
                unpadded = row[next((i for i, token in enumerate(row) if token != self._pad), 0) :]
                self._lengths.append(self._places.next_length(unpadded))
        made = input_ids.shape[1] - self._prompt_width + 1  # with the token that is about to be drawn
        scores[:, self._ends] = -math.inf
        for row, length in enumerate(self._lengths):
            if made == length:
                scores[row] = -math.inf
                scores[row, self._ends[0]] = 0.0
        return scores
