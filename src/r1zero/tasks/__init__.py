"""What is asked and how it is graded. Nothing in this room imports torch."""

from r1zero.tasks.problem import Problem


def load_problems(task: str, split: str, dataset_name: str | None, remove_commas: bool = True) -> list[Problem]:
    """The problems of one split of a task.

    Args:
        task: "arithmetic" or "gsm8k".
        split: "train" or "test"; what is measured on is never trained on.
        dataset_name: hub id or local folder; None: where the task itself comes from.
        remove_commas: drop thousands commas from the gold.

    Raises:
        DatasetError: when the data cannot be had or has another shape.
    """
    # Each task is imported when it is asked for: gsm8k may need the datasets library, arithmetic nothing.
    if task == "arithmetic":
        from r1zero.tasks import arithmetic

        return arithmetic.load(split)
    if task == "gsm8k":
        from r1zero.tasks import gsm8k

        return gsm8k.load(split, dataset_name or gsm8k.HUB_ID, remove_commas)
    raise ValueError(f"task {task!r} is not one of arithmetic, gsm8k")
