"""launch/evaluate.py through a real policy server on the CPU: the answers are those of transformers."""

import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import PROJECT
from tests.evaluation.conftest import make_run
from tests.serving.launched import environment, server_python
from tests.training.conftest import data

__all__ = ["data"]

pytestmark = [pytest.mark.xdist_group("real_server"), pytest.mark.timeout(900)]


@pytest.mark.parametrize("names", [["whole"], pytest.param(["whole", "adapted"], marks=pytest.mark.soak)], ids=len)
def test_a_server_answers_as_transformers_does(
    names: list[str], tmp_path: Path, model_folder: Path, data: Path
) -> None:
    """Whole weights of two steps in one server, adapters of two steps in another, and what both began with."""
    keys = {"max_completion_length": 16, "stop_strings": ["</answer>"]}
    runs = [make_run(tmp_path / name, model_folder, data, name == "adapted", **keys) for name in names]
    found = {}
    for engine in ("transformers", "vllm"):
        words = [*map(str, runs), "--checkpoints", "all", "--with_base", "--temperature", "0", "--engine", engine]
        done = subprocess.run(
            [server_python(), str(PROJECT / "launch" / "evaluate.py"), *words, "--output_dir", str(tmp_path / engine)],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((tmp_path / engine / "result.json").read_text())
        found[engine] = {
            each["model"]: pq.read_table(tmp_path / engine / each["completions"]["file"]).to_pylist()
            for each in result["evaluations"]
        }
    assert len(found["vllm"]) == 1 + 2 * len(names)
    assert found["vllm"] == found["transformers"]
    answers = [{row["completion"] for row in rows} for rows in found["vllm"].values()]
    assert all(one != other for at, one in enumerate(answers) for other in answers[:at])
    logs = sorted(path.name for path in (tmp_path / "vllm" / "logs").iterdir())
    assert logs == [f"server-{number}.log" for number in range(len(names))]
