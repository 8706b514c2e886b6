"""launch/run.py with a real policy server on the CPU, as a person starts it, and all that it left."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1zero.run_folder import RunFolder, read_json
from tests.conftest import PROJECT
from tests.stand_ins import striking
from tests.training.conftest import QUIET, rows

DEADLINE_S = 600.0  # and as much for each accident
RECIPE = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"
# As short as a run can be that still moves the policy.
SHORT = {
    "use_vllm": "true",
    "vllm_mode": "server",
    "reward_funcs": "tests.stand_ins.striking:reward",
    "per_device_train_batch_size": 16,
    "max_completion_length": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "max_steps": 3,
    "eval_count": 0,
    "eval_on_start": "false",
    "save_strategy": "no",
    "report_to": "none",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = {"use_peft": "true", "lora_r": 8, "lora_dropout": 0, "lora_target_modules": PROJECTIONS}


BEHIND_PROXY = PROJECT / "tests" / "stand_ins" / "launch_behind_proxy.py"
# Of accidents that the looks from outside bring about; those of `striking.PHASES` happen in the trainer.
STARTING, REHEARSING, CLOSING, RESTARTING = "starting", "rehearsing", "closing", "restarting"
LOOK_S = 0.2
WARDEN = "supervisor.py"
MAINS = ("vllm.entrypoints.cli.main serve", "accelerate.commands.launch", "--server")  # pair and rehearsal


@dataclass(frozen=True)
class Met:
    """An accident of a run, and what became of it. Times are seconds after it happened.

    Attributes:
        accident: as `stand_ins/striking.py` has it.
        noticed: until the first process of the pair, or the rehearsal, was gone: by itself or by the launcher.
        ended: until all processes of the pair were, and it was on record; where the run ended, until the launcher had.
        back: until the next step was recorded; None where there was none.
        outcome: "restarted", "ended", or "finished" where nothing had to be done.
        cause: of the restart, or the launcher's last line.
    """

    accident: str
    noticed: float
    ended: float
    back: float | None
    outcome: str
    cause: str


@dataclass(frozen=True)
class Launched:
    """A run that is over.

    Attributes:
        code: exit code of the launcher.
        err: its stderr.
        folder: its run folder.
        notes: what `stand_ins/striking.py` wrote.
        seen: every process that was a descendant of the launcher at any look.
        gone: wall clock of the looks that missed one of the main processes for the first time.
        orphans: what was alive when the launcher had recorded the end of its attempt.
        began: the wall clock when the launcher was started.
        ended: and when it had ended.
    """

    code: int
    err: str
    folder: RunFolder
    notes: Path
    seen: frozenset[psutil.Process]
    gone: tuple[float, ...]
    orphans: tuple[str, ...]
    began: float
    ended: float

    @property
    def secrets(self) -> tuple[str, ...] | None:
        """The token, the publish folder and that of vLLM's sockets; None where no trainer came so far."""
        file = self.notes / "secrets.json"
        if not file.exists():
            return None
        token, publish, sockets = json.loads(file.read_text())
        return token, publish, sockets

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Of the metrics."""
        return [line for line in self.folder.read_metrics() if line["kind"] == kind]

    @property
    def last_line(self) -> str:
        return self.err.rstrip().rpartition("\n")[2]

    @property
    def met(self) -> list[Met]:
        """The accidents in order."""
        struck = self.notes / "struck.jsonl"
        strikes = [json.loads(line) for line in struck.read_text().splitlines()] if struck.exists() else []
        return [self._met(each["accident"], each["time"]) for each in strikes]

    def _met(self, accident: str, struck: float) -> Met:
        restart = next((each for each in self.lines("restart") if each["time"] >= struck), None)
        ended = self.ended if restart is None else restart["time"]
        noticed = min((each for each in self.gone if struck <= each <= ended), default=ended)
        steps = [each["time"] for each in self.lines("step") if restart is not None and each["time"] > ended]
        back = steps[0] - struck if steps else None
        outcome = "restarted" if restart is not None else "ended" if self.code else "finished"
        cause = self.last_line if restart is None else str(restart["cause"])
        return Met(accident, noticed - struck, ended - struck, back, outcome, cause)

    def assert_nothing_is_left(self) -> None:
        assert not self.orphans
        left = [each for each in self.seen if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
        assert not left
        files = [path for path in self.folder.path.rglob("*") if path.is_file()]
        assert self.folder.recipe in files
        if self.secrets is None:
            return
        token, *folders = self.secrets
        for folder in map(Path, folders):
            assert folder.name.startswith("r1zero-") and not folder.exists()
        assert not [path for path in files if token.encode() in path.read_bytes()]

    def assert_rollouts_are_of_their_step(self, steps: int) -> None:
        files = sorted((self.folder.path / "rollouts").glob("train-*.parquet"))
        assert len(files) == steps
        for step, file in enumerate(files, 1):
            assert {(row["step"], row["policy_version"]) for row in rows(file)} == {(step, step - 1)}


def words(keys: Mapping[str, Any]) -> list[str]:
    """As they are typed."""
    given: list[str] = []
    for key, value in keys.items():
        given += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
    return given


def server_python() -> str:
    python = os.environ.get("R1ZERO_CPU_SERVER_PYTHON", "")
    if not python:
        pytest.skip("R1ZERO_CPU_SERVER_PYTHON names no Python with vLLM's CPU build; `make cpu-server` makes one")
    return str(Path(python).absolute())


def environment(notes: Path, strike: str = "") -> dict[str, str]:
    """Of a launcher or a trainer under test: no tracker of the user's, and the reward where Python finds it."""
    hidden = ("COV", "WANDB_", "CUDA_VISIBLE_DEVICES", "TENSORBOARD_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    ours = {
        "PYTHONPATH": os.pathsep.join(map(str, (PROJECT / "src", PROJECT))),
        "R1ZERO_NOTES": str(notes),
        "R1ZERO_STRIKE": strike,
    }
    return {**kept, **QUIET, **ours, "HF_HUB_OFFLINE": "1"}


def launch(place: Path, model: Path, keys: Mapping[str, Any], *accidents: str, **more: str) -> Launched:
    """Run launch/run.py to its end.

    Args:
        place: an empty folder.
        model: to train.
        keys: of the recipe, on top of `SHORT`.
        accidents: for `stand_ins/striking.py`, or with a phase of those above.
        more: of its environment.
    """
    notes = place / "notes"
    notes.mkdir()
    given = {**SHORT, **keys, "model_name_or_path": model, "output_dir": place / "run"}
    outside = (STARTING, REHEARSING, CLOSING, RESTARTING)
    behind_proxy = more or any(each.startswith("proxy") for each in accidents)
    script = BEHIND_PROXY if behind_proxy else PROJECT / "launch" / "run.py"
    inside = ";".join(each for each in accidents if each.split()[2] not in outside)
    began = time.time()
    with (place / "out").open("wb") as out, (place / "err").open("wb") as err:
        popen = subprocess.Popen(
            [server_python(), str(script), str(RECIPE), *words(given)],
            cwd=PROJECT,
            env=environment(notes, inside) | more,
            stdout=out,
            stderr=err,
        )
        with _Onlooker(psutil.Process(popen.pid), RunFolder(place / "run"), notes) as onlooker:
            onlooker.waiting = [each for each in accidents if each.split()[2] in outside]
            deadline = time.monotonic() + DEADLINE_S * (1 + len(accidents))
            try:
                while popen.poll() is None:
                    assert time.monotonic() < deadline, "not over in time"
                    with suppress(psutil.NoSuchProcess):
                        onlooker.look()
                    time.sleep(LOOK_S)
            finally:
                if popen.poll() is None:
                    popen.terminate()
                    popen.wait(60)
    return Launched(
        popen.returncode,
        (place / "err").read_text(),
        onlooker.folder,
        notes,
        frozenset(onlooker.seen),
        tuple(onlooker.gone),
        tuple(onlooker.orphans),
        began,
        time.time(),
    )


class _Onlooker(ExitStack):
    """Looks at a run from outside, and brings about the accidents that can be brought about from there."""

    def __init__(self, launcher: psutil.Process, folder: RunFolder, notes: Path) -> None:
        super().__init__()
        self.launcher, self.folder, self.notes = launcher, folder, notes
        self.waiting: list[str] = []
        self.seen: dict[psutil.Process, float] = {}  # and when first
        self.gone: list[float] = []
        self.orphans: list[str] = []
        self._mains: dict[psutil.Process, str] = {}
        self._restarts = 0

    def look(self) -> None:
        now = time.time()
        below = self.launcher.children(recursive=True)
        self.seen = dict.fromkeys(below, time.time()) | self.seen
        here = {each for each in self.launcher.children() if each.status() != psutil.STATUS_ZOMBIE}
        for each in here - set(self._mains):
            self._mains[each] = " ".join(each.cmdline())
        for each in set(self._mains) - here:
            command = self._mains.pop(each)
            if any(word in command for word in MAINS):
                self.gone.append(now)
        restarts = [line["time"] for line in self.folder.read_metrics() if line["kind"] == "restart"]
        if len(restarts) > self._restarts:
            self._restarts = len(restarts)
            self._look_for_orphans(restarts[-1])
            self.close()  # whoever has taken a port gives it back
            for filler in Path(self._publish_folder()).glob(striking.FILLER):
                filler.unlink()  # somebody has made room
        if self.waiting and self._strike(*self.waiting[0].split()):
            del self.waiting[0]

    def _look_for_orphans(self, recorded: float) -> None:
        for each in [process for process, first in self.seen.items() if first < recorded]:
            with suppress(psutil.NoSuchProcess):
                lives = each.is_running() and each.status() != psutil.STATUS_ZOMBIE
                words = " ".join(each.cmdline())  # empty: killed, and the system is taking its memory apart
                if lives and words and WARDEN not in words:
                    self.orphans.append(f"{each.pid} {words[:200]}")

    def _publish_folder(self) -> str:
        secrets = self.notes / "secrets.json"
        return str(json.loads(secrets.read_text())[1]) if secrets.exists() else str(self.notes)

    def _strike(self, who: str, what: str, phase: str, *path: str) -> bool:
        """Whether its moment had come."""
        rehearsal = next((each for each, words in self._mains.items() if "r1zero.preflight --" in words), None)
        match phase:
            case "starting":  # a port can be taken before
                ready = self.folder.plan.exists() and (
                    who == "port" or striking.server_below(self.launcher, "api") is not None
                )
            case "rehearsing":
                ready = rehearsal is not None and "--server" in self._mains[rehearsal]
                if ready and rehearsal is not None and who != "proxy":  # it has asked the server for something
                    ready = any(each.status == "ESTABLISHED" for each in rehearsal.net_connections())
            case "closing":  # all is done, and the trainer leaves
                ready = (read_json(self.folder.status) or {}).get("phase") == "done"
            case _:
                ready = self._restarts > 0
        if not ready:
            return False
        accident = " ".join((who, what, phase, *path))
        if who == "port":
            self.enter_context(socket.create_server(("127.0.0.1", self._planned_port())))
        elif who == "proxy":
            (self.notes / "fault.json").write_text(json.dumps({"fault": what, "path": path[0]}))
        else:
            server = striking.server_below(self.launcher, who)
            if server is None:
                return False
            server.send_signal(signal.Signals[what])
        striking.note_strike(self.notes, accident)
        return True

    def _planned_port(self) -> int:
        (port,) = set(re.findall(r" serve .* --port (\d+)", self.folder.plan.read_text()))
        return int(port)


def seconds(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(step[name]) for step in steps if name in step]
