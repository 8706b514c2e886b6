"""What hostile answers may cost: seconds, memory, and nothing that stays behind."""

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from r1zero.tasks.verifier import Graded, Verdict, Verifier
from tests.tasks.hostile_inputs import HOSTILE, Hostile

WALL_S = 3.0
BATCH_WALL_S = 30.0
MOST_BYTES = 1 << 30
_numbers = itertools.count(100)  # of each hostile answer its own; the verifier remembers what it has decided


@dataclass
class Watch:
    """Watches this process and all below it while a test runs: memory, sockets, and a listener that nobody calls."""

    port: int = 0
    most_bytes: int = 0  # resident, of any one process below this one
    growth_bytes: int = 0  # of this process
    sockets: set[str] = field(default_factory=set)
    calls: int = 0
    before: frozenset[int] = frozenset()  # what other tests left to live on, such as a policy server

    def run(self, stop: threading.Event, listener: socket.socket) -> None:
        me = psutil.Process()
        start = me.memory_info().rss
        while not stop.wait(0.03):
            self.growth_bytes = max(self.growth_bytes, me.memory_info().rss - start)
            for process in me.children(recursive=True):
                if process.pid in self.before:
                    continue
                try:
                    self.most_bytes = max(self.most_bytes, process.memory_info().rss)
                    self.sockets |= {str(one) for one in process.net_connections("inet")}
                except psutil.Error:
                    continue  # it has ended since
            try:
                listener.accept()[0].close()
                self.calls += 1
            except BlockingIOError:
                pass


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Empty current, home and temporary folders, everything watched; afterwards nothing may have stayed behind."""
    folders = [tmp_path / name for name in ("current", "home", "temporary")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("HOME", str(folders[1]))
    monkeypatch.setenv("TMPDIR", str(folders[2]))
    before = frozenset(process.pid for process in psutil.Process().children(recursive=True))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        watch = Watch(port=listener.getsockname()[1], before=before)
        stop = threading.Event()
        thread = threading.Thread(target=watch.run, args=(stop, listener))
        thread.start()
        yield watch
        stop.set()
        thread.join()
    assert watch.calls == 0
    assert watch.sockets == set()
    assert watch.most_bytes <= MOST_BYTES
    assert watch.growth_bytes <= MOST_BYTES
    left = [file for folder in folders for file in folder.rglob("*")]
    assert left == []
    deadline = time.monotonic() + 30  # on a busy machine the end of a process takes a while to be seen
    while stay := [p for p in psutil.Process().children(recursive=True) if p.pid not in before]:
        assert time.monotonic() < deadline, stay
        time.sleep(0.05)


@pytest.fixture
def verifier(watch: Watch) -> Iterator[Verifier]:
    """A verifier whose processes run already: a start is no part of a verdict."""
    with Verifier() as verifier:
        assert verifier.grade([r"\boxed{(x+2)^2}"], ["x^2+4x+4"])[0].verdict is Verdict.CORRECT
        yield verifier


def decide(verifier: Verifier, watch: Watch, hostile: Hostile) -> tuple[Graded, float]:
    """The verdict on a new hostile answer of this kind, and the seconds until it was there.

    Where it came late it is asked for twice more and the quickest counts: other work on the machine delays one of them,
    what is slow by itself is slow each time.
    """
    seconds = []
    while not seconds or (min(seconds) > WALL_S and len(seconds) < 3):
        completion = hostile.completion(next(_numbers), watch.port)
        began = time.monotonic()
        graded = verifier.grade([completion], [hostile.gold])[0]
        seconds.append(time.monotonic() - began)
    return graded, min(seconds)


def in_this_thread(call: Callable[[], None]) -> None:
    call()


def in_another_thread(call: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as threads:
        threads.submit(call).result()


@pytest.mark.alone
@pytest.mark.parametrize("where", [in_this_thread, in_another_thread])
def test_each_is_decided_in_time_and_leaves_nothing(
    where: Callable[[Callable[[], None]], None], verifier: Verifier, watch: Watch
) -> None:
    found: dict[str, tuple[Graded, float]] = {}

    def decide_all() -> None:
        for name, hostile in HOSTILE.items():
            found[name] = decide(verifier, watch, hostile)

    where(decide_all)
    assert len(found) >= 40
    assert {name: seconds for name, (_, seconds) in found.items() if seconds > WALL_S} == {}
    assert [name for name, (graded, _) in found.items() if graded.verdict is Verdict.CORRECT] == []
    # The parent lives, and so does a pool that has just lost workers.
    assert verifier.grade([r"\boxed{(x+3)^2}"], ["x^2+6x+9"])[0].verdict is Verdict.CORRECT
    verifier.close()


@pytest.mark.alone
@pytest.mark.parametrize(
    "kind",
    [
        "all of them",
        "vulgar fractions",
        "superscripts",
        # All 128 run to their limit of CPU time: half a minute is enough on two cores that nothing else uses.
        pytest.param("nested logarithms", marks=pytest.mark.soak),
        pytest.param("63 boxes that overrun, and the gold", marks=pytest.mark.soak),
    ],
)
def test_a_batch_of_128(kind: str, verifier: Verifier, watch: Watch) -> None:
    kinds = list(HOSTILE.values()) if kind == "all of them" else [HOSTILE[kind]]
    batch = [hostile for _, hostile in zip(range(128), itertools.cycle(kinds), strict=False)]
    completions = [hostile.completion(next(_numbers), watch.port) for hostile in batch]
    began = time.monotonic()
    graded = verifier.grade(completions, [hostile.gold for hostile in batch])
    seconds = time.monotonic() - began
    assert len(graded) == 128
    assert Verdict.CORRECT not in {one.verdict for one in graded}
    assert seconds <= BATCH_WALL_S
    verifier.close()


def test_an_honest_answer_beside_127_hostile_ones_keeps_its_verdict(verifier: Verifier, watch: Watch) -> None:
    hostile = [one for _, one in zip(range(127), itertools.cycle(HOSTILE.values()), strict=False)]
    completions = [one.completion(next(_numbers), watch.port) for one in hostile]
    golds = [one.gold for one in hostile]
    completions.insert(64, r"\boxed{(x+5)^2}")
    golds.insert(64, "x^2+10x+25")
    assert verifier.grade(completions, golds)[64].verdict is Verdict.CORRECT
    verifier.close()


@pytest.mark.parametrize("count", [60, pytest.param(1_000, marks=[pytest.mark.soak, pytest.mark.timeout(3_600)])])
def test_many_in_a_row_leave_no_zombie(count: int, verifier: Verifier, watch: Watch) -> None:
    # Those that overrun come first: each costs a worker, which has to be reaped and replaced.
    overrunning = ["nested logarithms", "nested sines within a limit", "tangents", "equation of powers"]
    kinds = itertools.cycle([*(HOSTILE[name] for name in overrunning), *HOSTILE.values()])
    most = 0
    verdicts = set()
    for _, hostile in zip(range(count), kinds, strict=False):
        verdicts.add(decide(verifier, watch, hostile)[0].verdict)
        below = psutil.Process().children(recursive=True)
        most = max(most, len(below))
        assert [process for process in below if process.status() == psutil.STATUS_ZOMBIE] == []
    assert Verdict.TIMED_OUT in verdicts
    assert most <= 12  # a manager, at most four workers, and those that are just being replaced
    verifier.close()


@pytest.mark.alone
@pytest.mark.parametrize("answer_match", ["math", "exact"])
@pytest.mark.parametrize("answer_format", ["boxed", "tagged"])
def test_every_way_of_grading_lives_through_them(answer_format: str, answer_match: str, watch: Watch) -> None:
    kinds = [hostile for hostile in HOSTILE.values() if hostile.whole or len(hostile.text) > 10_000]
    with Verifier(answer_format=answer_format, answer_match=answer_match) as verifier:
        for hostile in kinds:
            text = hostile.completion(next(_numbers), watch.port)
            for completion in (text, f"<answer>{text}</answer>", f"<answer>{hostile.text}"):
                began = time.monotonic()
                graded = verifier.grade([completion], [hostile.gold])[0]
                assert graded.verdict is not Verdict.CORRECT
                assert time.monotonic() - began <= WALL_S, completion[:100]


@pytest.mark.alone
def test_as_golds_they_are_checked_in_time(watch: Watch) -> None:
    golds = [hostile.text.replace("§", str(next(_numbers))) for hostile in HOSTILE.values()]
    with Verifier() as verifier:
        began = time.monotonic()
        reasons = verifier.check_golds(["42", *golds])
        seconds = time.monotonic() - began
    assert reasons[0] is None
    assert all(reason is None or reason for reason in reasons)
    assert seconds <= WALL_S * len(golds)
