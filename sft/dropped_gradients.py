"""Gradients that ZeRO-1 and 2 allocate when the engine starts and drop at once: in a trial nobody writes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from sft.software import is_read_deepspeed


@contextmanager
def unwritten_gradients() -> Iterator[None]:
    """While it is open, the gradients of the fp32 partition are allocated, for the peak, and not filled with zeros.

    Writing them is the first touch of 4 bytes a parameter: a third of the CPU time of the demo model's initialize.
    An offloaded optimizer keeps them, and there they are zeros.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:934 (initialize_optimizer_states).
    """
    if not is_read_deepspeed():  # older ones take a step with them
        yield
        return
    initialize = DeepSpeedZeroOptimizer.initialize_optimizer_states

    def initialize_unwritten(optimizer: DeepSpeedZeroOptimizer) -> None:
        if optimizer.cpu_offload:
            initialize(optimizer)
            return
        with patch.object(torch, "zeros", torch.empty):
            initialize(optimizer)

    with patch.object(DeepSpeedZeroOptimizer, "initialize_optimizer_states", initialize_unwritten):
        yield
