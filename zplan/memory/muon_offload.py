"""DeepSpeed's Muon with offloaded states: whole gradients and momentum are gathered on the GPU, updated there and cut.

Legend: N ranks, b bytes of a gathered element, L elements of a sub-group's partitions on one rank.
Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2059, stage3.py:2588 (_apply_muon_updates_cpu_offload).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from zplan.memory.muon import FP32, MASTER, Precision, update_bytes
from zplan.memory.muon3 import GatherBuffers, Matrix
from zplan.values import dataclass

MOST_BYTES = 64 * 1024 * 1024
"""Of the gather of a batch at stages 1 and 2 (stage_1_and_2.py:411, _muon_allgather_max_buffer_bytes)."""
NORM = 8
"""Gradient norms are taken in fp64 (runtime/utils.py, get_norm_dtype)."""
GRADIENTS, AND_MOMENTUM = 1, 2
"""Buffers that are gathered: momentum is not, as long as it is new and zero."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One matrix at stages 1 and 2."""

    shape: tuple[int, ...]
    by_rank: tuple[tuple[int, int], ...]
    """(rank, elements)."""
    mine: int
    """Elements of the rank that is looked at."""


def batches(pieces: Sequence[Piece]) -> list[Sequence[Piece]]:
    """Matrices together, while their gradients and momentum are within MOST_BYTES in fp32; at least one.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:2038 (_muon_param_batches).
    """
    found: list[Sequence[Piece]] = []
    start = numel = 0
    for index, piece in enumerate(pieces):
        if index > start and numel + prod(piece.shape) > MOST_BYTES // (2 * FP32):
            found.append(pieces[start:index])
            start, numel = index, 0
        numel += prod(piece.shape)
    return [*found, pieces[start:]] if pieces else []


def gathered_numel(batch: Sequence[Piece], num_ranks: int, num_buffers: int) -> int:
    """Elements that a rank sends at a time: the most that one rank has of the batch, cut to MOST_BYTES.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:1956 (_muon_all_gather_partitions: chunk_numel).
    """
    by_rank = [0] * num_ranks
    for piece in batch:
        for rank, numel in piece.by_rank:
            by_rank[rank] += numel
    return num_buffers * min(max(by_rank), max(1, MOST_BYTES // ((num_ranks + 1) * num_buffers * FP32)))


def stage12_update_bytes(
    pieces: Sequence[Piece], *, num_ranks: int, is_scaled: bool, of: Precision = MASTER
) -> tuple[int, int]:
    """(bytes of gather buffers between steps, most that a later step has live above them), in fp32.

    Per batch, which is freed before the next:

        gather    4 * 2 * elements
        update    the same + 4 N_k-1 + update_bytes(k)
        norm      the same + (4 + 8) N_k, or the part of it that the rank has; 4 more under a loss scale

    Args:
        is_scaled: there is a loss scale (fp16).
    """
    buffers, together = GatherBuffers(num_ranks, FP32), batches(pieces)
    for num_buffers in (GRADIENTS, AND_MOMENTUM):
        for batch in together:
            buffers.take(gathered_numel(batch, num_ranks, num_buffers), num_buffers)
    kept, most = buffers.kept_bytes, 0
    for batch in together:
        own = buffers.take(gathered_numel(batch, num_ranks, AND_MOMENTUM), AND_MOMENTUM)
        live = buffers.kept_bytes - kept + 2 * FP32 * sum(prod(piece.shape) for piece in batch)
        most, before = max(most, live + own), 0
        for piece in batch:
            most = max(most, live + before + update_bytes(piece.shape, of))
            before = FP32 * prod(piece.shape)
            most = max(most, live + before + (NORM + FP32 * is_scaled) * piece.mine)
    return kept, most


def stage3_update_bytes(
    groups: Sequence[Sequence[Matrix]], *, num_ranks: int, is_scaled: bool, of: Precision
) -> tuple[int, int]:
    """(bytes of gather buffers between steps, most that a later step has live above them).

    Per sub-group, beside the whole matrices of the one before, until they are replaced:

        parts     4 L fp32 gradients, b L momentum
        gather    2 N b L, and the gather's own buffers     one rank: b L, the gradients' cast
        update    update_bytes(k) + what matrix k - 1 left
        cut       b N_k + 2 b part_k + max(4, 8) part_k
    """
    b, buffers = of.gradient, GatherBuffers(num_ranks, of.gradient)
    sizes = [sum(part for part, _ in group) for group in groups]
    for numel in sizes:
        buffers.take(2 * numel)
    kept, most, before, left = buffers.kept_bytes, 0, 0, 0
    for numel, group in zip(sizes, groups, strict=True):
        own = buffers.take(2 * numel)
        cast = b * numel if b != FP32 else 0
        whole = 2 * num_ranks * b * numel if num_ranks > 1 else cast
        live = buffers.kept_bytes - kept + (FP32 + b) * numel + whole
        most = max(most, live + before + left + own)
        for part, shape in group:
            most = max(most, live + left + update_bytes(shape, of))
            left = b * prod(shape) + (2 + is_scaled) * b * part
            most = max(most, live + left + NORM * part)
        before = whole
    return kept, most
