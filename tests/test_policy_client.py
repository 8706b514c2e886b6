"""The client of the policy server, against stand-ins that do what a server must not."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from r1zero import policy_client
from r1zero.policy_client import (
    PolicyClient,
    PolicyServerError,
    PolicyServerRefused,
    PolicyServerTimeout,
    PolicyServerUpdating,
    Rollout,
    TicketCancelled,
    WrongPolicyVersion,
)
from r1zero.serving import TOKEN, VERSION_HEADER
from tests.stand_in_server import Handler, serving

LONG_S = 30.0  # what must not be reached
SAMPLING = {"max_tokens": 8, "temperature": 1.0}


def client(*urls: str, token: str | None = None, generation_timeout_s: float = LONG_S) -> PolicyClient:
    return PolicyClient(urls, token, generation_timeout_s=generation_timeout_s, control_timeout_s=LONG_S)


def generate(url: str, seconds: float = LONG_S, token: str | None = None, **asked: Any) -> list[Rollout]:
    with client(url, token=token, generation_timeout_s=seconds) as one:
        return one.collect(one.submit([[7, 8]], SAMPLING, **asked))


def posts(handler: type[Handler], path: str = "/v1/completions") -> list[Any]:
    return [body for method, at, body in handler.seen if (method, at) == ("POST", path)]


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# What is asked, and what comes back.


def test_rollouts_come_by_prompt_whatever_server_made_them() -> None:
    here, there = (("a b c", "stop"), ("a b", "length")), (("a", "stop"), ("a b c d", "stop"))
    with serving(completions=here) as (url, first), serving(completions=there) as (other, second):
        with client(url, other) as both:
            rollouts = both.collect(both.submit([[1], [2, 2], [3]], SAMPLING, n=2))
        assert [rollout.text for rollout in rollouts] == ["a b c", "a b", "a", "a b c d", "a b c", "a b"]
        assert [rollout.prompt_ids for rollout in rollouts] == [(1,), (1,), (2, 2), (2, 2), (3,), (3,)]
        assert rollouts[1] == Rollout((1,), (0, 1), (0.0, -0.5), None, True, "a b")
        assert (len(posts(first)), len(posts(second))) == (2, 1)


def test_clients_side_by_side_begin_with_another_server_each() -> None:
    limits = {"generation_timeout_s": LONG_S, "control_timeout_s": LONG_S}
    with serving() as (url, here), serving() as (other, there):
        for first in range(3):
            with PolicyClient((url, other), None, first=first, **limits) as one:
                one.collect(one.submit([[first]], SAMPLING))
        assert [body["prompt"] for body in posts(here)] == [[0], [2]]
        assert [body["prompt"] for body in posts(there)] == [[1]]


def test_one_request_a_prompt_with_its_own_number_of_completions() -> None:
    with serving() as (url, handler):
        with client(url) as one:
            rollouts = one.collect(one.submit([[5, 6], [7]], SAMPLING, n=[1, 3], model="policy-4"))
            assert one.collect(one.submit([], SAMPLING)) == []
        assert [rollout.prompt_ids for rollout in rollouts] == [(5, 6), (7,), (7,), (7,)]
        expected = {
            **SAMPLING,
            **{"prompt": [5, 6], "n": 1, "model": "policy-4", "logprobs": 0},
            **{"return_token_ids": True, "return_tokens_as_token_ids": True, "detokenize": False},
        }
        assert expected in posts(handler)
        assert len(posts(handler)) == 2


def test_the_server_decodes_where_text_or_stop_strings_are_wanted() -> None:
    with serving() as (url, handler), client(url) as one:
        one.collect(one.submit([[5]], {**SAMPLING, "stop": ["."]}))
        one.collect(one.submit([[5]], SAMPLING, logprobs=False))
        one.collect(one.submit([[5]], {**SAMPLING, "stop": None}))
        assert [post.get("detokenize") for post in posts(handler)] == [None, None, False]


def test_the_base_model_needs_no_name() -> None:
    with serving() as (url, handler):
        generate(url)
        assert "model" not in posts(handler)[0]


def test_submit_does_not_wait_and_cancel_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, client(f"http://127.0.0.1:{port(listener)}") as one:
        began = time.monotonic()
        ticket = one.submit([[1]], SAMPLING)
        assert time.monotonic() - began < LONG_S / 2
        connection, _ = listener.accept()
        connection.settimeout(LONG_S)
        assert b"POST /v1/completions" in connection.recv(65536)
        one.cancel(ticket)
        while connection.recv(65536):  # ends when the client leaves, and with an error at the timeout
            pass
        connection.close()
        with pytest.raises(TicketCancelled):
            one.collect(ticket)


def port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_no_more_than_so_many_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_client, "CONNECTIONS", 3)
    running, most, lock, three = [0], [0], threading.Lock(), threading.Barrier(3)

    def slowly(self: Handler, request: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        three.wait(LONG_S)
        time.sleep(0.1)  # for a fourth to come in
        with lock:
            running[0] -= 1
        Handler._complete(self, request)

    with serving(_complete=slowly) as (url, _), client(url) as one:
        assert len(one.collect(one.submit([[number] for number in range(12)], SAMPLING))) == 12
    assert most[0] == 3


def test_threads_share_a_client() -> None:
    with serving() as (url, _), client(url) as one, ThreadPoolExecutor(8) as threads:

        def round_of(number: int) -> list[Rollout]:
            return one.collect(one.submit([[number], [number + 1]], SAMPLING))

        rounds = list(threads.map(round_of, range(40)))
    assert [[rollout.prompt_ids for rollout in each] for each in rounds] == [[(n,), (n + 1,)] for n in range(40)]


# When it had requests for completions under way.


def test_it_knows_when_each_server_had_completions_to_make() -> None:
    """A server that took over, not the one that was gone; a round that failed or was cancelled is over, too."""
    held, came, gone = threading.Event(), threading.Event(), f"http://127.0.0.1:{unused_port()}"

    def complete(self: Handler, request: Any) -> None:
        came.set()
        assert held.wait(LONG_S)
        Handler._complete(self, request)

    with serving(_complete=complete) as (url, _), client(gone, url) as both:
        began = time.perf_counter()
        ticket = both.submit([[1]], SAMPLING)
        assert came.wait(LONG_S)
        ((asked, refused),), ((first, cut),) = both.busy()
        assert began < asked < refused < first
        held.set()
        both.collect(ticket)
        none, ((again, end),) = both.busy()
        assert none == [] and first < cut == again < end < time.perf_counter()
        assert both.busy() == [[], []]
        held.clear()
        came.clear()
        cancelled = both.submit([[1], [2]], SAMPLING)
        assert came.wait(LONG_S)
        both.cancel(cancelled)
        held.set()
        deadline = time.monotonic() + LONG_S
        while both.busy()[1]:  # the background thread comes to it
            assert time.monotonic() < deadline


def test_requests_at_the_same_time_are_one_interval() -> None:
    three = threading.Barrier(3)

    def together(self: Handler, request: Any) -> None:
        three.wait(LONG_S)
        Handler._complete(self, request)

    with serving(_complete=together) as (url, _), client(url) as one:
        for _ in range(2):
            one.collect(one.submit([[1], [2], [3]], SAMPLING))
        (intervals,) = one.busy()
    assert len(intervals) == 2


def test_looking_and_probing_are_no_completions() -> None:
    with serving() as (url, _), client(url) as one:
        one.control(url, "POST", "/anything", {})
        one.prompt_logprobs([[1, 2]], timeout_s=LONG_S)
        one.first_token(url, LONG_S)
        assert one.busy() == [[]]


# Which policy answered.


def test_the_version_comes_from_the_header() -> None:
    with serving(version="20") as (url, _):
        assert generate(url, expected_version=20)[0].policy_version == 20
        assert generate(url)[0].policy_version == 20


def test_the_version_comes_from_the_adapters_name() -> None:
    with serving(version="3") as (url, _):
        assert generate(url, model="policy-21", expected_version=21)[0].policy_version == 21


@pytest.mark.parametrize(
    ("traits", "asked", "got"),
    [
        ({"version": "19"}, {}, "policy version 19"),
        ({"version": "mixed"}, {}, "policy version mixed"),
        ({}, {}, "no policy version"),
        ({"answering_model": "policy-19"}, {"model": "policy-20"}, "policy version 19"),
        ({"answering_model": "the-base"}, {"model": "policy-20"}, "policy version the-base"),
    ],
)
def test_another_policy_than_the_expected_one(traits: dict[str, Any], asked: dict[str, Any], got: str) -> None:
    with serving(**traits) as (url, handler):
        with pytest.raises(WrongPolicyVersion, match=f"expected policy version 20, but its answer carries {got}"):
            generate(url, expected_version=20, **asked)
        assert len(posts(handler)) == 1


def test_without_an_expectation_an_unknown_version_is_none() -> None:
    for version in (None, "mixed"):
        with serving(version=version) as (url, _):
            assert generate(url)[0].policy_version is None


# Servers that fail.


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("hang-after-health", "no whole answer within 1 s; see the server's log, or raise generation_timeout"),
        ("loris", "no whole answer within 1 s; see the server's log, or raise generation_timeout"),
        ("error", 'answered 500: {"error": "engine is dead"}'),
        ("updating", "its weights are being updated, or an update failed half-way"),
        ("resets", "the connection failed (ClientOSError"),
        ("half", "the connection failed (ClientPayloadError"),
        ("torn", "its answer is not vLLM's (JSONDecodeError"),
        ("endless", "its answer is longer than"),
        ("garbage", "no answer in HTTP"),
    ],
)
def test_each_fault_ends_in_time_with_its_name(mode: str, why: str) -> None:
    seconds = 1.0 if "within 1 s" in why else LONG_S
    with serving(mode=mode) as (url, _):
        began = time.monotonic()
        with pytest.raises(PolicyServerError) as caught:
            generate(url, seconds)
        assert time.monotonic() - began < LONG_S
    text = str(caught.value)
    assert text.startswith(f"policy server at {url}: POST /v1/completions: ")
    assert why in text
    assert "\n" not in text
    assert isinstance(caught.value, PolicyServerTimeout) == ("within 1 s" in why)
    assert isinstance(caught.value, PolicyServerUpdating) == (mode == "updating")


def test_a_head_that_never_ends() -> None:
    def endless_head(self: Handler) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X-Filler: 1\r\n" * 100)

    with serving(_fail=endless_head, mode="garbage") as (url, _), pytest.raises(PolicyServerError):
        generate(url, 5)


def test_a_port_where_nobody_listens() -> None:
    with pytest.raises(PolicyServerError, match="the connection failed"):
        generate(f"http://127.0.0.1:{unused_port()}")


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ({"finish_reason": "abort"}, "given up by the server: finish_reason 'abort'"),
        ({"logprobs": {"tokens": ["token_id:1"], "token_logprobs": [-1.0]}}, "belong to other tokens"),
        ({"logprobs": {"tokens": ["token_id:0"], "token_logprobs": []}}, "0 logprobs of 1 tokens"),
        ({"logprobs": {"tokens": ["token_id:0"], "token_logprobs": [None]}}, "a logprob is None"),
        ({"logprobs": {"tokens": ["token_id:0"], "token_logprobs": [float("nan")]}}, "a logprob is nan"),
        ({"logprobs": None}, "TypeError"),
    ],
)
def test_completions_that_cannot_be_trained_on(choice: dict[str, Any], why: str) -> None:
    sound = {
        **{"index": 0, "text": "a", "token_ids": [0], "finish_reason": "stop"},
        "logprobs": {"tokens": ["token_id:0"], "token_logprobs": [-0.1]},
    }
    with serving(_choice=lambda self, number: sound) as (url, _):
        assert generate(url)[0].logprobs == (-0.1,)
    with (
        serving(_choice=lambda self, number: sound | choice) as (url, _),
        pytest.raises(PolicyServerError, match=f"its answer is not vLLM's .*{why}"),
    ):
        generate(url)


@pytest.mark.parametrize("content", ["[]", "null", '"ok"', '{"choices": []}', "[" * 100_000])
def test_json_that_is_not_vllms(content: str) -> None:
    def say(self: Handler, request: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    with serving(_complete=say) as (url, _), pytest.raises(PolicyServerError, match="its answer is not vLLM's"):
        generate(url)


def test_one_failure_ends_the_round_at_once() -> None:
    with serving(mode="hang-after-health") as (url, _), serving(mode="torn") as (other, _):
        began = time.monotonic()
        with client(url, other) as both, pytest.raises(PolicyServerError, match="not vLLM's"):
            both.collect(both.submit([[1], [2]], SAMPLING))
        assert time.monotonic() - began < LONG_S


# What is sent again, and what is not.


@pytest.mark.parametrize("mode", ["error", "resets", "half"])
def test_generation_is_tried_three_times(mode: str) -> None:
    with serving(mode=mode) as (url, handler):
        with pytest.raises(PolicyServerError):
            generate(url)
        assert len(posts(handler)) == 3


def test_a_passing_fault_is_overcome() -> None:
    with serving(mode="hiccup") as (url, handler):
        assert generate(url)
        assert len(posts(handler)) == 2


def test_the_next_server_is_asked_where_one_is_gone() -> None:
    with serving() as (url, handler), client(f"http://127.0.0.1:{unused_port()}", url) as both:
        assert len(both.collect(both.submit([[1], [2], [3]], SAMPLING))) == 3
        assert len(posts(handler)) == 3


@pytest.mark.parametrize("status", [307, 400, 401, 404, 409])
def test_a_refusal_is_not_argued_with(status: int) -> None:
    def refuse(self: Handler, request: Any) -> None:
        self.send_response(status)
        self.send_header("Location", "/v1/completions")
        self.send_header("Content-Length", "0")
        self.end_headers()

    with serving(_complete=refuse) as (url, handler):
        with pytest.raises(PolicyServerRefused, match=f"answered {status}") as caught:
            generate(url)
        assert caught.value.status == status
        assert len(posts(handler)) == 1


@pytest.mark.parametrize("mode", ["error", "resets", "half", "torn", "garbage"])
def test_what_changes_the_server_is_sent_once(mode: str) -> None:
    with serving(mode=mode) as (url, handler), client(url) as one:
        with pytest.raises(PolicyServerError):
            one.control(url, "POST", "/update_weights", {"files": []})
        with pytest.raises(PolicyServerError):
            one.control_all("POST", "/finish_weight_update")
        assert posts(handler, "/update_weights") == [{"files": []}]
        assert len(posts(handler, "/finish_weight_update")) == 1


def test_an_idle_connection_that_ended_costs_no_update() -> None:
    """A server of HTTP/1.1 that closes each connection after its answer, without having said so."""
    with serving(protocol_version="HTTP/1.1", end_headers=closing) as (url, handler), client(url) as one:
        for number in range(20):
            assert one.control(url, "POST", "/update_weights", number)["body"] == number
        assert posts(handler, "/update_weights") == list(range(20))


def closing(self: Handler) -> None:
    Handler.end_headers(self)
    self.close_connection = True


def test_reading_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{port(listener)}"

        def hang_up_twice_then_answer() -> None:
            for answer in (
                b"",
                b"",
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
            ):
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=hang_up_twice_then_answer, daemon=True).start()
        with client(url) as one:
            assert one.policy(url) == {}


# Control.


def test_control_gives_json_or_nothing() -> None:
    def plain(self: Handler) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"Success")

    with serving() as (url, handler), serving(do_POST=plain) as (other, _), client(url, other) as both:
        assert both.control(url, "POST", "/x", {"a": 1}) == {"path": "/x", "body": {"a": 1}}
        assert both.control(other, "POST", "/x", {"a": 1}) is None
        assert both.control_all("POST", "/y", [{"rank": 0}, {"rank": 1}]) == [
            {"path": "/y", "body": {"rank": 0}},
            None,
        ]
        assert both.control(url, "GET", "/health") is None
        assert posts(handler, "/y") == [{"rank": 0}]


def test_a_header_of_control_arrives() -> None:
    said: list[str | None] = []

    def listen(self: Handler) -> None:
        said.append(self.headers[VERSION_HEADER])
        self._answer(200, {})

    with serving(do_POST=listen) as (url, _), client(url) as one:
        one.control_all("POST", "/finish_weight_update", headers={VERSION_HEADER: "7"})
    assert said == ["7"]


def test_the_deadline_of_a_publish_is_named() -> None:
    with serving(mode="hang-after-health") as (url, _), client(url) as one:
        with pytest.raises(PolicyServerTimeout, match=r"POST /x: no whole answer within 0.5 s.* raise publish_timeout"):
            one.control(url, "POST", "/x", timeout_s=0.5)
        with pytest.raises(PolicyServerTimeout, match="raise server_silence_timeout"):
            one.first_token(url, 0.5)


def test_the_logprobs_of_fixed_tokens_on_each_server() -> None:
    with serving() as (url, first), serving() as (other, _), client(url, other) as both:
        told = both.prompt_logprobs([[4, 5, 6], [7, 8]], "policy-3", timeout_s=LONG_S)
        assert told == [[[-5.0, -6.0], [-8.0]]] * 2
        assert posts(first)[0]["prompt_logprobs"] == 0
    with (
        serving(answering_model="policy-2") as (url, _),
        client(url) as one,
        pytest.raises(WrongPolicyVersion, match=r"expected policy version policy-3, .*policy-2"),
    ):
        one.prompt_logprobs([[4, 5, 6]], "policy-3", timeout_s=LONG_S)


def test_a_first_token_and_the_policy() -> None:
    with serving(version="5") as (url, _), client(url) as one:
        assert one.first_token(url, LONG_S) == 0
        assert one.policy(url) == {"version": 5, "updating": False, "in_flight": 0}
    with serving(mode="updating") as (url, _), client(url) as one, pytest.raises(PolicyServerUpdating):
        one.first_token(url, LONG_S)


# Who may ask.


def test_the_token_is_sent_and_never_shown() -> None:
    with serving(token="right", version="1") as (url, _):
        assert generate(url, token="right")
        with client(url, token="right") as one:
            assert one.policy(url)["version"] == 1
        with pytest.raises(PolicyServerRefused, match=f"answered 401: .*; {TOKEN} must hold the same") as caught:
            generate(url, token="wrong-secret")
        assert "wrong-secret" not in str(caught.value)
        assert "Bearer [token]" in str(caught.value)  # this server repeats what it was sent


def test_proxies_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving() as (url, _):
        assert generate(url)


# Its life.


def test_closing_ends_what_is_under_way() -> None:
    with serving(mode="hang-after-health") as (url, _):
        one = client(url)
        ticket = one.submit([[1]], SAMPLING)
        began = time.monotonic()
        one.close()
        one.close()
        with pytest.raises(TicketCancelled):
            one.collect(ticket)
        with pytest.raises(RuntimeError, match="closed: make a new one"):
            one.submit([[1]], SAMPLING)
        assert time.monotonic() - began < LONG_S


def test_a_forked_process_is_told_to_make_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (url, _), client(url) as one:
        parent = os.getpid()
        with monkeypatch.context() as fork:
            fork.setattr(os, "getpid", lambda: parent + 1)
            with pytest.raises(RuntimeError, match="forked from: make a new one"):
                one.submit([[1]], SAMPLING)


def test_a_client_without_servers() -> None:
    with pytest.raises(ValueError, match="at least one policy server"):
        client()


def test_a_client_left_open_keeps_no_process_and_loads_no_torch() -> None:
    code = (
        "import sys; from r1zero.policy_client import PolicyClient\n"
        "left = PolicyClient(['http://127.0.0.1:9'], None, generation_timeout_s=600)\n"
        "left.submit([[1]], {})\n"
        "heavy = {'torch', 'transformers', 'vllm', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
