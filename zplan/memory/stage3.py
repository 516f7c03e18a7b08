"""ZeRO-3 during a step: partitions, gathered parameters as the coordinator fetches them, reduction, sub-groups.

Legend: b bytes of a parameter's dtype, N ranks, n_i elements of parameter i, partition_i = ceil(n_i / N).
Source: deepspeed 0.19.8, runtime/zero/stage3.py, partition_parameters.py, partitioned_param_coordinator.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from zplan.memory.coordinator import Action
from zplan.memory.exchange import PLAIN, Exchange
from zplan.memory.instances import Instances
from zplan.memory.meter import Kind, Meter
from zplan.memory.muon import BF16, Precision
from zplan.memory.quantized import FP16, Given, QuantizedGather, gather_alone, gather_together, scatter_bytes
from zplan.memory.shards import Shards, padded_bytes, secondary_group, update_bytes, whole_bytes
from zplan.memory.shared_buffers import SharedBuffers
from zplan.memory.sub_groups import muon_bytes, staging_bytes, sub_groups, unswapped_bytes
from zplan.zero_config import ZeroConfig

FP32 = 4


class Stage3Engine:
    """The bytes of what the parameter coordinator does, and the gradient path of one micro-step.

    Args:
        swapped: parameters whose gradients go to the NVMe (sub_groups.py).
        persistent: parameters that stay when backward is over.
    """

    def __init__(
        self,
        meter: Meter,
        items: Instances,
        shards: Shards,
        zero: ZeroConfig,
        *,
        num_ranks: int,
        itemsize: int,
        reduced: int | None = None,
        exchange: Exchange = PLAIN,
        of_muon: Precision = BF16,
        swapped: frozenset[int] = frozenset(),
        persistent: frozenset[int] = frozenset(),
        on_cpu: bool = False,
    ) -> None:
        self.persistent, self.held_over = persistent, 0
        self.shared = SharedBuffers(len(items.numel)) if zero.stage3_use_all_reduce_for_fetch_params else None
        self.copies_here = on_cpu or not zero.offloads_param
        self.of_muon, self.swapped = of_muon, swapped
        self.meter, self.items, self.shards, self.zero = meter, items, shards, zero
        self.num_ranks, self.itemsize, self.exchange = num_ranks, itemsize, exchange
        self.reduced = reduced or exchange.communicated_bytes(itemsize)
        self.accumulated = exchange.accumulated_bytes(itemsize)
        self.casts = exchange.communicated is not None or self.reduced != itemsize
        self.converts_back = exchange.converts_back or self.reduced != exchange.communicated_bytes(itemsize)
        self.held = [0] * len(items.numel)
        self.kept = [0] * len(items.numel)
        self.bytes, self.padded_bytes = whole_bytes(items), padded_bytes(items, num_ranks)
        self.secondary = [0] * len(items.numel)
        self.act: tuple[Callable[[tuple[int, ...]], None], ...] = (
            self._gather, self._arrive, self._settle, self._release, self._keep, self._forget, self._give_back,
            self.end_step, self._drop, self._fetch,
        )  # fmt: skip
        self.bucket: list[int] = []
        self.bucket_numel = 0
        self.outside: list[int] = []
        """Gradients of the bucket that are not in its buffer."""

    # -- parameters ----------------------------------------------------------------------------------------------
    def follow(self, actions: Sequence[Action]) -> None:
        """What the coordinator does at a call."""
        for act, numbers in actions:
            self.act[act](numbers)

    @property
    def by_parameter(self) -> tuple[list[int], ...]:
        """All that it remembers of gathered parameters, in the order of all parameters."""
        shared = (self.shared.held, self.shared.kept) if self.shared else ()
        return self.held, self.kept, self.secondary, *shared

    @cached_property
    def second_copies(self) -> int:
        """Ranks that share hpZ's second copy."""
        return secondary_group(self.zero, self.num_ranks)

    @cached_property
    def gathers_together(self) -> bool:
        return self.num_ranks > 1 and not self.zero.stage3_allgather_sequential

    def _is_coalesced(self, numbers: tuple[int, ...]) -> bool:
        """Several parameters share one flat buffer (all_gather_coalesced)."""
        return len(numbers) > 1 and self.gathers_together

    @cached_property
    def quantizes(self) -> bool:
        return self.num_ranks > 1 and self.zero.zero_quantized_weights

    def _quantized(self, numbers: tuple[int, ...]) -> QuantizedGather:
        """qwZ; out of hpZ's second copies where all of them have one."""
        group = self.second_copies
        copied = all(map(self._has_second_copy, numbers))
        scale, ranks = (self.num_ranks // group, group) if copied else (1, self.num_ranks)
        parts = self.shards.partition
        given = tuple(
            Given(self.items.numel[p], parts[p] * scale, self._staged_bytes((p,)) if self.zero.offloads_param else 0)
            for p in numbers
        )
        gather = gather_together if self._is_coalesced(numbers) else gather_alone
        return gather(given, num_ranks=ranks, itemsize=self.itemsize, is_fp16=self.exchange.is_fp16)

    def _gather(self, numbers: tuple[int, ...]) -> None:
        if self.quantizes:
            gather = self._quantized(numbers)
            self.meter.touch(Kind.GATHERED_PARAMETERS, gather.launching)
            self.meter.add(Kind.GATHERED_PARAMETERS, gather.flying)
            return
        if self.shared and self._is_coalesced(numbers) and not self._has_second_copy(numbers[0]):
            together = sum(self.padded_bytes[number] for number in numbers)
            self.shared.gather(numbers, together)
            self.meter.add(Kind.GATHERED_PARAMETERS, together)
            return
        flat = 0
        if self._is_coalesced(numbers):
            flat = sum(self.padded_bytes[number] for number in numbers)
        else:
            self._hold(numbers, [self._gathered_alone(number) for number in numbers])
        if self.zero.offloads_param and self.num_ranks > 1:
            self.meter.touch(Kind.GATHERED_PARAMETERS, flat + self._staged_bytes(numbers))
        self.meter.add(Kind.GATHERED_PARAMETERS, flat)

    def _fetch(self, numbers: tuple[int, ...]) -> None:
        """Each alone, from a copy of its partition if that is offloaded; a single rank makes a copy too.

        Source: deepspeed 0.19.8, partition_parameters.py (_allgather_params_sequential).
        """
        sizes = self.padded_bytes if self.num_ranks > 1 else self.bytes
        for number in numbers:
            self._hold((number,), [sizes[number]])
            if self.zero.offloads_param:
                self.meter.touch(Kind.GATHERED_PARAMETERS, self._staged_bytes((number,)))

    def _gathered_alone(self, number: int) -> int:
        """One rank has nothing to gather; it copies what is on the host.

        Source: deepspeed 0.19.8, partition_parameters.py (NoGatherHandle, NoGatherCoalescedHandle).
        """
        if self.num_ranks > 1:
            return self.padded_bytes[number]
        return self.bytes[number] if self.zero.offloads_param else 0

    def _staged_bytes(self, numbers: Sequence[int]) -> int:
        """Partitions copied from the host before the gather; hpZ's larger ones where there are any."""
        return sum(
            self.padded_bytes[p] // (self.second_copies if self._has_second_copy(p) else self.num_ranks)
            for p in numbers
            if p not in self.shards.persistent
        )

    def _has_second_copy(self, number: int) -> bool:
        """A frozen parameter has its own from loading on."""
        return self.second_copies > 1 and bool(self.secondary[number] or not self.items.trainable[number])

    def _hold(self, numbers: Sequence[int], each_bytes: Sequence[int]) -> None:
        for number, num_bytes in zip(numbers, each_bytes, strict=True):
            self.held[number] = num_bytes
        self.meter.add(Kind.GATHERED_PARAMETERS, sum(each_bytes))

    def _arrive(self, numbers: tuple[int, ...]) -> None:
        if self.quantizes:
            gather = self._quantized(numbers)
            self.meter.touch(Kind.GATHERED_PARAMETERS, gather.arriving)
            self._hold(numbers, [self.bytes[number] for number in numbers])
            self.meter.add(Kind.GATHERED_PARAMETERS, gather.unpacked)
        elif self._is_coalesced(numbers) and not (self.shared and self.shared.has(numbers)):
            self._hold(numbers, [self.bytes[number] for number in numbers])

    def _settle(self, numbers: tuple[int, ...]) -> None:
        if self.quantizes:
            gather = self._quantized(numbers)
            self.meter.add(Kind.GATHERED_PARAMETERS, -gather.flying - gather.unpacked)
        elif self._is_coalesced(numbers) and not (self.shared and self.shared.settle(numbers)):
            self.meter.add(Kind.GATHERED_PARAMETERS, -sum(self.padded_bytes[number] for number in numbers))

    def cut_all_again(self) -> None:
        """Every trained parameter has its second copy (hpZ)."""
        self._cut_again(tuple(number for group in self.items.groups for number in group))

    def _cut_again(self, numbers: tuple[int, ...]) -> None:
        """hpZ: the second copy of a trained parameter is made when it is first released after an update.

        Source: deepspeed 0.19.8, partition_parameters.py (_partition_param_sec), stage3.py
        (invalidate_secondary_tensor).
        """
        group = self.second_copies
        if group == 1:
            return
        for number in numbers:
            if self.items.trainable[number] and not self.secondary[number]:
                self.secondary[number] = 1
                self.meter.add(Kind.GATHERED_PARAMETERS, self.padded_bytes[number] // group if self.copies_here else 0)

    def _release(self, numbers: tuple[int, ...]) -> None:
        self._cut_again(numbers)
        released = self.shared.release(numbers) if self.shared else 0
        for number in numbers:
            released += self.held[number]
            self.held[number] = 0
        self.meter.add(Kind.GATHERED_PARAMETERS, -released)

    def _keep(self, numbers: tuple[int, ...]) -> None:
        """What is kept is the tensor that forward saw; one that is gathered again goes."""
        self._cut_again(numbers)
        again = tuple(number for number in numbers if self.kept[number] and number in self.items.packed)
        for number in numbers:
            if number not in again:
                self.kept[number], self.held[number] = self.held[number], 0
        if self.shared:
            self.shared.keep([number for number in numbers if number not in again])
        self._release(again)

    def _forget(self, numbers: tuple[int, ...]) -> None:
        """A quantised weight is kept on the context of its node, not among what the node saves: as long as the graph,
        which goes with the loss, behind the update.

        Source: bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit.forward: ctx.tensors).
        """
        for number in numbers:
            if number not in self.items.packed:
                shared = self.shared.forget((number,)) if self.shared else 0
                self.meter.add(Kind.GATHERED_PARAMETERS, -self.kept[number] - shared)
                self.kept[number] = 0

    def _drop(self, numbers: tuple[int, ...]) -> None:
        """The node that made a weight's gradient has run: the view of the weight that it kept is gone when the gradient
        reaches its hook.

        Source: torch 2.13.0, torch/csrc/autograd/engine.cpp (call_function: release_variables).
        """
        self._forget(numbers)
        self.meter.mark()

    def end_step(self, _numbers: tuple[int, ...]) -> None:
        """What persists is given back before the update, and gathered again behind it.

        Source: deepspeed 0.19.8, runtime/zero/stage3.py (_partition_all_parameters, _post_step).
        """
        if self.shared:
            self.meter.add(Kind.GATHERED_PARAMETERS, -self.held_over)
        again = update_bytes(self.items, self.shards, self.zero, num_ranks=self.num_ranks)
        self.meter.touch(Kind.GATHERED_PARAMETERS, again)

    def _give_back(self, _numbers: tuple[int, ...]) -> None:
        stays = sum(self.kept[number] for number in self.items.packed)
        if self.shared:
            self.held_over = self.shared.give_back(self.persistent, self.items.packed)
            stays += self.held_over
        self.meter.add(Kind.GATHERED_PARAMETERS, stays - self.meter.by_kind[Kind.GATHERED_PARAMETERS])

    # -- gradients -----------------------------------------------------------------------------------------------
    def begin_micro_step(self) -> None:
        """Earlier gradients are in the permanent partitions."""

    def gradient(self, number: int) -> None:
        """AccumulateGrad ran: into the bucket, or alone if the parameter is larger than the bucket."""
        numel, size = self.items.numel[number], self.zero.reduce_bucket_size
        self.meter.add(Kind.GRADIENTS, self.bytes[number])
        if self.bucket and self.bucket_numel + numel > size:
            self._reduce()
        if self.zero.contiguous_gradients and self.bucket_numel + numel <= size:
            self.meter.add(Kind.GRADIENTS, -self.bytes[number])
        else:
            self.outside.append(number)
        self.bucket.append(number)
        self.bucket_numel += numel

    def end_backward(self) -> None:
        """The epilogue reduces what is left."""
        self._reduce()

    def _reduce(self) -> None:
        if not self.bucket:
            return
        reducing, staged = self._reduction_bytes()
        if self.zero.offloads_optimizer:
            staged += staging_bytes(self.bucket, self.shards.partition, self.swapped, itemsize=self.accumulated)
        self.meter.touch(Kind.TEMPORARIES, max(reducing, staged))
        stays = unswapped_bytes(self.items, self.swapped.intersection(self.bucket), self.num_ranks)
        self.meter.add(Kind.GRADIENTS, stays - sum(self.bytes[number] for number in self.outside))
        self.bucket, self.bucket_numel, self.outside = [], 0, []

    def _reduction_bytes(self) -> tuple[int, int]:
        """(while ranks add gradients, what is left of it until each has taken its part).

        The padded copy of the bucket that reduce_scatter_coalesced builds, or qgZ's buffers between nodes; without
        reduce_scatter the reduced bucket times gradient_predivide_factor, a copy unless that is the number of ranks (it
        is 1). A communication dtype of its own takes a copy of what is not in the bucket's buffer, which has that
        dtype; another one for accumulation a copy of the partitions.

        Source: deepspeed 0.19.8, runtime/comm/coalesced_collectives.py (reduce_scatter_coalesced), stage3.py:1883
        (__avg_scatter_contiguous_grads), :1912 (__avg_scatter_grads).
        """
        back = self.accumulated if self.converts_back else 0
        scatters = (self.zero.reduce_scatter and not self.items.muon) or not self.zero.contiguous_gradients
        if not scatters and self.bucket_numel <= self.zero.reduce_bucket_size:
            copy = self.reduced * self.bucket_numel if self.num_ranks > 1 else 0
            kept = back * self.bucket_numel or copy
            return copy + back * self.bucket_numel, kept
        outside = sum(self.items.numel[p] for p in self.outside)
        converted = self.reduced * outside if self.casts else 0
        parts = sum(self.shards.partition[p] for p in self.bucket)
        if self.zero.zero_quantized_gradients and self.num_nodes > 1:
            left = (FP16 + back) * parts
            return converted + max(self._quantized_bytes(), left), back * parts or left
        padded = self._padded_bytes()
        return converted + padded + back * parts, back * parts or padded or converted

    def _quantized_bytes(self) -> int:
        """Of all_to_all_quant_reduce."""
        gradients = [(self.items.numel[p], self.items.longest[p]) for p in sorted(self.bucket)]
        return scatter_bytes(
            gradients, num_ranks=self.num_ranks, gpus_per_node=self.num_ranks // self.num_nodes, itemsize=self.reduced
        )  # fmt: skip

    def _padded_bytes(self) -> int:
        """Of reduce_scatter_coalesced, whose results are parts of it."""
        if len(self.bucket) == 1 and self.items.numel[self.bucket[0]] % self.num_ranks == 0:
            return 0
        return sum(self.reduced * self.shards.partition[p] * self.num_ranks for p in self.bucket)

    @cached_property
    def num_nodes(self) -> int:
        return self.num_ranks // (self.exchange.gpus_per_node or self.num_ranks)

    def step(self) -> None:
        """Per sub-group: fp32 gradients of its partitions (and a flat copy first if it has several parameters).

        Source: deepspeed 0.19.8, stage3.py (_prepare_sub_group, _prepare_fp32_grad_for_sub_group).
        """
        if self.items.muon:
            _, updating = muon_bytes(self.items, self.zero, self.num_ranks, self.of_muon)
            self.meter.touch(Kind.TEMPORARIES, updating)
        if self.zero.offloads_optimizer:
            self.meter.add(Kind.GRADIENTS, -self.meter.by_kind[Kind.GRADIENTS])
            return
        self.meter.touch(Kind.TEMPORARIES, 2 * FP32 * self.shards.largest_partition)
        groups = sub_groups(self.items, self.num_ranks, self.zero.sub_group_size)
        for numel, count in zip(groups.numel, groups.counts, strict=True):
            flat = self.accumulated * numel if count > 1 else 0
            cast = FP32 * numel if self.accumulated != FP32 else 0
            self.meter.touch(Kind.TEMPORARIES, max(flat + cast, FP32 * numel))
