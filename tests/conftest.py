"""Shared doors: the project folder, the data folder where it is present, and the launcher called in this process."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1zero import launcher

PROJECT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("R1ZERO_TEST_DATA", PROJECT.parent / "shared" / "data"))


@pytest.fixture
def gsm8k() -> Path:
    """The real GSM8K, where it is at hand; R1ZERO_TEST_DATA names a folder that holds gsm8k/{train,test}.jsonl."""
    folder = DATA / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"GSM8K is not at {folder}; set R1ZERO_TEST_DATA")
    return folder


@dataclass(frozen=True)
class Answer:
    """What a command answered."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """launch/run.py with these arguments, in this process."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["launch/run.py", *map(str, arguments)])
        try:
            code = launcher.main(PROJECT)
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Answer(code, out, err)

    return call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; read the diff")
