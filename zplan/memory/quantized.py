"""ZeRO++ on one GPU: the bytes of an int8 gather of parameters (qwZ) and of a 4-bit reduction of gradients (qgZ).

Legend: b bytes of a parameter's dtype, N ranks that gather, n elements of a parameter, P elements that one rank gives,
g groups of elements with one float32 scale each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, isqrt

from zplan.values import dataclass

GROUP_NUMEL = 8000
"""Elements of a group at most (CUDAQuantizer.target_group_size)."""
VECTOR = 8
"""Elements that the kernel reads at a time: a group is a multiple of it."""
INT8, FP16, FP32 = 1, 2, 4


@lru_cache(1 << 16)
def num_groups(numel: int) -> int | None:
    """Groups into which the quantizer cuts `numel` elements: the fewest of at most 8000 elements that are multiples of
    8; None where there are none and DeepSpeed asserts.

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (CUDAQuantizer.quantize).
    Limits: its second loop doubles the groups while they are too large, which the first one leaves nothing for.
    """
    vectors, rest = divmod(numel, VECTOR)
    if rest or not numel:
        return None
    least = ceil(numel / GROUP_NUMEL)
    small = [number for number in range(1, isqrt(vectors) + 1) if vectors % number == 0]
    return min(groups for number in small for groups in (number, vectors // number) if groups >= least)


@dataclass(frozen=True, slots=True)
class Given:
    """A parameter in a gather."""

    numel: int
    """n, whole and not padded."""
    partition: int
    """P."""
    staged_bytes: int
    """Of its partition, copied from the host."""


@dataclass(frozen=True, slots=True)
class QuantizedGather:
    """Bytes of one collective."""

    launching: int
    """The most while it is launched."""
    flying: int
    """From then until the last of its parameters is waited for."""
    arriving: int
    """The most, beside `flying`, while its parameters become tensors."""
    unpacked: int
    """Of `arriving`, what stays as long as `flying` beside the parameters themselves."""


def gather_alone(given: Sequence[Given], *, num_ranks: int, itemsize: int, is_fp16: bool) -> QuantizedGather:
    """Each parameter by itself; the int8 partition and the scales of one are there while the next is quantised.

        launching   N P + (2 P if not fp16) + P + 4 g     then     N P + P + 4 g + 4 g N
        flying      N P + 4 g N
        arriving    2 n + (b n if not fp16)

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (_all_gather_sequential, AllGatherHandle.wait).
    """
    flying = launching = arriving = before = arrived = 0
    for one in given:
        buffer, scales = num_ranks * one.partition, FP32 * (num_groups(one.partition) or 0)
        cast = 0 if is_fp16 and not one.staged_bytes else FP16 * one.partition
        own = one.partition + scales
        flying += buffer
        launching = max(launching, flying + before + cast + own, flying + own + scales * num_ranks)
        flying, before = flying + scales * num_ranks, own
        arriving = max(arriving, arrived + FP16 * one.numel + (0 if is_fp16 else itemsize * one.numel))
        arrived += itemsize * one.numel
    return QuantizedGather(launching, flying, arriving, 0)


def gather_together(given: Sequence[Given], *, num_ranks: int, itemsize: int, is_fp16: bool) -> QuantizedGather:
    """All in one int8 buffer, P and n summed over them; the float16 buffer that it becomes stays with it.

        launching   N P + max(b P + staged, b P + (2 P if not fp16), 2 P + P + 4 g, P + 4 g + 4 g N)
        flying      N P + 4 g N
        arriving    2 N P + b n of those before + 2 n + (b n if not fp16) of the largest

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py (_all_gather_coalesced,
    AllGatherCoalescedHandle.wait).
    """
    partition, staged = sum(one.partition for one in given), sum(one.staged_bytes for one in given)
    buffer, scales = num_ranks * partition, FP32 * (num_groups(partition) or 0)
    flat, cast, own = itemsize * partition, 0 if is_fp16 else FP16 * partition, partition + scales
    launching = max(flat + staged, flat + cast, FP16 * partition + own, own + scales * num_ranks)
    arriving = arrived = 0
    for one in given:
        arriving = max(arriving, arrived + FP16 * one.numel + (0 if is_fp16 else itemsize * one.numel))
        arrived += itemsize * one.numel
    unpacked = FP16 * buffer
    return QuantizedGather(buffer + launching, buffer + scales * num_ranks, unpacked + arriving, unpacked)


def scatter_bytes(
    gradients: Sequence[tuple[int, int]], *, num_ranks: int, gpus_per_node: int, itemsize: int
) -> int:  # fmt: skip
    """The most that qgZ has live while it reduces a bucket, one gradient after the other; the tensors of one are there
    until those of the next take their names.

        quantised, and received from the node   n / 2 + 4 g              g = max(rows, columns, N)
        reduced, and received from the others   n / 2 L + 4 (g // L)     L GPUs of a node
        dequantised                             2 n / L
        averaged                                2 n / N, which stay; two of them for a moment

    Vectors, and what 2 N does not divide, are reduced in full.

    Args:
        gradients: (elements, larger of the first two dimensions; 0 for a vector).

    Source: deepspeed 0.19.8, runtime/comm/coalesced_collectives.py (all_to_all_quant_reduce),
    ops/csrc/quantization/pt_binding.cpp.
    """
    live: dict[str, int] = {}
    most = done = 0
    for numel, longest in gradients:
        if not longest or numel % (2 * num_ranks):
            padded = -(-numel // num_ranks) * num_ranks
            done += itemsize * padded if padded > numel else 0
            most = max(most, done + sum(live.values()))
            continue
        groups = max(longest, num_ranks)
        sent, reduced = numel // 2, numel // 2 // gpus_per_node
        scales, fewer = FP32 * groups, FP32 * (groups // gpus_per_node)
        made = {
            "quantised": sent + scales, "received": sent, "its scales": scales, "reduced": reduced + fewer,
            "from others": reduced, "their scales": fewer, "dequantised": FP16 * numel // gpus_per_node,
        }  # fmt: skip
        for name, num_bytes in made.items():
            most = max(most, done + sum(live.values()) + num_bytes)
            live[name] = num_bytes
        average = FP16 * numel // num_ranks
        most = max(most, done + sum(live.values()) + 2 * average)
        done += average
    return most
