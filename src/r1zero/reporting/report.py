"""A run's folder becomes one page, report.html: curves, completions, facts. No torch.

    python launch/report.py RUN [RUN ...] [--output FILE]

Everything is in the one file, which opens without a network and may be sent on. Charts are drawn by uPlot 1.6.32 (MIT),
which lies beside this file: 50 kB without dependencies, where plotly's script has 4.5 MB; it is the library that draws
Grafana's time series. Nothing is built: what the page runs is what stands in ``page/``.

A page shows what models wrote, and that is hostile: its data are compressed and in base64, so that no completion can
end a script; its script makes nodes of text; and its content security policy runs no other script and asks no network.
"""

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from r1zero.reporting import report_data
from r1zero.reporting.refresher import NAME
from r1zero.reporting.run_reader import RunError, read_runs
from r1zero.run_folder import write_text

PAGE = Path(__file__).with_name("page")


@dataclass(frozen=True)
class Written:
    """A page on disk.

    >>> Written(Path("runs/x/report.html"), bytes=1_250_000, seconds=2.5).line()
    'runs/x/report.html (1.2 MB, in 2.5 s)'

    Attributes:
        path: of the page.
        bytes: its size.
        seconds: what making it took.
    """

    path: Path
    bytes: int
    seconds: float

    def line(self) -> str:
        """The page in a line."""
        return f"{self.path} ({self.bytes / 1e6:.1f} MB, in {self.seconds:.1f} s)"


def write(paths: Sequence[str | Path], output: Path | None = None) -> Written:
    """Write the page of one run, or of several side by side; whole or not at all.

    Args:
        paths: run folders.
        output: of the page; None: report.html in the folder of the one run, for several in the current folder.

    Raises:
        RunError: one of them is no run folder.
        OSError: the page cannot be written there.
    """
    began = time.monotonic()
    if output is None:
        output = Path(paths[0]) / NAME if len(paths) == 1 else Path(NAME)
    text = html(*report_data.page(read_runs(paths)))
    write_text(output, text)
    return Written(output, len(text.encode()), time.monotonic() - began)


def html(facts: dict[str, Any], rollouts: dict[str, Any]) -> str:
    """The page; see `report_data.page` for what it is given."""
    script = _read("uPlot.iife.min.js") + "\n" + _read("page.js")
    style = _read("uPlot.min.css") + "\n" + _read("page.css")
    parts = {
        "policy": f"default-src 'none'; img-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'",
        "style": style,
        "script": script,
        "facts": _packed(facts),
        "rollouts": _packed(rollouts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read("page.html"))


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _packed(content: dict[str, Any]) -> str:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=6, mtime=0)).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    """``launch/report.py``.

    Returns:
        The exit code: 0, or 2 where a folder is no run or the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="launch/report.py",
        description="One page, report.html, of a run or of several side by side; works without a network.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as runs/X-20261121-093000")
    where = f"the page; else {NAME} in the folder of the one run, for several in the current folder"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--background", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.background is not None:
        _step_back(given.background)
    try:
        written = write(given.runs, given.output)
    except RunError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: the page cannot be written: {error}; name another place with --output FILE\n")
        return 2
    path = written.path.resolve()
    sys.stdout.write(
        f"wrote {written.line()}\nopen {path.as_uri()}\nfrom another machine: scp {os.uname().nodename}:{path} .\n"
    )
    return 0


def _step_back(seconds: float) -> None:
    """Let everything else on this machine come first, and end after so many seconds."""
    os.nice(19)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    signal.alarm(max(1, int(seconds)))


if __name__ == "__main__":
    sys.exit(main())
