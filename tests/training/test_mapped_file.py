"""A safetensors file that is overwritten where it lies, read as a server reads it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r1zero.training.mapped_file import MappedFile


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_file_holds_what_was_copied_last_under_the_names_given(tmp_path: Path, dtype: torch.dtype) -> None:
    file = MappedFile(tmp_path / "a.safetensors", dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        given = {"one": torch.randn(3, 5), "two": torch.randn(2, 2, 2).transpose(0, 2), "none": torch.randn(0, 4)}
        copies = file(given)
        file.name({f"x.{name}.ü": each for name, each in copies.items()})
        read = load_file(file.path)
        assert read.keys() == {"x.one.ü", "x.two.ü", "x.none.ü"}
        assert all(torch.equal(read[f"x.{name}.ü"], each.to(dtype)) for name, each in given.items())
    file.close()
    file.close()
    assert not file.path.exists()


def test_more_than_before_takes_another_file(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "a.safetensors", torch.float32)
    for length in (2, 5000):
        file.name(file({"one": torch.arange(length)}))
        assert torch.equal(load_file(file.path)["one"], torch.arange(length).float())


def test_what_is_not_all_of_the_file_is_not_named(tmp_path: Path) -> None:
    file = MappedFile(tmp_path / "a.safetensors", torch.float32)
    copies = file({"one": torch.ones(4), "two": torch.ones(6)})
    for wrong in ({"one": copies["one"]}, {**copies, "three": copies["two"][:2]}):
        with pytest.raises(ValueError, match="which are not the 40 bytes in it"):
            file.name(wrong)
    with pytest.raises(ValueError, match="the names of its tensors take"):
        file.name({"x" * 5000: copies["one"], "two": copies["two"]})
