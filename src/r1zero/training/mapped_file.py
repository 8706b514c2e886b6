"""A safetensors file whose tensors are overwritten where they lie, for what is handed over again and again.

Written anew, each tensor is copied into a buffer, from there into the file, and the file's pages are taken and zeroed
first. Mapped, kept, and pinned where the tensors come from a GPU, they are copied once.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from r1zero.serving import MEMORY_FOLDER

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors calls them
ENTRY_BYTES = 160  # at most, of a tensor in the header, its name aside
PAGE = 4096


class HostCopy:
    """Copies tensors into CPU memory that is kept from one publish to the next, so each call overwrites the last one's.

    Memory that is taken anew comes page by page as it is first written, and pinning it for the copy from a GPU costs
    again; kept, both are paid once.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._memory = torch.empty(0, dtype=dtype)

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Contiguous copies under the same names, valid until the next call."""
        size = sum(each.numel() for each in tensors.values())
        on_gpu = any(each.is_cuda for each in tensors.values())
        if self._memory.numel() < size:
            self._memory = self._take(size, tensors, on_gpu)
        copies, at = {}, 0
        for name, each in tensors.items():
            copies[name] = self._memory[at : at + each.numel()].view(each.shape)
            copies[name].copy_(each.detach(), non_blocking=True)
            at += each.numel()
        if on_gpu:
            torch.cuda.synchronize()
        return copies

    def _take(self, size: int, tensors: Mapping[str, torch.Tensor], on_gpu: bool) -> torch.Tensor:
        return torch.empty(size, dtype=self._dtype, pin_memory=on_gpu)


class MappedFile(HostCopy):
    """Copies tensors into a file; `name` makes a safetensors file of it.

    Whoever reads the file must be done before the next call, which overwrites it.

    Args:
        path: of the file, which is made by the first call, with all the space that it needs, and deleted by `close`.
        dtype: of the tensors in it.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.path = path
        self._in_memory = path.absolute().is_relative_to(MEMORY_FOLDER)
        self._header = 0  # bytes before the tensors
        self._pinned: int | None = None  # where, in memory

    def name(self, copies: Mapping[str, torch.Tensor]) -> None:
        """Write into the file under which names its tensors are read.

        Args:
            copies: what a call gave, all of it, under any names.

        Raises:
            ValueError: they are not what is in the file.
        """
        size = self._memory.nbytes
        places, entries = [], {}
        for name, each in copies.items():
            first = (each.storage_offset() - self._memory.storage_offset()) * each.element_size()
            place = (first, first + each.nbytes)
            places.append(place)
            entries[name] = {"dtype": DTYPES[self._dtype], "shape": list(each.shape), "data_offsets": place}
        places.sort()
        if [0, *(end for _, end in places)] != [*(first for first, _ in places), size]:
            raise ValueError(f"{self.path}: {len(places)} tensors were named, which are not the {size:,} bytes in it")
        written = json.dumps(entries, separators=(",", ":")).encode().ljust(self._header - 8)
        if len(written) > self._header - 8:
            raise ValueError(f"{self.path}: the names of its tensors take {len(written)} bytes of {self._header - 8}")
        with self.path.open("r+b") as file:
            file.write(len(written).to_bytes(8, "little") + written)
            if not self._in_memory:
                file.flush()
                os.fsync(file.fileno())  # for servers on other machines

    def close(self) -> None:
        """Delete the file and give its memory back."""
        if self._pinned is not None:
            _cuda().cudaHostUnregister(self._pinned)
            self._pinned = None
        self._memory = torch.empty(0, dtype=self._dtype)
        self.path.unlink(missing_ok=True)

    def _take(self, size: int, tensors: Mapping[str, torch.Tensor], on_gpu: bool) -> torch.Tensor:
        self.close()
        self._header = _rounded_up(8 + sum(ENTRY_BYTES + len(name.encode()) for name in tensors))
        whole = self._header + size * self._dtype.itemsize
        with self.path.open("xb") as file:
            # Where space were taken only as it is written to, a full disk would be a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, whole)
        mapped = torch.from_file(str(self.path), shared=True, size=whole, dtype=torch.uint8)
        if on_gpu and self._in_memory:
            # Where the system does not allow it, copies are only slower. On a disk a GPU must not write into a file's
            # pages: the system would not know that they have changed, and another machine not get them.
            with suppress(RuntimeError):
                torch.cuda.check_error(_cuda().cudaHostRegister(mapped.data_ptr(), whole, 0))
                self._pinned = mapped.data_ptr()
        return mapped[self._header :].view(self._dtype)


def _cuda() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _rounded_up(size: int) -> int:
    return -(-size // PAGE) * PAGE
