"""Which trackers a run reports to, and that W&B neither asks, nor hangs, nor stops a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1zero.reporting import trackers
from tests.reporting import wandb_file


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has configured nothing."""
    for variable in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("asked", [None, "all"])
@pytest.mark.parametrize(
    ("environment", "netrc", "expected"),
    [
        ({}, None, []),
        ({"WANDB_API_KEY": "k"}, None, ["wandb"]),
        ({"WANDB_MODE": "offline"}, None, ["wandb"]),
        ({"WANDB_MODE": "online"}, None, []),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, None, []),
        ({}, "machine api.wandb.ai\n  login user\n  password k\n", ["wandb"]),
        ({}, "machine github.com login user password k\n", []),
        ({"WANDB_MODE": "disabled"}, "machine api.wandb.ai login user password k\n", []),
    ],
    ids=[
        "nothing",
        "a key",
        "offline",
        "online without a key",
        "disabled",
        "netrc",
        "netrc of others",
        "netrc, disabled",
    ],
)
def test_wandb_is_on_where_the_user_has_configured_it(
    asked: str | None,
    environment: dict[str, str],
    netrc: str | None,
    expected: list[str],
    nobody: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (nobody / ".netrc").write_text(netrc)
    assert trackers.chosen(asked) == expected


def test_netrc_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert trackers.chosen(None) == ["wandb"]


def test_wandb_that_is_not_installed_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert trackers.chosen(None) == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("none", []),
        (["none"], []),
        ([], []),
        ("tensorboard", ["tensorboard"]),
        (["tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)
def test_what_the_recipe_names_wins(
    asked: str | list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert trackers.chosen(asked) == expected


def start(folder: Path, timeout_s: float, more: str = "", **environment: str) -> list[str]:
    """What a process says that has a W&B run for `folder`: its own line, id and project of the run, those of `more`."""
    folder.mkdir(exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from r1zero.reporting import trackers\n"
        f"trackers.INIT_TIMEOUT_S = {timeout_s}\n"
        "tracker = trackers.WandbRun(Path(sys.argv[1]), print)\n"
        "tracker.start({'max_steps': 3})\n"
        "import wandb; run = wandb.run\n"
        "if run: print(run.id, run.project, dict(run.config))\n"
        "step = {'kind': 'step', 'time': 1.0, 'steps': 30, 'reward': 0.5, 'kl': None}\n"
        f"{more}\n"
        "tracker.record({**step, 'step': 1})\n"
        "tracker.finish('stopped')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_offline_it_writes_into_the_run_folder_and_the_same_folder_is_the_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-20261121-093000"
    for _ in range(2):
        said, identity = start(folder, 30, WANDB_MODE="offline")
        assert said.startswith(f"Weights & Biases: offline, {folder}/wandb/offline-run-")
        assert identity == "tiny-20261121-093000 r1zero {'max_steps': 3}"
        assert wandb_file.history(folder) == [{"step": 1, "steps": 30, "reward": 0.5}]
        time.sleep(1.1)  # W&B names its folders by the second
    files = sorted((folder / "wandb").rglob("*.wandb"))
    assert [file.name for file in files] == ["run-tiny-20261121-093000.wandb"] * 2
    assert not (tmp_path / "wandb").exists()


def test_a_name_that_cannot_be_an_id(tmp_path: Path) -> None:
    said, identity = start(tmp_path / "50%:a#1", 30, WANDB_MODE="offline")
    assert said.startswith("Weights & Biases: offline, ")
    assert identity == "50--a-1 r1zero {'max_steps': 3}"


def test_a_server_that_is_not_there_means_offline_and_says_how_to_send_it_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    said, identity = start(
        folder, 3, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0123456789" * 4, WANDB_PROJECT="mine"
    )
    assert time.monotonic() - began < 60
    assert said.startswith("Weights & Biases cannot be reached (")
    offline = Path(said.split("`wandb sync ")[1].split("`")[0])
    assert offline.parent == folder / "wandb" and offline.name.startswith("offline-run-")
    assert (offline / "run-run.wandb").is_file()
    assert identity == "run mine {'max_steps': 3}"
    assert wandb_file.history(folder) == [{"step": 1, "steps": 30, "reward": 0.5}]


def test_the_waits_for_a_server_are_bounded() -> None:
    assert trackers.INIT_TIMEOUT_S <= 30
    assert trackers.FINISH_TIMEOUT_S <= 60


def test_where_it_cannot_be_opened_at_all_that_is_said_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "wandb").write_text("in the way")
    (said,) = start(folder, 3, WANDB_MODE="offline", WANDB_DIR="/dev/null")
    assert said.startswith("Weights & Biases is off from here on, the run goes on without it: ")


def test_when_its_service_dies_that_is_said_once(tmp_path: Path) -> None:
    """The service is a process of wandb's own, which a full disk or the kernel's killer may end."""
    kill = (
        "import psutil\n"
        "children = psutil.Process().children(recursive=True)\n"
        "assert children\n"
        "[child.kill() for child in children]; psutil.wait_procs(children, 30)\n"
        "for number in range(2, 30): tracker.record({**step, 'step': number})\n"
        "tracker.rollouts(10, [{name: 'x' for name in trackers.COLUMNS}])"
    )
    began = time.monotonic()
    said = start(tmp_path / "run", 30, kill, WANDB_MODE="offline")[2:]
    assert len(said) == 1
    assert said[0].startswith("Weights & Biases is off from here on, the run goes on without it: ")
    assert time.monotonic() - began < 90


def test_a_table_of_rollouts_is_bounded(tmp_path: Path) -> None:
    rows = (
        "row = {name: None for name in trackers.COLUMNS} | {'step': 1, 'prompt': 'p', 'length': 40000}\n"
        "rows = [row | {'completion': f'{at} ' + 'x' * 40000 + f' {at}'} for at in range(512)]\n"
        "for number in range(1, 31): tracker.rollouts(number, rows)"
    )
    folder = tmp_path / "run"
    start(folder, 30, rows, WANDB_MODE="offline")
    tables = [row for row in wandb_file.history(folder) if "rollouts" in row]
    assert [row["step"] for row in tables] == [1, 10, 20, 30]
    table = wandb_file.table(folder, "rollouts")
    completions = [row[table["columns"].index("completion")] for row in table["data"]]
    assert [text.split(" ")[0] for text in completions] == [str(at) for at in range(0, 512, 64)]
    assert all(len(text) < 20_100 and text.split(" ")[-1] == text.split(" ")[0] for text in completions)
    assert "[... 20004 characters ...]" in completions[0]


class Failing:
    """A tracker's callback that fails at its second event."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_begin(self, *words: object, **more: object) -> str:
        self.seen.append("begin")
        return "control"

    def on_log(self, *words: object, **more: object) -> None:
        self.seen.append("log")
        raise OSError(28, "No space left on device")


def test_a_callback_that_fails_is_said_once_and_called_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import integrations

    other, failing = object(), Failing()
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [Failing for _ in names])
    said: list[str] = []
    callbacks = trackers.guarded([other, failing], ["tensorboard"], said.append)
    assert callbacks[0] is other
    assert callbacks[1].on_train_begin(None) == "control"
    assert [callbacks[1].on_log(None, logs={}) for _ in range(3)] == [None] * 3
    assert callbacks[1].on_train_begin(None) is None
    assert failing.seen == ["begin", "log"]
    why = "OSError: [Errno 28] No space left on device"
    assert said == [f"tensorboard is off from here on, the run goes on without it: {why}"]


def test_by_its_own_name_a_tracker_is_found_among_a_trainers_callbacks() -> None:
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import DefaultFlowCallback

    flow, board = DefaultFlowCallback(), TensorBoardCallback()
    kept = trackers.guarded([flow, board], ["tensorboard"], print)
    assert kept[0] is flow and kept[1] is not board
    assert kept[1].logging_dir is board.logging_dir  # what is no event is the callback's own
