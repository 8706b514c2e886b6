"""What a model's ``config.json`` says that a plan must know, read without torch and before anything starts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """The facts of one model's shape.

    Attributes:
        context_length: positions the model was made for, prompt and completion together; tokens. None: it does not say.
    """

    context_length: int | None


class ModelNotFound(Exception):
    """The model's configuration is neither in a folder, nor in the hub's cache, nor on the hub."""


def read(model: str, revision: str | None, *, download: bool) -> ModelFacts | None:
    """Facts of `model`, a local folder or a hub id.

    Args:
        model: as in ``model_name_or_path``.
        revision: as in ``model_revision``.
        download: whether a hub id that is not in the cache may be asked for over the network (a few kB).

    Returns:
        None where nothing is known without a download.

    Raises:
        ModelNotFound: when it cannot be had although a download was allowed.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _facts(folder / "config.json")
    # Imported late: it takes a quarter of a second, and a local folder does not need it.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(cached, str):
            return _facts(Path(cached))
        if not download:
            return None
        return _facts(Path(hf_hub_download(model, "config.json", revision=revision, etag_timeout=20)))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ModelNotFound(" ".join(str(error).split())) from error


def path_of(model: str) -> str:
    """What transformers can load. The embedded model is made first where it is not there yet, which imports torch."""
    from r1zero.recipe import TINY_MODEL

    if model == TINY_MODEL:
        from r1zero import tiny

        return str(tiny.ensure())
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model


def _facts(config: Path) -> ModelFacts:
    try:
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelNotFound(f"{config} is not JSON: {error}") from error
    content = {**content, **content.get("text_config", {})}
    return ModelFacts(context_length=content.get("max_position_embeddings"))
