"""The worker pool, with calls that hang, eat and crash: each costs itself alone, and nothing outlives the pool."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from r1zero.tasks.worker_pool import Outcome, WorkerPool, WorkerPoolError
from tests.conftest import PROJECT

CALL = "tests.stand_ins.pool_functions:call"
MIB = 1 << 20
CPU_S, WALL_S = 1.0, 5.0

# A trainer with a pool, as a process of its own. It says when it is ready to be done something to.
PARENT = """
import os, signal, sys, time
from r1zero.tasks.worker_pool import WorkerPool
pool = WorkerPool({call!r}, workers=2, cpu_seconds={cpu_seconds}, wall_seconds=60)
{before}
pool.map([["echo", 1]])
print("ready", flush=True)
{then}
"""


def make_pool(**settings: Any) -> WorkerPool:
    given = {"workers": 2, "cpu_seconds": CPU_S, "wall_seconds": WALL_S, "memory_bytes": 256 * MIB}
    return WorkerPool(CALL, **(given | settings))


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    with make_pool() as pool:
        yield pool


@pytest.fixture
def parent() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process with a pool, and returns when it has printed "ready"."""
    started = []

    def start(then: str, before: str = "", cpu_seconds: float = 60) -> subprocess.Popen[str]:
        code = PARENT.format(call=CALL, before=before, then=then, cpu_seconds=cpu_seconds)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def values(outcomes: list[Outcome]) -> list[Any]:
    assert {outcome.ended for outcome in outcomes} == {"returned"}, outcomes
    return [outcome.value for outcome in outcomes]


def descendants(pid: int | None = None) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def manager_of(pool: WorkerPool) -> psutil.Process:
    [outcome] = pool.map([["process_ids"]])
    return psutil.Process(outcome.value[0])


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def all_end(processes: list[psutil.Process], seconds: float) -> None:
    assert processes
    wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in processes), seconds)


# The ends that a call can come to.


@pytest.mark.parametrize(
    ("call", "ended", "value"),
    [
        (["echo", {"a": [1, 2.5, None, True]}], "returned", {"a": [1, 2.5, None, True]}),
        (["echo", "é \ud800 \U0001f600 \n\0"], "returned", "é \ud800 \U0001f600 \n\0"),
        (["chatter"], "returned", "done"),
        (["late_import"], "returned", 0.5),
        (["can_do"], "returned", ["3/4", 1024, True, "can_do"]),
        (["endless_loop"], "time", "over cpu_seconds = 1"),
        (["endless_power"], "time", "over cpu_seconds = 1"),
        (["endless_match"], "time", "over cpu_seconds = 1"),
        (["endless_sleep"], "time", "over wall_seconds = 5"),
        (["endless_and_deaf"], "time", "over wall_seconds = 5"),
        (["eat_memory"], "memory", "over memory_bytes"),
        (["crash"], "died", "killed by SIGSEGV"),
        (["leave", 0], "died", "ended with exit code 0"),
        (["leave", 3], "died", "ended with exit code 3"),
        (["recurse"], "raised", "RecursionError: maximum recursion depth exceeded"),
        (["ask_to_leave"], "raised", "SystemExit: the end"),
        (["interrupt"], "raised", "KeyboardInterrupt: "),
        (["complain", "no " * 1000], "raised", ("ValueError: " + "no " * 1000)[:1000]),
        (["complain_in_silence"], "raised", "Unprintable"),
        (["not_json"], "raised", "TypeError: Object of type object is not JSON serializable"),
        (["deep_list"], "raised", "RecursionError: maximum recursion depth exceeded while encoding a JSON object"),
        (["long_text", 3 * MIB], "raised", "ValueError: the value is 18874370 bytes of JSON; 16777216 is the most"),
        (["no_such_function"], "raised", "KeyError: 'no_such_function'"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_a_call_ends(shared: WorkerPool, call: list[Any], ended: str, value: Any) -> None:
    [outcome] = shared.map([call])
    assert outcome.ended == ended, outcome
    if ended == "raised":
        assert outcome.value.startswith(value)
    else:
        assert outcome.value == value
    assert outcome.seconds <= WALL_S + 1.0
    if ended == "time":
        assert outcome.seconds >= (CPU_S if "cpu" in value else WALL_S)


def test_what_happens_to_one_call_happens_to_no_other(shared: WorkerPool) -> None:
    bad = ["endless_loop", "eat_memory", "crash", "recurse", "chatter", "ask_to_leave", "endless_power"]
    calls = [[bad[number // 10]] if number % 10 == 5 else ["echo", number] for number in range(10 * len(bad))]
    outcomes = shared.map(calls)
    ends = [outcome.ended for outcome in outcomes[5::10]]
    assert ends == ["time", "memory", "died", "raised", "returned", "raised", "time"]
    del calls[5::10], outcomes[5::10]
    assert values(outcomes) == [number for _, number in calls]


def test_values_as_large_as_many_buffers_pass_in_both_directions(shared: WorkerPool) -> None:
    texts = [str(number) * MIB for number in range(8)]
    assert values(shared.map([["echo", text] for text in texts])) == texts


def test_a_call_from_any_of_four_threads_at_once_gets_its_own_outcome(shared: WorkerPool) -> None:
    def ask(thread: int) -> None:
        for turn in range(5):
            asked = [[thread, turn, number] for number in range(50)]
            outcomes = shared.map([["echo", each] for each in asked] + [["crash"]])
            assert outcomes.pop().ended == "died"
            assert values(outcomes) == asked

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(4)))


def test_memory_that_an_earlier_call_left_behind_is_not_charged_to_the_next() -> None:
    with make_pool(workers=1) as pool:
        outcomes = pool.map([["keep_memory", 60 * MIB], ["use_memory", 170 * MIB], ["keep_memory", 300 * MIB]])
    assert [outcome.ended for outcome in outcomes] == ["returned", "returned", "memory"]


def test_a_worker_that_has_grown_large_is_replaced_before_it_runs_short() -> None:
    with make_pool(workers=1) as pool:
        grown = pool.map([["keep_memory", 150 * MIB]])[0].value
        assert [pool.map([["process_ids"]])[0].value[1] != grown for _ in range(3)] == [True] * 3


def test_the_order_of_sets_is_the_same_in_every_pool(shared: WorkerPool) -> None:
    with make_pool() as other:
        assert other.map([["hash_of", "x"]])[0].value == shared.map([["hash_of", "x"]])[0].value


def test_a_worker_makes_no_file_process_socket_or_thread(shared: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    processes, in_shared_memory = set(psutil.pids()), set(Path("/dev/shm").iterdir())
    [outcome] = shared.map([["attempts", str(tmp_path)]])
    assert outcome.ended == "returned", outcome
    assert len(outcome.value) > 30
    assert set(outcome.value.values()) <= {"PermissionError", "ImportError"}, outcome.value
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert set(Path("/dev/shm").iterdir()) <= in_shared_memory
    assert processes >= {child.pid for child in descendants()}


def test_calls_can_have_a_limit_of_their_own(shared: WorkerPool) -> None:
    assert shared.map([["endless_loop"]], 0.1)[0].value == "over cpu_seconds = 0.1"
    assert shared.map([["endless_loop"]])[0].value == "over cpu_seconds = 1"


# What the pool leaves behind, and what it survives.


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.soak)])
def test_calls_that_overrun_leave_no_process_behind(count: int) -> None:
    with make_pool(cpu_seconds=0.05) as pool:
        manager = manager_of(pool)
        for name in ("endless_loop", "crash"):
            outcomes = pool.map([[name]] * count)
            assert {outcome.ended for outcome in outcomes} == {"time" if name == "endless_loop" else "died"}
            workers = manager.children(recursive=True)
            assert len(workers) == 2
            assert "zombie" not in {worker.status() for worker in workers}
        assert manager.num_fds() < 20
    assert not manager.is_running()
    assert not any(worker.is_running() for worker in workers)


def test_workers_that_are_begun_are_there_at_the_first_call() -> None:
    before = set(descendants())
    with make_pool() as pool:
        pool.begin()
        pool.begin()
        wait_until(lambda: len(set(descendants()) - before) == 3, 60)  # a manager and its two workers
        begun = set(descendants()) - before
        assert values(pool.map([["echo", 7]])) == [7] and manager_of(pool) in begun


def test_what_is_wrong_with_workers_that_are_begun_the_first_call_says() -> None:
    with WorkerPool("json:no_such", cpu_seconds=1, wall_seconds=1) as pool:
        pool.begin()
        with pytest.raises(WorkerPoolError, match="no worker for json:no_such"):
            pool.map([[1]])


def test_closing_ends_every_process_and_further_calls_are_refused() -> None:
    before = descendants()
    pool = make_pool()
    assert pool.map([]) == []
    assert descendants() == before, "nothing is started for nothing"
    pool.map([["echo", 1]])
    assert len(descendants()) == len(before) + 3
    pool.close()
    pool.close()
    assert descendants() == before
    with pytest.raises(RuntimeError, match="the worker pool is closed"):
        pool.map([["echo", 1]])


def test_a_pool_that_is_dropped_ends_its_processes() -> None:
    before = descendants()
    pool = make_pool()
    pool.map([["echo", 1]])
    del pool
    gc.collect()
    assert descendants() == before


def test_a_process_that_forgets_to_close_ends_at_once_and_silently(
    parent: Callable[..., subprocess.Popen[str]],
) -> None:
    process = parent("time.sleep(0.5)")
    left = descendants(process.pid)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "", "")
    all_end(left, 1.0)


MID_CALL = 'pool.map([["endless_loop"], ["endless_sleep"]])'


# A fork that C code makes closes nothing. Here it has copies of the sockets, of which the pool knows nothing.
HELD = """
for number in os.listdir("/proc/self/fd"):
    if os.path.exists(f"/proc/self/fd/{number}"):
        os.dup(int(number))
os.fork() or time.sleep(600)
"""


@pytest.mark.parametrize("fork", ["", HELD], ids=["alone", "while a fork holds the sockets"])
def test_a_killed_parent_leaves_nothing_behind_in_the_middle_of_a_call(
    parent: Callable[..., subprocess.Popen[str]], fork: str
) -> None:
    process = parent(f"{fork}\n{MID_CALL}")
    time.sleep(0.3)
    left = [each for each in descendants(process.pid) if "worker_manager" in " ".join(each.cmdline())]
    assert len(left) == 3
    process.kill()
    all_end(left, 2.0)


def test_ctrl_c_in_the_middle_of_a_call_is_the_parents_alone(parent: Callable[..., subprocess.Popen[str]]) -> None:
    process = parent(f"try:\n    {MID_CALL}\nexcept KeyboardInterrupt:\n    print(pool.map([['echo', 2]])[0].value)")
    time.sleep(0.3)
    left = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=10) == ("2\n", "")
    all_end(left, 1.0)


def test_ctrl_c_that_the_parent_takes_lightly_disturbs_no_call(parent: Callable[..., subprocess.Popen[str]]) -> None:
    process = parent(
        'print([outcome.ended for outcome in pool.map([["endless_loop"]] * 2)])\n'
        'print(manager == pool.map([["process_ids"]])[0].value[0])',
        before='manager = pool.map([["process_ids"]])[0].value[0]\nsignal.signal(signal.SIGINT, lambda *_: None)',
        cpu_seconds=0.5,
    )
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=10) == ("['time', 'time']\nTrue\n", "")


def test_signals_that_the_parent_blocks_or_ignores_still_end_a_call(
    parent: Callable[..., subprocess.Popen[str]],
) -> None:
    numbers = "[signal.SIGPROF, signal.SIGALRM, signal.SIGCHLD, signal.SIGTERM]"
    before = (
        f"signal.pthread_sigmask(signal.SIG_BLOCK, {numbers})\nfor n in {numbers}: signal.signal(n, signal.SIG_IGN)"
    )
    process = parent('print(pool.map([["endless_loop"], ["crash"]]))', before, cpu_seconds=0.2)
    out, err = process.communicate(timeout=20)
    assert "over cpu_seconds" in out, err
    assert "killed by SIGSEGV" in out, err


def test_a_parent_that_takes_sigpipe_as_it_comes_survives_a_dead_manager(
    parent: Callable[..., subprocess.Popen[str]],
) -> None:
    process = parent(
        "os.kill(pool.map([['process_ids']])[0].value[0], signal.SIGKILL)\n"
        "print(pool.map([['echo', 'x' * 10**6]])[0].ended)",
        before="signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
    )
    assert process.communicate(timeout=20) == ("returned\n", "")


def test_a_manager_killed_in_the_middle_is_replaced_and_every_call_has_its_outcome() -> None:
    with make_pool() as pool:
        manager = manager_of(pool)
        workers = manager.children()
        threading.Timer(0.2, manager.kill).start()
        calls = [["endless_loop"] if number % 50 == 49 else ["echo", number] for number in range(100)]
        outcomes = pool.map([["endless_sleep"], *calls])
        assert [outcome.ended for outcome in outcomes[::50]] == ["time"] * 3
        assert [outcome.value for outcome in outcomes[1:50]] == list(range(49))
        assert manager_of(pool) != manager
        all_end(workers, 1.0)


def test_a_manager_that_died_between_two_calls_is_replaced() -> None:
    with make_pool() as pool:
        manager_of(pool).kill()
        assert values(pool.map([["echo", 1]])) == [1]


def test_a_manager_that_dies_again_and_again_is_an_error() -> None:
    with make_pool(cpu_seconds=60, wall_seconds=60) as pool:
        before = descendants()
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.3):
                for process in descendants():
                    if process not in before and process.ppid() == os.getpid():
                        process.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(WorkerPoolError, match="died twice in a row, 0 of 2 calls done: its exit code is -9"):
                pool.map([["endless_sleep"]] * 2)
        finally:
            stop.set()
            killer.join()
        assert values(pool.map([["echo", 1]])) == [1]


def test_the_workers_of_a_killed_manager_end_in_the_middle_of_a_call(
    parent: Callable[..., subprocess.Popen[str]],
) -> None:
    process = parent(MID_CALL.replace("endless_sleep", "endless_match"))
    time.sleep(0.3)
    [manager] = psutil.Process(process.pid).children()
    workers = manager.children()
    manager.kill()
    all_end(workers, 1.0)


def test_a_map_that_a_signal_handler_breaks_off_leaves_the_pool_usable() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("the test's own handler")

    with make_pool() as pool:
        manager = manager_of(pool)
        previous = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(TimeoutError, match="the test's own handler"):
                pool.map([["endless_sleep"]] * 4)
            assert signal.getsignal(signal.SIGALRM) is stop
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert not manager.is_running()
        assert values(pool.map([["echo", number] for number in range(10)])) == list(range(10))


def test_the_parents_own_signal_handlers_and_timers_go_on(shared: WorkerPool) -> None:
    rung = []
    previous = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        outcomes = shared.map([["echo", number] for number in range(500)] + [["endless_loop"]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert outcomes.pop().ended == "time"
    assert values(outcomes) == list(range(500))
    assert len(rung) > 10


def test_a_fork_of_the_parent_uses_the_pool_while_another_thread_holds_it() -> None:
    with make_pool() as pool:
        manager = manager_of(pool)
        other = threading.Thread(target=pool.map, args=([["endless_sleep"]],))
        other.start()
        time.sleep(0.2)
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)  # no fork hangs here for longer
                outcomes = pool.map([["echo", "from the fork"], ["process_ids"]])
                pool.close()
                os.write(writing, repr((outcomes[0].value, outcomes[1].value[0] != manager.pid)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            assert answer.read() == "('from the fork', True)"
        os.waitpid(pid, 0)
        other.join()
        assert manager_of(pool) == manager, "the fork has left the parent's manager alone"


# What is refused.


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"cpu_seconds": 0}, "cpu_seconds is 0; give a number above 0"),
        ({"wall_seconds": -1.0}, r"wall_seconds is -1.0; give a number above 0"),
        ({"memory_bytes": 0}, "memory_bytes is 0; give a number above 0"),
        ({"workers": 0}, "workers is 0; give a number above 0"),
    ],
)
def test_a_limit_that_is_none_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_pool(**settings)


def test_a_function_that_cannot_be_had_is_named() -> None:
    with pytest.raises(ValueError, match=r"function 'json\.loads' is not of the form module:name"):
        WorkerPool("json.loads", cpu_seconds=1, wall_seconds=1)
    for function, why in {
        "no_such_module:call": "ModuleNotFoundError: No module named 'no_such_module'",
        "json:no_such_name": "AttributeError: module 'json' has no attribute 'no_such_name'",
    }.items():
        with (
            WorkerPool(function, cpu_seconds=1, wall_seconds=1) as pool,
            pytest.raises(WorkerPoolError, match=f"(?s)no worker for {function}.*{why}"),
        ):
            pool.map([[1]])


def test_a_memory_limit_that_the_module_alone_uses_up_is_refused() -> None:
    with (
        make_pool(memory_bytes=8 * MIB) as pool,
        pytest.raises(WorkerPoolError, match=r"memory_bytes is 8388608, and \S+ alone takes \d+: give at least \d+"),
    ):
        pool.map([["echo", 1]])


def test_arguments_that_are_not_json_are_refused_before_anything_runs(shared: WorkerPool) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        shared.map([["echo", 1], ["echo", object()]])
    assert values(shared.map([["echo", 2]])) == [2]
