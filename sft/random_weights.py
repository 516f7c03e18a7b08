"""Random weights of a trial at the cost of a copy: random numbers for 7 B parameters take a core more than a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_BLOCK_NUMEL = 65_537
"""A prime, so that the rows of a weight do not repeat each other."""


@contextmanager
def cheap_random_weights() -> Iterator[None]:
    """While it is open, large CPU tensors are filled with one block of random numbers, over and over.

    What a trial measures does not depend on the values, as long as they are finite and of the usual size.
    """
    normal, uniform = torch.Tensor.normal_, torch.Tensor.uniform_
    torch.Tensor.normal_ = _repeating(normal)  # type: ignore[method-assign]
    torch.Tensor.uniform_ = _repeating(uniform)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.normal_, torch.Tensor.uniform_ = normal, uniform  # type: ignore[method-assign]


def _repeating(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill_all(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.device.type != "cpu" or tensor.numel() <= _BLOCK_NUMEL or not tensor.is_contiguous():
            return fill(tensor, *args, **kwargs)
        flat = tensor.detach().view(-1)
        block = fill(flat[:_BLOCK_NUMEL], *args, **kwargs)
        for start in range(_BLOCK_NUMEL, flat.numel(), _BLOCK_NUMEL):
            piece = flat[start : start + _BLOCK_NUMEL]
            piece.copy_(block[: piece.numel()])
        return tensor

    return fill_all
