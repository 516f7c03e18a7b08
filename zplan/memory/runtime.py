"""What the GPU holds besides tensors: CUDA context, NCCL, library workspaces, allocator slack.

A model, not a measurement. Each constant says where it comes from; `low` takes none of the doubtful ones,
`high` all of them.
"""

from __future__ import annotations

from zplan.memory.terms import ByteRange
from zplan.units import MIB
from zplan.values import dataclass

CUDA_CONTEXT = ByteRange(low=300 * MIB, expected=500 * MIB, high=650 * MIB)
"""Context and the kernels of torch 2.x on Ampere to Hopper: 0.3 to 0.6 GB in nvidia-smi before the first tensor."""
CUBLAS_WORKSPACE = ByteRange(low=8 * MIB, expected=32 * MIB, high=64 * MIB)
"""torch 2.13.0, aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB on Hopper, 8 MiB before (:4096:2:16:8), per handle
and stream; cublasLt's own workspace of the same size comes on top. Allocated through the caching allocator."""
NCCL_COMMUNICATOR = ByteRange(low=64 * MIB, expected=256 * MIB, high=512 * MIB)
"""Buffers of one communicator: channels x peers x 4 MiB (NCCL_BUFFSIZE) and protocol buffers; grows with topology."""
ALLOCATOR_ROUNDING = 512
"""torch 2.13.0, c10/cuda/CUDACachingAllocator (kMinBlockSize): every block is a multiple of 512 bytes."""
SEGMENT = 2 * MIB
"""kSmallBuffer / kRoundLarge: segments are multiples of 2 MiB."""
RESERVED_PERCENT = (100, 106, 120)
"""Of what is allocated, with segments that no live block fills: assumed, lower end nothing; `zplan simulate` replays
the allocator instead."""


@dataclass(frozen=True, slots=True)
class Overheads:
    """Bytes outside the allocator."""

    context: ByteRange
    nccl: ByteRange


NOTHING = ByteRange(low=0, expected=0, high=0)


def overheads(*, on_cpu: bool, num_communicators: int, num_contexts: int = 1) -> Overheads:
    """Context and NCCL of one rank; CPU ranks have neither.

    Args:
        num_contexts: on its GPU, those of other processes included; `low` takes them to be on other GPUs.
    """
    if on_cpu:
        return Overheads(NOTHING, NOTHING)
    nccl = ByteRange(
        low=NCCL_COMMUNICATOR.low * min(num_communicators, 1),
        expected=NCCL_COMMUNICATOR.expected * num_communicators,
        high=NCCL_COMMUNICATOR.high * num_communicators,
    )
    context = ByteRange(
        low=CUDA_CONTEXT.low, expected=num_contexts * CUDA_CONTEXT.expected, high=num_contexts * CUDA_CONTEXT.high
    )
    return Overheads(context, nccl)


def reserved_range(allocated: ByteRange, *, on_cpu: bool, largest_block: int = 0) -> ByteRange:
    """What the caching allocator holds from the driver, from what tensors use.

        allocated * (1.0 | 1.06 | 1.20), rounded up to 2 MiB segments;   CPU ranks: what is allocated

    Args:
        largest_block: the largest tensors that come and go, one of each kind. When the room that one left is split by
            smaller ones, or is another stream's, the next of its kind needs new segments: `high` counts it once more.
    """
    if on_cpu:
        return allocated
    low, middle, high = RESERVED_PERCENT
    return ByteRange(
        low=_segments(allocated.low * low // 100),
        expected=_segments(allocated.expected * middle // 100),
        high=_segments(allocated.high * high // 100 + largest_block),
    )


def _segments(num_bytes: int) -> int:
    return -(-num_bytes // SEGMENT) * SEGMENT
