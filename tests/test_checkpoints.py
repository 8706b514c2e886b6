"""Checkpoints: complete or absent, and what is not whole is found and named."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1zero import checkpoints
from r1zero.checkpoints import CheckpointError, newest
from r1zero.run_folder import RunFolder
from tests.conftest import PROJECT

FILES = ("model.safetensors", "optimizer.pt", "rng_state_0.pth", "global_step7/zero_pp_rank_0_optim_states.pt", "empty")


def write(folder: Path, step: int, *, resumable: bool = True, size: int = 3000) -> Path:
    """A checkpoint, written as the trainer does."""
    final = folder / "checkpoints" / f"checkpoint-{step}"
    place = checkpoints.begin(final, 0)
    for number, name in enumerate(FILES):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(random.Random(f"{step} {name}").randbytes(size + number) if name != "empty" else b"")
    entries = checkpoints.entries(place, checkpoints.files_of(place), sync=True)
    checkpoints.write_manifest(place, step, resumable, {"processes": 1}, entries)
    checkpoints.put_in_place(final)
    return final


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    assert newest(RunFolder(tmp_path)) == checkpoints.Found(None)
    paths = [write(tmp_path, step) for step in (5, 100, 20)]
    (tmp_path / "checkpoints" / "checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "README.md").write_text("of TRL")
    assert newest(RunFolder(tmp_path)) == checkpoints.Found(paths[1])
    assert sorted(path.name for path in paths[0].iterdir()) == sorted(
        [*{n.split("/")[0] for n in FILES}, "manifest.json"]
    )


HARMS = [(name, harm) for name in FILES for harm in ("missing", "too short", "too long", "differs")]


@pytest.mark.parametrize(
    ("name", "harm"), [each for each in HARMS if each not in (("empty", "too short"), ("empty", "differs"))]
)
def test_each_file_that_is_not_as_it_was_written_is_named(tmp_path: Path, name: str, harm: str) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 20)
    content = (newer / name).read_bytes()
    (newer / name).unlink()
    if harm != "missing":
        altered = bytes([content[0] ^ 1]) + content[1:] if harm == "differs" else b""
        (newer / name).write_bytes({"too short": content[:-1], "too long": content + b"."}.get(harm, altered))
    found = newest(RunFolder(tmp_path))
    assert found.path == older
    ((path, why),) = found.passed_over
    assert path == newer and why.startswith(name) and harm in why


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda text: None, "manifest.json is missing: it was not written to its end, or not by r1zero"),
        (lambda text: text[: len(text) // 2], "manifest.json is not as it was written"),
        (lambda text: "", "manifest.json is not as it was written"),
        (lambda text: "[]", "manifest.json is not as it was written"),
        (lambda text: text.replace("3000", "3001", 1), "manifest.json is not as it was written"),
        (lambda text: text.replace('"resumable": true', '"resumable": 1'), "manifest.json is not as it was written"),
    ],
    ids=["missing", "cut off", "empty", "no object", "a size", "a flag"],
)
def test_a_manifest_that_is_not_as_it_was_written_is_named(tmp_path: Path, harm, why: str) -> None:
    older, newer = write(tmp_path, 5), write(tmp_path, 20)
    text = harm((newer / "manifest.json").read_text())
    (newer / "manifest.json").unlink()
    if text is not None:
        (newer / "manifest.json").write_text(text)
    assert newest(RunFolder(tmp_path)) == checkpoints.Found(older, ((newer, why),))


def test_a_checkpoint_under_another_name_and_one_without_optimizer_are_passed_over(tmp_path: Path) -> None:
    older, model_alone = write(tmp_path, 5), write(tmp_path, 20, resumable=False)
    renamed = older.with_name("checkpoint-30")
    shutil.copytree(older, renamed)
    found = newest(RunFolder(tmp_path))
    assert found.path == older
    assert found.passed_over == (
        (renamed, "manifest.json is that of step 5"),
        (model_alone, "it holds the model alone, without the optimizer (save_only_model: true)"),
    )


def test_what_is_written_aside_is_no_checkpoint_and_goes_when_the_run_starts_again(tmp_path: Path) -> None:
    first = write(tmp_path, 5)
    place = checkpoints.begin(first.with_name("checkpoint-10"), 0)
    (place / "model.safetensors").write_bytes(b"half")
    half_deleted = first.with_name(".checkpoint-2.removed")
    half_deleted.mkdir()
    assert newest(RunFolder(tmp_path)) == checkpoints.Found(first)
    checkpoints.remove_leftovers(first.parent)
    assert list(first.parent.iterdir()) == [first]


def test_a_torn_one_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    torn = write(tmp_path, 5)
    (torn / "optimizer.pt").unlink()
    assert newest(RunFolder(tmp_path)).path is None
    assert newest(RunFolder(tmp_path)).path != write(tmp_path, 5, size=10) == newest(RunFolder(tmp_path)).path
    assert list(torn.parent.iterdir()) == [torn]


def test_the_oldest_go_and_the_latest_stays_whatever_the_limit(tmp_path: Path) -> None:
    paths = {step: write(tmp_path, step) for step in (5, 10, 15, 20)}
    folder = tmp_path / "checkpoints"
    for keep, left in (
        (None, [5, 10, 15, 20]),
        (0, [5, 10, 15, 20]),
        (4, [5, 10, 15, 20]),
        (3, [10, 15, 20]),
        (1, [20]),
    ):
        checkpoints.rotate(folder, paths[20], keep)
        assert sorted(checkpoints.by_step(folder)) == left
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-20"]


def test_after_going_back_the_later_ones_go_before_the_older_ones(tmp_path: Path) -> None:
    """The newest was torn, the run went back to step 10 and has made step 15 again."""
    paths = {step: write(tmp_path, step) for step in (5, 10, 15, 20)}
    (paths[20] / "optimizer.pt").unlink()
    for keep, left in ((3, [5, 10, 15]), (2, [10, 15]), (1, [15])):
        checkpoints.rotate(tmp_path / "checkpoints", paths[15], keep)
        assert sorted(checkpoints.by_step(tmp_path / "checkpoints")) == left
    assert newest(RunFolder(tmp_path)).path == paths[15]


def test_without_room_nothing_is_begun_and_the_error_names_folder_and_bytes(tmp_path: Path) -> None:
    first = write(tmp_path, 5)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.begin(first.with_name("checkpoint-10"), 10**18)
    said = str(raised.value)
    assert f"no room for checkpoint-10 in {first.parent}: it needs 953674316406.2 MiB and " in said
    assert "MiB are free" in said and "save_total_limit" in said
    assert list(first.parent.iterdir()) == [first] and newest(RunFolder(tmp_path)).path == first


def test_whether_a_disk_was_full_is_seen_from_the_error_or_the_disk() -> None:
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("PytorchStreamWriter failed")
    wrapped.__cause__ = full
    plenty = 2**40
    assert checkpoints.out_of_space(full, plenty, 10)
    assert checkpoints.out_of_space(wrapped, plenty, 10)
    assert checkpoints.out_of_space(ValueError("I/O error: No space left on device (os error 28)"), plenty, 10)
    assert checkpoints.out_of_space(RuntimeError("file write failed"), 5 * 2**20, 10 * 2**20)
    assert not checkpoints.out_of_space(RuntimeError("shapes differ"), plenty, 10)


# --- writers that are killed

WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from r1zero import checkpoints
from tests.test_checkpoints import write
step = int(sys.argv[3])
while True:
    step += 1
    latest = write(Path(sys.argv[2]), step, size=200_000)
    checkpoints.rotate(latest.parent, latest, 2)
    print(step, flush=True)
"""


def kill_while_writing(folder: Path, seconds: float, step: int) -> int:
    """Write checkpoints after `step` until killed after so many seconds; the last step that it had completed."""
    argv = [sys.executable, "-c", WRITER, str(PROJECT), str(folder), str(step)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        assert first, "the writer did not come to its first checkpoint"
        time.sleep(seconds)
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read()
    return [int(line) for line in (first + rest).split()][-1]


def survive(folder: Path, kills: int, seed: int) -> None:
    rng, step, partials = random.Random(seed), 0, 0
    for _ in range(kills):
        said = kill_while_writing(folder, rng.uniform(0.0, 0.08), step)
        found = newest(RunFolder(folder))
        assert found.path is not None and found.passed_over == ()
        step = int(found.path.name.removeprefix("checkpoint-"))
        assert step in (said, said + 1)  # killed between the rename and the word of it
        partials += any(found.path.parent.glob(".checkpoint-*"))
        checkpoints.remove_leftovers(found.path.parent)
        assert all(path.name.startswith("checkpoint-") for path in found.path.parent.iterdir())
    assert kills < 10 or partials > 0  # some kills did come in the middle


def test_a_writer_that_is_killed_leaves_the_newest_complete_one(tmp_path: Path) -> None:
    survive(tmp_path, kills=3, seed=0)


@pytest.mark.soak
def test_a_writer_that_is_killed_fifty_times(tmp_path: Path) -> None:
    survive(tmp_path, kills=50, seed=1)


# --- a disk that is full

SMALL_DISK_BYTES = 2_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    options = f"size={SMALL_DISK_BYTES}"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up_leaves_the_newest_complete_one(small_disk: Path) -> None:
    """Without the look before: as when somebody else fills the disk meanwhile."""
    first = write(small_disk, 1, size=300_000)
    with pytest.raises(OSError, match="No space left"):
        write(small_disk, 2, size=300_000)
    found = newest(RunFolder(small_disk))
    assert found.path == first and found.passed_over == ()
    partial = first.with_name(".checkpoint-2.partial")
    assert partial.exists()
    assert json.loads((first / "manifest.json").read_text())["step"] == 1
    checkpoints.remove_leftovers(first.parent)
    assert not partial.exists()
