"""Several launchers on one machine are the nodes of a run: the first leads, processes run on all, nothing stays."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from r1zero import agent, connection, hardware, nodes
from r1zero import supervisor as supervisors
from r1zero.agent import MeetingFailed
from r1zero.connection import Connection, Lost
from r1zero.nodes import RemoteNode
from r1zero.plan import Process
from r1zero.supervisor import Interrupted, NodeLost, ProcessFailed, Supervisor
from tests.test_supervisor import IGNORE_SIGTERM, SLEEP, lives, pid_in, spawning, until

AGENT = """
import sys
from pathlib import Path
from r1zero import agent, connection
connection.SILENT_S = float(sys.argv[4])
sys.exit(agent.serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), lambda line: print(line, flush=True)))
"""


class Agents:
    """The agents of a test, and what they printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "meeting.json"
        self.popen: list[subprocess.Popen[bytes]] = []

    def start(self, number: int, of: int, silent_s: float = 30.0, **env: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"agent-{number}.out").open("ab") as output:
            popen = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(self.file), str(number), str(of), str(silent_s)],
                env={**os.environ, **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.popen.append(popen)
        return popen

    def output(self, number: int) -> str:
        return (self.folder / f"agent-{number}.out").read_text()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    made = Agents(tmp_path)
    yield made
    for popen in made.popen:
        with suppress(psutil.Error):
            for child in psutil.Process(popen.pid).children(recursive=True):
                child.kill()
        popen.kill()
        popen.wait()


@contextmanager
def run_of(agents: Agents, count: int, silent_s: float = 30.0) -> Iterator[tuple[Supervisor, tuple[RemoteNode, ...]]]:
    """A supervisor with `count` nodes beside its own."""
    for number in range(1, count + 1):
        agents.start(number, count + 1, silent_s)
    here = hardware.this_node()
    with nodes.gathered(agents.file, here, count + 1, lambda: None) as (first, others):
        assert first.address == others[0].reaches_head_at
        with Supervisor(agents.folder, stop_grace_s=3, others=others) as supervisor:
            for other in others:
                other.begin(agents.folder)
            yield supervisor, others


def python(name: str, code: str, node: int, gpus: tuple[int, ...] = ()) -> Process:
    return Process(name, (sys.executable, "-c", code), env=(("GREETING", "hello"),), gpus=gpus, node=node)


def started_by(agents: Agents) -> list[psutil.Process]:
    return [each for popen in agents.popen for each in psutil.Process(popen.pid).children(recursive=True)]


def test_processes_run_on_every_node_and_all_ends_together(agents: Agents) -> None:
    secret = "a1b2c3" * 8
    show = "import os; print(os.getppid(), os.environ['GREETING'], os.environ['TOKEN'])"
    with run_of(agents, 2) as (supervisor, others):
        assert not agents.file.exists()
        assert [other.node.host for other in others] == [socket.gethostname()] * 2
        assert len({port for other in others for port in other.node.ports}) == 6
        for node in range(3):
            supervisor.start(python(f"trainer-{node}", f"{show}\n{SLEEP[:-4]}0.5)", node), {"TOKEN": secret})
            supervisor.start(python(f"server-{node}", spawning(agents.folder / f"{node}"), node))
        for node in range(3):
            supervisor.wait(f"trainer-{node}", lambda: None)
        living = [pid_in(agents.folder / f"{node}") for node in range(3)]
        below = started_by(agents)
        for node in range(3):
            words = (agents.folder / "logs" / f"trainer-{node}.log").read_text().split()
            assert int(words[0]) == (agents.popen[node - 1].pid if node else os.getpid())
            assert words[1:] == ["hello", secret]
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                assert secret not in " ".join(process.cmdline())
    assert [popen.wait(20) for popen in agents.popen] == [0, 0]
    assert not any(map(lives, [*living, *(each.pid for each in below)]))
    for number in (1, 2):
        joined, done = agents.output(number).splitlines()
        assert joined.startswith(f"node {number} of 3 (") and done.endswith(": done")
    for file in agents.folder.rglob("*"):
        if file.is_file() and file.name[:7] != "trainer":
            assert secret not in file.read_text()


def test_a_failure_on_another_node_is_named_with_its_own_error(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisors, "PEERS_S", 3.0)
    with run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("trainer-0", SLEEP, 0))
        supervisor.start(python("trainer-1", "import time; time.sleep(0.5); raise ValueError('nan on node 1')", 1))
        began = time.monotonic()
        with pytest.raises(ProcessFailed) as failed:
            supervisor.wait("trainer-0", lambda: None)
        assert time.monotonic() - began < 30
    assert failed.value.cause == "trainer-1: exited with code 1: ValueError: nan on node 1"
    assert failed.value.last_lines[-1] == "ValueError: nan on node 1"


def test_of_trainers_that_fall_together_the_one_that_did_not_just_lose_its_peer_is_the_cause(agents: Agents) -> None:
    lost = "raise RuntimeError('[gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:5')"
    with run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("trainer-0", f"import time; time.sleep(0.5); {lost}", 0))
        supervisor.start(python("trainer-1", "import time; time.sleep(2); raise ValueError('its reward')", 1))
        with pytest.raises(ProcessFailed) as failed:
            supervisor.wait("trainer-0", lambda: None)
    assert failed.value.cause.startswith(
        "trainer-1: exited with code 1: ValueError: its reward, then trainer-0: exited"
    )


def test_what_cannot_be_started_there_is_said(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with run_of(agents, 1) as (supervisor, _):
        with pytest.raises(ProcessFailed, match=r"model: could not be started: No such file .* on node 1 \("):
            supervisor.start(Process("model", ("/no/such/tool",), node=1))
        with pytest.raises(ProcessFailed, match=r"server: could not be started: it needs GPU 3 .* on node 1 \("):
            supervisor.start(python("server", SLEEP, 1, gpus=(3,)))


def test_one_is_ended_and_started_again_and_the_others_stay(agents: Agents) -> None:
    with run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("server", spawning(agents.folder / "kept"), 1))
        supervisor.start(python("trainer", spawning(agents.folder / "gone", IGNORE_SIGTERM + SLEEP), 1))
        kept, gone = pid_in(agents.folder / "kept"), pid_in(agents.folder / "gone")
        supervisor.end(["trainer"])
        assert lives(kept) and not lives(gone)
        supervisor.check()
        supervisor.run(python("trainer", "raise SystemExit(0)", 1), 20)
        with pytest.raises(ProcessFailed, match="model: not finished after 1 s"):
            supervisor.run(python("model", SLEEP, 1), 1)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_agent_that_is_gone_fails_the_run_by_its_nodes_name(
    agents: Agents, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENT_S", 3.0)
    with run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("server", spawning(agents.folder / "pid", options="env={}"), 1))
        pid = pid_in(agents.folder / "pid")
        agents.popen[0].send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        with pytest.raises(NodeLost, match=r"node 1 \(.*\): its launcher is gone \(.*\); server ran there"):
            supervisor.run(python("model", SLEEP, 0), 60)
    agents.popen[0].send_signal(signal.SIGCONT)
    until(lambda: not lives(pid), 30)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_when_the_head_is_gone_an_agent_ends_all_that_it_started(agents: Agents, how: signal.Signals) -> None:
    head = f"""
import sys
from pathlib import Path
from r1zero import agent, connection, hardware, nodes
from r1zero import supervisor as supervisors
from r1zero.plan import Process
from r1zero.supervisor import Supervisor
folder = Path({str(agents.folder)!r})
with nodes.gathered(folder / "meeting.json", hardware.this_node(), 2, lambda: None) as (_, others):
    with Supervisor(folder, others=others) as supervisor:
        others[0].begin(folder)
        supervisor.run(Process("server", (sys.executable, "-c", (folder / "code.py").read_text()), node=1), 600)
"""
    (agents.folder / "code.py").write_text(spawning(agents.folder / "pid", options="start_new_session=True, env={}"))
    popen = subprocess.Popen([sys.executable, "-c", head])
    try:
        agents.start(1, 2, 3.0)
        pid = pid_in(agents.folder / "pid")
        popen.send_signal(how)
        until(lambda: not lives(pid), 30)
        assert agents.popen[0].wait(20) == 1
        assert "the head is gone" in agents.output(1)
    finally:
        popen.kill()
        popen.wait()


def test_a_signal_that_an_agent_gets_interrupts_the_run(agents: Agents) -> None:
    with pytest.raises(Interrupted, match=r"SIGTERM received on node 1 \("), run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("server", spawning(agents.folder / "pid"), 1))
        pid = pid_in(agents.folder / "pid")
        agents.popen[0].terminate()
        supervisor.run(python("model", SLEEP, 0), 60)
    assert agents.popen[0].wait(20) == 143
    assert not lives(pid)


def test_sigusr1_is_the_heads_affair_and_reaches_no_process_of_the_run(agents: Agents) -> None:
    with run_of(agents, 1) as (supervisor, _):
        supervisor.start(python("server", spawning(agents.folder / "pid"), 1))
        pids = [agents.popen[0].pid, pid_in(agents.folder / "pid"), *(each.pid for each in started_by(agents))]
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        supervisor.check()
        assert all(map(lives, pids))


def test_a_second_signal_does_not_wait_for_another_node_either(agents: Agents) -> None:
    with pytest.raises(Interrupted), run_of(agents, 1) as (supervisor, _):
        supervisor._stop_grace_s = 60
        supervisor.start(python("server", IGNORE_SIGTERM + "print('up', flush=True)\n" + SLEEP, 1))
        until(lambda: (agents.folder / "logs/server.log").read_text() == "up\n", 20)
        began = time.monotonic()
        for delay in (0.3, 1.5):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        supervisor.wait("server", on_tick=lambda: None)
    assert time.monotonic() - began < 9  # the agent's own grace is 10 s


def test_nodes_that_do_not_come_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MEET_S", 1.0)
    monkeypatch.setattr(agent, "MEET_S", 1.0)
    file = tmp_path / "meeting.json"
    missing = pytest.raises(MeetingFailed, match="of 3 nodes number 1, 2 did not come within 1 s")
    with missing, nodes.gathered(file, hardware.this_node(), 3, lambda: None):
        raise AssertionError
    assert not file.exists()
    lines: list[str] = []
    before = signal.getsignal(signal.SIGUSR1)
    assert agent.serve(file, 1, 2, lines.append) == 1
    signal.signal(signal.SIGUSR1, before)
    assert lines[0].startswith(f"error: node 1: the head of the run was not found within 1 s: there is no file {file}")


def test_a_head_that_starts_nothing_lets_the_agents_go(agents: Agents) -> None:
    agents.start(1, 2)
    with nodes.gathered(agents.file, hardware.this_node(), 2, lambda: None):
        pass
    assert agents.popen[0].wait(20) == 0


def test_a_run_folder_that_a_node_does_not_have_is_named(agents: Agents) -> None:
    agents.start(1, 2)
    absent = r"node 1 \(.*\): /no/such/run is not here: checkout and run folder must lie on a file system that all"
    with nodes.gathered(agents.file, hardware.this_node(), 2, lambda: None) as (_, others):
        with pytest.raises(MeetingFailed, match=absent):
            others[0].begin(Path("/no/such/run"))
        assert agents.popen[0].wait(20) == 1


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A head that waits for one agent, for the time of the test."""
    monkeypatch.setattr(nodes, "HANDSHAKE_S", 1.0)
    monkeypatch.setattr(connection, "HANDSHAKE_S", 1.0)
    file, over = tmp_path / "meeting.json", threading.Event()
    failed: list[BaseException] = []

    def gather() -> None:
        def tick() -> None:
            if over.is_set():
                raise KeyboardInterrupt

        try:
            with nodes.gathered(file, hardware.this_node(), 2, tick):
                over.wait(60)
        except BaseException as error:  # noqa: BLE001 - it belongs to the test
            failed.append(error)

    thread = threading.Thread(target=gather)
    thread.start()
    until(file.exists, 20)
    assert file.stat().st_mode & 0o777 == 0o600
    yield {**json.loads(file.read_text()), "file": file}
    over.set()
    thread.join(30)
    assert [type(each) for each in failed] in ([], [KeyboardInterrupt])


@pytest.mark.parametrize("strange", [b"GET / HTTP/1.1\r\n\r\n", b"", b"[]\n", b"{}\n", b"x" * 9000, b"\xff\n", None])
def test_a_stranger_at_the_port_is_not_a_node(head: dict[str, object], strange: bytes | None) -> None:
    port = int(str(head["port"]))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        greeting = json.loads(sock.makefile("rb").readline())
        wrong = {"number": 1, "proof": connection._proof("guessed", f"agent 1 {greeting['nonce']}"), "nonce": "n"}
        sock.sendall(json.dumps(wrong).encode() + b"\n" if strange is None else strange)
        with suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert Path(str(head["file"])).exists()  # it still waits for the right one
    right = Connection(connection.connect("127.0.0.1", port, str(head["secret"]), 1))
    right.send({"node": {"host": "h", "gpus": [], "ports": [], "address": ""}})
    until(lambda: not Path(str(head["file"])).exists(), 20)
    right.close()


def test_an_impostor_of_the_head_is_not_followed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def pretend() -> None:
            sock, _ = server.accept()
            sock.sendall(b'{"nonce": "n"}\n')
            sock.makefile("rb").readline()
            sock.sendall(b'{"proof": "0"}\n')

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(ValueError, match="it does not know the secret"):
            connection.connect("127.0.0.1", server.getsockname()[1], "s" * 64, 1)
        thread.join()


def test_what_was_sent_before_the_end_is_received_before_it_is_said(tmp_path: Path) -> None:
    one, other = (Connection(each) for each in _pair())
    for number in range(3):
        one.send({"number": number})
    one.close()
    assert [(other.receive(10) or {})["number"] for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(Lost, match="the other side has ended"):
            other.receive(10)


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]
