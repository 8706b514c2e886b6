"""launch/run.py as a process of its own, ended in every way and phase: nothing of it stays, and it says why it ended.

"Nothing stays" is looked for honestly: not only the processes seen below the launcher while it ran, but every process
of the machine whose environment, command line or working folder carries this launch's mark.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1zero import checkpoints
from r1zero.restarts import REFUSED
from r1zero.run_folder import RunFolder, read_json
from r1zero.serving import PUBLISH_FOLDER, TOKEN
from tests.conftest import PROJECT

STAND_INS = Path(__file__).with_name("stand_ins")
SLOW_S = 150.0  # until something is up, on a machine that others use as well
STOP_S = 25.0  # from a signal to the end: ten seconds of grace, and looking
GONE_S = 10.0  # how long children may outlive a launcher that could not stop them
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
QUIET = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
}
RECIPE = """
method: grpo
task: arithmetic
prompt_template: r1rl
model_name_or_path: {model}
use_vllm: {use_vllm}
per_device_train_batch_size: 32
num_generations: 8
max_completion_length: 20
max_steps: 1000
eval_count: 40
report_to: none
save_strategy: "no"
"""
SIGINT, SIGTERM, SIGHUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
CODES = {SIGINT: 130, SIGTERM: 143, SIGHUP: 129}


class Launch:
    """One launcher, what was seen below it, and how it ended."""

    def __init__(
        self, script: Path, folder: Path, arguments: tuple[str, ...], env: dict[str, str], terminal: bool = False
    ) -> None:
        self.folder, self.run_folder = folder, RunFolder(folder / "run")
        self.mark = uuid.uuid4().hex
        self._output = folder / f"output-{self.mark}.txt"
        what = ("recipe.yaml", "--output_dir", str(self.run_folder.path))
        command = [sys.executable, str(script), *(() if "--resume" in arguments else what), *arguments]
        self._output.touch()
        self.keyboard, screen = pty.openpty() if terminal else (-1, -1)
        with self._output.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **QUIET, **env, "R1ZERO_TESTED_AS": self.mark},
                stdin=screen if terminal else subprocess.DEVNULL,
                stdout=screen if terminal else output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if terminal else None,
            )
        if terminal:
            os.close(screen)
            threading.Thread(target=self._read_screen, daemon=True).start()
        self._seen: set[psutil.Process] = set()

    def _read_screen(self) -> None:
        with self._output.open("ab", buffering=0) as output, suppress(OSError):  # OSError: all of its users are gone
            while read := os.read(self.keyboard, 4096):
                output.write(read)

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def last_lines(self) -> list[str]:
        """What a person sees without scrolling."""
        return self.output.splitlines()[-40:]

    def log(self, name: str) -> str:
        log = self.run_folder.logs / f"{name}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    @property
    def phase(self) -> str | None:
        status = read_json(self.run_folder.status)
        return None if status is None else str(status["phase"])

    @property
    def steps(self) -> int:
        return sum(line["kind"] == "step" for line in self.run_folder.read_metrics())

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.run_folder.summary) or {}

    @property
    def restarts(self) -> list[dict[str, Any]]:
        return [line for line in self.run_folder.read_metrics() if line["kind"] == "restart"]

    @property
    def secret(self) -> dict[str, str]:
        """What server and trainer know of each other, as the server's environment has it."""
        env = self.find("stand_ins/vllm.py").environ()
        return {TOKEN: env[TOKEN], PUBLISH_FOLDER: env[PUBLISH_FOLDER]}

    @property
    def ports(self) -> list[int]:
        """The ports of the plan: the server's, the weights' group's."""
        plan = self.run_folder.plan.read_text() if self.run_folder.plan.exists() else ""
        return sorted({int(port) for port in re.findall(r"port (\d+)", plan)})

    def below(self) -> list[psutil.Process]:
        """What lives below the launcher now; remembered."""
        found = []
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.popen.pid).children(recursive=True)
        self._seen.update(found)
        return found

    def all_with(self, word: str, but: str = "no such word") -> list[psutil.Process]:
        """The processes below the launcher with `word`, and without `but`, in their command."""
        found = []
        for process in self.below():
            with suppress(psutil.Error):
                if word in (line := " ".join(process.cmdline())) and but not in line:
                    found.append(process)
        return found

    def find(self, word: str, but: str = "no such word") -> psutil.Process:
        """The one process of those."""
        found = self.all_with(word, but)
        assert len(found) == 1, f"{word}: {found}"
        return found[0]

    def until(self, condition: Callable[[], object], seconds: float = SLOW_S) -> None:
        """Wait until `condition` holds while the launcher lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            self.below()
            assert self.popen.poll() is None, f"ended early with {self.popen.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.output}"
            time.sleep(0.05)

    def signal(self, signum: int) -> None:
        """Send the launcher a signal, having looked at what is below it."""
        self.below()
        self.popen.send_signal(signum)

    def end(self, within_s: float) -> int:
        """The exit code, once the launcher has ended by itself; nothing of it is left then."""
        began = time.monotonic()
        while self.popen.poll() is None:
            self.below()
            assert time.monotonic() - began < within_s, f"still there after {within_s} s:\n{self.output}"
            time.sleep(0.05)
        print(f"ended with {self.popen.returncode} after {time.monotonic() - began:.1f} s\n{self.output}")
        assert self.left() == []
        self.ports_are_free()
        return self.popen.returncode

    def wait_for_output(self, words: str) -> None:
        """What a terminal shows comes through a thread of ours, maybe after the launcher's end."""
        deadline = time.monotonic() + 10
        while words not in self.output:
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def left(self) -> list[str]:
        """What belongs to this launch and lives, anywhere on this machine."""
        return [str(process) for process in self._living()]

    def ports_are_free(self) -> None:
        for port in self.ports:
            with socket.socket() as held:
                held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as a server does: past TIME_WAIT
                held.bind(("127.0.0.1", port))
                held.listen()

    def clean_up(self) -> None:
        """End what a failed test left; by its id, and only what is this launch's."""
        for process in self._living():
            with suppress(psutil.Error):
                process.kill()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        if self.keyboard != -1:
            os.close(self.keyboard)

    def _living(self) -> list[psutil.Process]:
        living = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):
                if process.pid == self.popen.pid and self.popen.poll() is not None:
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and (process in self._seen or self._marked(process)):
                    living.append(process)
        return living

    def _marked(self, process: psutil.Process) -> bool:
        with suppress(psutil.AccessDenied, OSError):
            if process.environ().get("R1ZERO_TESTED_AS") == self.mark:
                return True
        with suppress(psutil.AccessDenied, OSError):
            places = [process.cwd(), *process.cmdline()]
            return any(self.folder == path or self.folder in path.parents for path in map(Path, places))
        return False


Start = Callable[..., Launch]


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    started: list[Launch] = []
    yield started
    for each in started:
        each.clean_up()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder with the embedded model, eight steps old; one for all workers."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "failing-runs-model"
    code = "from r1zero import tiny; print(tiny.ensure(tiny.Pretraining(steps=8)))"
    env = {**os.environ, **QUIET, "R1ZERO_CACHE": str(cache)}
    made = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return Path(made.stdout.splitlines()[-1])  # what is imported may say something, too


@pytest.fixture
def start(tmp_path: Path, model: Path, launches: list[Launch]) -> Start:
    """launch/run.py with a real trainer on the CPU."""

    def call(*arguments: str) -> Launch:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model, use_vllm="false"))
        env = {"CUDA_VISIBLE_DEVICES": "", "R1ZERO_CACHE": str(tmp_path / "cache")}
        launches.append(Launch(PROJECT / "launch" / "run.py", tmp_path, arguments, env))
        return launches[-1]

    return call


@pytest.fixture
def start_with_server(tmp_path: Path, launches: list[Launch]) -> Start:
    """The launcher with a stand-in server and a stand-in trainer, on two GPUs that are not there."""

    def call(
        *arguments: str,
        server: str = "ok",
        trainer: str = "trains",
        terminal: bool = False,
        restarts: int = 0,
        **more_env: str,
    ) -> Launch:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tmp_path / "model", use_vllm="true"))
        (tmp_path / "project" / "launch").mkdir(parents=True, exist_ok=True)
        shutil.copy(STAND_INS / "trainer.py", tmp_path / "project" / "launch" / "grpo.py")
        if not (tmp_path / "project" / "accelerate_configs").exists():
            (tmp_path / "project" / "accelerate_configs").symlink_to(PROJECT / "accelerate_configs")
        env = {
            "R1ZERO_STAND_IN_PROJECT": str(tmp_path / "project"),
            "R1ZERO_STAND_IN_SERVER": server,
            "R1ZERO_STAND_IN_TRAINER": trainer,
            "CUDA_VISIBLE_DEVICES": "0,1",
            **more_env,
        }
        ours = () if "--resume" in arguments else ("--vllm_mode", "server", "--max_restarts", str(restarts))
        launches.append(Launch(STAND_INS / "launch_with_server.py", tmp_path, (*ours, *arguments), env, terminal))
        return launches[-1]

    return call


def assert_interrupted(launch: Launch, signum: signal.Signals) -> None:
    launch.signal(signum)
    assert launch.end(STOP_S) == CODES[signum]
    assert launch.output.splitlines()[-1] == f"error: the run was interrupted: {signum.name} received"
    assert launch.summary["outcome"] == "interrupted"
    assert launch.summary["reason"] == f"{signum.name} received"
    assert "Traceback" not in launch.output


def assert_failed(launch: Launch, within_s: float, *reason: str, code: int = 1) -> None:
    """It ended with this exit code, and these words are in its very last line."""
    assert launch.end(within_s) == code
    last = launch.output.splitlines()[-1]
    assert last == f"error: the run failed: {launch.summary['reason']}"
    for words in reason:
        assert words in last
    assert launch.summary["outcome"] == "failed"


def assert_gone_after_kill_9(launch: Launch) -> None:
    """kill -9 of the launcher: what it had started ends without it."""
    assert len(launch.below()) > 2
    launch.signal(signal.SIGKILL)
    launch.popen.wait()
    began = time.monotonic()
    while launch.left():
        assert time.monotonic() - began < GONE_S, launch.left()
        time.sleep(0.1)
    print(f"all gone {time.monotonic() - began:.1f} s after kill -9")
    launch.ports_are_free()
    assert launch.popen.returncode == -signal.SIGKILL
    assert launch.summary == {"outcome": "failed", "reason": "the launcher was killed"}


def preparing(launch: Launch) -> bool:
    """The model is being made: its folder under another name is there."""
    return any(path.is_dir() for path in (launch.folder / "cache").glob("tiny-arithmetic-*"))


PHASES: dict[str, tuple[tuple[str, ...], Callable[[Launch], object]]] = {
    "preparing the model": (("--model_name_or_path", "r1zero/tiny-arithmetic"), preparing),
    "starting the trainer": ((), lambda launch: "starting the trainer" in launch.output),
    "loading model and data": ((), lambda launch: launch.phase == "loading model and data"),
    "measuring": (
        ("--eval_on_start", "true", "--eval_samples", "200"),
        lambda launch: launch.phase == "measuring before training",
    ),
    "training": ((), lambda launch: launch.steps >= 2),
}


# Before anything is started


@pytest.mark.parametrize("signum", [SIGINT, SIGTERM])
def test_a_signal_while_the_recipe_is_read(tmp_path: Path, launches: list[Launch], signum: signal.Signals) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")  # a read that lasts, as a download of the model's config may
    launch = Launch(PROJECT / "launch" / "run.py", tmp_path, (), {})
    launches.append(launch)
    writers: list[int] = []

    def is_read() -> bool:
        with suppress(OSError):  # nobody has it open yet
            writers.append(os.open(tmp_path / "recipe.yaml", os.O_WRONLY | os.O_NONBLOCK))
        return bool(writers)

    launch.until(is_read)
    launch.signal(signum)
    code = launch.end(STOP_S)
    os.close(writers[0])
    assert not launch.run_folder.path.exists()
    if signum == SIGINT:
        assert (code, launch.output) == (130, "error: SIGINT received before anything was started\n")
    else:
        assert code in (143, -SIGTERM)  # a shell calls either 143


# With a real trainer on the CPU. One start costs about five seconds, so SIGTERM in training is left to the stand-ins.


@pytest.mark.parametrize(
    ("phase", "signum"),
    [*((phase, SIGINT) for phase in PHASES), ("preparing the model", SIGTERM), ("starting the trainer", SIGTERM)],
)
def test_a_signal_in_this_phase_ends_all(start: Start, phase: str, signum: signal.Signals) -> None:
    arguments, reached = PHASES[phase]
    launch = start(*arguments)
    launch.until(lambda: reached(launch))
    assert_interrupted(launch, signum)
    assert not launch.run_folder.model.exists()


def test_kill_9_of_the_trainer(start: Start) -> None:
    launch = start()
    launch.until(lambda: launch.steps >= 2)
    launch.find("grpo.py", but="accelerate.commands.launch").kill()
    assert_failed(launch, STOP_S, "trainer: exited with code 1", "SIGKILL", "logs/trainer.log")
    assert "/1000  reward" in "\n".join(launch.last_lines)


def test_a_rank_that_fails_stops_all_with_its_own_error_first(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R1ZERO_NOTES", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    reward = ("--reward_funcs", "tests.stand_ins.failing_reward:reward")
    launch = start("--accelerate_config", "ddp", "--cpu_processes", "2", *reward)
    launch.until((tmp_path / "failed-at").exists)
    assert_failed(launch, 60, "trainer: exited with code 1: ValueError: the reward of rank 1 is broken, its log: ")
    took = time.time() - float((tmp_path / "failed-at").read_text())
    print(f"{took:.1f} s from the error to the launcher's end")
    assert took < 60
    shown = launch.output.partition(" lines of ")[2].splitlines()
    assert "  the report" in shown[-3]
    assert "torch elastic: the first to fail was rank 1, exited with code 1" in shown[-4]
    assert "[rank1]: ValueError: the reward of rank 1 is broken" in shown[-5]


@pytest.mark.parametrize(
    ("config", "blind", "part"),
    [
        ("ddp", False, 0.4),
        ("zero3", True, 0.4),  # in the middle of both ranks' shards
        *(
            pytest.param(config, True, part, marks=pytest.mark.soak)
            for config in ("ddp", "zero2", "zero3")
            for part in (0.1, 0.4, 0.7, 0.97)
            if (config, part) != ("zero3", 0.4)
        ),
    ],
)
def test_ranks_without_room_for_a_checkpoint_end_together(
    config: str, blind: bool, part: float, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for a part of the second checkpoint. Blind, that is met in the midst of writing it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (PROJECT / "src", PROJECT))))
    reward = ("--reward_funcs", "tests.stand_ins.blind_to_space:reward") if blind else ()
    small = ("--accelerate_config", config, "--cpu_processes", "2", "--per_device_train_batch_size", "8")
    saving = ("--save_strategy", "steps", "--save_steps", "5", "--eval_count", "0")
    launch = start(*small, *saving, *reward)
    launch.until(launch.run_folder.checkpoints.exists)
    with disk_at(launch.run_folder.checkpoints) as resize:
        first = launch.run_folder.checkpoints / "checkpoint-5"
        launch.until(first.exists)
        written = checkpoints.bytes_in(first)
        resize(shutil.disk_usage(first).used + int(part * written))
        no_room = f"trainer: exited with code 1: no room for checkpoint-10 in {first.parent}: it needs "
        assert_failed(launch, 120, no_room, "Older checkpoints are as they were", code=REFUSED)
        assert checkpoints.newest(launch.run_folder) == checkpoints.Found(first)
        assert not list(first.parent.glob(".*"))


@contextmanager
def disk_at(folder: Path) -> Iterator[Callable[[int], object]]:
    """A file system of its own in an empty folder; gives what sets its size, in bytes."""
    command = ["mount", "-t", "tmpfs", "tmpfs", folder]
    if subprocess.run([*command, "-o", "size=1g"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield lambda size: subprocess.run([*command, "-o", f"remount,size={size}"], check=True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_kill_9_of_the_launcher_with_a_real_trainer(start: Start) -> None:
    launch = start()
    launch.until(lambda: launch.steps >= 2)
    assert_gone_after_kill_9(launch)


# With a server, which stands in for vLLM


def test_a_server_that_dies_while_starting(start_with_server: Start) -> None:
    launch = start_with_server(server="dies")
    launch.until(lambda: "starting the policy server" in launch.output)
    assert_failed(launch, STOP_S, "server: exited with code 3: torch.OutOfMemoryError: CUDA out of memory.")
    assert "engine core failed to start" in "\n".join(launch.last_lines)
    assert launch.phase is None  # no trainer has begun


def test_the_trainer_is_started_beside_the_server_and_begins_once_that_is_ready(start_with_server: Start) -> None:
    launch = start_with_server(server="hang-after-health", trainer="trains")
    launch.until(lambda: launch.all_with("launch/grpo.py"))
    time.sleep(2)
    assert launch.phase is None and "starting the trainer" not in launch.output
    launch.signal(SIGTERM)
    assert launch.end(STOP_S) == CODES[SIGTERM]


@pytest.mark.parametrize(
    ("mode", "how_far"),
    [("refuses", "connection refused"), ("hang-after-health", "/health answered 200, but no token was generated")],
)
def test_a_server_that_is_never_ready(start_with_server: Start, mode: str, how_far: str) -> None:
    launch = start_with_server("--server_ready_timeout", "3", server=mode, restarts=3)
    launch.until(lambda: "starting the policy server" in launch.output)
    assert_failed(launch, 3 + STOP_S, "not ready after 3 s", how_far, "logs/server.log")


@pytest.mark.parametrize("signum", [SIGINT, SIGTERM])
def test_a_signal_while_the_server_starts(start_with_server: Start, signum: signal.Signals) -> None:
    launch = start_with_server(server="slow")
    launch.until(lambda: "/health" in launch.log("server"))
    assert_interrupted(launch, signum)


@pytest.mark.parametrize("signum", [SIGTERM, SIGHUP])
def test_a_signal_while_server_and_trainer_run(start_with_server: Start, signum: signal.Signals) -> None:
    launch = start_with_server()
    launch.until(lambda: launch.steps >= 2)
    assert_interrupted(launch, signum)


def test_ctrl_c_on_a_terminal(start_with_server: Start) -> None:
    """The key itself, while a live line is on the screen: the terminal sends the signal, and is left as it was."""
    launch = start_with_server(terminal=True)
    launch.until(lambda: launch.steps >= 2 and HIDE_CURSOR in launch.output)
    launch.below()
    os.write(launch.keyboard, b"\x03")
    assert launch.end(STOP_S) == 130
    launch.wait_for_output("error: the run was interrupted: SIGINT received")
    assert launch.output.rindex(SHOW_CURSOR) > launch.output.rindex(HIDE_CURSOR)
    assert launch.summary["outcome"] == "interrupted"
    assert "Traceback" not in launch.output


def test_a_second_ctrl_c_does_not_wait_for_a_server_that_hangs(start_with_server: Start) -> None:
    launch = start_with_server(server="ignores-sigterm")
    launch.until(lambda: launch.steps >= 2)
    trainer = launch.find("launch/grpo.py")
    launch.signal(SIGINT)
    launch.until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE, GONE_S)
    launch.signal(SIGINT)
    assert launch.end(7) == 130  # the server's ten seconds of grace have only begun
    assert launch.summary["reason"] == "SIGINT received"


@pytest.mark.parametrize("trainer", ["trains", "needs-server"])
def test_kill_9_of_the_server(start_with_server: Start, trainer: str) -> None:
    launch = start_with_server(trainer=trainer)
    launch.until(lambda: launch.steps >= 2)
    launch.find("stand_ins/vllm.py").kill()
    assert_failed(launch, GONE_S, "server: killed by SIGKILL", "logs/server.log")
    assert "stand-in server: " in "\n".join(launch.last_lines)
    assert launch.summary["reason"].startswith("server: ")


def test_kill_9_of_accelerate_leaves_no_trainer(start_with_server: Start) -> None:
    launch = start_with_server(R1ZERO_REAL_ACCELERATE="1")
    launch.until(lambda: launch.steps >= 2)
    launch.find("accelerate.commands.launch").kill()
    assert_failed(launch, STOP_S, "trainer: killed by SIGKILL")
    assert "/1000  reward" in "\n".join(launch.last_lines)


def test_a_trainer_that_fails(start_with_server: Start) -> None:
    launch = start_with_server(trainer="fails", R1ZERO_REAL_ACCELERATE="1")
    launch.until(lambda: launch.steps >= 2)
    assert_failed(launch, STOP_S, "trainer: exited with code 1: ValueError: the stand-in's loss is nan")
    assert "accelerate: the script returned non-zero exit status 1" in "\n".join(launch.last_lines)
    assert "CalledProcessError" not in launch.output


@pytest.mark.parametrize("server", ["ok", "ignores-sigterm"])
def test_when_the_trainer_is_done_the_server_is_stopped(start_with_server: Start, server: str) -> None:
    launch = start_with_server(trainer="finishes", server=server)
    launch.until(lambda: launch.phase == "done")
    assert launch.end(STOP_S) == 0
    assert launch.summary["outcome"] == "finished"
    assert launch.summary["seconds_in_all"] > 0
    assert len(launch.ports) == 2


def test_kill_9_of_the_launcher_with_a_server(start_with_server: Start) -> None:
    launch = start_with_server(server="ignores-sigterm")
    launch.until(lambda: launch.steps >= 2)
    assert_gone_after_kill_9(launch)


# Started again as a pair


def goes_on(launch: Launch, number: int, cause: str) -> None:
    """Restart `number` is on record, for `cause`, on the terminal, and in status.json once the trainer is up again."""
    launch.until(lambda: len(launch.restarts) >= number)
    restart = launch.restarts[number - 1]
    assert restart["restart"] == number and cause in restart["cause"]
    launch.until(lambda: f"FAILED at step {restart['step']}: {restart['cause']}; restart {number} of" in launch.output)
    launch.until(lambda: launch.output.count("starting the trainer") > number)
    assert (read_json(launch.run_folder.status) or {})["restarts"] == number


def assert_finished_after(launch: Launch, restarts: int) -> None:
    assert launch.end(SLOW_S) == 0
    assert launch.summary["outcome"] == "finished"
    assert launch.summary["restarts"] == restarts
    assert (read_json(launch.run_folder.status) or {})["restarts"] == restarts


def kill_server(launch: Launch) -> None:
    launch.find("stand_ins/vllm.py").kill()


def stop_server(launch: Launch) -> None:
    launch.find("stand_ins/vllm.py").send_signal(signal.SIGSTOP)


def silence_server(launch: Launch) -> None:
    (launch.folder / "silent").touch()


def kill_trainer(launch: Launch) -> None:
    launch.find("launch/grpo.py").kill()


@pytest.mark.parametrize(
    ("accident", "cause"),
    [
        pytest.param(kill_server, "server: killed by SIGKILL", id="server killed"),
        pytest.param(stop_server, "server: made no token for 4 s: ", id="server stopped"),
        pytest.param(silence_server, "server: made no token for 4 s: ", id="server silent"),
        pytest.param(kill_trainer, "trainer: killed by SIGKILL", id="trainer killed"),
    ],
)
def test_after_an_accident_both_go_on_from_the_newest_checkpoint(
    start_with_server: Start, accident: Callable[[Launch], None], cause: str
) -> None:
    launch = start_with_server("--server_silence_timeout", "4", trainer="resumes", restarts=1)
    launch.until(lambda: launch.steps >= 6)
    before = [launch.find("stand_ins/vllm.py"), launch.find("launch/grpo.py"), launch.find("stand-in's engine")]
    port = before[1].cmdline()[before[1].cmdline().index("--vllm_group_port") + 1]
    began = time.monotonic()
    accident(launch)
    launch.until(lambda: launch.restarts)
    assert time.monotonic() - began < 4 + STOP_S
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in before)
    (launch.folder / "silent").unlink(missing_ok=True)
    goes_on(launch, 1, cause)
    assert_finished_after(launch, 1)
    saved = int(launch.restarts[0]["checkpoint"].rpartition("-")[2])
    assert saved >= 5
    assert launch.restarts[0]["step"] >= saved - 1  # the trainer works on until it is ended
    lines = list(launch.run_folder.read_metrics())
    at = lines.index(launch.restarts[0])
    assert [line["step"] for line in lines[at:] if line["kind"] == "step"] == [saved + 1, saved + 2, saved + 3]
    assert launch.log("server").count("stand-in server: ") == 2
    assert f"--vllm_group_port {port}" not in launch.log("trainer")


def test_without_a_checkpoint_both_begin_again(start_with_server: Start) -> None:
    launch = start_with_server(restarts=1)
    launch.until(lambda: launch.steps >= 3)
    kill_server(launch)
    goes_on(launch, 1, "server: killed by SIGKILL")
    assert "goes on from the beginning, there is no checkpoint" in launch.output
    launch.until(lambda: [line["step"] for line in launch.run_folder.read_metrics() if line["kind"] == "step"][-1] < 3)
    assert_interrupted(launch, SIGTERM)  # and a signal starts nothing again


def test_the_same_error_at_the_same_step_ends_the_run(start_with_server: Start) -> None:
    launch = start_with_server(trainer="fails", restarts=3)
    launch.until(lambda: len(launch.restarts) == 1)
    error = "trainer: exited with code 1: ValueError: the stand-in's loss is nan at 0x"
    assert_failed(launch, SLOW_S, error, "(the same error at step 2 as before), its log: ")
    assert [each["step"] for each in launch.summary["failures"]] == [2, 2]
    assert f"attempt 1 came to step 2: {error}" in launch.output


def test_restarts_are_used_up(start_with_server: Start) -> None:
    launch = start_with_server(trainer="fails-later", restarts=2)
    launch.until(lambda: len(launch.restarts) == 2)
    assert_failed(launch, SLOW_S, "trainer: exited with code 1: ValueError", "(2 restarts used up), its log: ")
    assert [each["step"] for each in launch.summary["failures"]] == [2, 4, 6]
    assert [each["checkpoint"] for each in launch.restarts] == ["checkpoints/checkpoint-2", "checkpoints/checkpoint-4"]


@pytest.mark.parametrize(
    ("trainer", "code", "real"), [("misconfigured", 2, ""), ("refuses", 3, ""), ("refuses", 3, "1")]
)
def test_a_trainer_that_must_not_go_on_is_not_started_again(
    start_with_server: Start, trainer: str, code: int, real: str
) -> None:
    """Its exit code is the launcher's, also through accelerate."""
    env = {"R1ZERO_REAL_ACCELERATE": real} if real else {}
    launch = start_with_server(trainer=trainer, restarts=3, **env)
    launch.until(lambda: launch.steps >= 2)
    assert_failed(launch, STOP_S, "trainer: exited with code", code=code)
    assert launch.restarts == []


def test_what_fails_before_the_first_step_is_not_tried_again(start_with_server: Start) -> None:
    launch = start_with_server(server="port-taken", restarts=3)
    launch.until(lambda: "starting the policy server" in launch.output)
    why = "server: exited with code 1: OSError: [Errno 98] Address already in use (before the first step, so it is not"
    assert_failed(launch, STOP_S, why)


def test_during_an_update_of_its_weights_a_server_may_be_silent(start_with_server: Start) -> None:
    launch = start_with_server("--server_silence_timeout", "2", "--publish_timeout", "8", restarts=0)
    launch.until(lambda: launch.steps >= 2)
    (launch.folder / "updating").touch()
    time.sleep(5)
    assert launch.popen.poll() is None
    assert_failed(launch, 8 + STOP_S, "server: did not finish an update of its weights for 8 s")


# The token and the folder that server and trainer share


def assert_secret_kept(launch: Launch, token: str) -> None:
    """It is in no file of the run, in no output, and in no command line of this machine."""
    assert token not in launch.output
    for file in launch.folder.rglob("*"):
        if file.is_file():
            assert token.encode() not in file.read_bytes(), file
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            assert token not in " ".join(process.cmdline()), process


def test_the_token_is_in_the_environment_of_those_who_need_it_and_nowhere_else(start_with_server: Start) -> None:
    launch = start_with_server(trainer="resumes", restarts=1)
    launch.until(lambda: launch.steps >= 6)
    secret = launch.secret
    token, folder = secret[TOKEN], Path(secret[PUBLISH_FOLDER])
    assert len(token) == 64
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.name.startswith("r1zero-")
    assert sorted(path.name for path in folder.iterdir()) == ["of-the-server", "of-the-trainer"]
    assert launch.find("launch/grpo.py").environ()[TOKEN] == token
    assert f"told of {[TOKEN, PUBLISH_FOLDER]}" in launch.log("rehearsal")
    assert "told of []" in launch.log("preflight")
    holders = [each for each in launch.below() if TOKEN in each.environ()]
    assert sorted(Path(each.cmdline()[1]).name for each in holders) == ["grpo.py", "vllm.py"]
    assert_secret_kept(launch, token)
    kill_trainer(launch)
    goes_on(launch, 1, "trainer: killed by SIGKILL")
    assert_finished_after(launch, 1)
    assert_secret_kept(launch, token)
    assert not folder.exists()


@pytest.mark.parametrize("ending", ["trainer killed", "ctrl-c", "launcher killed"])
def test_the_publish_folder_is_gone_however_the_run_ends(start_with_server: Start, ending: str) -> None:
    launch = start_with_server()
    launch.until(lambda: launch.steps >= 2)
    folder = Path(launch.secret[PUBLISH_FOLDER])
    assert folder.is_dir()
    if ending == "trainer killed":
        kill_trainer(launch)
        assert launch.end(STOP_S) == 1
    elif ending == "ctrl-c":
        assert_interrupted(launch, SIGINT)
    else:
        assert_gone_after_kill_9(launch)
    assert not folder.exists()
