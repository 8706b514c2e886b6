"""From a completion to the one answer it commits to."""

import re

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def tagged_answer(completion: str, remove_commas: bool = True) -> str | None:
    """The stripped content of the first ``<answer>...</answer>``; None where there is none, or it is empty.

    The first, as R1RL takes it: what follows an answer, such as a second question that a base model makes up, must
    not replace it.

    >>> tagged_answer("12 + 30 = 42</reasoning><answer> 1,042 </answer>")
    '1042'
    """
    found = _ANSWER.search(completion)
    if found is None:
        return None
    answer = found[1].strip()
    if remove_commas:
        answer = answer.replace(",", "")
    return answer or None
