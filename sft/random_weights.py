"""Random weights of a trial at the cost of a copy: random numbers for 7 B parameters take a core more than a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import deepspeed as integration

from sft.partitioned_weights import filling, is_cpu, without_broadcast

_BLOCK_NUMEL = 8_209
"""A prime, so that a row comes again after that many rows only; small: random numbers are what such weights cost."""


_FILLED_AGAIN = (torch.nn.Linear, torch.nn.Embedding)
"""Modules that fill their weights when they are made, and that transformers then fills."""


@contextmanager
def cheap_random_weights(config: Any = None) -> Iterator[None]:
    """While it is open, large CPU tensors are filled with one block of random numbers, over and over, and under ZeRO-3
    on CPU ranks each rank fills its own partitions.

    What a trial measures does not depend on the values, as long as they are finite and of the usual size.

    Args:
        config: of the model to be made; if transformers fills all its layers, torch does not fill them before.
    """
    with ExitStack() as patches:
        if config is not None and _fills_every_layer(config):
            for kind in _FILLED_AGAIN:
                patches.enter_context(patch.object(kind, "reset_parameters", lambda module: None))
        for name in ("normal_", "uniform_"):
            patches.enter_context(patch.object(torch.Tensor, name, _repeating(getattr(torch.Tensor, name))))
        if is_cpu():
            fill = filling(integration.initialize_weights_zero3)
            patches.enter_context(patch.object(integration, "initialize_weights_zero3", fill))
            patches.enter_context(patch.object(deepspeed.zero.Init, "_zero_init_param", without_broadcast))
        yield


def _fills_every_layer(config: Any) -> bool:
    """Whether the model's class leaves it to transformers to fill linear layers, biases too, and embeddings.

    Source: transformers 5.23, modeling_utils.py (PreTrainedModel._init_weights).
    """
    models = AutoModelForCausalLM._model_mapping
    found = models.get(type(config), None)
    return getattr(found, "_init_weights", None) is PreTrainedModel._init_weights


def _repeating(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill_all(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.device.type != "cpu" or tensor.numel() <= _BLOCK_NUMEL or not tensor.is_contiguous():
            return fill(tensor, *args, **kwargs)
        flat = tensor.detach().view(-1)
        block = fill(flat[:_BLOCK_NUMEL], *args, **kwargs)
        rest = flat[_BLOCK_NUMEL:]
        whole = rest.numel() // _BLOCK_NUMEL
        end = whole * _BLOCK_NUMEL
        rest[:end].view(whole, _BLOCK_NUMEL).copy_(block.expand(whole, _BLOCK_NUMEL))
        rest[end:].copy_(block[: rest.numel() - end])
        return tensor

    return fill_all
