"""The order of the examples: shuffled as transformers shuffles them, with the longest in the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler


def longest(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """Indices of the `count` longest, longest first."""
    return tuple(sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))[:count])


class LongestFirst(Sampler[int]):
    """The permutation that accelerate would draw; in the first epoch `first` is moved to its beginning.

    A run that has no room for its longest sequences then fails in its first step and not after hours. accelerate
    replaces a RandomSampler by its own, so this one wraps what accelerate would have put there.

    Source: accelerate 1.15, data_loader.py (prepare_data_loader, SeedableRandomSampler).
    """

    def __init__(self, source: Sized, first: Sequence[int]) -> None:
        self.first = tuple(first)
        self.shuffled = SeedableRandomSampler(source)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.shuffled)

    def __iter__(self) -> Iterator[int]:
        if self.epoch > 0:
            yield from self.shuffled
            return
        chosen = set(self.first)
        order = list(self.shuffled)
        yield from self.first
        yield from (index for index in order if index not in chosen)

    def set_epoch(self, epoch: int) -> None:
        """The data loader says which epoch begins."""
        self.epoch = epoch
        self.shuffled.set_epoch(epoch)
