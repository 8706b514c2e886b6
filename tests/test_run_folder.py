"""The run folder: never written over, never half a file, and everything that ran is in it."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from r1zero import run_folder
from r1zero.run_folder import RunFolder, default_path
from tests.conftest import PROJECT


def test_a_name_that_is_taken_gets_a_number_and_the_taken_one_stays_as_it_is(tmp_path: Path) -> None:
    wanted = RunFolder(tmp_path / "runs" / "run")
    first = wanted.create()
    (first.path / "mine").write_text("mine")
    (tmp_path / "runs" / "run-3").write_text("a file of that name")
    assert [wanted.create().path.name for _ in range(3)] == ["run-2", "run-4", "run-5"]
    assert first.path == wanted.path
    assert [path.name for path in first.path.iterdir()] == ["mine"]


def test_a_thousand_runs_of_one_name_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(self: Path, parents: bool = False) -> None:
        raise FileExistsError(self)

    monkeypatch.setattr(Path, "mkdir", taken)
    with pytest.raises(FileExistsError, match="run: a thousand runs of this name exist"):
        RunFolder(Path("run")).create()


def test_what_cannot_be_made_is_said_by_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        RunFolder(tmp_path / "file" / "run").create()


def test_every_path_lies_in_the_folder_under_a_name_of_its_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = ["recipe", "plan", "versions", "status", "metrics", "summary", "stop", "logs", "checkpoints", "model"]
    paths = [getattr(folder, name) for name in names] + [folder.rollouts(7), folder.rollouts(7, "test")]
    assert len(set(paths)) == len(paths)
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        *("recipe.yaml", "plan.txt", "versions.json", "status.json", "metrics.jsonl", "summary.json"),
        *("stop.json", "logs", "checkpoints", "model", "rollouts/train-000007.parquet", "rollouts/test-000007.parquet"),
    ]


def test_the_default_path_is_recipe_and_local_time_and_output_dir_names_one_exactly() -> None:
    now = time.mktime((2026, 11, 21, 9, 30, 0, 0, 0, -1))
    assert default_path("runs", "tiny-add", None, now) == Path("runs/tiny-add-20261121-093000")
    assert default_path("runs", "tiny-add", "elsewhere/x", now) == Path("elsewhere/x")
    assert default_path("runs", "tiny-add", None).name.startswith(f"tiny-add-{time.localtime().tm_year}")


def test_metrics_that_are_still_being_written_are_left_out_until_they_are_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert list(folder.read_metrics()) == []
    run_folder.append_json_line(folder.metrics, {"kind": "step", "step": 1, "word": "größer\u2028"})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "st')
    assert list(folder.read_metrics()) == [{"kind": "step", "step": 1, "word": "größer\u2028"}]
    with folder.metrics.open("a") as file:
        file.write('ep": 2}\n')
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]


def test_a_file_is_written_whole_with_its_folder_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "status.json"
    run_folder.write_json(path, {"phase": "größer"})
    run_folder.write_json(path, {"phase": "kleiner"})
    assert path.read_text(encoding="utf-8") == '{\n  "phase": "kleiner"\n}\n'
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    run_folder.write_json(path, {"phase": "old"})
    with pytest.raises(UnicodeEncodeError):
        run_folder.write_text(path, "new \ud800")  # half a surrogate pair, which UTF-8 cannot say
    assert run_folder.read_json(path) == {"phase": "old"}


def test_a_reader_never_meets_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    content = {"numbers": list(range(2000))}
    run_folder.write_json(path, content)
    code = (
        "import sys; from pathlib import Path; from r1zero import run_folder\n"
        "for _ in range(300): run_folder.write_json(Path(sys.argv[1]), {'numbers': list(range(2000))})"
    )
    with subprocess.Popen([sys.executable, "-c", code, path]) as writer:
        reads = 0
        while writer.poll() is None:
            assert run_folder.read_json(path) == content
            reads += 1
    assert writer.returncode == 0 and reads > 20
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_line_is_cut_off_and_whole_ones_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    run_folder.drop_half_line(path)
    assert not path.exists()
    for content, kept in (('{"a": 1}\n{"b"', '{"a": 1}\n'), ('{"a": 1}\n', '{"a": 1}\n'), ('{"b"', "")):
        path.write_text(content)
        run_folder.drop_half_line(path)
        assert path.read_text() == kept


def test_what_was_recorded_of_steps_that_are_done_again_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [
        *({"kind": "step", "step": step, "attempt": 1} for step in (1, 2, 3)),
        {"kind": "evaluation", "step": 2, "attempt": 1},
        {"kind": "evaluation", "step": 3, "attempt": 1},
        {"kind": "alert", "step": 3, "attempt": 1},
        {"kind": "restart", "step": 3},
        {"kind": "resume", "step": 2},
        {"kind": "step", "step": 3, "attempt": 2},
    ]
    for line in lines:
        run_folder.append_json_line(folder.metrics, line)
    assert list(folder.read_metrics()) == [*lines[:2], lines[3], *lines[6:]]
    assert folder.read_metrics_after(0)[0] == lines


def test_what_is_not_there_reads_as_none(tmp_path: Path) -> None:
    assert run_folder.read_json(tmp_path / "absent.json") is None


def test_versions_say_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("one")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setattr(sys, "argv", ["launch/run.py", "recipe.yaml"])

    found = run_folder.versions(tmp_path, ("NVIDIA A10",))
    assert json.loads(json.dumps(found)) == found
    assert found["git_commit"] == head and found["git_dirty"] is False
    assert found["argv"] == ["launch/run.py", "recipe.yaml"]
    assert found["gpus"] == ["NVIDIA A10"]
    assert (found["host"], found["python"]) == (platform.node(), platform.python_version())
    assert found["cpu_count"] == os.cpu_count()
    assert abs(time.mktime(time.strptime(found["time"], "%Y-%m-%dT%H:%M:%S%z")) - time.time()) < 86400
    for package in ("r1zero", "torch", "trl", "transformers", "accelerate"):
        assert found["packages"][package] == metadata.version(package)
    assert set(found["packages"]) <= set(run_folder.PACKAGES)

    (tmp_path / "new").write_text("not tracked, so no change of what is")
    assert run_folder.versions(tmp_path)["git_dirty"] is False
    (tmp_path / "file").write_text("two")
    assert run_folder.versions(tmp_path)["git_dirty"] is True


def test_versions_without_git_or_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PACKAGES", ("no-such-package-as-this", "pyyaml"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = run_folder.versions(tmp_path)
    assert (found["git_commit"], found["git_dirty"], list(found["packages"])) == (None, False, ["pyyaml"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder.versions(PROJECT)["git_commit"] is None
