"""CUDA's caching allocator, replayed on a stream of allocations: reserved bytes, and where the card is full.

Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp and c10/core/CachingDeviceAllocator.h (the constants), with the
options of PYTORCH_CUDA_ALLOC_CONF under their own names.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

MIB = 1 << 20
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_ALLOCATION_BYTES = 10 * MIB
LARGE_ROUNDING_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorOptions:
    """The options of PYTORCH_CUDA_ALLOC_CONF that change what is reserved."""

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    garbage_collection_threshold: float = 0.0


class CardFullError(Exception):
    """The replayed allocator could not serve a request; the text is PyTorch's."""


@dataclass(eq=False, slots=True)
class Segment:
    """One cudaMalloc, or one expandable address range of a stream."""

    number: int
    bytes: int
    last_used: int = 0


@dataclass(eq=False, slots=True)
class Piece:
    """A block inside a segment."""

    segment: Segment
    offset: int
    bytes: int
    pool: tuple[int, bool]
    free: bool = False
    before: Piece | None = None
    after: Piece | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return (self.bytes, self.segment.number, self.offset)


def rounded_bytes(requested: int) -> int:
    """Block size of a request: a multiple of 512 bytes."""
    return max(MIN_BLOCK_BYTES, (requested + MIN_BLOCK_BYTES - 1) // MIN_BLOCK_BYTES * MIN_BLOCK_BYTES)


def segment_bytes(size: int) -> int:
    """What is asked of cudaMalloc for a block of `size` bytes."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_ALLOCATION_BYTES:
        return LARGE_SEGMENT_BYTES
    return (size + LARGE_ROUNDING_BYTES - 1) // LARGE_ROUNDING_BYTES * LARGE_ROUNDING_BYTES


class CachingAllocator:
    """One device's allocator.

    Args:
        capacity_bytes: what cudaMalloc can hand out in all; None never fails.
        total_bytes: the card's size, for the message; capacity_bytes by default.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        total_bytes: int | None = None,
        options: AllocatorOptions | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.total_bytes = total_bytes or capacity_bytes
        self.options = options or AllocatorOptions()
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[tuple[int, bool], list[tuple[tuple[int, int, int], Piece]]] = {}
        self._segments = 0
        self._clock = 0
        self._tails: dict[tuple[int, bool], Piece] = {}
        """Last piece of each pool's expandable segment."""

    def allocate(self, requested: int, *, stream: int = 0) -> Piece:
        """Serve a request from the pool of its stream, else from the device.

        Raises:
            CardFullError: nothing is left, also after the cached blocks were given back.
        """
        self._clock += 1
        size = rounded_bytes(requested)
        pool = (stream, size <= SMALL_BYTES)
        piece = self._take_cached(pool, size) or self._take_new(pool, size, requested)
        piece.segment.last_used = self._clock
        if self._should_split(piece, size):
            self._split(piece, size)
        piece.free = False
        self.allocated_bytes += piece.bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return piece

    def free(self, piece: Piece) -> None:
        """Give a block back to its pool and merge it with free neighbours."""
        self.allocated_bytes -= piece.bytes
        piece.free = True
        before, after = piece.before, piece.after
        if before is not None and before.free:
            self._remove(before)
            piece.offset, piece.bytes, piece.before = before.offset, piece.bytes + before.bytes, before.before
            if before.before is not None:
                before.before.after = piece
        if after is not None and after.free:
            self._remove(after)
            piece.bytes, piece.after = piece.bytes + after.bytes, after.after
            if after.after is not None:
                after.after.before = piece
        self._insert(piece)
        if self.options.expandable_segments and piece.after is None:
            self._tails[piece.pool] = piece

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache: give back what no block uses."""
        for pool, entries in self._pools.items():
            for _, piece in list(entries):
                if self.options.expandable_segments:
                    self._unmap(piece)
                elif piece.before is None and piece.after is None:
                    self._remove(piece)
                    self.reserved_bytes -= piece.bytes
            if self.options.expandable_segments:
                self._pools[pool] = [entry for entry in entries if entry[1].bytes]

    def _take_cached(self, pool: tuple[int, bool], size: int) -> Piece | None:
        entries = self._pools.setdefault(pool, [])
        position = bisect.bisect_left(entries, ((size, -1, -1),), key=lambda entry: (entry[0],))
        if position == len(entries):
            return None
        piece = entries[position][1]
        limit = self.options.max_split_size_bytes
        if limit is not None and not pool[1]:
            if size < limit <= piece.bytes:
                return None
            if size >= limit and piece.bytes >= size + LARGE_SEGMENT_BYTES:
                return None
        del entries[position]
        return piece

    def _take_new(self, pool: tuple[int, bool], size: int, requested: int) -> Piece:
        if self.options.expandable_segments:
            return self._expand(pool, size, requested)
        wanted = segment_bytes(size)
        if self.options.garbage_collection_threshold and self.capacity_bytes is not None:
            self._collect_garbage(self.options.garbage_collection_threshold * self.capacity_bytes, wanted)
        self._reserve(wanted, requested)
        self._segments += 1
        return Piece(Segment(self._segments, wanted), 0, wanted, pool)

    def _expand(self, pool: tuple[int, bool], size: int, requested: int) -> Piece:
        """Map more pages at the end of the pool's address range: 2 MiB for small blocks, 20 MiB for large ones."""
        page = SMALL_SEGMENT_BYTES if pool[1] else LARGE_SEGMENT_BYTES
        tail = self._tails.get(pool)
        cached = tail.bytes if tail is not None and tail.free else 0
        grown = (size - cached + page - 1) // page * page
        self._reserve(grown, requested)
        if tail is None:
            self._segments += 1
            piece = Piece(Segment(self._segments, grown), 0, grown, pool)
        elif tail.free:
            self._remove(tail) if tail.bytes else None
            tail.bytes += grown
            piece = tail
        else:
            piece = Piece(tail.segment, tail.offset + tail.bytes, grown, pool, before=tail)
            tail.after = piece
        self._tails[pool] = piece
        return piece

    def _unmap(self, piece: Piece) -> None:
        """Give back whole pages of a free block at the end of its range; blocks inside keep their pages."""
        if piece.after is not None:
            return
        page = SMALL_SEGMENT_BYTES if piece.pool[1] else LARGE_SEGMENT_BYTES
        kept = -(-piece.offset // page) * page - piece.offset
        self.reserved_bytes -= max(piece.bytes - kept, 0)
        piece.bytes = min(piece.bytes, kept)

    def _reserve(self, wanted: int, requested: int) -> None:
        if self.capacity_bytes is not None and self.reserved_bytes + wanted > self.capacity_bytes:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved_bytes + wanted > self.capacity_bytes:
                raise CardFullError(self._message(requested))
        self.reserved_bytes += wanted
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _collect_garbage(self, threshold_bytes: float, wanted: int) -> None:
        """Give back the longest unused whole segments until reserved memory is below the threshold."""
        if self.reserved_bytes + wanted <= threshold_bytes:
            return
        idle = [
            piece
            for entries in self._pools.values()
            for _, piece in entries
            if piece.before is None and piece.after is None and not piece.pool[1]
        ]
        for piece in sorted(idle, key=lambda p: p.segment.last_used):
            if self.reserved_bytes + wanted <= threshold_bytes:
                break
            self._remove(piece)
            self.reserved_bytes -= piece.bytes

    def _should_split(self, piece: Piece, size: int) -> bool:
        rest = piece.bytes - size
        if piece.pool[1] or self.options.expandable_segments:
            return rest >= MIN_BLOCK_BYTES
        limit = self.options.max_split_size_bytes
        return (limit is None or size < limit) and rest > SMALL_BYTES

    def _split(self, piece: Piece, size: int) -> None:
        rest = Piece(
            piece.segment, piece.offset + size, piece.bytes - size, piece.pool, True, before=piece, after=piece.after
        )
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.bytes = rest, size
        self._insert(rest)
        if self.options.expandable_segments and rest.after is None:
            self._tails[piece.pool] = rest

    def _insert(self, piece: Piece) -> None:
        bisect.insort(self._pools.setdefault(piece.pool, []), (piece.key, piece), key=lambda entry: entry[0])

    def _remove(self, piece: Piece) -> None:
        entries = self._pools[piece.pool]
        del entries[bisect.bisect_left(entries, piece.key, key=lambda entry: entry[0])]

    def _message(self, requested: int) -> str:
        """torch.OutOfMemoryError's words for this state."""
        total = self.total_bytes or 0
        free = (self.capacity_bytes or 0) - self.reserved_bytes
        cached = self.reserved_bytes - self.allocated_bytes
        return (
            f"CUDA out of memory. Tried to allocate {format_size(requested)}. GPU 0 has a total capacity of "
            f"{format_size(total)} of which {format_size(free)} is free. Of the allocated memory "
            f"{format_size(self.allocated_bytes)} is allocated by PyTorch, and {format_size(cached)} is reserved by "
            "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for Memory "
            "Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
        )


def format_size(num_bytes: int) -> str:
    """Bytes in PyTorch's own spelling (format_size of CUDACachingAllocator.cpp)."""
    if num_bytes <= 1024:
        return f"{num_bytes} bytes"
    if num_bytes <= MIB:
        return f"{num_bytes / 1024:.2f} KiB"
    if num_bytes <= 1 << 30:
        return f"{num_bytes / MIB:.2f} MiB"
    return f"{num_bytes / (1 << 30):.2f} GiB"


def replay_peak(sizes: Iterable[int], *, options: AllocatorOptions | None = None) -> int:
    """Reserved bytes after allocating `sizes` in order and freeing none."""
    allocator = CachingAllocator(options=options)
    for size in sizes:
        allocator.allocate(size)
    return allocator.peak_reserved_bytes
