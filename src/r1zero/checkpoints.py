"""Checkpoints that are complete or absent: how they get their name, how they are told apart, which one is newest.

A checkpoint is written aside, as ``checkpoints/.checkpoint-20.partial/checkpoint-20``. When all of it is on the disk it
gets a manifest with the size and the hash of every file, and then, by one rename, its place. So what is called
checkpoint-20 was complete once; what became of it since, its manifest tells. No torch: the launcher reads this too.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from r1zero.restarts import Refusal
from r1zero.run_folder import RunFolder

MANIFEST = "manifest.json"
THREADS = 8  # reading and hashing; a disk array gives more to several readers than to one
PIECE_BYTES = 4 * 2**20
SPARE_BYTES = 4 * 2**20  # tokenizer, configuration and manifest, and what a file system keeps for itself
MIB = 2**20


class CheckpointError(Refusal):
    """A checkpoint cannot be written, or nothing can go on from it; the message names it and what is in the way."""


@dataclass(frozen=True)
class Entry:
    """One file of a checkpoint.

    >>> Entry(bytes=5, xxh3="b5e6e1e4ed6f8c4e4b2e4d3d6a1c9b0a").bytes
    5

    Attributes:
        bytes: its size.
        xxh3: its 128-bit XXH3 hash, in hex.
    """

    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Found:
    """The newest complete checkpoint of a run.

    >>> Found(Path("checkpoint-10"), ((Path("checkpoint-20"), "optimizer.pt is missing"),)).path
    PosixPath('checkpoint-10')

    Attributes:
        path: of the checkpoint; None where there is none.
        passed_over: newer ones that nothing can go on from, newest first, each with the reason.
    """

    path: Path | None
    passed_over: tuple[tuple[Path, str], ...] = field(default=())


def newest(folder: RunFolder) -> Found:
    """The complete checkpoint of the highest step. Each file of those that are looked at is read."""
    passed_over: list[tuple[Path, str]] = []
    for _, path in sorted(by_step(folder.checkpoints).items(), reverse=True):
        why = problem(path)
        if why is None:
            return Found(path, tuple(passed_over))
        passed_over.append((path, why))
    return Found(None, tuple(passed_over))


def by_step(checkpoints: Path) -> dict[int, Path]:
    """What bears the name of a checkpoint, by its optimizer step."""
    found = ((step_of(path), path) for path in checkpoints.glob("checkpoint-*"))
    return {step: path for step, path in found if step is not None}


def step_of(path: Path) -> int | None:
    """The optimizer step that a checkpoint's name says; None where it is no checkpoint's.

    >>> step_of(Path("checkpoints/checkpoint-20")), step_of(Path("model"))
    (20, None)
    """
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def problem(checkpoint: Path) -> str | None:
    """Why nothing can go on from a checkpoint, in one line that names the file; None where nothing is wrong."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    if checkpoint.name != f"checkpoint-{manifest['step']}":
        return f"{MANIFEST} is that of step {manifest['step']}"
    return first_difference(checkpoint, entries_of(manifest)) or not_resumable(manifest)


def not_resumable(manifest: Mapping[str, Any]) -> str | None:
    """Why a complete checkpoint does not hold enough to go on from, None where it does."""
    return None if manifest["resumable"] else "it holds the model alone, without the optimizer (save_only_model: true)"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: when it is missing or not as it was written.
    """
    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing: it was not written to its end, or not by r1zero") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error})") from error
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest.pop("xxh3") == _hash_of(manifest):
            return manifest
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"{MANIFEST} is not as it was written")


def write_manifest(
    checkpoint: Path, step: int, resumable: bool, facts: Mapping[str, Any], files: Mapping[str, Entry]
) -> None:
    """Write the manifest of a checkpoint whose other files are on the disk.

    Args:
        checkpoint: its folder.
        step: the optimizer step.
        resumable: whether it holds all that a run goes on from.
        facts: what a run that goes on from it must have in common with the one that wrote it.
        files: by name relative to `checkpoint`.
    """
    manifest = {
        "step": step,
        "resumable": resumable,
        "facts": dict(facts),
        "bytes": sum(each.bytes for each in files.values()),
        "files": {name: {"bytes": files[name].bytes, "xxh3": files[name].xxh3} for name in sorted(files)},
    }
    text = json.dumps({**manifest, "xxh3": _hash_of(manifest)}, indent=1, ensure_ascii=False) + "\n"
    path = checkpoint / MANIFEST
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def entries_of(manifest: Mapping[str, Any]) -> dict[str, Entry]:
    """The files that a manifest lists."""
    return {name: Entry(each["bytes"], each["xxh3"]) for name, each in manifest["files"].items()}


def files_of(checkpoint: Path) -> list[str]:
    """The files in a checkpoint's folder but for the manifest, by name relative to it, in order."""
    found = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def first_difference(checkpoint: Path, files: Mapping[str, Entry]) -> str | None:
    """The first of `files` that is not as it was written, in one line; None where all are."""
    for name, entry in files.items():  # cheap looks first
        try:
            size = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} is too {'short' if size < entry.bytes else 'long'}: {size} of {entry.bytes} bytes"
    try:
        hashed = entries(checkpoint, files, sync=False)
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
    return next((f"{name} differs from what was written" for name in files if hashed[name] != files[name]), None)


def entries(checkpoint: Path, names: Iterable[str], sync: bool) -> dict[str, Entry]:
    """Size and hash of files, read by several threads.

    Args:
        checkpoint: the folder that they are in.
        names: relative to it.
        sync: whether to bring each file to the disk first.
    """
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _entry(checkpoint / name, sync), names), strict=True))


def aside(checkpoint: Path) -> Path:
    """Where a checkpoint is written before it is complete.

    >>> aside(Path("checkpoints/checkpoint-20"))
    PosixPath('checkpoints/.checkpoint-20.partial/checkpoint-20')
    """
    return checkpoint.parent / f".{checkpoint.name}.partial" / checkpoint.name


def begin(checkpoint: Path, needed: int) -> Path:
    """An empty folder aside for a checkpoint.

    Args:
        checkpoint: what is to be written.
        needed: bytes that it will take at least.

    Raises:
        CheckpointError: when the disk has no room for that; it names the folder, the bytes needed and those free.
    """
    place = aside(checkpoint)
    shutil.rmtree(place.parent, ignore_errors=True)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(checkpoint.parent).free
    if free < needed:
        raise no_space(checkpoint, needed, free)
    place.mkdir(parents=True)
    return place


def put_in_place(checkpoint: Path) -> None:
    """Give what lies complete aside its name. One of that name that lay there, torn or of a course given up, goes."""
    place = aside(checkpoint)
    for path in (place, *(each for each in place.rglob("*") if each.is_dir())):
        _sync(path)
    if checkpoint.exists():
        remove(checkpoint)
    place.rename(checkpoint)
    _sync(checkpoint.parent)
    place.parent.rmdir()


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: first its name, so that it is not met half deleted."""
    doomed = checkpoint.parent / f".{checkpoint.name}.removed"
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def give_up(checkpoint: Path) -> None:
    """Delete what was begun of a checkpoint. Any of several processes may, also while another one writes or deletes."""
    begun = aside(checkpoint).parent
    doomed = checkpoint.parent / f".{checkpoint.name}.removed"
    with suppress(OSError):  # another process was first
        begun.rename(doomed)
    for path in (begun, doomed):
        shutil.rmtree(path, ignore_errors=True)


def rotate(checkpoints: Path, latest: Path, keep: int | None) -> None:
    """Delete all but `keep` checkpoints; the oldest go first, but those of later steps than `latest` before them.

    Later ones are there when the run went back to an earlier one: they are torn, or of a course that was given up.

    Args:
        checkpoints: the folder that they are in.
        latest: the one that has just been completed, which always stays.
        keep: of them in all; None or less than 1 keeps all.
    """
    if keep is None or keep < 1:
        return
    found = by_step(checkpoints)
    step = next(number for number, path in found.items() if path == latest)
    others = sorted((number for number in found if number != step), key=lambda number: (number < step, number))
    for number in others[: max(0, len(found) - keep)]:
        remove(found[number])


def remove_leftovers(checkpoints: Path) -> None:
    """Delete what a run that was killed left half written or half deleted."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.removed"):
        for path in checkpoints.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def no_space(checkpoint: Path, needed: int, free: int) -> CheckpointError:
    """The error of a disk that has no room for a checkpoint; `needed` and `free` in bytes."""
    return CheckpointError(
        f"no room for {checkpoint.name} in {checkpoint.parent}: it needs {needed / MIB:.1f} MiB and {free / MIB:.1f} "
        "MiB are free. Older checkpoints are as they were. Make room, or keep fewer with save_total_limit, and go on "
        "from the newest"
    )


def given_up(checkpoint: Path) -> CheckpointError:
    """The error of a process whose part of a checkpoint has no place any more. The cause is another's, who says it."""
    return CheckpointError(
        f"{checkpoint.name} was given up by another process: what was begun of it in {checkpoint.parent} is gone"
    )


def out_of_space(error: BaseException, free: int, missing: int) -> bool:
    """Whether writing failed for want of space.

    torch and safetensors say so in words of their own or not at all, so the disk is asked too.

    Args:
        error: what writing raised.
        free: bytes on the disk.
        missing: bytes that were still to be written.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        chain = chain.__cause__ or chain.__context__
    return free < max(missing, MIB) or "No space left on device" in str(error)


def bytes_in(folder: Path) -> int:
    """What the files in a folder take, in bytes; of one that another process deletes, what is met of it."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += Path(place, name).stat().st_size
    return found


def _entry(path: Path, sync: bool) -> Entry:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            size += len(piece)
    return Entry(size, digest.hexdigest())


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode())


def _sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
