"""What a policy server serves beneath a 4-bit trainer's adapter: the trainer's rounded base weights, in bfloat16.

A 4-bit trainer computes with weights rounded to 16 values a block. A server with the weights as they were published has
another policy, which differs by far more than bfloat16 does; one that computes in 4 bits itself is slow. So the
weights are rounded as the trainer rounds them, written out as bfloat16, and kept in the user's cache.

``python -m r1zero.quantized_base --config RECIPE`` makes it where it is missing and ends with the folder's name.
Finding it takes no torch, so that a plan can name it.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from r1zero import model_facts
from r1zero import recipe as recipes
from r1zero.recipe import TINY_MODEL, Recipe, RecipeError
from r1zero.run_folder import read_json, write_json

if TYPE_CHECKING:
    import torch

VERSION = "1"  # raise when a change of this file makes other weights of the same settings
MANIFEST = "r1zero_base.json"
WAIT_S = 3600.0  # for another process that makes the same base
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
SHARD_SIZE = "4GB"

Say = Callable[[str], None]


class BaseNotMade(Exception):
    """The rounded base could not be made; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """All that decides how the trainer rounds a model's weights.

    >>> Settings(quant_type="nf4").double_quant
    False

    Attributes:
        quant_type: nf4 or fp4.
        double_quant: whether the scales of the blocks are rounded too.
        storage_dtype: what the 4-bit values are packed into; None: uint8.
        dtype: what the model is loaded in before it is rounded; the trainer computes in it.
        trust_remote_code: whether code that comes with the model may run.
    """

    quant_type: str = "nf4"
    double_quant: bool = False
    storage_dtype: str | None = None
    dtype: str = "bfloat16"
    trust_remote_code: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "Settings":
        """Those of a recipe.

        Raises:
            RecipeError: it does not load its model in 4 bits.
        """
        if not recipe["load_in_4bit"]:
            raise recipe.fault("load_in_4bit", "the trainer's weights are not rounded", "serve the model itself")
        return cls(
            quant_type=recipe["bnb_4bit_quant_type"],
            double_quant=recipe["use_bnb_nested_quant"],
            storage_dtype=recipe["bnb_4bit_quant_storage"],
            dtype=recipe["dtype"],
            trust_remote_code=recipe["trust_remote_code"],
        )


def folder(model: str, revision: str | None, settings: Settings) -> Path | None:
    """Where the rounded base of `model` is or will be: one folder for each content of the model and each settings.

    Args:
        model: as in ``model_name_or_path``.
        revision: as in ``model_revision``.
        settings: how it is rounded.

    Returns:
        None for a model of the hub that is not in its cache: which commit would be loaded is not known without asking.
    """
    source = _source(model, revision)
    if source is None:
        return None
    # What trust_remote_code allows is no matter of the weights, which are the same with and without it.
    values = {key: value for key, value in asdict(settings).items() if key != "trust_remote_code"}
    text = json.dumps([VERSION, _identity(source), values], sort_keys=True)
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in Path(model).name)
    return _cache() / f"{name}-{settings.quant_type}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def is_made(folder: Path) -> bool:
    """Whether a base is there, whole: each file of its manifest has the size that it was written with."""
    manifest = read_json(folder / MANIFEST)
    if manifest is None:
        return False
    files: dict[str, int] = manifest["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def ensure(model: str, revision: str | None, settings: Settings, say: Say = lambda line: None) -> Path:
    """The folder of the rounded base, made now where it is not there or not whole. Needs torch.

    Processes that ask at once wait for the first of them.

    Args:
        model: as in ``model_name_or_path``.
        revision: as in ``model_revision``.
        settings: how it is rounded.
        say: gets a line for each stage.

    Raises:
        BaseNotMade: too little space, a model without layers to round, or another maker that does not end.
    """
    place = folder(model, revision, settings)
    if place is None:
        say(f"looking up {model} on the hub")
        _download_small_files(model, revision)
        place = folder(model, revision, settings)
        if place is None:
            raise BaseNotMade(f"{model} is not in the hub's cache after its download: is it a model?")
    if is_made(place):
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f"{place.name}.lock"), timeout=WAIT_S)
    try:
        with lock:
            if not is_made(place):
                _make_aside(place, model, revision, settings, say)
    except Timeout:
        raise BaseNotMade(f"another process has been making {place} for {WAIT_S:.0f} s: stop it, or wait") from None
    return place


def _make_aside(place: Path, model: str, revision: str | None, settings: Settings, say: Say) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    try:
        _make(aside, model, revision, settings, say)
        shutil.rmtree(place, ignore_errors=True)  # one that is not whole
        aside.rename(place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(aside: Path, model: str, revision: str | None, settings: Settings, say: Say) -> None:
    import torch

    say(f"rounding {model} to {settings.quant_type}, on {'the GPU' if torch.cuda.is_available() else 'the CPU'}")
    rounded = load(model, revision, settings)
    count = unround(rounded)
    if not count:
        raise BaseNotMade(f"{model}: no layer was rounded, so there is nothing to serve but the model itself")
    size = sum(each.numel() * each.element_size() for each in rounded.parameters())
    free = shutil.disk_usage(aside).free
    if free < size * 1.01:
        raise BaseNotMade(
            f"the rounded base takes {size / 2**30:.1f} GiB and {aside.parent} has {free / 2**30:.1f} GiB free: make "
            f"room there, or give another folder in R1ZERO_CACHE"
        )
    say(f"writing {count} rounded layers and the rest, {size / 2**30:.2f} GiB in bfloat16")
    rounded.save_pretrained(aside, max_shard_size=SHARD_SIZE)
    _copy_the_rest(_required_source(model, revision), aside)
    files = {path.relative_to(aside).as_posix(): path.stat().st_size for path in aside.rglob("*") if path.is_file()}
    write_json(aside / MANIFEST, {"model": model, "revision": revision, **asdict(settings), "files": files})


def load(model: str, revision: str | None, settings: Settings) -> Any:
    """The model as the trainer loads it: rounded, on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl import ModelConfig, get_quantization_config

    config = ModelConfig(
        load_in_4bit=True,
        dtype=settings.dtype,
        bnb_4bit_quant_type=settings.quant_type,
        use_bnb_nested_quant=settings.double_quant,
        bnb_4bit_quant_storage=settings.storage_dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        model_facts.path_of(model),
        revision=revision or "main",
        dtype=settings.dtype,
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
        quantization_config=get_quantization_config(config),
        trust_remote_code=settings.trust_remote_code,
    )


def unround(model: Any) -> int:
    """Give each 4-bit layer its rounded weights in bfloat16, layer by layer, on the CPU. How many there were."""
    import bitsandbytes
    import torch

    found = [(name, each) for name, each in model.named_modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    for name, layer in found:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = _parameter(bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        if layer.bias is not None:
            plain.bias = _parameter(layer.bias)
        model.set_submodule(name, plain)
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    model.is_quantized = model.is_loaded_in_4bit = False
    del model.config.quantization_config
    model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    return len(found)


def _parameter(values: "torch.Tensor") -> "torch.nn.Parameter":
    import torch

    return torch.nn.Parameter(values.detach().to("cpu", torch.bfloat16), requires_grad=False)


def _copy_the_rest(source: Path, aside: Path) -> None:
    """Tokenizer, generation settings and code, as they are: all that is not weights and not yet written."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights and not (aside / path.name).exists():
            shutil.copyfile(path, aside / path.name)


def _cache() -> Path:
    override = os.environ.get("R1ZERO_CACHE")
    return Path(override).expanduser() if override else user_cache_path("r1zero")


def _source(model: str, revision: str | None) -> Path | None:
    """The folder that holds the model's config: local, or its snapshot in the hub's cache. None: not downloaded."""
    path = Path(model_facts.path_of(model) if model == TINY_MODEL else model).expanduser()
    if path.is_dir():
        return path.resolve()
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(cached).parent if isinstance(cached, str) else None


def _required_source(model: str, revision: str | None) -> Path:
    source = _source(model, revision)
    if source is None:
        raise BaseNotMade(f"{model} has gone from the hub's cache while its base was made")
    return source


def _identity(source: Path) -> Any:
    """What a change of the model's weights would change: the snapshot's commit, or each file's name, size and time."""
    if source.parent.name == "snapshots":
        return [source.parent.parent.name, source.name]
    files = sorted(path for path in source.iterdir() if path.suffix in WEIGHT_SUFFIXES or path.name == "config.json")
    return [str(source), *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _download_small_files(model: str, revision: str | None) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(model, revision=revision, ignore_patterns=[f"*{suffix}" for suffix in WEIGHT_SUFFIXES])
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise BaseNotMade(f"{model} cannot be had: {' '.join(str(error).split())}") from error


def main(words: list[str] | None = None) -> int:
    """Make the rounded base of a recipe's model; the last line is its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m r1zero.quantized_base",
        description="Make the bfloat16 form of a 4-bit trainer's base, for the policy server.",
        epilog="Any key of the recipe can be overridden: --key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="a recipe YAML")
    known, overrides = parser.parse_known_args(words)
    try:
        recipe = recipes.load(known.config, overrides)
        settings = Settings.of(recipe)
        made = ensure(recipe.model, recipe["model_revision"], settings, lambda line: _write(line))
    except (RecipeError, BaseNotMade) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    _write(str(made))
    return 0


def _write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
