"""CUDA's caching allocator, replayed on a stream of allocations: reserved bytes, and where the card is full.

Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp (DeviceCachingAllocator); every rule names the function that it
restates. Not restated: pools of CUDA graphs, peers, events of other streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zplan.errors import ConfigError
from zplan.simulate.blocks import (
    ADDRESS_BYTES,
    LARGE_SEGMENT_BYTES,
    MIB,
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    Block,
    Clock,
    Pool,
    format_size,
    page_bytes,
    rounded_bytes,
    segment_bytes,
)
from zplan.values import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorOptions:
    """The options of PYTORCH_CUDA_ALLOC_CONF that change what is reserved, and torch's memory fraction."""

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    garbage_collection_threshold: float = 0.0
    """Acts only under a memory fraction, as in torch."""
    roundup_power2_divisions: int = 0
    per_process_memory_fraction: float | None = None
    """Of the card's size: torch.cuda.set_per_process_memory_fraction."""


def parse_options(text: str) -> AllocatorOptions:
    """PYTORCH_CUDA_ALLOC_CONF as torch reads it; options that do not change what is reserved are passed over.

    Raises:
        ConfigError: a value that is not understood.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition(":")
        try:
            match name:
                case "expandable_segments":
                    values[name] = {"True": True, "False": False}[value]
                case "max_split_size_mb":
                    values["max_split_size_bytes"] = int(value) * MIB
                case "roundup_power2_divisions":
                    values[name] = int(value)
                case "garbage_collection_threshold" | "per_process_memory_fraction":
                    values[name] = float(value)
        except (KeyError, ValueError):
            raise ConfigError(
                f"PYTORCH_CUDA_ALLOC_CONF has {item!r}", because="the simulation does not replay that value",
                fix=f"unset PYTORCH_CUDA_ALLOC_CONF, or another {name}",
            ) from None  # fmt: skip
    return AllocatorOptions(**values)


class CardFullError(Exception):
    """The replayed allocator could not serve a request; the text is PyTorch's."""


class CachingAllocator:
    """One device's allocator.

    Args:
        capacity_bytes: what cudaMalloc can hand out in all; None never fails.
        total_bytes: the card's size, for the message and the fraction; capacity_bytes by default.
        other_bytes: of this process on the card, outside the allocator (context, NCCL); for the message.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        total_bytes: int | None = None,
        other_bytes: int = 0,
        options: AllocatorOptions | None = None,
    ) -> None:
        self.options = options or AllocatorOptions()
        self.capacity_bytes = capacity_bytes
        self.total_bytes = total_bytes or capacity_bytes or 0
        self.other_bytes = other_bytes
        fraction = self.options.per_process_memory_fraction
        self.allowed_bytes = None if fraction is None else int(fraction * self.total_bytes)
        self.allocated_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._clocks = {True: Clock(), False: Clock()}
        self._segments = 0

    def allocate(self, requested: int, *, stream: int = 0) -> Block:
        """Serve a request from the pool of its stream, else from the device. Source: malloc, alloc_found_block.

        Raises:
            CardFullError: nothing is left, also after the cached blocks were given back.
        """
        size = rounded_bytes(requested, self.options.roundup_power2_divisions)
        small = size <= SMALL_BYTES
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(small=small, clock=self._clocks[small])
        block = self._take_cached(pool, size) or self._take_new(pool, size)
        if block is None:
            raise CardFullError(self._message(segment_bytes(size)))
        if self._should_split(block, size):
            self._split(block, size)
        block.allocated = True
        self.allocated_bytes += block.bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool and merge it with free neighbours. Source: free_block."""
        self.allocated_bytes -= block.bytes
        block.allocated = False
        self._merge(block)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache: give back what no block uses. Source: release_blocks."""
        for pool in self._pools.values():
            for _, block in list(pool.free):
                if self.options.expandable_segments:
                    self._unmap(block)
                elif not block.is_split:
                    self._release(block)

    def _take_cached(self, pool: Pool, size: int) -> Block | None:
        """Best fit. Source: get_free_block."""
        pool.clock.searches += 1
        position = pool.position((size, -1, -1))
        if position == len(pool.free):
            return None
        block = pool.free[position][1]
        if self.options.expandable_segments:
            while position + 1 < len(pool.free):
                other = pool.free[position + 1][1]
                if other.expandable_bytes >= block.expandable_bytes:
                    break
                position, block = position + 1, other
        limit = self.options.max_split_size_bytes
        if limit is not None:
            if size < limit <= block.bytes:
                return None
            if size >= limit and block.bytes >= size + LARGE_SEGMENT_BYTES:
                return None
        del pool.free[position]
        return block

    def _take_new(self, pool: Pool, size: int) -> Block | None:
        """From the device; before giving up, some and then all of the cache goes back to it. Source: malloc."""
        if self.allowed_bytes is not None and self.options.garbage_collection_threshold > 0:
            self._collect_garbage(self.options.garbage_collection_threshold * self.allowed_bytes)
        block = self._from_device(pool, size)
        if block is None and self._release_oversized(pool, size):
            block = self._from_device(pool, size)
        if block is None:
            self.empty_cache()
            self.num_retries += 1
            block = self._from_device(pool, size)
        return block

    def _from_device(self, pool: Pool, size: int) -> Block | None:
        """Source: alloc_block."""
        wanted = segment_bytes(size)
        if self.allowed_bytes is not None and self.reserved_bytes + wanted > self.allowed_bytes:
            return None
        if self.options.expandable_segments:
            return self._expand(pool, size)
        if not self._reserve(wanted):
            return None
        self._segments += 1
        return Block(self._segments, 0, wanted, pool)

    def _reserve(self, wanted: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + wanted > self.capacity_bytes:
            return False
        self.reserved_bytes += wanted
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _release(self, block: Block) -> None:
        """cudaFree of a whole segment. Source: release_block."""
        block.pool.remove(block)
        self.reserved_bytes -= block.bytes

    def _release_oversized(self, pool: Pool, size: int) -> bool:
        """Under max_split_size, give back just enough of the blocks that it keeps whole.

        Source: release_available_cached_blocks.
        """
        limit = self.options.max_split_size_bytes
        if limit is None or self.options.expandable_segments:
            return False
        wanted = max(size, limit)
        position = pool.position((wanted, -1, -1))
        if position < len(pool.free):
            self._release(pool.free[position][1])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][1].bytes >= limit:
            released += pool.free[-1][1].bytes
            self._release(pool.free[-1][1])
        return released >= wanted

    def _collect_garbage(self, threshold_bytes: float) -> None:
        """Give back whole free segments of at least average age. Source: garbage_collect_cached_blocks."""
        target = self.reserved_bytes - int(threshold_bytes)
        idle = [block for block in self._free_blocks() if not block.pool.small and not block.is_split]
        while target > 0 and idle:
            average = sum(block.pool.age(block) for block in idle) / len(idle)
            old = [block for block in idle if block.pool.age(block) >= average]
            for block in old:
                self._release(block)
                target -= block.bytes
            idle = [block for block in idle if block not in old]

    def _free_blocks(self) -> Iterator[Block]:
        for pool in self._pools.values():
            for _, block in pool.free:
                yield block

    def _should_split(self, block: Block, size: int) -> bool:
        rest = block.bytes - size
        if block.pool.small or self.options.expandable_segments:
            return rest >= MIN_BLOCK_BYTES
        limit = self.options.max_split_size_bytes
        return (limit is None or size < limit) and rest > SMALL_BYTES

    def _split(self, block: Block, size: int) -> None:
        self._cut(block, size)
        assert block.after is not None
        block.pool.insert(block.after)

    def _cut(self, block: Block, size: int) -> None:
        """Leave the first `size` bytes in `block`; the rest becomes the block behind it."""
        rest = Block(
            block.segment, block.offset + size, block.bytes - size, block.pool, mapped=block.mapped,
            before=block, after=block.after,
        )  # fmt: skip
        if block.after is not None:
            block.after.before = rest
        block.after, block.bytes = rest, size

    def _merge(self, block: Block) -> None:
        """Take in the neighbours that are free as well, or as much without memory. Source: try_merge_blocks."""
        before, after = block.before, block.after
        if before is not None and not before.allocated and before.mapped == block.mapped:
            self._forget(before)
            block.offset, block.bytes, block.before = before.offset, block.bytes + before.bytes, before.before
            if before.before is not None:
                before.before.after = block
        if after is not None and not after.allocated and after.mapped == block.mapped:
            self._forget(after)
            block.bytes, block.after = block.bytes + after.bytes, after.after
            if after.after is not None:
                after.after.before = block

    def _forget(self, block: Block) -> None:
        block.pool.remove(block) if block.mapped else block.pool.unmapped.remove(block)

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Map pages behind a free block or at the lowest free address. Source: try_allocate_expandable_block."""
        block = self._find_addresses(pool, size)
        if not block.mapped and not self._map(block, min(block.bytes, size)):
            return None
        while block.bytes < size:
            unmapped = block.after
            assert unmapped is not None
            if not self._map(unmapped, min(size - block.bytes, unmapped.bytes)):
                return None
            block = unmapped
        pool.remove(block)
        return block

    def _find_addresses(self, pool: Pool, size: int) -> Block:
        """Source: find_expandable_block."""
        for unmapped in sorted(pool.unmapped, key=lambda block: (block.segment, block.offset)):
            before = unmapped.before
            first = before if before is not None and not before.allocated else unmapped
            room, block = 0, first
            while room < size and block is not None and not block.allocated:
                room, block = room + block.bytes, block.after  # type: ignore[assignment]
            if room >= size:
                return first
        self._segments += 1
        fresh = Block(self._segments, 0, ADDRESS_BYTES, pool, mapped=False)
        pool.unmapped.append(fresh)
        return fresh

    def _map(self, block: Block, size: int) -> bool:
        """Back the first `size` bytes, in whole pages, with memory. Source: map_block."""
        page = page_bytes(block.pool)
        size = -(-size // page) * page
        if not self._reserve(size):
            return False
        block.pool.unmapped.remove(block)
        if size < block.bytes:
            self._cut(block, size)
            assert block.after is not None
            block.pool.unmapped.append(block.after)
        block.mapped = True
        self._merge(block)
        block.pool.insert(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the whole pages of a free block. Source: unmap_block."""
        page = page_bytes(block.pool)
        first, last = -(-block.offset // page) * page, (block.offset + block.bytes) // page * page
        if first >= last:
            return
        block.pool.remove(block)
        if first > block.offset:
            self._cut(block, first - block.offset)
            block.pool.insert(block)
            assert block.after is not None
            block = block.after
        if last < block.offset + block.bytes:
            self._split(block, last - block.offset)
        self.reserved_bytes -= block.bytes
        block.mapped = False
        self._merge(block)
        block.pool.unmapped.append(block)

    def _message(self, wanted: int) -> str:
        """torch.OutOfMemoryError's words for this state."""
        free = (self.capacity_bytes or 0) - self.reserved_bytes
        allowed = "" if self.allowed_bytes is None else f"{format_size(self.allowed_bytes)} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {format_size(wanted)}. GPU 0 has a total capacity of "
            f"{format_size(self.total_bytes)} of which {format_size(free)} is free. Including non-PyTorch memory, this "
            f"process has {format_size(self.reserved_bytes + self.other_bytes)} memory in use. {allowed}Of the "
            f"allocated memory {format_size(self.allocated_bytes)} is allocated by PyTorch, and "
            f"{format_size(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but unallocated. If "
            "reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
            "avoid fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/"
            "notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
        )
