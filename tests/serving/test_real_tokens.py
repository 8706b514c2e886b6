"""Completions without their text, on the real `vllm serve`: the engine gives what vLLM would answer."""

import json
import time
from http.client import HTTPConnection
from typing import Any

import pytest

from r1zero.policy_client import PolicyClient
from r1zero.serving import POLICY_ROUTE
from tests.serving.conftest import Reply, Server

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(600)]
PROMPT = [5, 6, 7, 8, 9]
SAMPLING = {"max_tokens": 24, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
ASKED = {"logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True, "prompt": PROMPT}


def both(server: Server, **more: Any) -> tuple[Reply, Reply]:
    """With text and without."""
    request = {**SAMPLING, **ASKED, "model": str(server.model), **more}
    return (
        server.post("/v1/completions", request),
        server.post("/v1/completions", {**request, "detokenize": False}),
    )


@pytest.mark.parametrize(
    "more",
    [
        {"n": 3, "seed": 5},
        {"n": 2, "seed": 6, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
        {"n": 4, "seed": 7, "stop_token_ids": list(range(10, 30))},
        {"n": 1, "temperature": 0.0},
        {"n": 2, "seed": 8, "min_tokens": 24, "ignore_eos": True, "model": None},
    ],
)
def test_without_text_the_same_tokens_and_logprobs(server: Server, more: dict[str, Any]) -> None:
    usual, alone = both(server, **more)
    assert (usual.status, alone.status) == (200, 200), alone.body
    there, here = usual.content, alone.content
    assert here["model"] == there["model"] == str(server.model)
    assert len(here["choices"]) == len(there["choices"]) == more["n"]
    assert "usage" in there and "usage" not in here  # one is vLLM's and the other is not
    for mine, its in zip(here["choices"], sorted(there["choices"], key=lambda each: each["index"]), strict=True):
        assert not mine["text"]
        for name in ("index", "token_ids", "finish_reason"):
            assert mine[name] == its[name], name
        assert mine["logprobs"]["tokens"] == its["logprobs"]["tokens"]
        assert mine["logprobs"]["token_logprobs"] == pytest.approx(its["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"max_tokens": 300}, 400),  # more than the context
        ({"temperature": -1.0}, 400),
        ({"prompt": [10**6]}, 400),  # no such token
        ({"model": "policy-99"}, 404),
    ],
)
def test_what_vllm_refuses_is_refused_in_its_words(server: Server, more: dict[str, Any], status: int) -> None:
    usual, alone = both(server, **more)
    assert (usual.status, alone.status) == (status, status), alone.body
    assert alone.content["error"]["message"] == usual.content["error"]["message"]


@pytest.mark.parametrize("more", [{"stop": ["7"]}, {"logit_bias": {"5": 1.0}}, {"prompt": "1"}, {"top_k": None}])
def test_what_is_not_known_goes_vllms_way(server: Server, more: dict[str, Any]) -> None:
    _, alone = both(server, **more)
    assert alone.status == 200 and "usage" in alone.content


def test_the_client_learns_the_same_with_and_without(server: Server) -> None:
    """Seeds of its own for each prompt, and stop strings, for which the server decodes."""
    with PolicyClient([f"http://127.0.0.1:{server.port}"], server.token, generation_timeout_s=120) as client:
        prompts, seeds = [PROMPT, PROMPT[::-1]], [11, 21]
        never = {**SAMPLING, "stop": ["\N{SNOWMAN}"]}
        alone = client.collect(client.submit(prompts, SAMPLING, 3, seeds=seeds))
        decoded = client.collect(client.submit(prompts, never, 3, seeds=seeds))
    assert [each.completion_ids for each in alone] == [each.completion_ids for each in decoded]
    assert [each.clipped for each in alone] == [each.clipped for each in decoded]
    for one, other in zip(alone, decoded, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert other.text and not one.text


def test_nobody_waits_any_more_and_nothing_more_is_made(server: Server) -> None:
    request = {**SAMPLING, **ASKED, "detokenize": False, "max_tokens": 240, "ignore_eos": True, "n": 16}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {server.token}"}
    before = server.ask("GET", POLICY_ROUTE).content["tokens"]
    connection.request("POST", "/v1/completions", json.dumps(request), headers)
    deadline = time.monotonic() + 60
    while server.ask("GET", POLICY_ROUTE).content["tokens"] == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert server.ask("GET", POLICY_ROUTE).content["in_flight"] == 1
    connection.close()
    deadline = time.monotonic() + 30
    while server.ask("GET", POLICY_ROUTE).content["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # what the engine had begun
    stopped = server.ask("GET", POLICY_ROUTE).content["tokens"]
    assert stopped - before < 16 * 240
    time.sleep(1)
    assert server.ask("GET", POLICY_ROUTE).content["tokens"] == stopped
