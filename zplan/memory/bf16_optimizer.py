"""Stage 1 that accumulates bf16 gradients in fp32: BF16_Optimizer takes ZeRO's place, with fp32 gradients of the whole
model on every rank.

Legend: b bytes of the training dtype, N ranks, S elements of one rank's partition of a group, PAD = N S.
Source: deepspeed 0.19.8, runtime/engine.py:2305 (_do_optimizer_sanity_check), runtime/bf16_optimizer.py.
"""

from __future__ import annotations

from zplan.memory.exchange import Exchange
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.stage0 import ALLREDUCE_BUCKET_NUMEL, FP32, WholeGradients
from zplan.memory.stage12 import Partitions
from zplan.zero_config import ZeroConfig


def takes_bf16_optimizer(zero: ZeroConfig, exchange: Exchange, itemsize: int) -> bool:
    """bf16, fp32 accumulation, stage 1, no offload."""
    is_bf16 = itemsize < FP32 and not exchange.is_fp16
    return zero.stage == 1 and is_bf16 and exchange.accumulated == "fp32" and not zero.offloads_optimizer


def is_dealt(zero: ZeroConfig, exchange: Exchange, itemsize: int) -> bool:
    """Whether the flat groups are in the order of round_robin_gradients, which only the ZeRO optimizers know.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:469, runtime/bf16_optimizer.py (no such argument).
    """
    return zero.round_robin_gradients and not takes_bf16_optimizer(zero, exchange, itemsize)


def accumulated_bytes(cut: Partitions) -> int:
    """Flat fp32 gradients of every group, whole: 4 PAD (fp32_groups_gradients_flat)."""
    return FP32 * sum(cut.padded)


class Bf16Engine(WholeGradients):
    """Gradients stay until zero_grad, as zeros for the next micro-step (clear_lp_grads); they are added to the flat
    ones behind each backward, and those are reduced behind the last one.

    Args:
        reduced: bytes of an element while ranks add gradients.
    """

    def __init__(
        self, meter: Meter, items: Instances, cut: Partitions, *, itemsize: int, reduced: int, partial: bool
    ) -> None:
        super().__init__(meter, items, itemsize=itemsize, partial=partial)
        self.cut = cut
        self.cast = reduced if reduced != FP32 else 0

    def end_backward(self) -> None:
        """Each gradient in fp32 once (_update_hp_grad); then groups are joined until they exceed 5e8 elements, a copy
        unless it is one, and cast for the reduction (engine.py, allreduce_no_retain, allreduce_bucket)."""
        self.meter.touch(Kind.TEMPORARIES, FP32 * self.cut.largest_numel)
        filled = count = 0
        for size in self.cut.padded:
            filled, count = filled + size, count + 1
            self.meter.touch(Kind.TEMPORARIES, ((FP32 if count > 1 else 0) + self.cast) * filled)
            if filled > ALLREDUCE_BUCKET_NUMEL:
                filled = count = 0

    def step(self) -> None:
        """The partition's gradient is a view of the flat ones."""
