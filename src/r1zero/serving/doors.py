"""The doors of the policy server: who may enter, through which of them, and under which policy version it answers.

`vllm serve --middleware r1zero.serving.doors.Doors` puts this in front of everything that vLLM serves. vLLM's own
`--api-key` guards /v1 alone, and leaves open, among others, the routes that load weights and the one that calls any
method of a worker. Here no request passes without the run's token, and none to a route that we do not use.
"""

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from typing import Any

from prometheus_client import REGISTRY

from r1zero.serving import POLICY_ROUTE, PUBLISH_FOLDER, TOKEN, VERSION_HEADER, tokens
from r1zero.serving.published import published
from r1zero.serving.routes import COMPLETIONS, FINISH, LOAD_ADAPTER, ROUTES, SLEEP, START, UPDATE, WAKE_UP

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

MIXED = "mixed"
LARGEST_ADAPTER_REQUEST = 64 * 1024  # bytes; it is a name and a path
LARGEST_PROMPT = 64 * 2**20  # bytes; some millions of tokens
TOKENS_MADE = "vllm:generation_tokens_total"
DRAIN_S = 30.0  # what is being generated may take so long to end before the server sleeps
LOOK_S = 0.02


def run_token() -> str:
    """The run's token.

    Raises:
        RuntimeError: when there is none.
    """
    token = os.environ.get(TOKEN, "")
    if not token:
        raise RuntimeError(f"{TOKEN} is not set: the policy server does not start without the run's token; set it")
    return token


# vLLM imports a middleware before it listens, but makes one only when the first request comes, where a failure is lost.
run_token()


class Doors:
    """ASGI middleware: token, allowed routes, and the policy version of the weights that are served.

    It passes each message of an answer on as it comes: nothing is buffered. Of its own it answers POLICY_ROUTE, and
    requests for completions without their text (`tokens.Tokens`).
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._authorization = f"Bearer {run_token()}".encode()
        self._weights = _Weights()
        self._in_flight = 0
        self._sleeping = False

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One connection, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:  # a WebSocket: closed before it is accepted, which the client sees as 403
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        given = _values(scope, b"authorization")
        if len(given) != 1 or not hmac.compare_digest(given[0], self._authorization):
            return await _answer(send, 401, {"error": "the run's token is missing or wrong"})
        route = (scope["method"], scope["path"])
        # The raw path too: what arrives percent-encoded, or behind a root path, is none of our clients.
        raw = scope.get("raw_path")
        if route not in ROUTES or scope.get("root_path") or (raw is not None and raw != scope["path"].encode()):
            return await _answer(send, 404, {"error": "no such route"})
        path = scope["path"]
        if path == POLICY_ROUTE:
            state = {**self._weights.state(), "in_flight": self._in_flight, "sleeping": self._sleeping}
            return await _answer(send, 200, {**state, "tokens": _tokens_made()})
        if path == COMPLETIONS:
            return await self._completions(scope, receive, send)
        if path == LOAD_ADAPTER:
            return await self._load_adapter(scope, receive, send)
        if path in (START, UPDATE, FINISH):
            return await self._change_weights(scope, receive, send)
        if path in (SLEEP, WAKE_UP):
            return await self._sleep_or_wake(scope, receive, send)
        return await self._app(scope, receive, send)

    async def _completions(self, scope: Message, receive: Receive, send: Send) -> None:
        if refusal := self._weights.refusal or ("the server sleeps" if self._sleeping else ""):
            return await _answer(send, 409, {"error": refusal})
        updates = self._weights.updates

        async def with_version(message: Message) -> None:
            if message["type"] == "http.response.start":
                # What is still being generated while it is sent may yet meet an update.
                streamed = any(value.startswith(b"text/event-stream") for value in _values(message, b"content-type"))
                version: Any = MIXED if streamed or self._weights.updates != updates else self._weights.version
                if version is not None:
                    header = (VERSION_HEADER.lower().encode(), str(version).encode())
                    message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        self._in_flight += 1
        try:
            body = await _body(receive, LARGEST_PROMPT)
            if body is None:
                return await _answer(send, 413, {"error": f"more than {LARGEST_PROMPT} bytes, or not sent whole"})
            if not await self._answered_as_tokens(scope, body, receive, with_version):
                await self._app(scope, _replay(body, receive), with_version)
        finally:
            self._in_flight -= 1

    async def _answered_as_tokens(self, scope: Message, body: bytes, receive: Receive, send: Send) -> bool:
        """Whether nothing is left to do: answered, or nobody waits any more. What fails is vLLM's to answer."""
        request, engine = tokens.read(body), tokens.of(scope.get("app"))
        if engine is None or not engine.takes(request):
            return False
        try:
            made = await _while_there(receive, engine.complete(request))
        except Exception as error:  # noqa: BLE001 - a parameter that vLLM refuses, a dead engine: it says so best
            tokens.LOG.warning("tokens alone: %s: %s; asked again in vLLM's own way", type(error).__name__, error)
            return False
        if made is not None:
            await _answer(send, 200, made)
        return True

    async def _load_adapter(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _body(receive, LARGEST_ADAPTER_REQUEST)
        if body is None:
            return await _answer(send, 413, {"error": f"more than {LARGEST_ADAPTER_REQUEST} bytes, or not sent whole"})
        try:
            request = json.loads(body)
            name, path = request["lora_name"], request["lora_path"]
            if not (isinstance(name, str) and isinstance(path, str)):
                raise TypeError("lora_name and lora_path must be texts")
        except (ValueError, LookupError, TypeError) as error:
            return await _answer(send, 400, {"error": f"not a request to load an adapter: {error}"})
        inside = published(path)
        if inside is None:
            why = f"lora_path {path!r} is not inside the folder that {PUBLISH_FOLDER} names"
            return await _answer(send, 403, {"error": why})
        # Written anew with the path that was checked, or a body that two readers read differently would be let in.
        checked = json.dumps({"lora_name": name, "lora_path": str(inside)}).encode()
        kept = [(key, value) for key, value in scope["headers"] if key not in (b"content-length", b"content-type")]
        length = (b"content-length", str(len(checked)).encode())
        scope = {**scope, "headers": [*kept, (b"content-type", b"application/json"), length]}
        return await self._app(scope, _replay(checked, receive), send)

    async def _sleep_or_wake(self, scope: Message, receive: Receive, send: Send) -> None:
        """Nothing is let in once sleep was asked for, and what is inside may end: an engine asleep answers nobody."""
        before, falls_asleep = self._sleeping, scope["path"] == SLEEP
        if falls_asleep:
            self._sleeping = True
            deadline = asyncio.get_running_loop().time() + DRAIN_S
            while self._in_flight:
                if asyncio.get_running_loop().time() > deadline:
                    self._sleeping = before
                    why = f"{self._in_flight} completions are still under way after {DRAIN_S:g} s"
                    return await _answer(send, 409, {"error": why})
                await asyncio.sleep(LOOK_S)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._sleeping = falls_asleep if message["status"] == 200 else before
            await send(message)

        return await self._app(scope, receive, watched)

    async def _change_weights(self, scope: Message, receive: Receive, send: Send) -> None:
        path, version = scope["path"], None
        if path == FINISH:
            given = _values(scope, VERSION_HEADER.lower().encode())
            if len(given) != 1 or not (given[0].isdigit() and len(given[0]) < 19):
                return await _answer(send, 400, {"error": f"{VERSION_HEADER} must be one policy version, got {given}"})
            version = int(given[0])
        if path != START and (why := self._weights.not_ready_for(path)):
            return await _answer(send, 409, {"error": why})
        self._weights.begins(path)
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before the answer is out: whoever has read it must find the new version.
                self._weights.ends(path, status, version)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._weights.ends(path, 0, version)  # where the answer was not sent whole


class _Weights:
    """What is known of the weights that the server holds, as the weights route changes them.

    Attributes:
        version: the policy version of the last complete update; None before the first.
        refusal: why nothing may be generated now; empty while it may.
        updates: how many updates were begun.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self.refusal = ""
        self.updates = 0
        self._failed = ""
        self._received = False
        self._step = ""

    def state(self) -> dict[str, Any]:
        """As POLICY_ROUTE answers it."""
        return {"version": self.version, "updating": bool(self.refusal), "refusal": self.refusal or None}

    def not_ready_for(self, path: str) -> str:
        """Why this step of an update cannot be taken now; empty when it can."""
        if self._step:
            return f"{self._step} has not ended"
        if self._failed:
            return f"{self._failed}; begin again with {START}"
        if not self.refusal:
            return f"no update of the weights was begun with {START}"
        if path == FINISH and not self._received:
            return f"no weights came since {START}"
        return ""

    def begins(self, path: str) -> None:
        """From here on the weights are those of no policy version."""
        self._step = path
        if path == START:
            self.updates += 1
            self._failed, self._received = "", False
            self.refusal = "an update of the weights is under way"

    def ends(self, path: str, status: int, version: int | None) -> None:
        """The server answered with this status; 0 when it did not answer. Said twice, the second is not heard."""
        if self._step != path:
            return
        self._step = ""
        if status != 200:
            self._failed = f"the last update of the weights failed at {path} with {status or 'no answer'}"
            self.refusal = f"{self._failed}, and no other was completed since"
        elif path == UPDATE:
            self._received = True
        elif path == FINISH:
            self.version, self.refusal = version, ""


def _tokens_made() -> int:
    """Tokens that the engine has made so far: while the number rises it lives, however long its queue is."""
    families = REGISTRY.restricted_registry([TOKENS_MADE]).collect()
    return int(sum(sample.value for family in families for sample in family.samples if sample.name == TOKENS_MADE))


def _values(message: Message, name: bytes) -> list[bytes]:
    headers: Iterable[tuple[bytes, bytes]] = message.get("headers", ())
    return [value for key, value in headers if key.lower() == name]


async def _body(receive: Receive, largest: int) -> bytes | None:
    """The request's body; None when it is larger, or the client went away."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += bytes(message.get("body", b""))
        if len(body) > largest:
            return None
        if not message.get("more_body", False):
            return body


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives, or None when the client goes away before, for whom it is cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for each in (working, leaving):
            each.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, receive: Receive) -> Receive:
    """`body` as if it had just come, then whatever comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return waiting.pop() if waiting else await receive()

    return next_message


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers: Headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
