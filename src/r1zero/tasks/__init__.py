"""What is asked and how it is graded. Nothing in this room imports torch."""

from r1zero.tasks.problem import Problem


def load_problems(task: str, split: str, dataset_name: str | None = None, remove_commas: bool = True) -> list[Problem]:
    """Every problem of one split of a task, in the dataset's order.

    Args:
        task: "arithmetic", "gsm8k", "math" or "dataset".
        split: "train" or "test", or what the dataset calls it.
        dataset_name: hub id, folder or file; None: where the task itself comes from.
        remove_commas: drop thousands commas from the golds of gsm8k.

    Raises:
        DatasetError: when the data cannot be had or has another shape.
    """
    from r1zero.tasks import sources  # imported here, so that a submodule of this room can be imported alone

    if task not in sources.TASKS:
        raise ValueError(f"task {task!r} is not one of {', '.join(sources.TASKS)}")
    own = sources.TRAINED_ON if split == "train" else sources.MEASURED_ON
    name = dataset_name or own.get(task)
    return sources.load(sources.Source(task, split, name, sources.CONFIGS.get(name or "")), remove_commas).problems
