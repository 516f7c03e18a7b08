"""Random weights that cost a copy: of the usual size, finite, no row like another, and nothing stays patched."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sft.random_weights import _BLOCK_NUMEL, cheap_random_weights


def test_a_large_weight_is_filled_with_numbers_of_the_asked_size() -> None:
    weight = torch.empty(1024, 1024)
    assert weight.numel() > 10 * _BLOCK_NUMEL
    with cheap_random_weights():
        torch.nn.init.normal_(weight, std=0.02)
    # The deviation of a sample of n values is within five of its own standard errors, 1 / sqrt(2 n) of the asked one.
    assert abs(float(weight.std()) / 0.02 - 1) < 5 / sqrt(2 * _BLOCK_NUMEL)
    assert len(torch.unique(weight, dim=0)) == 1024


def test_a_seed_gives_the_same_weights_and_the_patch_ends() -> None:
    before = torch.Tensor.normal_

    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        with cheap_random_weights():
            return torch.empty(300, 300).uniform_(-1, 1)

    assert torch.equal(weights(), weights())
    assert torch.Tensor.normal_ is before


def test_a_larger_weight_takes_no_more_operators_and_repeats_its_first_block() -> None:
    class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
        operators = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            return func(*args, **(kwargs or {}))

    def fill(numel: int) -> tuple[torch.Tensor, int]:
        weight = torch.empty(numel)
        with Count() as count, cheap_random_weights():  # type: ignore[no-untyped-call]
            weight.normal_()
        return weight, count.operators

    small, large = fill(_BLOCK_NUMEL + 1), fill(20 * _BLOCK_NUMEL + 17)
    assert small[1] == large[1]
    for weight, _ in (small, large):
        assert torch.equal(weight[_BLOCK_NUMEL:], weight[:-_BLOCK_NUMEL])
