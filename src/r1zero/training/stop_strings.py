"""Where a completion ends besides its end token: at the first of the recipe's stop strings.

transformers can stop at strings only with the tokenizer handed to `generate`, which TRL does not do, and vLLM stops at
text without special tokens. So every completion is cut here as well, whoever made it: after the first token that
completes a stop string. What is left is distributed as if generation had stopped there.
"""

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """The stop strings of a run, in the tokens of its model.

    Attributes:
        strings: a completion ends with the first of them; it may be a special token's text.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings = tuple(strings)
        self._tokenizer = tokenizer

    def __bool__(self) -> bool:
        return bool(self.strings)

    def for_vllm(self) -> dict[str, list[Any]]:
        """Sampling parameters with which vLLM stops by itself: special tokens by id, its text leaves them out."""
        added = self._tokenizer.get_added_vocab()
        ids = [added[string] for string in self.strings if string in added]
        return {"stop": list(self.strings), "stop_token_ids": ids}

    def cut(self, completions: list[list[int]], logprobs: list[list[Any]] | None) -> tuple[Any, Any]:
        """Token ids and, where there are any, logprobs of the completions, each up to its first stop string."""
        if not self.strings:
            return completions, logprobs
        kept = [self._kept(ids) for ids in completions]
        cut = [ids[:count] for ids, count in zip(completions, kept, strict=True)]
        if logprobs is None:
            return cut, None
        return cut, [each[:count] for each, count in zip(logprobs, kept, strict=True)]

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether a completion holds a stop string, which after `cut` means that it ended with it."""
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)

    def _kept(self, ids: Sequence[int]) -> int:
        """How many tokens it takes until a stop string is complete; all of them where none ever is."""
        if not self.ended(ids):
            return len(ids)
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            if self.ended(ids[:middle]):
                high = middle
            else:
                low = middle + 1
        return low
