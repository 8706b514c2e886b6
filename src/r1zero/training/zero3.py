"""What DeepSpeed's ZeRO-3 has to be told of a model."""

from typing import Any


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
