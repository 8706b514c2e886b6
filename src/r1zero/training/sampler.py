"""Which prompt is asked when: a pure function of seed and position, so that any position can be gone on from."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler


class WindowSampler(Sampler[int]):
    """The indices of the training prompts in the order that TRL's `_prepare_inputs` expects.

    Prompts form one endless row: all of them once, in the order of the first shuffle, then all of them once in the
    order of the second, and so on. A window, which is what one round of generation asks, is the next `window` of them.
    An epoch has as many whole windows as the prompts fill; what is left over of a shuffle opens the next epoch, so that
    no prompt is asked again before each was asked once. TRL leaves these out and, where a run is resumed, begins with
    the first shuffle again, since its sampler does not know the epoch. Where nothing is left over, an uninterrupted
    run asks in the order of TRL's.

    >>> sampler = WindowSampler(range(5), group=2, window=2, repeats=1, shuffle=False, seed=0)
    >>> list(sampler), len(sampler)
    ([0, 0, 1, 1, 2, 2, 3, 3], 8)
    >>> sampler.set_epoch(1)
    >>> list(sampler)
    [4, 4, 0, 0, 1, 1, 2, 2]

    Args:
        prompts: the training dataset.
        group: completions of one prompt.
        window: prompts of one window, over all processes.
        repeats: how often each window comes, once for each batch that is cut from it.
        shuffle: whether prompts come in random order; else in that of the dataset.
        seed: of the shuffles.

    Attributes:
        windows: of an epoch.
    """

    def __init__(self, prompts: Sized, *, group: int, window: int, repeats: int, shuffle: bool, seed: int) -> None:
        self._count = len(prompts)
        self._group, self._window, self._repeats = group, window, repeats
        self._shuffle, self._seed = shuffle, seed
        self._epoch = 0
        # Less prompts than a window has: an epoch is one window, in which some come twice.
        self.windows = max(1, self._count // window)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self.windows * self._window * self._group * self._repeats

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self.windows * self._window
        row = self._row(first, first + self.windows * self._window)
        for start in range(0, len(row), self._window):
            for _ in range(self._repeats):
                for index in row[start : start + self._window]:
                    yield from [index] * self._group

    def window(self, number: int) -> list[int]:
        """What a window holds, counted from 0 over all epochs: the indices of one of its batches, of all processes.

        >>> WindowSampler(range(5), group=2, window=2, repeats=3, shuffle=False, seed=0).window(2)
        [4, 4, 0, 0]
        """
        row = self._row(number * self._window, (number + 1) * self._window)
        return [index for index in row for _ in range(self._group)]

    def _row(self, first: int, last: int) -> list[int]:
        """The prompts at the places [first, last) of the endless row."""
        # Each shuffle is a further draw of one generator, as in TRL; those before the first that is needed are drawn
        # again, which takes milliseconds.
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        row: list[int] = []
        for turn in range(-(-last // self._count)):
            order = torch.randperm(self._count, generator=generator) if self._shuffle else torch.arange(self._count)
            begin, end = (min(max(place - turn * self._count, 0), self._count) for place in (first, last))
            row += order[begin:end].tolist()
        return row
