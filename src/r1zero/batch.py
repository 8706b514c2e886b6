"""The arithmetic of an optimizer step: TRL's own, done before a model is loaded."""

from dataclasses import dataclass

from r1zero.model_facts import ModelFacts
from r1zero.placement import counted
from r1zero.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """How many prompts and completions an optimizer step takes, and how that arises from the recipe's keys.

    >>> batch = Batch(processes=2, per_device=16, accumulation=4, group=8, steps_per_generation=4, iterations=1)
    >>> batch.samples_per_step, batch.prompts_per_step
    (128, 16)

    Attributes:
        processes: trainer processes on all nodes, one a GPU.
        per_device: samples in one forward and backward pass of one process (``per_device_train_batch_size``).
        accumulation: such passes in one optimizer step (``gradient_accumulation_steps``).
        group: completions of one prompt (``num_generations``); 1 for the cold start.
        steps_per_generation: passes that one round of generation feeds.
        iterations: how often each completion is learned from (``num_iterations``).
    """

    processes: int
    per_device: int
    accumulation: int
    group: int
    steps_per_generation: int
    iterations: int

    @property
    def samples_per_step(self) -> int:
        return self.processes * self.per_device * self.accumulation

    @property
    def prompts_per_step(self) -> int:
        return self.samples_per_step // self.group

    @property
    def completions_per_generation(self) -> int:
        return self.processes * self.completions_per_process

    @property
    def completions_per_process(self) -> int:
        """Of one generation: what one process grades, and generates where no policy server does."""
        return self.per_device * self.steps_per_generation


def of(recipe: Recipe, processes: int) -> Batch:
    """The batch of `recipe` on so many trainer processes, as GRPOConfig computes it.

    Raises:
        RecipeError: when it cannot be divided into whole groups, with the arithmetic.
    """
    per_device, accumulation = recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    if recipe.own.method != "grpo":
        return Batch(processes, per_device, accumulation, group=1, steps_per_generation=accumulation, iterations=1)
    group = recipe["num_generations"]
    one_pass, processes_text = processes * per_device, counted(processes, "process", "processes")
    asked, passes = recipe["generation_batch_size"], recipe["steps_per_generation"]
    if asked is not None:
        if asked % one_pass:
            why = f"is not a multiple of {per_device} per device x {processes_text} = {one_pass}"
            raise recipe.fault("generation_batch_size", why, f"use {max(1, round(asked / one_pass)) * one_pass}")
        passes = asked // one_pass
    elif passes is None:
        passes = accumulation
    together = one_pass * passes
    if together % group:
        divisors = [str(n) for n in range(2, together + 1) if together % n == 0][:8]
        why = (
            f"{per_device} per device x {processes_text} x {counted(passes, 'pass', 'passes')} a generation = "
            f"{together} completions, not a multiple of {group}"
        )
        options = f"use num_generations {' or '.join(divisors)}" if divisors else "raise per_device_train_batch_size"
        raise recipe.fault("num_generations", why, options)
    if (one_pass * accumulation) % group:
        why = f"an optimizer step takes {one_pass * accumulation} completions, which is not whole groups of {group}"
        raise recipe.fault("num_generations", why, "make per_device x processes x accumulation a multiple of it")
    return Batch(processes, per_device, accumulation, group, passes, recipe["num_iterations"])


def check_packing(recipe: Recipe, model: ModelFacts | None) -> None:
    """Refuse to pack what this model would not keep apart.

    Args:
        recipe: what is trained and how.
        model: None where nothing is known of it yet; the trainer asks again when it is there.

    Raises:
        RecipeError: when the recipe packs and the model cannot.
    """
    why = model.unpackable if model else None
    if recipe.own.micro_batch_tokens is not None and why:
        raise recipe.fault("micro_batch_tokens", why, "leave micro_batch_tokens out, or take another model")
