"""The doors by themselves, as an ASGI application in front of one that stands in for vLLM's."""

import asyncio
import importlib
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from prometheus_client import REGISTRY, Counter

from r1zero.serving import POLICY_ROUTE, PUBLISH_FOLDER, TOKEN, VERSION_HEADER
from r1zero.serving.routes import ROUTES

RIGHT = (b"authorization", b"Bearer right")
Message = dict[str, Any]


class Behind:
    """What is behind the doors: it remembers who came, and answers as it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.headers: list[list[tuple[bytes, bytes]]] = []
        self.status: dict[str, int] = {}
        self.content_type = b"application/json"
        self.body = [b'{"success": true}']
        self.meanwhile: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
            message = await receive()
        self.seen.append((scope["method"], scope["path"], body))
        self.headers.append(scope["headers"])
        if self.meanwhile:
            await self.meanwhile()
        status = self.status.get(scope["path"], 200)
        if status == 0:
            raise ConnectionResetError("the client is gone")
        headers = [(b"content-type", self.content_type)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in self.body:
            await send({"type": "http.response.body", "body": part, "more_body": part is not self.body[-1]})


class Reply:
    """What came out of the doors, message by message."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages
        self.status = messages[0]["status"] if messages else None
        self.headers = dict(messages[0]["headers"]) if messages else {}
        self.body = b"".join(message["body"] for message in messages[1:])

    @property
    def version(self) -> bytes | None:
        return self.headers.get(VERSION_HEADER.lower().encode())


class Front:
    """The doors and what is behind them."""

    def __init__(self, module: ModuleType) -> None:
        self.behind = Behind()
        self.doors = module.Doors(self.behind)

    async def send(
        self,
        method: str,
        path: str,
        content: Any = None,
        headers: tuple[tuple[bytes, bytes], ...] = (RIGHT,),
        stays: bool = False,
        **scope: Any,
    ) -> Reply:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        waiting = [
            {"type": "http.request", "body": body[:5], "more_body": True},
            {"type": "http.request", "body": body[5:], "more_body": False},
        ]
        got: list[Message] = []

        async def receive() -> Message:
            if not waiting and stays:
                await asyncio.Event().wait()
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            got.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "root_path": "", **scope}
        scope.setdefault("raw_path", path.encode())
        await self.doors(scope, receive, send)
        return Reply(got)

    def ask(self, *words: Any, **more: Any) -> Reply:
        return asyncio.run(self.send(*words, **more))

    def version_is(self, version: int) -> Reply:
        return self.ask("POST", "/finish_weight_update", headers=(RIGHT, said(version)))

    def update(self, version: int) -> None:
        for path in ("/start_weight_update", "/update_weights"):
            assert self.ask("POST", path).status == 200
        assert self.version_is(version).status == 200

    @property
    def policy(self) -> dict[str, Any]:
        return json.loads(self.ask("GET", POLICY_ROUTE).body)


def said(version: object) -> tuple[bytes, bytes]:
    return VERSION_HEADER.encode(), str(version).encode()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv(TOKEN, "right")
    monkeypatch.setenv(PUBLISH_FOLDER, str(tmp_path / "publish"))
    return importlib.import_module("r1zero.serving.doors")


@pytest.fixture
def front(module: ModuleType) -> Front:
    return Front(module)


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_there_is_no_server(module: ModuleType, token: str | None, monkeypatch) -> None:
    if token is None:
        monkeypatch.delenv(TOKEN)
    else:
        monkeypatch.setenv(TOKEN, token)
    with pytest.raises(RuntimeError, match=f"{TOKEN} is not set.*set it"):
        module.Doors(Behind())
    monkeypatch.delitem(sys.modules, module.__name__)
    with pytest.raises(RuntimeError, match=f"{TOKEN} is not set"):  # vLLM: when it builds its application
        importlib.import_module(module.__name__)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"authorization", b"Bearer wrong"),),
        ((b"authorization", b"right"),),
        ((b"authorization", b"Bearer right "),),
        ((b"authorization", b"Bearer \xff\xfe"),),
        ((b"authorization", b""),),
        (RIGHT, (b"authorization", b"Bearer wrong")),
        ((b"authorization", b"Bearer wrong"), RIGHT),
        (RIGHT, RIGHT),
        ((b"x-authorization", b"Bearer right"),),
    ],
)
def test_without_the_token_nothing_is_told_and_nothing_passes(front: Front, headers: Any) -> None:
    for method, path in [*ROUTES, ("GET", "/nothing"), ("OPTIONS", "/v1/completions")]:
        reply = front.ask(method, path, headers=headers)
        assert (reply.status, reply.body) == (401, b'{"error": "the run\'s token is missing or wrong"}')
    assert front.behind.seen == []


def test_the_routes_that_we_use_pass(front: Front) -> None:
    ours = {("GET", POLICY_ROUTE), ("POST", "/v1/load_lora_adapter")}
    # In an order in which they are called: a server that sleeps, or is amid an update, answers no completions.
    order = ["/sleep", "/wake_up", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    for method, path in sorted(
        ROUTES - ours, key=lambda route: (route[1] not in order, order.index(route[1]) if route[1] in order else 0)
    ):
        assert front.ask(method, path, b"{}", headers=(RIGHT, said(1))).status == 200, path
        assert front.behind.seen[-1] == (method, path, b"{}")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("POST", "/collective_rpc", {}),
        ("GET", "/server_info", {}),
        ("POST", "/invocations", {}),
        ("GET", "/v1/completions", {}),
        ("HEAD", "/health", {}),
        ("OPTIONS", "/v1/completions", {}),
        ("post", "/v1/completions", {}),
        ("POST", "//v1/completions", {}),
        ("POST", "/v1/completions/", {}),
        ("POST", "/v1/./completions", {}),
        ("POST", "/x/../v1/completions", {}),
        ("POST", "/V1/completions", {}),
        ("POST", "/v1/completions", {"raw_path": b"/v1/%63ompletions"}),
        ("POST", "/v1/completions", {"raw_path": b"/%2e/v1/completions"}),
        ("POST", "/v1/completions", {"root_path": "/v1"}),
        ("POST", "", {}),
    ],
)
def test_nothing_else_is_there(front: Front, method: str, path: str, scope: dict[str, Any]) -> None:
    assert front.ask(method, path, **scope).status == 404
    assert front.behind.seen == []


def test_a_websocket_is_closed_before_it_is_open(front: Front) -> None:
    got: list[Message] = []

    async def connect() -> None:
        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            got.append(message)

        scope = {"type": "websocket", "path": "/v1/completions", "headers": [RIGHT], "root_path": ""}
        await front.doors(scope, receive, send)

    asyncio.run(connect())
    assert got == [{"type": "websocket.close", "code": 1008}]
    assert front.behind.seen == []


def test_an_answer_passes_as_it_comes(front: Front) -> None:
    front.behind.body = [b"one ", b"two ", b"three"]
    reply = front.ask("POST", "/v1/completions", {"prompt": "1"})
    assert [message["body"] for message in reply.messages[1:]] == [b"one ", b"two ", b"three"]
    assert front.behind.seen == [("POST", "/v1/completions", b'{"prompt": "1"}')]


def test_each_answer_says_the_version_of_the_weights(front: Front) -> None:
    assert front.ask("POST", "/v1/completions").version is None
    assert front.policy == {
        "version": None,
        "updating": False,
        "refusal": None,
        "in_flight": 0,
        "sleeping": False,
        "tokens": 0,
    }
    for version in (0, 7):
        front.update(version)
        assert front.ask("POST", "/v1/completions").version == str(version).encode()
        assert front.policy["version"] == version
    front.behind.content_type = b"text/event-stream; charset=utf-8"
    assert front.ask("POST", "/v1/completions").version == b"mixed"


def test_an_update_between_request_and_answer_makes_it_mixed(front: Front) -> None:
    front.update(1)

    async def update_while_it_generates() -> Reply:
        async def steps() -> None:
            front.behind.meanwhile = None
            state = json.loads((await front.send("GET", POLICY_ROUTE)).body)
            assert state["in_flight"] == 1
            for path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
                assert (await front.send("POST", path, headers=(RIGHT, said(1)))).status == 200

        front.behind.meanwhile = steps
        return await front.send("POST", "/v1/completions")

    assert asyncio.run(update_while_it_generates()).version == b"mixed"  # though it is version 1 again
    assert front.policy["in_flight"] == 0


@pytest.mark.parametrize("status", [0, 400, 500])
@pytest.mark.parametrize("failing", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
def test_after_a_failed_step_nothing_is_generated_until_an_update_is_complete(
    front: Front, failing: str, status: int
) -> None:
    front.update(1)
    front.behind.status = {failing: status}
    for path in ("/start_weight_update", "/update_weights", "/finish_weight_update"):
        try:
            reply = front.ask("POST", path, headers=(RIGHT, said(2)))
        except ConnectionResetError:
            break
        if reply.status != 200:
            break
    front.behind.status = {}
    seen = len(front.behind.seen)
    refused = front.ask("POST", "/v1/completions")
    assert refused.status == 409
    why = f"the last update of the weights failed at {failing} with {status or 'no answer'}, and no other was completed"
    assert why in json.loads(refused.body)["error"]
    for path in ("/update_weights", "/finish_weight_update"):  # the broken one cannot be taken up again
        reply = front.ask("POST", path, headers=(RIGHT, said(2)))
        assert reply.status == 409 and b"begin again with /start_weight_update" in reply.body
    assert len(front.behind.seen) == seen
    assert front.policy == {
        "version": 1,
        "updating": True,
        "refusal": json.loads(refused.body)["error"],
        "in_flight": 0,
        "sleeping": False,
        "tokens": 0,
    }
    front.update(3)
    assert front.ask("POST", "/v1/completions").version == b"3"


def test_between_the_steps_of_an_update_nothing_is_generated(front: Front) -> None:
    for path in ("/start_weight_update", "/update_weights"):
        assert front.ask("POST", path).status == 200
        assert front.ask("POST", "/v1/completions").status == 409
    assert front.version_is(1).status == 200
    assert front.ask("POST", "/v1/completions").status == 200


def test_an_update_is_begun_and_brings_weights(front: Front) -> None:
    assert front.ask("POST", "/update_weights").status == 409
    assert front.version_is(1).status == 409
    assert front.ask("POST", "/start_weight_update").status == 200
    refused = front.version_is(1)
    assert refused.status == 409 and b"no weights came" in refused.body
    assert front.policy["version"] is None


@pytest.mark.parametrize(
    "headers", [(), (said("two"),), (said("-1"),), (said(""),), (said(1), said(2)), (said("9" * 30),)]
)
def test_an_update_ends_with_a_version(front: Front, headers: Any) -> None:
    for path in ("/start_weight_update", "/update_weights"):
        front.ask("POST", path)
    refused = front.ask("POST", "/finish_weight_update", headers=(RIGHT, *headers))
    assert refused.status == 400 and VERSION_HEADER.encode() in refused.body
    assert front.version_is(1).status == 200  # it was not sent on, so nothing is lost


def test_an_adapter_comes_from_the_publish_folder(front: Front, tmp_path: Path) -> None:
    inside = tmp_path / "publish" / "policy-3"
    inside.mkdir(parents=True)
    for path in ("policy-3", str(inside), f"{tmp_path}/publish/x/../policy-3"):
        body = (
            b'{"lora_path": "/etc", "lora_name": "policy-3", "load_inplace": true, "lora_path": "%s"}' % path.encode()
        )
        assert (
            front.ask("POST", "/v1/load_lora_adapter", body, headers=(RIGHT, (b"content-length", b"9"))).status == 200
        )
        sent = front.behind.seen[-1][2]
        assert json.loads(sent) == {"lora_name": "policy-3", "lora_path": str(inside)}
        assert dict(front.behind.headers[-1])[b"content-length"] == str(len(sent)).encode()
        assert dict(front.behind.headers[-1])[b"content-type"] == b"application/json"


@pytest.mark.parametrize("path", ["/etc", "..", ".", "", "../publish", "link", "policy\0", "../publish-2/policy-1"])
def test_an_adapter_from_elsewhere_does_not_come(front: Front, path: str, tmp_path: Path) -> None:
    for folder in ("publish", "publish-2/policy-1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "publish" / "link").symlink_to("/etc")
    refused = front.ask("POST", "/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": path})
    assert refused.status == 403 and PUBLISH_FOLDER.encode() in refused.body
    assert front.behind.seen == []


def test_without_a_publish_folder_no_adapter_comes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PUBLISH_FOLDER)
    assert front.ask("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}).status == 403


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[]", 400), (b'{"lora_name": "a", "lora_path": 1}', 400), (b" " * 70_000, 413)],
)
def test_what_is_no_request_for_an_adapter(front: Front, body: bytes, status: int) -> None:
    assert front.ask("POST", "/v1/load_lora_adapter", body).status == status
    assert front.behind.seen == []


# --- sleep


def test_nothing_is_asked_of_a_server_that_sleeps(front: Front) -> None:
    assert front.ask("POST", "/sleep").status == 200
    assert front.policy["sleeping"]
    reply = front.ask("POST", "/v1/completions")
    assert reply.status == 409 and b"the server sleeps" in reply.body
    assert front.ask("POST", "/wake_up").status == 200
    assert not front.policy["sleeping"]
    assert front.ask("POST", "/v1/completions").status == 200


def test_a_server_that_could_not_sleep_or_wake_is_as_before(front: Front) -> None:
    front.behind.status["/sleep"] = 500
    assert front.ask("POST", "/sleep").status == 500
    assert not front.policy["sleeping"]
    front.behind.status |= {"/sleep": 200, "/wake_up": 500}
    front.ask("POST", "/sleep")
    assert front.ask("POST", "/wake_up").status == 500
    assert front.policy["sleeping"]


def test_sleep_waits_for_what_is_being_generated(front: Front) -> None:
    async def both() -> None:
        may_end = asyncio.Event()
        front.behind.meanwhile = may_end.wait
        generating = asyncio.create_task(front.send("POST", "/v1/completions"))
        await asyncio.sleep(0.05)
        sleeping = asyncio.create_task(front.send("POST", "/sleep"))
        await asyncio.sleep(0.1)
        assert [path for _, path, _ in front.behind.seen] == ["/v1/completions"]
        assert (await front.send("POST", "/v1/completions")).status == 409
        may_end.set()
        assert (await generating).status == (await sleeping).status == 200

    asyncio.run(both())


def test_the_tokens_made_are_counted(front: Front) -> None:
    made = Counter("vllm:generation_tokens", "as vLLM counts them", ["engine"], registry=REGISTRY)
    try:
        made.labels("0").inc(40)
        made.labels("1").inc(2)
        assert front.policy["tokens"] == 42
    finally:
        REGISTRY.unregister(made)


# Completions without their text.


class Engine:
    """What `tokens.Tokens` is to the doors."""

    def __init__(self, gives: Any) -> None:
        self.gives, self.asked, self.cancelled = gives, [], False

    def takes(self, request: Any) -> bool:
        return isinstance(request, dict) and request.get("detokenize") is False

    async def complete(self, request: Any) -> Any:
        self.asked.append(request)
        if isinstance(self.gives, Exception):
            raise self.gives
        try:
            if self.gives is None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return self.gives


@pytest.fixture
def engine(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine({"choices": []})
    monkeypatch.setattr(module.tokens, "of", lambda app: found)
    return found


ALONE = {"prompt": [1], "detokenize": False}


def stay(front: Front, content: Any) -> tuple[Reply, list[bytes]]:
    """The answer to a client that does not go away, and what vLLM was asked."""
    reply = front.ask("POST", "/v1/completions", content, stays=True)
    return reply, [body for _, _, body in front.behind.seen]


def test_tokens_alone_are_answered_here_under_the_version(front: Front, engine: Engine) -> None:
    front.update(7)
    seen = len(front.behind.seen)
    reply, _ = stay(front, ALONE)
    assert (reply.status, reply.version, json.loads(reply.body)) == (200, b"7", {"choices": []})
    assert engine.asked == [ALONE] and len(front.behind.seen) == seen
    assert front.policy["in_flight"] == 0


@pytest.mark.parametrize("gives", [ValueError("temperature"), RuntimeError("the engine is dead")])
def test_what_fails_there_is_asked_of_vllm(front: Front, engine: Engine, gives: Exception) -> None:
    engine.gives = gives
    reply, seen = stay(front, ALONE)
    assert reply.status == 200 and [json.loads(body) for body in seen] == [ALONE]


def test_with_text_vllm_is_asked(front: Front, engine: Engine) -> None:
    _, seen = stay(front, {"prompt": [1]})
    assert [json.loads(body) for body in seen] == [{"prompt": [1]}] and not engine.asked


def test_for_a_client_that_left_nothing_more_is_made(front: Front, engine: Engine) -> None:
    engine.gives = None
    reply = front.ask("POST", "/v1/completions", ALONE)
    assert reply.messages == [] and engine.cancelled
    assert front.policy["in_flight"] == 0 and not front.behind.seen


def test_amid_an_update_no_tokens_either(front: Front, engine: Engine) -> None:
    assert front.ask("POST", "/start_weight_update").status == 200
    assert stay(front, ALONE)[0].status == 409 and not engine.asked


def test_a_vllm_that_is_not_known_well_enough_answers_itself(module: ModuleType, front: Front) -> None:
    assert module.tokens.of(object()) is None
    reply, seen = stay(front, ALONE)
    assert reply.status == 200 and len(seen) == 1
