"""Tracker: every storage that comes and goes, by kind of memory, with its phase, category and call site.

It sits above the fake tensors as a dispatch mode, so it sees what a real device would be asked for, and nothing of how
fake tensors work inside. The same class counts real tensors, which is how the simulation is checked.
"""

from __future__ import annotations

import functools
import sys
import weakref
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from zplan.simulate import kernels
from zplan.simulate.dispatch_cache import DispatchCache, view_of
from zplan.simulate.report import Category, MemoryKind
from zplan.values import dataclass

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_DETACH, _SLICE = aten.detach.default, aten.slice.Tensor
SITE_BYTES = 1 << 16
"""Smaller storages carry no call site: finding one costs more than such a storage is worth."""
ALLOCATE, FREE, EMPTY_CACHE = 1, -1, 0


@dataclass(slots=True)
class Block:
    """One storage, or one size of a storage that was resized."""

    kind: MemoryKind
    requested_bytes: int
    counted_bytes: int
    stream: int
    phase: str
    site: str
    category: Category | None = None


def _counted_bytes(kind: MemoryKind, requested: int) -> int:
    """The caching allocator gives multiples of 512."""
    return (requested + 511) & ~511 if kind == "gpu" else requested


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes per kind of memory and keeps the whole stream of allocations and frees.

    Args:
        kinds: device type -> kind of memory; `{"simgpu": "gpu", "cpu": "host"}`, or `{"cpu": "gpu"}` for CPU ranks.
        fake_mode: of the fake tensors that it will see; None counts real tensors.
    """

    def __init__(self, kinds: dict[str, MemoryKind], *, fake_mode: FakeTensorMode | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds = kinds
        self.fake_mode = fake_mode
        self.fake = fake_mode is not None
        self.phase = "load"
        self.stream = 0
        self.num_operations = 0
        self.current: dict[MemoryKind, int] = {"gpu": 0, "host": 0, "pinned": 0}
        self.events: list[tuple[int, Block | None, int]] = []
        """(ALLOCATE | FREE | EMPTY_CACHE, block, number of the operation)."""
        self.marks: list[tuple[int, str]] = []
        """(index into events, phase that starts there)."""
        self.live: dict[int, tuple[Block, Any]] = {}
        self.copied: dict[tuple[str, str], int] = {}
        self.flops: dict[int, int] = {}
        """Optimizer step -> floating point operations."""
        self.step_index = 0
        self.num_played = 0
        """Micro-steps that were played from a tape."""
        self.operation: Any = ""
        """The operation that was dispatched last."""
        self._pin_next = False
        self.run = DispatchCache(self.track, self.track_new, fake_mode) if fake_mode is not None else self.run_and_track
        self.enter_phase("load")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch wraps a mode's every call, to keep its compiler out; nothing is compiled under this one."""
        return False

    def enter_phase(self, phase: str) -> None:
        self.phase = phase
        self.marks.append((len(self.events), phase))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0]._fake_device  # asked for in every operation; two of three calls are this one
        self.num_operations += 1
        self.operation = func
        special = kernels.SPECIAL_BY_ID.get(id(func))
        if special is not None and (self.fake or func in kernels.COUNTED):
            return special(self, func, args, kwargs or {})
        return self.run(func, args, kwargs)

    def detached(self, tensor: torch.Tensor) -> Any:
        """`detach()` or `.data` of a fake tensor without the way through the dispatcher; None where that is needed."""
        alias = self.run.detached(tensor) if isinstance(self.run, DispatchCache) else None
        if alias is not None:
            self.num_operations += 1
            self.operation = _DETACH
        return alias

    def sliced(self, tensor: torch.Tensor, dim: int, start: Any, end: Any) -> Any:
        """As `detached`, of a slice; only where autograd does not look, which would remember what it is a view of."""
        if torch.is_grad_enabled() or not isinstance(self.run, DispatchCache):
            return None
        part = self.run.sliced(tensor, dim, start, end)
        if part is not None:
            self.num_operations += 1
            self.operation = _SLICE
        return part

    def run_and_track(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on real tensors and count what it returns."""
        out = func(*args, **kwargs) if kwargs else func(*args)
        for item in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(item, torch.Tensor):
                self.track(item)
        return out

    def track_new(self, tensor: torch.Tensor, device: torch.device, num_bytes: int) -> None:
        """Count the storage of a tensor that is known to have its own."""
        kind = self.kinds.get(device.type)
        if kind is not None:
            self._count(tensor.untyped_storage(), kind, num_bytes)

    def track(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor that an operation returned, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return
        kind = self.kinds.get(tensor.device.type)
        if kind is None:
            return
        self._count(storage, kind, storage.nbytes())

    def _count(self, storage: torch.UntypedStorage, kind: MemoryKind, num_bytes: int) -> None:
        if self._pin_next and kind == "host":
            kind = "pinned"
        self.adopt(storage, self._allocate(kind, num_bytes))

    def _allocate(self, kind: MemoryKind, requested: int) -> Block:
        counted = _counted_bytes(kind, requested)
        site = call_site() if counted >= SITE_BYTES else ""
        return self._taken(Block(kind, requested, counted, self.stream, self.phase, site))

    def _taken(self, block: Block) -> Block:
        if block.requested_bytes:
            self.current[block.kind] += block.counted_bytes
            self.events.append((ALLOCATE, block, self.num_operations))
        return block

    def take(self, kind: MemoryKind, requested: int, stream: int, site: str, category: Category | None) -> Block:
        """A block of a tape; nothing holds it but the tape's player."""
        counted = _counted_bytes(kind, requested)
        return self._taken(Block(kind, requested, counted, stream, self.phase, site, category))

    def adopt(self, storage: torch.UntypedStorage, block: Block) -> None:
        """From now on the block lives as long as the storage."""
        key = storage._cdata
        self.live[key] = (block, weakref.ref(storage, partial(self._forget, key)))

    def tensor_on(self, storage: torch.UntypedStorage, *layout: Any) -> Any:
        """A fake tensor on the storage: shape, stride, offset, dtype, device."""
        return view_of(storage, *layout, fake_mode=self.fake_mode)

    def forget(self, storage: torch.UntypedStorage) -> None:
        """The storage is as good as freed."""
        self._forget(storage._cdata)

    def release(self, block: Block) -> None:
        if block.requested_bytes:
            self.current[block.kind] -= block.counted_bytes
            self.events.append((FREE, block, self.num_operations))

    def _forget(self, key: int, _: object = None) -> None:
        entry = self.live.pop(key, None)
        if entry is not None:
            self.release(entry[0])

    def resized(self, storage: torch.UntypedStorage) -> None:
        """`UntypedStorage.resize_` is not dispatched; a resize frees the old size and allocates the new one."""
        entry = self.live.get(storage._cdata)
        if entry is None or entry[0].requested_bytes == storage.nbytes():
            return
        old, reference = entry
        self.release(old)
        self.live[storage._cdata] = (self._allocate(old.kind, storage.nbytes()), reference)

    def scratch(self, sizes: list[int]) -> None:
        """Memory that a kernel takes from the caching allocator and gives back before it returns."""
        blocks = [self._allocate("gpu", size) for size in sizes]
        for block in blocks:
            block.category = "temporary"
        for block in reversed(blocks):
            self.release(block)

    def categorise(self, tensor: Any, category: Category, *, overwrite: bool = True) -> None:
        """Say what a tensor's storage is for; the last word counts."""
        if not isinstance(tensor, torch.Tensor):
            return
        entry = self.live.get(tensor.untyped_storage()._cdata)
        if entry is not None and (overwrite or entry[0].category is None):
            entry[0].category = category

    def block_of(self, tensor: torch.Tensor) -> Block | None:
        entry = self.live.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        block = self.block_of(tensor)
        return block is not None and block.kind == "pinned"

    def pinned_empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked host memory; on CPU ranks nothing can be pinned and it is plain memory."""
        self._pin_next = True
        try:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        finally:
            self._pin_next = False

    def share(self, tensor: torch.Tensor) -> None:
        """Its bytes move into shared memory, where nothing is pinned; the pinned block that they leave stays taken."""
        key = tensor.untyped_storage()._cdata
        entry = self.live.get(key)
        if entry is not None and entry[0].kind == "pinned":
            self.live[key] = (self._allocate("host", entry[0].requested_bytes), entry[1])

    def copy(self, source: str, target: str, num_bytes: int) -> None:
        self.copied[(source, target)] = self.copied.get((source, target), 0) + num_bytes

    def count_flops(self, flops: int) -> None:
        self.flops[self.step_index] = self.flops.get(self.step_index, 0) + flops

    def empty_cache(self) -> None:
        self.events.append((EMPTY_CACHE, None, self.num_operations))


_SKIPPED = ("/torch/", "/contextlib.py", "/functools.py", "/zplan/simulate/", "/deepspeed/utils/nvtx", "/comm/")
_PACKAGES = ("deepspeed/", "transformers/", "trl/", "peft/", "accelerate/")


@functools.cache
def _skipped(path: str) -> bool:
    return any(part in path for part in _SKIPPED)


def call_site() -> str:
    """`file:line function` of the innermost frame outside torch and this package, or the autograd node."""
    frame: Any = sys._getframe(2)
    while frame is not None and _skipped(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        node = torch._C._current_autograd_node()
        return f"autograd {node.name()}" if node is not None else ""
    name, path = frame.f_code.co_name, frame.f_code.co_filename
    if name == "backward" and "/deepspeed/" in path:
        node = torch._C._current_autograd_node()
        if node is not None:
            return f"autograd {node.name()}"
    for package in _PACKAGES:
        position = path.rfind("/" + package)
        if position >= 0:
            path = path[position + 1 :]
            break
    return f"{path}:{frame.f_lineno} {name}"
