"""What the real wandb has written of an offline run: its file is LevelDB's log of protobuf records."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER, _BLOCK = 7, 32768


def records(folder: Path) -> Iterator[Any]:
    """The records of the newest W&B run in a run folder."""
    path = max((folder / "wandb").glob("offline-run-*/*.wandb"))
    data, at, record = path.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _HEADER:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged, in its order, without what W&B adds."""
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                keys = list(item.nested_key) or [item.key]
                inner = row
                for key in keys[:-1]:
                    inner = inner.setdefault(key, {})
                inner[keys[-1]] = json.loads(item.value_json)
            rows.append({name: value for name, value in row.items() if not name.startswith("_")})
    return rows


def artifacts(folder: Path) -> dict[str, list[Path]]:
    """By type, the files that are to be sent; of each artifact its first."""
    found: dict[str, list[Path]] = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "artifact":
            files = [Path(each.local_path) for each in record.artifact.manifest.contents]
            found.setdefault(record.artifact.type, []).append(files[0])
    return found


def table(folder: Path, name: str) -> dict[str, Any]:
    """The newest table of this name, with its ``columns`` and ``data``."""
    path = max((folder / "wandb").rglob(f"{name}_*.table.json"))
    return dict(json.loads(path.read_text(encoding="utf-8")))
