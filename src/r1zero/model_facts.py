"""What a model's ``config.json`` says that a plan must know, read without torch and before anything starts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The linear maps of a layer that can carry an adapter, in the families that all have the same seven.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # by model_type
# PEFT's own choice for these families where a recipe names no lora_target_modules.
PEFT_DEFAULT = ("q_proj", "v_proj")


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model of one of `FAMILIES`.

    >>> smollm2 = ModelShape(576, 30, 9, 3, 64, 1536, 49152, tied_embeddings=True)
    >>> f"{smollm2.parameters / 1e6:.1f}M"
    '134.5M'

    Attributes:
        hidden_size: width of the residual stream.
        layers: transformer layers.
        heads: attention heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        intermediate_size: width inside the MLP.
        vocab_size: rows of the embedding.
        tied_embeddings: whether the language head is the embedding.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool

    def projection(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of one of `PROJECTIONS`."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden_size, queries),
            "k_proj": (self.hidden_size, keys),
            "v_proj": (self.hidden_size, keys),
            "o_proj": (queries, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }[name]

    @property
    def projection_parameters(self) -> int:
        """Weights in the projections of all layers: what 4-bit loading quantizes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in map(self.projection, PROJECTIONS))

    @property
    def embedding_parameters(self) -> int:
        """Weights in the embedding, and in the language head where it is another matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """All weights but those of the norms, which are too few to matter."""
        return self.projection_parameters + self.embedding_parameters

    def lora_parameters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Weights of a LoRA adapter.

        Args:
            rank: of the adapter.
            targets: names as in ``lora_target_modules``; None stands for PEFT's own choice.
        """
        return self.layers * sum(rank * sum(self.projection(name)) for name in adapted(targets))

    def kv_bytes_per_token(self, width: int) -> int:
        """Bytes of keys and values of one token in all layers, `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


def adapted(targets: Sequence[str] | None) -> tuple[str, ...]:
    """Which of `PROJECTIONS` get an adapter.

    >>> adapted(["model.layers.*.v_proj"])
    ('v_proj',)

    Args:
        targets: names as in ``lora_target_modules``; None stands for PEFT's own choice.
    """
    named = {name.rpartition(".")[2] for name in (PEFT_DEFAULT if targets is None else targets)}
    return tuple(name for name in PROJECTIONS if name in named or "all-linear" in named)


@dataclass(frozen=True)
class ModelFacts:
    """What is known of one model.

    Attributes:
        context_length: positions the model was made for, prompt and completion together; tokens. None: it does not say.
        family: its ``model_type``; None: it does not say.
        shape: None where the family is not one of `FAMILIES`, whose weights can be counted here.
        window: whether some of its layers look back at only so many tokens (a sliding window).
    """

    context_length: int | None
    family: str | None = None
    shape: ModelShape | None = None
    window: bool = False

    @property
    def unpackable(self) -> str | None:
        """Why sequences of this model cannot be laid end to end and keep apart; None where they can."""
        if self.family not in FAMILIES:
            return (
                f"of models, {', '.join(FAMILIES)} are known to keep packed sequences apart, and this is {self.family}"
            )
        return "some layers of this model look back through a sliding window" if self.window else None


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
    family = content.get("model_type")
    return ModelFacts(content.get("max_position_embeddings"), family, _shape(content), _has_window(content))


def _has_window(content: dict[str, Any]) -> bool:
    """With transformers' defaults: Qwen's models have a window only on request, Mistral's unless it is null."""
    window = content.get("sliding_window", 4096) is not None
    if content.get("layer_types"):
        return any(kind != "full_attention" for kind in content["layer_types"])
    return window if content.get("model_type") == "mistral" else window and bool(content.get("use_sliding_window"))


def _shape(content: dict[str, Any]) -> ModelShape | None:
    """The shape that a configuration describes, with transformers' defaults for what it leaves out."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    values = [content.get(key) for key in needed]
    if content.get("model_type") not in FAMILIES or not all(isinstance(value, int) and value > 0 for value in values):
        return None
    hidden, layers, heads, intermediate, vocab = (int(value) for value in values if value)
    return ModelShape(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or hidden // heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        tied_embeddings=bool(content.get("tie_word_embeddings", False)),
    )
