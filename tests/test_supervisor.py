"""The supervisor, with real processes that misbehave: it sees each death, and nothing of a run outlives it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from r1zero.plan import Process
from r1zero.supervisor import Interrupted, ProcessFailed, Supervisor, visible_gpus

SLEEP = "import time; time.sleep(600)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
# Starts {what} with {options}, writes its pid to {file}, and then does {then}.
SPAWN = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {what!r}], {options})
pathlib.Path({file!r} + ".new").write_text(str(child.pid))
os.rename({file!r} + ".new", {file!r})
{then}
"""


def python(name: str, code: str, gpus: tuple[int, ...] = (), env: tuple[tuple[str, str], ...] = ()) -> Process:
    return Process(name, (sys.executable, "-c", code), env=env, gpus=gpus, log=f"logs/{name}.log")


def spawning(file: Path, what: str = SLEEP, options: str = "", then: str = "time.sleep(600)") -> str:
    return SPAWN.format(what=what, options=options, file=str(file), then=then)


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until `condition` held; fails when it does not within `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began


def lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def pid_in(file: Path) -> int:
    until(file.exists, 20)
    return int(file.read_text())


others: set[int] = set()  # children of this process that are none of the test's, such as a policy server


@pytest.fixture(autouse=True)
def alone() -> None:
    others.clear()
    others.update(child.pid for child in psutil.Process().children())


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.pid not in others and lives(child.pid)]


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    with Supervisor(tmp_path, stop_grace_s=3) as entered:
        yield entered
    assert not children(), "the warden, or a process, is still there"


def test_a_process_runs_to_its_end_with_its_env_and_log(supervisor: Supervisor, tmp_path: Path) -> None:
    ticks = []
    code = "import os, sys, time; print(os.environ['GREETING']); print('e', file=sys.stderr); time.sleep(0.5)"
    supervisor.run(python("model", code, env=(("GREETING", "hello"),)), 20, on_tick=lambda: ticks.append(1))
    assert sorted((tmp_path / "logs/model.log").read_text().split()) == ["e", "hello"]
    assert ticks


def test_wait_returns_when_the_trainer_is_done_and_the_server_is_then_stopped(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        supervisor.start(python("server", SLEEP))
        supervisor.start(python("trainer", "pass"))
        supervisor.wait("trainer", on_tick=lambda: None)
        assert len(children()) == 2  # server and warden
        assert supervisor.stop() == ()
        assert not children()
        assert supervisor.stop() == ()
    assert not (tmp_path / "logs/warden.log").exists()


def test_a_failure_shows_the_last_lines_of_this_start_only(supervisor: Supervisor, tmp_path: Path) -> None:
    (tmp_path / "logs/trainer.log").write_text("from an earlier start\n")
    code = "import sys\nfor i in range(5): print('step', i)\nprint('10%\\r20%'); sys.exit(3)"
    with pytest.raises(ProcessFailed) as failed:
        supervisor.run(python("trainer", code), 20)
    assert (failed.value.name, failed.value.reason) == ("trainer", "exited with code 3")
    assert failed.value.last_lines == ("step 0", "step 1", "step 2", "step 3", "step 4", "20%")
    assert str(failed.value) == f"trainer: exited with code 3, its log: {tmp_path}/logs/trainer.log"
    assert failed.value.log_end.startswith(f"the last 6 lines of {tmp_path}/logs/trainer.log:\n  step 0\n")
    assert failed.value.log_end.endswith("  step 4\n  20%")


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("Traceback (most recent call last):\n  File x\n    raise\nValueError: nan\nbye", "ValueError: nan"),
        ("(EngineCore pid=7) Traceback (most recent call last):\n(EngineCore pid=7)   File x\n"
         "(EngineCore pid=7) OSError: [Errno 98] Address already in use\nshutting down",
         "OSError: [Errno 98] Address already in use"),
        ("Traceback (most recent call last):\nOSError: disk full\nTraceback (most recent call last):\n  File y\n"
         "RuntimeError: Engine core initialization failed. See root cause above.", "OSError: disk full"),
        ("Traceback (most recent call last):\n  File y\n"
         "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
         "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"),
        ("torch.OutOfMemoryError: CUDA out of memory.\nengine dead", "torch.OutOfMemoryError: CUDA out of memory."),
        ("error: recipe.yaml: 1 fault, nothing was started", "recipe.yaml: 1 fault, nothing was started"),
        ("step 1\nstep 2", ""),
    ],
)  # fmt: skip
def test_the_error_that_a_log_ends_with_is_part_of_the_cause(supervisor: Supervisor, log: str, error: str) -> None:
    with pytest.raises(ProcessFailed) as failed:
        supervisor.run(python("trainer", f"import sys; print({log!r}); sys.exit(1)"), 20)
    assert failed.value.error == error
    assert failed.value.cause == "trainer: exited with code 1" + (f": {error}" if error else "")
    assert "\n" not in str(failed.value)


def test_of_a_long_log_thirty_lines_are_shown(supervisor: Supervisor) -> None:
    with pytest.raises(ProcessFailed) as failed:
        supervisor.run(python("trainer", "for i in range(20000): print('line', i)\nraise SystemExit(1)"), 20)
    assert failed.value.last_lines == tuple(f"line {i}" for i in range(19970, 20000))


def test_kill_9_of_a_process_is_noticed_within_two_seconds(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(python("server", SLEEP))
    code = f"import os, pathlib; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n{SLEEP}"
    supervisor.start(python("trainer", code))
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 20)
    supervisor.check()
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ProcessFailed, match="trainer: killed by SIGKILL"):
        supervisor.wait("trainer", on_tick=lambda: None)
    assert time.monotonic() - began < 2


def test_a_server_that_ends_well_has_failed_all_the_same(supervisor: Supervisor) -> None:
    supervisor.start(python("server", "pass"))
    supervisor.start(python("trainer", SLEEP))
    with pytest.raises(ProcessFailed, match="server: exited with code 0, and it should have stayed up"):
        supervisor.wait("trainer", on_tick=lambda: None)


def test_of_two_deaths_both_are_named_and_the_server_is_the_cause(supervisor: Supervisor) -> None:
    supervisor.start(python("trainer", "raise SystemExit(1)"))
    supervisor.start(python("server", "raise SystemExit(7)"))
    until(lambda: len(supervisor.exit_codes()) == 2, 30)
    with pytest.raises(ProcessFailed) as failed:
        supervisor.check()
    assert str(failed.value).startswith("server: exited with code 7, then trainer: exited with code 1, its log: ")


def test_a_death_that_follows_within_a_second_is_named_second(supervisor: Supervisor) -> None:
    supervisor.start(python("server", "import time; time.sleep(0.7); raise SystemExit(7)"))
    supervisor.start(python("trainer", "raise SystemExit(1)"))
    with pytest.raises(ProcessFailed) as failed:
        supervisor.wait("trainer", on_tick=lambda: None, poll_s=0.05)
    assert (failed.value.name, failed.value.others) == ("trainer", ("server: exited with code 7",))


def test_past_the_deadline_the_process_is_ended(supervisor: Supervisor, tmp_path: Path) -> None:
    code = spawning(tmp_path / "pid", options="start_new_session=True")
    with pytest.raises(ProcessFailed, match="model: not finished after 1 s"):
        supervisor.run(python("model", code), 1)
    assert not lives(pid_in(tmp_path / "pid"))


def test_a_command_that_cannot_be_started(supervisor: Supervisor) -> None:
    with pytest.raises(ProcessFailed, match="trainer: could not be started: No such file or directory: /no/such/tool"):
        supervisor.start(Process("trainer", ("/no/such/tool", "launch"), log="logs/trainer.log"))


@pytest.mark.parametrize(
    ("what", "options", "then"),
    [
        pytest.param(SLEEP, "start_new_session=True", "time.sleep(600)", id="in a new session"),
        pytest.param(SLEEP, "start_new_session=True, env={}", "time.sleep(600)", id="new session, wiped environ"),
        pytest.param(SLEEP, "start_new_session=True", "", id="new session, parent dead: known by environ"),
        pytest.param(SLEEP, "env={}", "", id="wiped environ, parent dead: known by session"),
        pytest.param(IGNORE_SIGTERM + SLEEP, "", "time.sleep(600)", id="ignores SIGTERM"),
    ],
)
def test_no_grandchild_outlives_the_stop(tmp_path: Path, what: str, options: str, then: str) -> None:
    with Supervisor(tmp_path, stop_grace_s=1.5) as supervisor:
        supervisor.start(python("trainer", spawning(tmp_path / "pid", what, options, then)))
        pid = pid_in(tmp_path / "pid")
        time.sleep(0.5)  # so that the one that ignores SIGTERM has come that far, and a parent has died
        assert lives(pid)
        began = time.monotonic()
    assert not lives(pid)
    assert time.monotonic() - began < 10


def test_a_grandchild_known_to_nothing_but_the_wardens_memory_is_ended(tmp_path: Path) -> None:
    """New session, wiped environ, and its parent died long before the stop: a colocated vLLM engine, say."""
    with Supervisor(tmp_path) as supervisor:
        then = f"while not os.path.exists({str(tmp_path / 'die')!r}): time.sleep(0.05)"
        supervisor.start(python("trainer", spawning(tmp_path / "pid", SLEEP, "start_new_session=True, env={}", then)))
        pid = pid_in(tmp_path / "pid")
        time.sleep(3)  # the warden looks every 2 s
        (tmp_path / "die").touch()
        supervisor.wait("trainer", on_tick=lambda: None)
        assert lives(pid)
    assert not lives(pid)
    assert str(pid) in (tmp_path / "logs/warden.log").read_text()


def test_an_end_takes_all_of_some_and_leaves_the_others(supervisor: Supervisor, tmp_path: Path) -> None:
    """What is ended had started one in a session of its own whose parent is dead, and one that nothing tells apart."""
    supervisor.start(python("server-1", SLEEP))
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"
    supervisor.start(python("server-10", spawning(tmp_path / "kept", options="start_new_session=True")))
    supervisor.start(python("trainer", f"{orphan}\n{spawning(tmp_path / 'gone', options='env={}')}"))
    kept, gone = pid_in(tmp_path / "kept"), pid_in(tmp_path / "gone")
    before = {each.pid for each in psutil.process_iter() if lives(each.pid) and _of(each, supervisor)}
    supervisor.end(["server-1", "never-started", "trainer"])
    assert lives(kept) and not lives(gone)
    left = {each.pid for each in psutil.process_iter() if lives(each.pid) and _of(each, supervisor)}
    assert len(before) == 5 and len(left) == 2 and kept in left
    supervisor.check()
    supervisor.start(python("trainer", "pass"))
    supervisor.wait("trainer", on_tick=lambda: None)


def _of(process: psutil.Process, supervisor: Supervisor) -> bool:
    with suppress(psutil.Error):
        return process.environ().get("R1ZERO_RUN_ID", "").startswith(supervisor._run_id)
    return False


def test_a_stopped_process_does_not_take_the_grace(supervisor: Supervisor, tmp_path: Path) -> None:
    supervisor.start(python("server", f"open({str(tmp_path / 'up')!r}, 'w')\n{SLEEP}"))
    until((tmp_path / "up").exists, 20)
    supervisor._started["server"].popen.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    supervisor.end(["server"])
    assert time.monotonic() - began < 2.5  # of 3


def test_more_env_is_for_that_process_alone(supervisor: Supervisor, tmp_path: Path) -> None:
    show = "import os; print(os.environ.get('SECRET'))"
    supervisor.run(python("trainer", show), 20, more_env={"SECRET": "s"})
    supervisor.run(python("model", show), 20)
    assert (tmp_path / "logs/trainer.log").read_text() == "s\n"
    assert (tmp_path / "logs/model.log").read_text() == "None\n"


def test_a_temporary_folder_is_ours_alone_in_the_first_place_that_takes_it_and_goes_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with Supervisor(tmp_path) as supervisor:
        folder = supervisor.temporary_folder((tmp_path / "absent", tmp_path / "place"))
        (folder / "weights").write_text("w")
        assert folder.parent == tmp_path / "place"
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(FileNotFoundError):
            supervisor.temporary_folder((tmp_path / "absent",))
    assert not folder.exists()


def test_a_temporary_folder_goes_also_where_somebody_killed_the_warden(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        folder = supervisor.temporary_folder((tmp_path,))
        (warden,) = children()
        warden.kill()
    assert not folder.exists()


def test_shared_memory_of_the_killed_does_not_stay(tmp_path: Path) -> None:
    code = f"""
import pathlib, signal, time
from multiprocessing import resource_tracker, shared_memory
signal.signal(signal.SIGTERM, signal.SIG_IGN)
made = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister("/" + made.name, "shared_memory")
pathlib.Path({str(tmp_path / "new")!r}).write_text(made.name)
pathlib.Path({str(tmp_path / "new")!r}).rename({str(tmp_path / "name")!r})
time.sleep(600)
"""
    with Supervisor(tmp_path, stop_grace_s=0.5) as supervisor:
        supervisor.start(python("server", code))
        until((tmp_path / "name").exists, 20)
        segment = Path("/dev/shm") / (tmp_path / "name").read_text()
        assert segment.exists()
    assert not segment.exists()


def test_the_stop_leaves_other_processes_alone(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", SLEEP])
    try:
        with Supervisor(tmp_path) as supervisor:
            supervisor.start(python("trainer", SLEEP))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_children_inherit_no_descriptor_of_the_launcher(supervisor: Supervisor, tmp_path: Path) -> None:
    code = "import os; print([os.readlink(f'/proc/self/fd/{i}') for i in (0, 1, 2)]); os.fstat(3)"
    with pytest.raises(ProcessFailed) as failed:
        supervisor.run(python("model", code), 20)
    assert failed.value.last_lines[-1] == "OSError: [Errno 9] Bad file descriptor"
    assert "/dev/null" in failed.value.last_lines[0]


LAUNCHER = """
import pathlib, sys, time
from r1zero.plan import Process
from r1zero.supervisor import Supervisor
with Supervisor(pathlib.Path(sys.argv[1])) as supervisor:
    for name in ("server", "trainer"):
        supervisor.start(Process(name, (sys.executable, "-c", (pathlib.Path(sys.argv[1]) / f"{name}.py").read_text())))
    supervisor.wait("trainer", on_tick=lambda: None)
"""


def test_after_kill_9_of_the_launcher_all_is_gone_within_ten_seconds(tmp_path: Path) -> None:
    wiped = spawning(tmp_path / "wiped", IGNORE_SIGTERM + SLEEP, "start_new_session=True, env={}")
    (tmp_path / "server.py").write_text(wiped)
    (tmp_path / "trainer.py").write_text(spawning(tmp_path / "worker", SLEEP, "start_new_session=True"))
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)])
    pids = [pid_in(tmp_path / "wiped"), pid_in(tmp_path / "worker")]
    time.sleep(0.5)
    below = [child.pid for child in psutil.Process(launcher.pid).children(recursive=True)]
    assert len(below) == 5  # the warden, the two, and what they started
    assert set(pids) < set(below)
    launcher.kill()
    launcher.wait()
    until(lambda: not any(lives(pid) for pid in below), 10)
    assert "ending what the launcher" in (tmp_path / "logs/warden.log").read_text()


def test_the_warden_is_not_ended_by_the_signals_that_end_a_launcher(supervisor: Supervisor) -> None:
    (warden,) = children()
    until(lambda: bool(int(_status(warden.pid, "SigIgn"), 16) & 1 << signal.SIGTERM - 1), 20)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        warden.send_signal(each)
    time.sleep(0.3)
    assert lives(warden.pid)


def _status(pid: int, field: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(field))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_interrupts_the_wait_and_stops_all(tmp_path: Path, signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as interrupted, Supervisor(tmp_path) as supervisor:
        supervisor.start(python("trainer", spawning(tmp_path / "pid", options="start_new_session=True")))
        pid = pid_in(tmp_path / "pid")
        assert signal.getsignal(signum) != before
        threading.Timer(0.3, os.kill, (os.getpid(), signum)).start()
        supervisor.wait("trainer", on_tick=lambda: None)
    assert (interrupted.value.signum, interrupted.value.name) == (signum, signum.name)
    assert not lives(pid)
    assert not children()
    assert signal.getsignal(signum) == before


def test_a_second_signal_kills_at_once(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), Supervisor(tmp_path, stop_grace_s=60) as supervisor:
        supervisor.start(python("trainer", IGNORE_SIGTERM + "print('up', flush=True)\n" + SLEEP))
        until(lambda: (tmp_path / "logs/trainer.log").read_text() == "up\n", 20)
        began = time.monotonic()
        for delay in (0.3, 1.5):
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        supervisor.wait("trainer", on_tick=lambda: None)
    assert 1.4 < time.monotonic() - began < 15


def test_a_signal_that_someone_swallowed_is_raised_again(supervisor: Supervisor) -> None:
    with suppress(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    with pytest.raises(Interrupted):
        supervisor.check()


def test_gpus_are_counted_within_what_the_launcher_was_given(
    supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    show = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    supervisor.run(python("trainer", show, gpus=(0, 2)), 20)
    supervisor.run(python("model", show), 20)
    assert (tmp_path / "logs/trainer.log").read_text() == "'4,7'\n"
    assert (tmp_path / "logs/model.log").read_text() == "''\n"
    with pytest.raises(ProcessFailed, match="it needs GPU 3 of those in CUDA_VISIBLE_DEVICES=4,6,7, which has 3"):
        supervisor.start(python("server", show, gpus=(3,)))


@pytest.mark.parametrize(
    ("gpus", "own", "visible"),
    [((0, 1), None, "0,1"), ((), None, ""), ((1,), "2, 3", "3"), ((0,), "GPU-4f,GPU-a1", "GPU-4f"), ((), "", "")],
)
def test_visible_gpus(gpus: tuple[int, ...], own: str | None, visible: str) -> None:
    assert visible_gpus(gpus, own) == visible


def test_the_modules_are_light() -> None:
    heavy = "{'torch', 'rich', 'requests', 'transformers', 'numpy', 'yaml', 'r1zero.plan'}"
    code = f"import sys, r1zero.supervisor, r1zero.policy_server; sys.exit(str({heavy} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""
