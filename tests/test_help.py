"""--help is instant, and lists every key of ours."""

import resource
import subprocess
import sys

import pytest

from r1zero import recipe
from tests.conftest import PROJECT


@pytest.mark.parametrize("script", ["run", "grpo", "sft"])
def test_help_answers_without_torch(script: str) -> None:
    command = [sys.executable, "-X", "importtime", PROJECT / "launch" / f"{script}.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "trl", "numpy", "pyarrow", "datasets"}
    assert "--key value" in done.stdout


def test_help_lists_every_key_of_ours() -> None:
    text = subprocess.check_output([sys.executable, PROJECT / "launch/run.py", "--help"], text=True)
    for key in recipe.own_keys().values():
        assert f"  {key.name}  [" in text
        assert key.help.split(";")[0][:40] in text


@pytest.mark.alone
def test_help_is_quick() -> None:
    """The bound is the bar's, of processor time: the clock on the wall tells what else the machine is doing."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, PROJECT / "launch/run.py", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.7
