"""What a machine is seen as: nvidia-smi is a script put first on PATH, the rest is real."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from r1zero import hardware
from r1zero.hardware import Gpu, HardwareError, assumed, detect, free_ports

A10, H200 = Gpu("NVIDIA A10", 22.5), Gpu("NVIDIA H200", 140.4)
SMI = """\
0, GPU-aaaa1111-0000, NVIDIA A10, 23028
1, GPU-aabb2222-0000, NVIDIA H200, 143771
"""


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it but a shell and what the test puts there; no variable of a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def two_gpus(machine: Path) -> None:
    script(machine, "nvidia-smi", f'[ "$1" = --query-gpu=index,uuid,name,memory.total ] || exit 9\necho "{SMI}"\n')


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (A10, H200)),
        ("0", (A10,)),
        ("1", (H200,)),
        ("1,0", (H200, A10)),
        (" 1 , 0 ", (H200, A10)),
        ("GPU-aabb", (H200,)),
        ("GPU-aaaa1111-0000,1", (A10, H200)),
        ("0,7,1", (A10,)),
        ("-1", ()),
        ("-1,0", ()),
        ("7", ()),
        ("GPU-cccc", ()),
        ("", ()),
        (",0", ()),
    ],
)
def test_the_gpus_that_cuda_visible_devices_lets_through(
    visible: str | None, expected: tuple[Gpu, ...], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus(machine)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = detect()
    assert [node.host for node in found.nodes] == [socket.gethostname()]
    assert found.nodes[0].gpus == expected
    assert found.gpus_per_node == len(expected)
    assert len(set(found.ports)) == 2 + max(1, 4 * len(expected))  # four policy servers on each GPU


@pytest.mark.parametrize(
    "text", [None, "exit 9", 'echo "NVIDIA-SMI has failed because it could not talk to the driver"; exit 0', ""]
)
def test_no_driver_no_gpu(text: str | None, machine: Path) -> None:
    if text is not None:
        script(machine, "nvidia-smi", text)
    assert detect().nodes[0].gpus == ()


def test_whether_torch_is_a_cpu_build_and_which_deepspeed_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise hardware.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hardware.metadata, "version", lambda name: "2.13.0+cpu")
    assert detect().torch_cpu_only
    monkeypatch.setattr(hardware.metadata, "version", lambda name: "2.13.0+cu129")
    assert not detect().torch_cpu_only
    assert detect().deepspeed == "2.13.0+cu129"
    monkeypatch.setattr(hardware.metadata, "version", missing)
    assert not detect().torch_cpu_only
    assert detect().deepspeed is None


@pytest.mark.parametrize("available", [True, False])
def test_whether_a_server_can_run_without_a_gpu(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.policy_server, "cpu_server_available", lambda: available)
    assert detect().cpu_server == available


def test_several_nodes_are_one_hardware(machine: Path) -> None:
    two_gpus(machine)
    here = hardware.this_node()
    assert here.gpus == (A10, H200) and len(set(here.ports)) == 10
    there = replace(here, host="d2", gpus=(A10,), ports=(7, 8, 9), address="10.0.0.2")
    found = hardware.of_nodes((here, there))
    assert found.nodes == (here, there)
    assert found.ports == here.ports
    assert found.gpus_per_node == 1


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "memory"),
    [
        ("1x0", 1, 0, None),
        ("1x2", 1, 2, 80.0),
        ("4x8:80", 4, 8, 80.0),
        ("1x1:22.5", 1, 1, 22.5),
        ("12x16:141", 12, 16, 141.0),
    ],
)
def test_assumed_hardware(text: str, nodes: int, gpus: int, memory: float | None) -> None:
    found = assumed(text)
    assert (len(found.nodes), found.gpus_per_node) == (nodes, gpus)
    assert len({node.host for node in found.nodes}) == nodes
    assert [gpu.memory_gib for gpu in found.nodes[0].gpus] == [memory] * gpus
    assert all("assumed" in gpu.name for gpu in found.nodes[0].gpus)
    assert not found.torch_cpu_only
    assert not found.cpu_server
    assert len(set(found.ports)) == 2 + max(1, 4 * gpus)
    assert [node.ports for node in assumed(text, (1, 2, 3)).nodes] == [(1, 2, 3)] * nodes
    assert len({node.address for node in found.nodes}) == nodes
    assert nodes > 1 or found.nodes[0].address == "127.0.0.1"


@pytest.mark.parametrize("text", ["", "0x1", "x", "1x", "2", "1x2:", "1x2:x", "-1x2", "1x2 ", "1X2", "1x2:80GiB"])
def test_assumed_hardware_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(HardwareError, match="write NODESxGPUS or NODESxGPUS:GIB"):
        assumed(text)


def test_free_ports_are_distinct_and_free() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    for port in ports:
        with socket.socket() as each:
            each.bind(("127.0.0.1", port))


def test_the_gpus_of_a_real_machine_are_read_without_a_shell(machine: Path) -> None:
    """A driver that says a name with a comma in it is left out rather than misread."""
    script(machine, "nvidia-smi", f'echo "0, GPU-1, Odd, name, 23028"; echo "{SMI}"\n')
    assert detect().nodes[0].gpus == (A10, H200)
    assert os.environ["PATH"] == str(machine)


def test_a_gpu_that_shares_the_hosts_memory_has_none_of_its_own(machine: Path) -> None:
    script(machine, "nvidia-smi", 'echo "0, GPU-1, NVIDIA GB10, [N/A]"\n')
    assert detect().nodes[0].gpus == (Gpu("NVIDIA GB10", 0.0),)


@pytest.mark.parametrize(("text", "limited"), [("max\n", False), ("2147483648\n", True), (None, False)])
def test_the_hosts_memory_is_the_containers_where_that_is_less(
    text: str | None, limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    if text is not None:
        limit.write_text(text)
    monkeypatch.setattr(hardware, "CONTAINER_LIMITS", (limit,))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert whole > 2
    assert hardware.this_node().memory_gib == (2.0 if limited else round(whole, 1))
