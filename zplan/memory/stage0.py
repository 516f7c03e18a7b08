"""Stage 0: DeepSpeed without ZeRO. Every rank holds everything; gradients are all-reduced in flat buckets.

Source: deepspeed 0.19.8, runtime/engine.py:2294 (_do_optimizer_sanity_check): bf16 without ZeRO is DDP_BFLOAT16, fp16
is FP16, both with an fp32 copy of every trainable parameter (fp16/unfused_optimizer.py); fp32 keeps the plain
optimizer.
"""

from __future__ import annotations

from dataclasses import replace

from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.muon import Precision, chained_updates_bytes

FP32 = 4
ALLREDUCE_BUCKET_NUMEL = 500_000_000
"""engine.py (buffered_allreduce_fallback, elements_per_buffer default)."""


class WholeGradients:
    """Gradients of the whole model, as autograd makes them, on every rank.

    Args:
        partial: gradients of earlier micro-steps are already there.
    """

    def __init__(self, meter: Meter, items: Instances, *, itemsize: int, partial: bool) -> None:
        self.meter, self.items, self.itemsize, self.partial = meter, items, itemsize, partial
        self.own: set[int] = set()

    def begin_micro_step(self) -> None:
        """Gradients of earlier micro-steps are there."""
        if self.partial:
            for group in self.items.groups:
                for number in group:
                    self.gradient(number)

    def gradient(self, number: int) -> None:
        num_bytes = self.itemsize * self.items.numel[number]
        if number in self.own:
            self.meter.touch(Kind.GRADIENTS, num_bytes)
            return
        self.own.add(number)
        self.meter.add(Kind.GRADIENTS, num_bytes)


class Stage0Engine(WholeGradients):
    """Gradients of the training dtype until the step; the step holds fp32 copies of all of them below fp32.

    Args:
        reduced: bytes of an element while ranks add gradients.
    """

    def __init__(
        self, meter: Meter, items: Instances, *, itemsize: int, reduced: int, partial: bool,
        of_muon: Precision, exchange: Exchange = PLAIN,
    ) -> None:  # fmt: skip
        super().__init__(meter, items, itemsize=itemsize, partial=partial)
        self.of_muon = replace(of_muon, gradient=FP32, normalised=FP32)
        self.cast = reduced if reduced != itemsize or exchange.communicated else 0

    def end_backward(self) -> None:
        """All-reduce: gradients are flattened until the buffer holds at least 5e8 elements; by one rank as well. What
        is reduced in another dtype is copied once more (engine.py, allreduce_bucket).
        """
        filled = largest = 0
        for group in self.items.groups:
            for number in group:
                filled += self.items.numel[number]
                largest = max(largest, filled)
                if filled > ALLREDUCE_BUCKET_NUMEL:
                    filled = 0
        self.meter.touch(Kind.TEMPORARIES, (self.itemsize + self.cast) * largest)

    def step(self) -> None:
        """fp32 gradients of all trainable parameters next to the low-precision ones, and Muon's update on top."""
        updates = chained_updates_bytes(self.items.muon.values(), self.of_muon)
        if self.itemsize != FP32:
            total = sum(self.items.numel[number] for group in self.items.groups for number in group)
            self.meter.touch(Kind.TEMPORARIES, FP32 * total + updates)
        else:
            self.meter.touch(Kind.TEMPORARIES, updates)
