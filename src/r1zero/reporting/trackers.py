"""Which experiment trackers a run reports to. Nothing here asks a question, needs a login or stops a run.

Weights & Biases is on when the user has it configured, one run per run folder; without a network it goes on offline.
It is given each line of metrics.jsonl as it is. The others are transformers' own callbacks, under transformers' names.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1zero.reporting import refresher
from r1zero.run_folder import STOPPED_OUTCOME

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0  # what is not sent by then stays in the run folder, for `wandb sync`
ROLLOUTS_EVERY = 10  # steps, and the first
ROLLOUTS = 8  # of a step, in one table
CHARACTERS = 20_000  # of a prompt or completion in a table
COLUMNS = ("step", "prompt", "completion", "gold", "answer", "verdict", "reward", "length", "clipped", "source")
_LEFT_OUT = ("time",)  # W&B has its own
_NO_ID = re.compile(r"[/\\#?%:]")  # what W&B takes in no id


def chosen(asked: str | list[str] | None) -> list[str]:
    """The trackers in use: those the recipe names, else wandb where it is configured, else none."""
    if asked is None or asked == "all":
        return ["wandb"] if _wandb_configured() else []
    names = [asked] if isinstance(asked, str) else list(asked)
    return [name for name in names if name != "none"]


class WandbRun:
    """The W&B run of one run folder, as its recorder sees it. The first thing that fails is said, and is the last.

    Args:
        folder: the run folder.
        say: says a line in the trainer's log.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        """Open it, and say where it is, or that it is offline; the same folder always means the same W&B run."""
        try:
            self._run, where = _opened(self._folder, config)
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more than its tracker
            self._off(error)
        else:
            self._say(where)

    def record(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: a step's numbers under their names, an evaluation's under ``evaluation/``."""
        before = "evaluation/" if line["kind"] == "evaluation" else ""
        numbers = {name: value for name, value in line.items() if _is_number(value) and name not in _LEFT_OUT}
        step = numbers.pop("step")
        self._try(lambda run: run.log({"step": step, **{before + name: value for name, value in numbers.items()}}))

    def rollouts(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The completions of one optimizer step: of every `ROLLOUTS_EVERY`-th some go into a table."""
        if step % ROLLOUTS_EVERY and step != 1:
            return

        def log(run: Any) -> None:
            import wandb

            data = [[_shortened(row[name]) for name in COLUMNS] for row in sample(rows, ROLLOUTS)]
            run.log({"step": step, "rollouts": wandb.Table(columns=list(COLUMNS), data=data)})

        self._try(log)

    def finish(self, outcome: str | None) -> None:
        """Close it; where the run has come to its end, with a fresh report as its artifact. It takes a bounded time.

        Args:
            outcome: as the summary has it; None where there is none, as of a run that fails.
        """
        if outcome not in (None, STOPPED_OUTCOME) and self._run is not None:
            refresher.Refresher(self._folder).finish()
        page = self._folder / refresher.NAME

        def close(run: Any) -> None:
            import wandb

            if page.is_file():
                artifact = wandb.Artifact(f"report-{run.id}"[:128], type="report")
                artifact.add_file(str(page))
                run.log_artifact(artifact)
            run.finish(exit_code=int(outcome is None))

        self._try(close)
        self._run = None

    def _try(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more than its tracker
            self._off(error)

    def _off(self, error: Exception) -> None:
        self._run = None
        self._say(off_line("Weights & Biases", error))


class _Guarded:
    """A tracker's callback in a trainer of transformers; what fails in it is said once, and it is called no more.

    No TrainerCallback by descent: the handler of callbacks asks each for the method of an event, whichever it is.
    """

    def __init__(self, name: str, callback: Any, say: Callable[[str], None]) -> None:
        self._name, self._callback, self._say = name, callback, say
        self._failed = False

    def __getattr__(self, event: str) -> Any:
        found = getattr(self._callback, event)
        if not event.startswith("on_"):
            return found

        def call(*words: Any, **more: Any) -> Any:
            if self._failed:
                return None
            try:
                return found(*words, **more)
            except Exception as error:  # noqa: BLE001 - whatever it is, the run is worth more than its tracker
                self._failed = True
                self._say(off_line(self._name, error))
                return None

        return call


def guarded(callbacks: Iterable[Any], report_to: Sequence[str], say: Callable[[str], None]) -> list[Any]:
    """A trainer's callbacks, those of trackers so that none can stop the run."""
    from transformers.integrations import get_reporting_integration_callbacks

    names = dict(zip(get_reporting_integration_callbacks(list(report_to)), report_to, strict=True))
    return [_Guarded(names[type(each)], each, say) if type(each) in names else each for each in callbacks]


def off_line(name: str, error: Exception) -> str:
    """The line of a tracker that has failed."""
    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"{name} is off from here on, the run goes on without it: {why}"


def sample(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """At most `count` of `rows`, evenly spread, so that they are of different questions.

    >>> [row["at"] for row in sample([{"at": at} for at in range(16)], 4)]
    [0, 4, 8, 12]
    """
    return [rows[at * len(rows) // count] for at in range(count)] if len(rows) > count else list(rows)


def _shortened(value: Any) -> Any:
    """A long text without its middle."""
    if not isinstance(value, str) or len(value) <= CHARACTERS:
        return value
    half = CHARACTERS // 2
    return f"{value[:half]}\n[... {len(value) - 2 * half} characters ...]\n{value[-half:]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _opened(run_folder: Path, config: dict[str, Any]) -> tuple[Any, str]:
    """The W&B run, and a line that says where it is, or that it is offline."""
    import wandb

    os.environ.setdefault("WANDB_DATA_DIR", str(run_folder.resolve() / "wandb"))  # what is to be sent, else in the home
    wanted: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "r1zero"),
        "id": _NO_ID.sub("-", run_folder.resolve().name)[:128],
        "name": run_folder.resolve().name,
        "resume": "allow",
        "allow_val_change": True,  # some keys may be other ones from a resume on
        "dir": str(run_folder),
        "config": config,
    }
    always: dict[str, Any] = {"silent": True, "finish_timeout": FINISH_TIMEOUT_S}
    try:
        run = wandb.init(**wanted, settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, **always))
    except (wandb.errors.Error, OSError) as error:
        why = " ".join(str(error).split())[:200]
        wandb.teardown()  # its service still holds the id of the run that did not start
        run = wandb.init(**wanted, mode="offline", settings=wandb.Settings(**always))
        later = f"`wandb sync {run.settings.sync_dir}` sends it later"
        return run, f"Weights & Biases cannot be reached ({why}); offline: {later}"
    return run, f"Weights & Biases: {'offline, ' + str(run.settings.sync_dir) if run.offline else run.url}"


def _wandb_configured() -> bool:
    if importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_MODE") == "disabled":
        return False
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") == "offline":
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
