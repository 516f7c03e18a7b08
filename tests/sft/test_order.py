"""The longest examples come first, the others in the order that accelerate would draw."""

from __future__ import annotations

import torch
from accelerate.data_loader import SeedableRandomSampler
from transformers import set_seed

from sft.order import LongestFirst, longest

LENGTHS = [3, 9, 1, 9, 7, 2]


def test_the_longest_are_found_ties_in_order() -> None:
    assert longest(LENGTHS, 3) == (1, 3, 4)
    assert len(longest(LENGTHS, 100)) == len(LENGTHS)


def test_the_first_epoch_begins_with_them_and_loses_nothing() -> None:
    set_seed(7)
    first = longest(LENGTHS, 2)
    order = list(LongestFirst(LENGTHS, first))
    assert tuple(order[:2]) == first
    assert sorted(order) == list(range(len(LENGTHS)))
    torch.manual_seed(7)
    drawn = list(SeedableRandomSampler(LENGTHS))
    assert order[2:] == [index for index in drawn if index not in first]


def test_later_epochs_are_drawn_as_accelerate_draws_them() -> None:
    set_seed(7)
    ours, theirs = LongestFirst(LENGTHS, (1, 3)), SeedableRandomSampler(LENGTHS)
    for sampler in (ours, theirs):
        sampler.set_epoch(3)
    assert list(ours) == list(theirs)
