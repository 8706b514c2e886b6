"""Which trackers a run reports to, and that W&B neither asks, nor hangs, nor stops a run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r1zero.reporting import trackers


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


def start(folder: Path, timeout_s: float, **environment: str) -> list[str]:
    """What a process says that starts W&B for `folder`: the line of `start_wandb`, then id and project of the run."""
    folder.mkdir(exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from r1zero.reporting import trackers\n"
        f"trackers.INIT_TIMEOUT_S = {timeout_s}\n"
        "print(trackers.start_wandb(Path(sys.argv[1]), {'max_steps': 3}))\n"
        "import wandb; run = wandb.run; run.log({'reward': 0.5})\n"
        "print(run.id, run.project, dict(run.config)); run.finish()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
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
        time.sleep(1.1)  # W&B names its folders by the second
    files = sorted((folder / "wandb").rglob("*.wandb"))
    assert [file.name for file in files] == ["run-tiny-20261121-093000.wandb"] * 2
    assert all(file.stat().st_size > 500 for file in files)
    assert not (tmp_path / "wandb").exists()


def test_a_server_that_is_not_there_means_offline_and_says_how_to_send_it_later(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    began = time.monotonic()
    said, identity = start(
        folder, 3, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0123456789" * 4, WANDB_PROJECT="mine"
    )
    assert time.monotonic() - began < 30
    assert said.startswith("Weights & Biases cannot be reached (")
    offline = Path(said.split("`wandb sync ")[1].split("`")[0])
    assert offline.parent == folder / "wandb" and offline.name.startswith("offline-run-")
    assert (offline / "run-run.wandb").is_file()
    assert identity == "run mine {'max_steps': 3}"


def test_the_wait_for_a_server_is_bounded() -> None:
    assert trackers.INIT_TIMEOUT_S <= 30
