"""Random weights that cost a copy: of the usual size, finite, no row like another, and nothing stays patched."""

from __future__ import annotations

import torch

from sft.random_weights import _BLOCK_NUMEL, cheap_random_weights


def test_a_large_weight_is_filled_with_numbers_of_the_asked_size() -> None:
    weight = torch.empty(1024, 1024)
    assert weight.numel() > 10 * _BLOCK_NUMEL
    with cheap_random_weights():
        torch.nn.init.normal_(weight, std=0.02)
    # One block has 65537 values: their deviation is within 5 / sqrt(2 x 65537) = 1.4 % of the asked one.
    assert abs(float(weight.std()) / 0.02 - 1) < 0.014
    assert len(torch.unique(weight, dim=0)) == 1024


def test_a_seed_gives_the_same_weights_and_the_patch_ends() -> None:
    before = torch.Tensor.normal_

    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        with cheap_random_weights():
            return torch.empty(300, 300).uniform_(-1, 1)

    assert torch.equal(weights(), weights())
    assert torch.Tensor.normal_ is before
