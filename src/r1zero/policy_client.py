"""The one way in which launcher, preflight and trainer talk to a running policy server.

It differs from an HTTP client in five ways.

- Each call ends by a total deadline, also when the server sends one byte a second, and an answer has a largest size.
- Generating and reading may be tried again; whatever changes the server is sent exactly once.
- Each completion carries the policy version that made it; where the caller expects one, another is an error.
- Requests run in a background thread: `submit` returns at once, `collect` waits.
- No proxy of the environment, no redirect and no cookie is followed: the token goes to the policy server alone.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

from r1zero.serving import POLICY_ROUTE, TOKEN, VERSION_HEADER

COMPLETIONS = "/v1/completions"
ADAPTER_NAME = re.compile(r"policy-(\d+)")

CONNECTIONS = 256  # to each server at once, for generating: as many sequences as vLLM runs at once by default
TRIES = 3
PAUSES_S = (0.2, 1.0)  # before the second and the third try
PASSING = frozenset({500, 502, 503})  # an engine or a proxy that may recover
WEIGHTS_IN_FLUX = 409

IDLE_S = 2.0  # vLLM closes an idle connection after 5 s; ours must go first, or a request meets a closing one
LATE_S = 5.0  # the background thread keeps the deadlines; so much later the caller stops trusting it
SHOWN_CHARACTERS = 500  # of what a server says in an error
VLLM_MAX_TOKENS = 16  # where a request names no max_tokens
SMALL_BYTES = 16 * 2**20  # the largest answer without completions
BYTES_A_TOKEN = 512  # vLLM's JSON takes about 120 for a token's id, text, logprob and offset

Value = TypeVar("Value")
Interval = tuple[float, float]  # begin and end, by time.perf_counter


class PolicyServerError(Exception):
    """A policy server did not do what it was asked.

    Attributes:
        url: of the server.
        route: method and path, such as POST /v1/completions.
        why: what happened, in one line, with the remedy where there is one.
    """

    def __init__(self, url: str, route: str, why: str) -> None:
        super().__init__(f"policy server at {url}: {route}: {why}")
        self.url, self.route, self.why = url, route, why


class PolicyServerTimeout(PolicyServerError):
    """The whole answer was not there at the deadline."""


class PolicyServerRefused(PolicyServerError):
    """It answered with a status other than 200.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, url: str, route: str, status: int, why: str) -> None:
        super().__init__(url, route, why)
        self.status = status


class PolicyServerUpdating(PolicyServerRefused):
    """It generates nothing now: its weights are being updated, or an update failed half-way."""


class WrongPolicyVersion(PolicyServerError):
    """Another policy answered than the one expected.

    Attributes:
        expected: the version, or the name of the model, that was asked for.
        got: what the server says it was; "mixed" when it changed meanwhile, None when it does not say.
    """

    def __init__(self, url: str, route: str, expected: int | str, got: int | str | None) -> None:
        said = "no policy version" if got is None else f"policy version {got}"
        super().__init__(url, route, f"expected policy version {expected}, but its answer carries {said}")
        self.expected, self.got = expected, got


class PolicyServerUnreachable(PolicyServerError):
    """No connection, or one that broke: asking again may help."""

    @property
    def nobody_listens(self) -> bool:
        """Whether the machine said that no process listens there, which one that is merely busy never does."""
        error = self.__cause__
        return isinstance(getattr(error, "os_error", error), ConnectionRefusedError)


class TicketCancelled(Exception):
    """What is collected was cancelled, or its client closed."""


@dataclass(frozen=True)
class Rollout:
    """One completion as the policy made it.

    >>> Rollout((1, 2), (3, 4), (-0.5, -0.1), 20, False, "4.").clipped
    False

    Attributes:
        prompt_ids: the prompt's tokens.
        completion_ids: as sampled, the end token included.
        logprobs: of the sampled tokens under the distribution they were sampled from, in nats, as many as
            `completion_ids`; None where whoever generated keeps none.
        policy_version: the optimizer step whose weights made it; None when nobody said.
        clipped: whether it was cut off at the limit of tokens.
        text: decoded by the server where no logprobs were asked for; empty where generation does not decode.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    policy_version: int | None
    clipped: bool
    text: str


@dataclass(frozen=True)
class _Deadline:
    """When something must be over.

    Attributes:
        at: on the monotonic clock, which is also the event loop's; seconds.
        seconds: how long that was from the beginning.
        key: of the recipe, that gives more time; None where there is none.
    """

    at: float
    seconds: float
    key: str | None

    @classmethod
    def after(cls, seconds: float, key: str | None) -> "_Deadline":
        return cls(time.monotonic() + seconds, seconds, key)

    @property
    def why(self) -> str:
        remedy = f"; see the server's log, or raise {self.key}" if self.key else "; see the server's log"
        return f"no whole answer within {self.seconds:g} s{remedy}"


@dataclass(frozen=True, eq=False)
class Ticket:
    """A round of generation under way, to be collected or cancelled."""

    _deadline: _Deadline
    _future: "Future[list[list[Rollout]]]"


@dataclass(frozen=True)
class _Call:
    """One request."""

    url: str
    method: str
    path: str
    content: bytes | None
    headers: Mapping[str, str]
    most_bytes: int = SMALL_BYTES
    generates: bool = False

    @property
    def route(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class _Reply:
    """A whole answer of status 200, and what it answers; `content` is None where it is not JSON."""

    call: _Call
    content: Any
    version: str | None


@dataclass(frozen=True)
class _Prompt:
    """One prompt of a round: the places at its server, and the calls that may be made for it."""

    ids: tuple[int, ...]
    n: int
    model: str | None
    expected_version: int | None
    logprobs: bool
    places: asyncio.Semaphore
    calls: tuple[_Call, ...]


class _Generating:
    """When one server had at least one request for completions of this client under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # requests begin and end in the background thread, others ask
        self._requests = 0
        self._since = 0.0
        self._over: list[Interval] = []

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        with self._lock:
            if not self._requests:
                self._since = time.perf_counter()
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                if not self._requests:
                    self._over.append((self._since, time.perf_counter()))

    def take(self) -> list[Interval]:
        with self._lock:
            if self._requests:
                now = time.perf_counter()
                self._over.append((self._since, now))
                self._since = now
            taken, self._over = self._over, []
            return taken


class PolicyClient:
    """A client of the run's policy servers. Threads may share it; a forked process makes its own.

    Example:
        >>> with PolicyClient(["http://127.0.0.1:8000"], token, generation_timeout_s=900) as client:  # doctest: +SKIP
        ...     ticket = client.submit([[1, 2, 3]], {"max_tokens": 16, "temperature": 1.0}, n=8, expected_version=20)
        ...     rollouts = client.collect(ticket)

    Args:
        base_urls: of the servers, such as http://127.0.0.1:8000; prompts are dealt to them in turn.
        token: of the run, sent with each request; None sends none.
        generation_timeout_s: for a round of generation, from `submit` on; seconds.
        control_timeout_s: for any other call that is given no time of its own; seconds.
        first: the place of the server that gets the first prompt; of clients that work side by side each has another,
            so that all servers have work where each client has fewer prompts than there are servers.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        token: str | None,
        *,
        generation_timeout_s: float,
        control_timeout_s: float = 60.0,
        first: int = 0,
    ) -> None:
        if not base_urls:
            raise ValueError("a policy client needs the URL of at least one policy server")
        self.base_urls = tuple(url.rstrip("/") for url in base_urls)
        self._token = token
        self._generation_timeout_s, self._control_timeout_s = generation_timeout_s, control_timeout_s
        self._turns = itertools.islice(itertools.cycle(range(len(self.base_urls))), first % len(self.base_urls), None)
        self._places = [asyncio.Semaphore(CONNECTIONS) for _ in self.base_urls]
        self._generating = {url: _Generating() for url in self.base_urls}
        self._process = os.getpid()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy-client", daemon=True)
        self._thread.start()
        self._wait(self._begin(self._open()), _Deadline.after(LATE_S, None))

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End what is under way, close every connection, end the thread. Safe to call twice."""
        if self._closed or os.getpid() != self._process:
            return
        ending = self._begin(self._end())
        self._closed = True
        self._wait(ending, _Deadline.after(LATE_S, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LATE_S)
        if not self._thread.is_alive():
            self._loop.close()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Mapping[str, Any],
        n: int | Sequence[int] = 1,
        model: str | None = None,
        *,
        expected_version: int | None = None,
        seeds: Sequence[int] | None = None,
        logprobs: bool = True,
    ) -> Ticket:
        """Start a round of generation: one request a prompt, dealt to the servers in turn.

        Args:
            prompts: token ids.
            sampling: vLLM's sampling parameters; without max_tokens vLLM makes 16.
            n: completions of each prompt, or of all.
            model: an adapter's name, such as policy-20; None for the server's base model.
            expected_version: of the policy that must answer.
            seeds: of each prompt's first completion; vLLM gives its next ones the seeds that follow. None: unseeded.
            logprobs: of the sampled tokens, in place of the text, which a server then need not decode; whoever only
                grades does without.
        """
        fixed = {
            **sampling,
            "return_token_ids": True,
            # The sampled token's logprob alone; ids, because decoded tokens cannot be told apart.
            **({"logprobs": 0, "return_tokens_as_token_ids": True} if logprobs else {}),
            # Whoever learns decodes by itself; only stop strings need it in the server.
            **({"detokenize": False} if logprobs and not sampling.get("stop") else {}),
            **({"model": model} if model is not None else {}),
        }
        counts = [n] * len(prompts) if isinstance(n, int) else list(n)
        longest = int(sampling.get("max_tokens") or VLLM_MAX_TOKENS)
        asked = []
        for ids, count, seed in zip(prompts, counts, seeds or itertools.repeat(None, len(counts)), strict=True):
            server = next(self._turns)
            body = {**fixed, "prompt": list(ids), "n": count, **({} if seed is None else {"seed": seed})}
            most_bytes = SMALL_BYTES + BYTES_A_TOKEN * count * (len(ids) + longest)
            call = _call(self.base_urls[server], "POST", COMPLETIONS, body, most_bytes=most_bytes)
            urls = itertools.islice(itertools.cycle(self.base_urls), server, server + TRIES)
            calls = tuple(dataclasses.replace(call, url=url, generates=True) for url in urls)
            asked.append(_Prompt(tuple(ids), count, model, expected_version, logprobs, self._places[server], calls))
        deadline = _Deadline.after(self._generation_timeout_s, "generation_timeout")
        return Ticket(deadline, self._begin(_all(self._generate(each, deadline) for each in asked)))

    def collect(self, ticket: Ticket) -> list[Rollout]:
        """Wait for a round: its rollouts by prompt, those of one prompt side by side.

        Raises:
            PolicyServerTimeout: when `generation_timeout_s` after `submit` not all are there.
            PolicyServerRefused: when a server refuses; PolicyServerUpdating while its weights are in flux.
            WrongPolicyVersion: when another policy answered than `expected_version`.
            PolicyServerError: when a server is gone, or its answer is not vLLM's.
            TicketCancelled: when it was cancelled.
        """
        groups = self._wait(ticket._future, ticket._deadline)
        return list(itertools.chain.from_iterable(groups))

    def wait(self, ticket: Ticket, seconds: float) -> bool:
        """Whether a round is over, well or badly, so that `collect` does not wait; looks on for so long at most."""
        finished, _ = concurrent.futures.wait([ticket._future], timeout=seconds)
        return bool(finished) or time.monotonic() > ticket._deadline.at + LATE_S

    def cancel(self, ticket: Ticket) -> None:
        """Give a round up: its connections are closed, by which vLLM notices and stops generating."""
        ticket._future.cancel()

    def busy(self) -> list[list[Interval]]:
        """When each server had a request for completions under way, since this was last asked.

        Returns:
            For each server the intervals, in their order; one that is not over yet ends now, and the next one begins.
        """
        return [each.take() for each in self._generating.values()]

    def control(
        self,
        url: str,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Any other call, sent exactly once unless it is a GET.

        Args:
            url: of one server.
            method: of HTTP.
            path: on that server.
            body: sent as JSON; None sends nothing.
            headers: further ones.
            timeout_s: for the whole answer, of the recipe's publish_timeout; None takes the client's own.

        Returns:
            The answer's JSON; None where it is not JSON.

        Raises:
            PolicyServerError: and its subclasses, as `collect`.
        """
        deadline = self._deadline(timeout_s)
        return self._wait(self._begin(self._control(_call(url, method, path, body, headers), deadline)), deadline)

    def control_all(
        self,
        method: str,
        path: str,
        bodies: Sequence[Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """`control` to all servers at once; the first failure ends the wait for the others.

        Args:
            method: of HTTP.
            path: on each server.
            bodies: one for each server; None sends none.
            headers: further ones.
            timeout_s: as in `control`.
        """
        deadline = self._deadline(timeout_s)
        each = bodies if bodies is not None else [None] * len(self.base_urls)
        calls = [_call(url, method, path, body, headers) for url, body in zip(self.base_urls, each, strict=True)]
        return self._wait(self._begin(_all(self._control(call, deadline) for call in calls)), deadline)

    def prompt_logprobs(
        self, prompts: Sequence[Sequence[int]], model: str | None = None, *, timeout_s: float
    ) -> list[list[list[float]]]:
        """What each server's policy thinks of fixed tokens: computed anew, since for this vLLM reads no prefix cache.

        Args:
            prompts: token ids, at least one each.
            model: as in `submit`.
            timeout_s: for all of it, of the recipe's publish_timeout.

        Returns:
            For each server and prompt the logprob of each token given those before it, the first left out; in nats,
            before temperature and the like.

        Raises:
            PolicyServerError: and its subclasses, as `collect`.
        """
        deadline = self._deadline(timeout_s)
        each = (self._probe(url, prompts, model, deadline) for url in self.base_urls)
        return self._wait(self._begin(_all(each)), deadline)

    def first_token(self, url: str, timeout_s: float) -> int:
        """One token of a server's base model: the proof that it is alive.

        Raises:
            PolicyServerError: and its subclasses, as `collect`; PolicyServerUpdating comes from a server that lives.
        """
        deadline = _Deadline.after(timeout_s, "server_silence_timeout")
        call = _call(url, "POST", COMPLETIONS, {"prompt": "1", "max_tokens": 1, "return_token_ids": True})
        reply = self._wait(self._begin(self._ask_in_time([call] * TRIES, deadline)), deadline)
        with _reading(reply):
            return int(reply.content["choices"][0]["token_ids"][0])

    def policy(self, url: str) -> dict[str, Any]:
        """What a server says of its weights: version (int or None), updating (bool), in_flight (int).

        Raises:
            PolicyServerError: and its subclasses, as `collect`.
        """
        content = self.control(url, "GET", POLICY_ROUTE)
        if not isinstance(content, dict):
            raise PolicyServerError(url, f"GET {POLICY_ROUTE}", "its answer is not that of r1zero's policy server")
        return content

    def _deadline(self, timeout_s: float | None) -> _Deadline:
        if timeout_s is None:
            return _Deadline.after(self._control_timeout_s, None)
        return _Deadline.after(timeout_s, "publish_timeout")

    # The bridge to the background thread.

    def _begin(self, work: Coroutine[Any, Any, Value]) -> "Future[Value]":
        if os.getpid() != self._process or self._closed:
            work.close()
            fate = "was closed" if self._closed else "belongs to the process that this one was forked from"
            raise RuntimeError(f"this policy client {fate}: make a new one")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, future: "Future[Value]", deadline: _Deadline) -> Value:
        try:
            return future.result(max(0.0, deadline.at + LATE_S - time.monotonic()))
        except CancelledError as error:
            raise TicketCancelled("this was cancelled, or the policy client was closed meanwhile") from error
        except TimeoutError as error:
            future.cancel()
            why = f"{deadline.why} (nor did the client's own thread notice: this machine is overloaded)"
            raise PolicyServerTimeout(", ".join(self.base_urls), "a request", why) from error

    # What runs in the background thread.

    async def _open(self) -> None:
        # Without limits: the places bound what generates, and a call to control must not wait behind it.
        self._pool = self._session(aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S))
        # A kept connection may have ended when it is used again, and what is sent once cannot be sent anew.
        self._fresh = self._session(aiohttp.TCPConnector(limit=0, force_close=True))

    def _session(self, connector: Any) -> Any:
        return aiohttp.ClientSession(
            connector=connector,
            headers={"Authorization": f"Bearer {self._token}"} if self._token else {},
            skip_auto_headers=("Accept-Encoding",),  # the size of a compressed answer says nothing
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None),  # `_ask_in_time` keeps the deadlines
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._pool.close()
        await self._fresh.close()

    async def _generate(self, asked: _Prompt, deadline: _Deadline) -> list[Rollout]:
        reply = await self._ask_in_time(asked.calls, deadline, asked.places)
        return _rollouts(asked, reply)

    async def _control(self, call: _Call, deadline: _Deadline) -> Any:
        calls = [call] * TRIES if call.method == "GET" else [call]
        return (await self._ask_in_time(calls, deadline)).content

    async def _probe(
        self, url: str, prompts: Sequence[Sequence[int]], model: str | None, deadline: _Deadline
    ) -> list[list[float]]:
        return await _all(self._prompt_logprobs(url, ids, model, deadline) for ids in prompts)

    async def _prompt_logprobs(
        self, url: str, ids: Sequence[int], model: str | None, deadline: _Deadline
    ) -> list[float]:
        body = {"prompt": list(ids), "max_tokens": 1, "prompt_logprobs": 0}
        call = _call(url, "POST", COMPLETIONS, body | ({"model": model} if model is not None else {}))
        reply = await self._ask_in_time([call] * TRIES, deadline)
        with _reading(reply):
            said = reply.content["model"]
            if model is None or said == model:
                entries = reply.content["choices"][0]["prompt_logprobs"]
                pairs = zip(ids, entries, strict=True)
                return [_finite(entry[str(token)]["logprob"]) for token, entry in itertools.islice(pairs, 1, None)]
        raise WrongPolicyVersion(url, call.route, model, said)

    async def _ask_in_time(
        self, calls: Sequence[_Call], deadline: _Deadline, places: asyncio.Semaphore | None = None
    ) -> _Reply:
        """The answer to the first of the calls, to the next where that may help, all by the deadline."""
        try:
            async with asyncio.timeout_at(deadline.at), places or contextlib.nullcontext():
                for pause_s, call in zip(PAUSES_S, calls[:-1], strict=False):
                    try:
                        return await self._ask(call)
                    except PolicyServerUnreachable:
                        pass
                    except PolicyServerRefused as error:
                        if error.status not in PASSING:
                            raise
                    await asyncio.sleep(pause_s)
                return await self._ask(calls[-1])
        except TimeoutError as error:
            raise PolicyServerTimeout(calls[0].url, calls[0].route, deadline.why) from error

    async def _ask(self, call: _Call) -> _Reply:
        """One request, once."""
        session = self._pool if call.path == COMPLETIONS else self._fresh
        noted = self._generating[call.url].request() if call.generates else contextlib.nullcontext()
        try:
            with noted:
                async with session.request(
                    call.method, call.url + call.path, data=call.content, headers=call.headers, allow_redirects=False
                ) as response:
                    content = bytearray()
                    async for piece in response.content.iter_any():
                        content += piece
                        if len(content) > call.most_bytes:
                            why = f"its answer is longer than the {call.most_bytes} bytes that it could need"
                            raise PolicyServerError(call.url, call.route, why)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise PolicyServerUnreachable(call.url, call.route, f"the connection failed ({_named(error)})") from error
        except aiohttp.ClientError as error:
            raise PolicyServerError(call.url, call.route, f"no answer in HTTP ({_named(error)})") from error
        if response.status != 200:
            raise self._refusal(call, response.status, content.decode(errors="replace"))
        is_json = response.content_type == "application/json"
        reply = _Reply(call, None, response.headers.get(VERSION_HEADER))
        with _reading(reply):
            return dataclasses.replace(reply, content=json.loads(content) if is_json and content else None)

    def _refusal(self, call: _Call, status: int, body: str) -> PolicyServerRefused:
        if self._token:
            body = body.replace(self._token, "[token]")  # a server that repeats its request must not bring it to a log
        said = " ".join(body.split())[:SHOWN_CHARACTERS]
        why = f"answered {status}: {said}" if said else f"answered {status}"
        if status == WEIGHTS_IN_FLUX:
            why += "; its weights are being updated, or an update failed half-way: start server and trainer again"
            return PolicyServerUpdating(call.url, call.route, status, why)
        if status == 401:
            why += f"; {TOKEN} must hold the same token for the server and for this process"
        return PolicyServerRefused(call.url, call.route, status, why)


def _call(
    url: str,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    most_bytes: int = SMALL_BYTES,
) -> _Call:
    content = None if body is None else json.dumps(body).encode()
    typed = {} if body is None else {"Content-Type": "application/json"}
    return _Call(url.rstrip("/"), method, path, content, {**typed, **(headers or {})}, most_bytes)


async def _all(work: Iterable[Coroutine[Any, Any, Value]]) -> list[Value]:
    """The results in order; where one fails or the whole is cancelled, the others are ended first."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _rollouts(asked: _Prompt, reply: _Reply) -> list[Rollout]:
    """The completions of one prompt, checked: as many as asked for, of the policy asked for, a logprob a token."""
    with _reading(reply):
        version = _version(asked, reply)
        choices = sorted(reply.content["choices"], key=lambda choice: choice["index"])
        if len(choices) != asked.n:
            raise ValueError(f"{len(choices)} completions instead of {asked.n}")
        return [_rollout(asked.ids, choice, version, asked.logprobs) for choice in choices]


def _rollout(
    prompt_ids: tuple[int, ...], choice: Mapping[str, Any], version: int | None, with_logprobs: bool
) -> Rollout:
    ids, logprobs, ended = choice["token_ids"], choice["logprobs"], choice["finish_reason"]
    if ended not in ("stop", "length"):
        raise ValueError(f"a completion was given up by the server: finish_reason {ended!r}")
    if not with_logprobs:
        return Rollout(prompt_ids, tuple(ids), None, version, ended == "length", str(choice["text"]))
    if logprobs["tokens"] != [f"token_id:{token}" for token in ids]:
        raise ValueError("the logprobs of a completion belong to other tokens")
    values = tuple(_finite(value) for value in logprobs["token_logprobs"])
    if len(values) != len(ids):
        raise ValueError(f"{len(values)} logprobs of {len(ids)} tokens")
    return Rollout(prompt_ids, tuple(ids), values, version, ended == "length", str(choice["text"]))


def _version(asked: _Prompt, reply: _Reply) -> int | None:
    """The policy version that answered: an adapter's name says it, for full weights the server's header."""
    if asked.model is not None and ADAPTER_NAME.fullmatch(asked.model):
        said: str | None = str(reply.content["model"])
        match = ADAPTER_NAME.fullmatch(str(said))
        version = int(match[1]) if match else None
    else:
        said = reply.version
        version = int(said) if said is not None and said.isdecimal() else None
    if asked.expected_version is not None and version != asked.expected_version:
        got = said if version is None else version
        raise WrongPolicyVersion(reply.call.url, reply.call.route, asked.expected_version, got)
    return version


def _finite(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a logprob is {value!r}")
    return float(value)


@contextlib.contextmanager
def _reading(reply: _Reply) -> Iterator[None]:
    """Whatever is missing or of the wrong shape in an answer is named as the server's fault."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = f"its answer is not vLLM's ({_named(error)})"
        raise PolicyServerError(reply.call.url, reply.call.route, why) from error


def _named(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN_CHARACTERS]
