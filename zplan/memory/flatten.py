"""ZeRO-1 and 2 flatten each group of weights on the GPU where that has room for a second copy, else in host memory.

Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:444 (flatten_on_accelerator), accelerator/cuda_accelerator.py
(available_memory: what NVML calls free, after torch has given back what it does not use).
"""

from __future__ import annotations

from itertools import accumulate

from zplan.hardware import Cluster
from zplan.memory.bf16_optimizer import takes_bf16_optimizer
from zplan.memory.exchange import Exchange
from zplan.memory.instances import instances
from zplan.memory.outside import outside_allocator
from zplan.memory.stage12 import Partitions, partition
from zplan.memory.states import FP32
from zplan.memory.trainable import Layout
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Flattened:
    """One group, in bytes."""

    padded: int
    """b PAD."""
    partition: int
    """b S."""
    masters_before: int
    """Of the groups before it, as far as they are on the GPU."""
    masters: int
    """Those and its own."""
    is_flat: bool
    """A group of one parameter that needs no padding is viewed, not copied."""
    on_host: bool

    @property
    def beside(self) -> int:
        """On the GPU beside all weights, at most: the second copy, or no more than what its masters are made of.

        Source: stage_1_and_2.py:560 (weights_partition: clone), torch 2.13.0, csrc/utils/tensor_flatten.h.
        """
        if self.on_host:
            return self.partition + self.masters
        return self.masters_before + (0 if self.is_flat else self.padded)


def flattened(laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster, cut: Partitions) -> tuple[Flattened, ...]:
    """Every optimizer group of one rank, in the order in which they are flattened."""
    items, b = instances(laid), recipe.weight_bytes
    master = 0 if choice.zero.offloads_optimizer else FP32
    weights = b * sum(cut.padded) + laid.frozen_bytes
    on_cpu = cluster.gpu.kind == "cpu"
    free = cluster.gpu.free_bytes - outside_allocator(choice, cluster).expected
    earlier = accumulate((master * size for size in cut.sizes), initial=0)
    return tuple(
        Flattened(
            padded=b * padded, partition=b * size, masters_before=before, masters=before + master * size,
            is_flat=len(group) == 1 and items.numel[group[0]] == padded,
            on_host=not on_cpu and free - weights - before < b * padded,
        )
        for size, padded, group, before in zip(cut.sizes, cut.padded, items.groups, earlier, strict=False)
    )  # fmt: skip


def on_host_bytes(laid: Layout, recipe: Recipe, choice: Choice, cluster: Cluster) -> int:
    """Most of one rank's weights in host memory while the engine is made: all of them when it begins, or a group's that
    is flattened there, with its flat copy. Nothing at stage 3."""
    if choice.zero.stage == 3:
        return 0
    most = laid.stored_bytes
    if choice.zero.stage == 0 or takes_bf16_optimizer(choice.zero, Exchange.of(recipe), recipe.weight_bytes):
        return most
    cut = partition(instances(laid), choice.batch.zero_ranks)
    groups = flattened(laid, recipe, choice, cluster, cut)
    return max(most, *(2 * group.padded for group in groups if group.on_host), 0)
