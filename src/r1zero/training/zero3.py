"""What DeepSpeed's ZeRO-3 has to be told of a model, and what it has to be given back."""

from typing import Any

import torch
from torch import nn

from r1zero.restarts import Refusal


def restore_rotary_frequencies(model: nn.Module) -> None:
    """Give rotary position embeddings the fp32 frequencies back that they have without ZeRO-3; no-op elsewhere.

    While a model is loaded for ZeRO-3 in bf16, DeepSpeed turns every new floating-point tensor into bf16, the inverse
    frequencies too (DeepSpeed#4932). Each is then wrong by up to 0.4 %, which at position 800 turns keys and queries by
    a radian and more: log-probabilities of a 7B shape were 0.37 nats off on average (docs/log.md). DeepSpeed's other
    stages keep these buffers.

    Args:
        model: as it was loaded.

    Raises:
        Refusal: such a module cannot be made anew from its configuration.
    """
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        rounded = {
            name: each
            for name, each in own.items()
            if name.endswith("inv_freq") and each.is_floating_point() and each.dtype != torch.float32
        }
        if not rounded:
            continue
        kind = type(module)
        try:
            exact = dict(kind(module.config).named_buffers(recurse=False))  # type: ignore[call-arg, arg-type]
            for name, each in rounded.items():
                module.register_buffer(name, exact[name].to(each.device), persistent=False)
        except (AttributeError, KeyError, TypeError) as error:
            raise Refusal(
                f"under ZeRO-3 in bf16 DeepSpeed rounds the rotary frequencies of {kind.__name__} to bf16, which makes "
                f"it another model, and they cannot be made anew ({error}); set accelerate_config to zero2"
            ) from error


def gather_head_with_model(model: Any) -> None:
    """Have the language head's weight gathered for the whole forward and backward pass of the model; no-op elsewhere.

    TRL's fused head reads the weight without calling the head. DeepSpeed (0.19) notices such a read and gathers from
    then on, but not where it is just prefetching the weight, because a forward pass before did call the head, as the
    probe's does: then the weight is sharded when its gradient comes, and the backward pass fails ("The size of tensor a
    (0) must match ..."). Tied heads are the input embedding, which is called in every pass.

    Args:
        model: the policy without what the trainer wraps it in, after DeepSpeed has taken it.
    """
    owner = model.get_base_model() if hasattr(model, "peft_config") else model
    head, embedding = owner.get_output_embeddings(), owner.get_input_embeddings()
    if head is None or not hasattr(head.weight, "ds_id") or head.weight is embedding.weight:
        return
    import deepspeed  # type: ignore[import-not-found]

    deepspeed.zero.register_external_parameter(owner, head.weight)
