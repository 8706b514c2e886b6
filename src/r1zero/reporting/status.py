"""What runs, where, how far: ``launch/run.py --status RUN`` and ``--list [RUNS_DIR]``. No torch.

Told from the run folder alone, of long files from their ends alone. That a run has ended without a word is told from
its launcher's process where that can be looked at, else from how long nothing was written.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.text import Text

from r1zero import checkpoints, log_ends
from r1zero.reporting import doctor, refresher
from r1zero.reporting.progress import duration, phase_line
from r1zero.reporting.run_reader import REQUEUES, RunError, read_run
from r1zero.run_folder import STOPPED_OUTCOME, RunFolder, pid_namespace, read_json

SILENT_S = 900.0  # what writes nothing for longer, or for SILENT_STEPS of its steps, is not taken to run
SILENT_STEPS = 5
SAME_PROCESS_S = 10.0  # psutil's time of a process's start moves when the clock is set
TAIL_BYTES = (2**16, 2**20)  # of metrics.jsonl: read at first, and at most
NO_PROCESS = ("report", "warden")  # logs of what runs beside the run
WIDTH_OF_NAMES = 20  # of a run in a list, at least
STYLES = {"running": "green", "finished": "bold", "failed": "red", "died": "red", "silent": "yellow"}
_LEFT_OFF = ("stopped", "failed", "interrupted", "died", "silent", "alarm")


@dataclass(frozen=True)
class Standing:
    """Where a run stands.

    >>> Standing(RunFolder(Path("runs/x")), "failed", why="trainer: killed by SIGKILL").step
    0

    Attributes:
        folder: of the run.
        state: running; finished, failed, interrupted or alarm, as its summary says; stopped, to be resumed, or queued,
            where Slurm resumes it; died: its launcher is gone and nothing says why; silent: it wrote nothing for long,
            and its launcher cannot be looked at from here.
        why: of its end, as far as that is on record.
        phase: what it does, or did last.
        step: the last optimizer step on record.
        steps: of the whole run; 0 where that is not known yet.
        seconds_left: of the phase.
        began: when the run began, unix seconds.
        written: when something of it was last written, unix seconds.
        host: of its launcher.
        pid: of its launcher, where that can be looked at and lives.
        newest: by kind the newest line of metrics.jsonl that counts, as far as it lies in the file's last MiB.
    """

    folder: RunFolder
    state: str
    why: str = ""
    phase: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    began: float = 0.0
    written: float = 0.0
    host: str = ""
    pid: int | None = None
    newest: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def main(run: Path | None, runs_dir: str | None, unknown: Sequence[str] = ()) -> int:
    """Print where `run` stands, or a line for each run in `runs_dir`.

    Args:
        run: of ``--status``.
        runs_dir: of ``--list``; None where it was not asked for.
        unknown: the words of the command line that nothing has taken.

    Returns:
        The exit code: 0; 2 where there is no such run or folder.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if unknown:
        errors.print(f"error: {' '.join(unknown)}: --status takes one run folder, --list at most one folder of runs")
        return 2
    if run is not None:
        if why := _no_run(run):
            errors.print(f"error: {why}")
            return 2
        for line in lines(glance(RunFolder(run)), time.time()):
            console.print(line)
        return 0
    place = Path(runs_dir or "")
    if not place.is_dir():
        errors.print(f"error: {place}: there is no such folder; name the one that runs are in (runs_dir)")
        return 2
    found = list_runs(place)
    if not found:
        own = f"; it is a run itself: --status {place}" if is_run(place) else ""
        errors.print(f"no runs in {place}{own}")
        return 0
    for row in table(found, time.time(), console.width if console.is_terminal else None):
        console.print(row)
    return 0


def is_run(path: Path) -> bool:
    """Whether a run has written into this folder."""
    folder = RunFolder(path)
    files = (folder.status, folder.versions, folder.metrics, folder.summary, folder.recipe)
    try:
        return any(each.is_file() for each in files)
    except OSError:  # somebody else's, and closed
        return False


def _no_run(path: Path) -> str:
    """Why there is no run to look at; empty where there is one."""
    if not path.is_dir():
        return f"{path}: there is no such folder; --list says which runs there are"
    if is_run(path):
        return ""
    inside = next((each for each in sorted(path.iterdir()) if is_run(each)), None)
    remedy = f"runs are in it, such as {inside}: --list {path}" if inside else "--list says which runs there are"
    return f"{path}: is no run folder; {remedy}"


def list_runs(place: Path) -> list[Standing]:
    """The runs in a folder, newest first; what is no run is passed over."""
    runs = [glance(RunFolder(path)) for path in place.iterdir() if path.is_dir() and is_run(path)]
    return sorted(runs, key=lambda run: run.began, reverse=True)


def glance(folder: RunFolder) -> Standing:
    """Read where a run stands; of what cannot be read there is nothing."""
    status, summary, manifest = (_object(path) for path in (folder.status, folder.summary, folder.versions))
    newest, began = _newest(folder.metrics), _began(folder, manifest)
    attempt = _seconds(manifest)
    step = newest.get("step", {})
    state, pid = _state(folder, status, summary, manifest, step)
    fresh = _number(status.get("time")) >= attempt - 1  # what an attempt before this one did is not what goes on
    lives = state in ("running", "silent")
    phase = phase_line({**status, "seconds_left": None}) if status.get("phase") else ""
    return Standing(
        folder=folder,
        state=state,
        why=str(summary.get("reason") or summary.get("why") or ""),
        phase=phase if fresh or not lives else f"starting{''.join(f' ({log.stem})' for log in _logs(folder)[:1])}",
        step=int(_number(step.get("step"))),
        steps=int(_number(step.get("steps")) or (status.get("phase") == "training" and _number(status.get("total")))),
        seconds_left=_left(status) if state == "running" and fresh else None,
        began=began,
        written=_written(folder),
        host=str(manifest.get("host") or ""),
        pid=pid,
        newest=newest,
    )


def _left(status: Mapping[str, Any]) -> float | None:
    """Seconds left by now, as the last word on it has them."""
    left = status.get("seconds_left")
    return max(0.0, left - (time.time() - _number(status.get("time")))) if isinstance(left, int | float) else None


def _state(
    folder: RunFolder,
    status: Mapping[str, Any],
    summary: Mapping[str, Any],
    manifest: Mapping[str, Any],
    step: Mapping[str, Any],
) -> tuple[str, int | None]:
    """The state, and the pid of the launcher where it is known to live."""
    outcome = summary.get("outcome")
    lives, pid = _launcher(manifest)
    if outcome == "finished" and lives and "seconds_in_all" not in summary and status.get("phase") != "done":
        return "running", pid  # a cold start is measured when its model is saved
    if outcome == STOPPED_OUTCOME:
        requeues = _json(folder.path / REQUEUES)
        last = requeues[-1].get("time") if isinstance(requeues, list) and requeues else 0.0
        return "queued" if _number(last) >= folder.summary.stat().st_mtime - 60 else STOPPED_OUTCOME, None
    if outcome:
        return str(outcome), None
    if lives is not None:
        return ("running", pid) if lives else ("died", None)
    patience = max(SILENT_S, SILENT_STEPS * _number(step.get("seconds/step")))
    return "running" if time.time() - _written(folder) < patience else "silent", None


def _launcher(manifest: Mapping[str, Any]) -> tuple[bool | None, int | None]:
    """Whether the process that began the run lives, and its pid; None where that cannot be seen from here."""
    process = manifest.get("process")
    if not isinstance(process, dict) or manifest.get("host") != platform.node():
        return None, None
    if process.get("namespace") != pid_namespace():
        return None, None
    try:
        pid = int(process["pid"])
        alike = abs(psutil.Process(pid).create_time() - float(process["began"])) < SAME_PROCESS_S
        return alike and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE, pid
    except psutil.NoSuchProcess:
        return False, None
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None, None


def _newest(metrics: Path) -> dict[str, dict[str, Any]]:
    """By kind the newest line that counts: what was done again after a resume does not."""
    found: dict[str, dict[str, Any]] = {}
    for most in TAIL_BYTES:
        found = {}
        void_after: float | None = None
        tail, whole = _tail(metrics, most)
        for line in reversed(tail):
            kind = line[10:].partition(b'"')[0].decode(errors="replace")  # each line begins with {"kind": "
            if kind in found:
                continue
            try:
                read = json.loads(line)
                kind, step = str(read["kind"]), read.get("step")
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            if kind == "resume":
                void_after = step if void_after is None else min(void_after, step)
            elif kind not in found and (void_after is None or step is None or step <= void_after):
                found[kind] = read
        if whole or {"step", "evaluation"} <= set(found):
            break
    return found


def _tail(path: Path, most: int) -> tuple[list[bytes], bool]:
    """The whole lines in the last `most` bytes of a file, and whether that is the whole file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            lines = file.read().split(b"\n")
    except OSError:
        return [], True
    return (lines if size <= most else lines[1:]), size <= most


def _began(folder: RunFolder, manifest: Mapping[str, Any]) -> float:
    """When the run's last attempt began, or its first line was written, whichever is earlier."""
    try:
        with folder.metrics.open("rb") as file:
            began = _number(json.loads(file.readline(2**16)).get("time"))
    except (OSError, ValueError, AttributeError):
        began = 0.0
    known = [each for each in (began, _seconds(manifest)) if each]
    return min(known, default=_modified(folder.path))


def _seconds(manifest: Mapping[str, Any]) -> float:
    """When the last attempt began, unix seconds; 0 where that is not on record."""
    try:
        return datetime.strptime(str(manifest.get("time")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return 0.0


def _written(folder: RunFolder) -> float:
    own = (folder.status, folder.metrics, folder.summary, folder.versions, folder.recipe)
    return max(_modified(path) for path in (*own, *_logs(folder)))


def _logs(folder: RunFolder) -> list[Path]:
    """The logs of the run's processes, but for those beside the run; the one that was written last first."""
    logs = [path for path in folder.logs.glob("*.log") if not path.name.startswith(NO_PROCESS)]
    return sorted(logs, key=_modified, reverse=True)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _object(path: Path) -> dict[str, Any]:
    found = _json(path)
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


# Words.


def table(runs: Sequence[Standing], now: float, width: int | None) -> Iterator[Text]:
    """A line for each run, the name last.

    Args:
        runs: as they are to be shown.
        now: unix seconds.
        width: of the terminal, in which each line is to fit; None: names stay whole.
    """
    rows = [("STATE", "STEP", "REWARD", "HELD OUT", "LEFT, AGO", "RUN")]
    rows += [_row(run, now) for run in runs]
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    for number, row in enumerate(rows):
        numbers = (f"{cell:>{wide}}" for cell, wide in zip(row[1:5], widths[1:], strict=True))
        line = "  ".join([f"{row[0]:<{widths[0]}}", *numbers, ""])
        name = row[5]
        if width is not None:
            room = max(WIDTH_OF_NAMES, width - len(line))
            name = name if len(name) <= room else f"{name[: room // 2 - 1]}…{name[-(room - room // 2) :]}"
        text = Text(line + name)
        text.stylize("bold" if number == 0 else STYLES.get(row[0], ""), 0, widths[0])
        yield text


def _row(run: Standing, now: float) -> tuple[str, str, str, str, str, str]:
    reward, score = run.newest.get("step", {}).get("reward"), run.newest.get("evaluation", {}).get("mean")
    return (
        run.state,
        f"{run.step}/{run.steps}" if run.steps else "",
        "" if reward is None else f"{reward:.3f}",
        "" if score is None else f"{100 * score:.1f} %",
        _short(run.seconds_left) if run.state == "running" else f"{_short(now - run.written)} ago",
        run.folder.path.resolve().name,
    )


def _short(seconds: float | None) -> str:
    """A time in one unit.

    >>> _short(7.2), _short(130), _short(7300), _short(200000), _short(None)
    ('7 s', '2 min', '2 h', '2 d', '')
    """
    if seconds is None:
        return ""
    for unit, of_unit in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= of_unit:
            return f"{int(seconds / of_unit)} {unit}"
    return f"{max(0, int(seconds))} s"


def lines(run: Standing, now: float) -> Iterator[str]:
    """Where one run stands, in words."""
    yield str(run.folder.path)
    for name, text in (
        ("state", _said_state(run, now)),
        ("phase", _said_phase(run)),
        ("step", f"{run.step} of {run.steps} ({100 * run.step // run.steps} %)" if run.steps else ""),
        ("reward", _reward(run)),
        ("held out", _score(run.newest.get("evaluation"))),
        ("alert", _at(run, "alert", "message")),
        ("restart", _at(run, "restart", "cause")),
        ("why" if run.state in ("stopped", "queued") else "error", _error(run)),
        ("logs", _said_logs(run, now)),
        *(("doctor", text) for text in _doctor(run)),
        *(("next", text) for text in _next(run)),
    ):
        if text:
            yield f"  {name:<9} {' '.join(text.split())}"


def _said_state(run: Standing, now: float) -> str:
    quiet = duration(max(0.0, now - run.written))
    where = f" on {run.host}" if run.host else ""
    if run.state == "running":
        silent = f"; nothing was written for {quiet}" if now - run.written > SILENT_S else ""
        whose = f", pid {run.pid}" if run.pid else ""
        return f"running{where}{whose}, begun {duration(max(0.0, now - run.began))} ago{silent}"
    said = {
        "died": f"died{where}: its launcher is gone, and it did not say how it ended; last written {quiet} ago",
        "silent": f"silent{where}: nothing was written for {quiet}, and its launcher cannot be looked at from here",
        "queued": f"queued: stopped, and given back to Slurm, {quiet} ago",
    }
    return said.get(run.state, f"{run.state}{where}, {quiet} ago")


def _said_phase(run: Standing) -> str:
    if run.state == "finished":
        return ""
    return run.phase + (f", left {duration(run.seconds_left)}" if run.seconds_left is not None else "")


def _reward(run: Standing) -> str:
    step = run.newest.get("step", {})
    if step.get("reward") is not None:
        spread = f" +- {step['reward_std']:.3f}" if step.get("reward_std") is not None else ""
        return f"{step['reward']:.3f} at step {run.step}{spread}"
    return f"none; loss {step['loss']:.4f} at step {run.step}" if step.get("loss") is not None else ""


def _score(found: Mapping[str, Any] | None) -> str:
    try:
        if found is None:
            return ""
        low, high = 100 * found["low"], 100 * found["high"]
        return f"{100 * found['mean']:.1f} % [{low:.1f}, {high:.1f}] at step {found['step']}"
    except (KeyError, TypeError):
        return ""


def _at(run: Standing, kind: str, name: str) -> str:
    """The newest line of this kind."""
    line = run.newest.get(kind)
    return f"at step {line.get('step')}: {line.get(name)}" if line else ""


def _error(run: Standing) -> str:
    """Why it ended; where nobody said so, the newest error that a log of its last attempt ends with."""
    if run.state not in ("died", "silent"):
        return "" if run.state == "finished" else run.why
    errors = (log_ends.read(log, 0).error for log in _logs(run.folder))
    return next((each for each in errors if each), "no log ends with one" if run.state == "died" else "")


def _said_logs(run: Standing, now: float) -> str:
    logs = _logs(run.folder)
    if not logs:
        return ""
    beside = f"; beside it {', '.join(log.name for log in logs[1:])}" if logs[1:] else ""
    return f"{logs[0]}, written {_short(now - _modified(logs[0]))} ago{beside}"


def _doctor(run: Standing) -> Iterator[str]:
    """What the doctor finds in it, worst first."""
    try:
        findings = doctor.diagnose(read_run(run.folder.path))
    except RunError as error:
        yield f"cannot read it: {error}"
        return
    for finding in findings[:3]:
        yield f"{finding.name} ({finding.severity}): {finding.what}; {finding.evidence}; {finding.remedy}"


def _next(run: Standing) -> Iterator[str]:
    """What a person does now: commands to be typed where the project lies."""
    path = run.folder.path
    if run.state == "running":
        if logs := _logs(run.folder):
            yield f"follow it: tail -f {logs[0]}"
        if run.pid:
            yield f"stop it with a checkpoint: kill -USR1 {run.pid}"
    elif run.state == "finished":
        page = path / refresher.NAME
        yield f"look at it: {page}" if page.is_file() else f"look at it: python launch/report.py {path}"
        if run.folder.model.is_dir():
            yield f"its model: {run.folder.model}"
    elif run.state == "queued":
        yield "nothing: Slurm starts it again (squeue --me)"
    elif run.state in _LEFT_OFF:
        if run.state == "alarm":
            yield str(_object(run.folder.summary).get("remedy") or "")
        saved = max(checkpoints.by_step(run.folder.checkpoints), default=0)
        whence = f"from checkpoint-{saved}" if saved else "from the beginning, there is no checkpoint"
        when = {"failed": "when the error is mended, go on", "silent": f"where nothing of it runs on {run.host}, go on"}
        yield f"{when.get(run.state, 'go on')} {whence}: python launch/run.py --resume {path}"
