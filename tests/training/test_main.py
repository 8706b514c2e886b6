"""The door of a trainer process: what it hands on, and the exit codes by which the launcher knows how it ended."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from r1zero.restarts import REFUSED, Refusal
from r1zero.training import main
from tests.conftest import PROJECT

RECIPE = PROJECT / "recipes" / "tiny" / "arithmetic_grpo.yaml"
Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """launch/grpo.py with a training of its own and further arguments."""

    def with_training(train: Callable[..., None], *arguments: str) -> int:
        monkeypatch.setattr(main, "_train", lambda method: train)
        words = ["launch/grpo.py", "--config", str(RECIPE), "--run_folder", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", words)
        return main.main("grpo", PROJECT)

    return with_training


@pytest.mark.parametrize(
    ("arguments", "resume"), [((), None), (("--resume", "run/checkpoint-20"), Path("run/checkpoint-20"))]
)
def test_the_checkpoint_to_go_on_from_is_handed_on(call: Call, arguments: tuple[str, ...], resume: Path | None) -> None:
    got: list[Any] = []
    assert call(lambda *words: got.extend(words), *arguments) == 0
    assert got[-1] == resume


def test_what_must_not_go_on_says_so_by_its_exit_code(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*words: Any) -> None:
        raise Refusal("the server serves another policy")

    assert call(train) == REFUSED
    assert capsys.readouterr().err == "error: the server serves another policy\n"
