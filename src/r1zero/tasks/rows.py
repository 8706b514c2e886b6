"""Rows of a dataset, each with the place it stands at: from the hub, a local folder or a single file.

A local folder holds a split as ``<split>.jsonl``, ``<split>.json``, ``<split>.parquet`` or shards
``<split>-*.parquet``, itself or in ``data/``, as snapshots of hub datasets do; where a configuration is named, in the
folder of that name.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from r1zero.tasks.problem import DatasetError

ENDINGS = (".jsonl", ".json", ".parquet")
Row = tuple[str, Mapping[str, Any]]


def local(dataset_name: str) -> Path | None:
    """The file or folder of that name, None where there is none: then it is a hub id."""
    path = Path(dataset_name).expanduser()
    return path if path.exists() else None


def read(dataset_name: str, split: str, config: str | None = None, key: str = "dataset_name") -> Iterator[Row]:
    """Every row of one split as (place, columns); the place is what an error names, "train.jsonl, line 3".

    Args:
        dataset_name: a hub id, a folder, or a file; a file is read whole, whatever the split.
        split: the split's name.
        config: the dataset's configuration: the hub's, or a folder inside the local one.
        key: the recipe key that named the dataset, for the remedy in an error.

    Raises:
        DatasetError: when the split is not there, cannot be read, or a row is no mapping of columns.
    """
    found = local(dataset_name)
    rows = _of_the_hub(dataset_name, split, config, key) if found is None else _of_files(dataset_name, split, config)
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise DatasetError(f"{place}: holds {repr(row)[:100]} where columns by name are expected")
        yield place, row


def files(dataset_name: str, split: str, config: str | None = None) -> list[Path]:
    """The files that hold one split of a local dataset.

    Raises:
        DatasetError: when there are none.
    """
    path = Path(dataset_name).expanduser()
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise DatasetError(f"{path}: is not one of {', '.join(ENDINGS)}; give such a file, or a folder of them")
        return [path]
    folders = [path / config, path / "data" / config] if config else [path, path / "data"]
    for folder in folders:
        for ending in ENDINGS:
            file = folder / f"{split}{ending}"
            if file.is_file():
                return [file]
        shards = sorted(file for file in folder.glob("*.parquet") if file.name.startswith(f"{split}-"))
        if shards:
            return shards
    here = sorted(each.name for folder in folders if folder.is_dir() for each in folder.iterdir())
    where = path / config if config else path
    raise DatasetError(
        f"{where}: has no {', '.join(split + ending for ending in ENDINGS)} or {split}-*.parquet; it holds "
        f"{', '.join(here[:8]) or 'nothing'}; name a split with dataset_train_split or dataset_test_split, a folder in "
        "it with dataset_config"
    )


def same_rows(one: tuple[str, str, str | None], other: tuple[str, str, str | None]) -> bool:
    """Whether two (dataset_name, split, config) name the same rows; local ones are told by their files."""
    if local(one[0]) is None or local(other[0]) is None:
        return one == other
    try:
        ours, theirs = ({file.resolve() for file in files(*each)} for each in (one, other))
    except DatasetError:
        return False  # reading it will say so
    return not ours.isdisjoint(theirs)


def _of_the_hub(dataset_name: str, split: str, config: str | None, key: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(dataset_name, config, split=split)
    except Exception as error:  # the hub, the cache and the builders raise many kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        remedy = f"offline, name a local folder with {split}.jsonl in it: --{key} FOLDER"
        raise DatasetError(f"{dataset_name}: split {split} cannot be loaded ({why}); {remedy}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{dataset_name}, {split} row {number}", row


def _of_files(dataset_name: str, split: str, config: str | None) -> Iterator[tuple[str, Any]]:
    for file in files(dataset_name, split, config):
        if file.suffix == ".parquet":
            for number, row in enumerate(_parquet(file), start=1):
                yield f"{file}, row {number}", row
        else:
            yield from _json(file)


def _parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(file).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise DatasetError(f"{file}: cannot be read as parquet ({' '.join(str(error).split())})") from error


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """One object a line, or, in a .json file, one list of objects."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file}: cannot be read ({error})") from error
    if file.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{file}: is not JSON ({error})") from error
        for number, row in enumerate(rows, start=1):
            yield f"{file}, row {number}", row
        return
    # By "\n" only: str.splitlines would also cut a text at U+2028, which JSON leaves as it is.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{file}, line {number}: is not JSON ({error})") from error
        yield f"{file}, line {number}", row
