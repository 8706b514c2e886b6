"""Completions as tokens, answered by vLLM's engine without vLLM's OpenAI layer in between.

For each sampled token that layer decodes the token by itself, makes objects of it and writes it twice into JSON, all in
one Python thread: 60 microseconds a token, where without logprobs the server's front takes 13 (measured on a CPU;
docs/log.md). That thread, and not the GPU, bounded the rollouts of small models. A trainer wants numbers alone: it
decodes what it learns from by itself.

A request is taken where it says ``"detokenize": false`` and asks for nothing else that is not known here. Any other
goes the usual way, and its answer has the same members, so that whoever asks need not know which one it was.
"""

import json
import logging
import uuid
from collections.abc import Mapping
from functools import cache
from typing import Any

LOG = logging.getLogger(__name__)
# vLLM's own defaults come from the model's generation_config.json: so that none is needed, these must be said.
SAID = frozenset({"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
SAMPLING = SAID | {"n", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty"}
KNOWN = SAMPLING | {
    *("model", "prompt", "logprobs", "detokenize", "return_token_ids", "return_tokens_as_token_ids"),
}
LEAST_LOGPROB = -9999.0  # JSON has no infinity, and vLLM writes this for it


class Tokens:
    """Answers requests for tokens from the engine of a running vLLM.

    Args:
        state: of vLLM's application.
    """

    def __init__(self, state: Any) -> None:
        self._engine = state.engine_client
        self._models = state.openai_serving_models
        self._longest = int(self._engine.model_config.max_model_len)

    def takes(self, request: Any) -> bool:
        """Whether `complete` answers this request as vLLM would: everything that it says is known."""
        if not isinstance(request, dict) or request.get("detokenize") is not False or request.get("logprobs") != 0:
            return False
        given = {name for name, value in request.items() if value is not None}
        prompt = request.get("prompt")
        return (
            SAID <= given <= KNOWN
            and isinstance(prompt, list)
            and bool(prompt)
            and all(type(token) is int for token in prompt)
            and type(request["max_tokens"]) is int
            and len(prompt) + request["max_tokens"] <= self._longest
            and self._known(request.get("model"))
        )

    async def complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The completions of one prompt.

        Raises:
            ValueError: for sampling parameters that vLLM does not take.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = request.get("model")
        sampling = SamplingParams(
            **{key: request[key] for key in SAMPLING if request.get(key) is not None},
            logprobs=0,  # the sampled token's
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"type": "token", "prompt_token_ids": request["prompt"]}
        adapter = self._models.lora_requests.get(name)
        generating = self._engine.generate(prompt, sampling, f"tokens-{uuid.uuid4().hex}", lora_request=adapter)
        *_, final = [each async for each in generating]
        return {
            "model": self._models.model_name() if name is None else name,
            "choices": [_choice(each) for each in sorted(final.outputs, key=lambda each: each.index)],
        }

    def _known(self, name: Any) -> bool:
        return name is None or name in self._models.lora_requests or self._models.is_base_model(name)


@cache
def of(app: Any) -> Tokens | None:
    """For vLLM's application; None, and a line in the log, where its parts are not what is known of them."""
    try:
        from vllm.logprobs import FlatLogprobs
        from vllm.sampling_params import SamplingParams

        SamplingParams(n=1, logprobs=0, flat_logprobs=True, detokenize=False)
        FlatLogprobs().start_indices  # noqa: B018 - whether it is there
        return Tokens(app.state)
    except (ImportError, AttributeError, TypeError) as error:
        LOG.warning("this vLLM is not known well enough (%s): its own way answers rollouts, which is slower", error)
        return None


def read(body: bytes) -> Any:
    """A request; None where it is no JSON, which vLLM answers best."""
    try:
        return json.loads(body)
    except ValueError:
        return None


def _choice(output: Any) -> dict[str, Any]:
    """A completion with the members of vLLM's answer that say something of its tokens."""
    ids, flat = list(output.token_ids), output.logprobs
    # The sampled token's comes first at each place.
    logprobs = [max(flat.logprobs[start], LEAST_LOGPROB) for start in flat.start_indices]
    if [flat.token_ids[start] for start in flat.start_indices] != ids:
        raise ValueError("the logprobs of a completion belong to other tokens")
    return {
        **{"index": output.index, "text": "", "token_ids": ids, "finish_reason": output.finish_reason},
        "logprobs": {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logprobs},
    }
