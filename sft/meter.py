"""Measured bytes of one rank, phase by phase: PyTorch's allocator on CUDA, live tensor storages on a CPU rank.

A CPU rank has no caching allocator that could be asked. Resident memory is not the analogue of
`max_memory_allocated`: a reduce bucket of `torch.empty` is allocated in full and never touched. So every storage that
a torch operator makes is counted while it lives. That costs speed, so the count ends when the trial's peak has been
seen, and its own seconds are known.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["load", "init", "forward", "backward", "step", "save"]


class Meter(Protocol):
    """Peak allocated bytes of each phase."""

    def enter(self, phase: Phase) -> None:
        """End the phase before and start this one."""
        ...

    def finish_phases(self) -> None:
        """Attribute nothing more to phases; on CPU ranks, stop counting."""
        ...

    @property
    def phases(self) -> Mapping[str, int]:
        """Peak bytes per phase so far."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Peak over everything measured."""
        ...


class CudaMeter:
    """Reads torch.cuda's peak statistics at each boundary between phases, and resets them."""

    own_seconds = 0.0
    """Two calls of the driver for each phase."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.phases: dict[str, int] = {}
        self.reserved_bytes = 0
        self._current: Phase | None = None
        self._peak = 0

    def enter(self, phase: Phase) -> None:
        self._close()
        self._current = phase

    def finish_phases(self) -> None:
        self._close()
        self._current = None

    def _close(self) -> None:
        peak = torch.cuda.max_memory_allocated(self.device)
        self._peak = max(self._peak, peak)
        self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved(self.device))
        if self._current is not None:
            self.phases[self._current] = max(self.phases.get(self._current, 0), peak)
        torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def allocated_bytes(self) -> int:
        self._close()
        return self._peak


_HANDOVER_SECONDS = 0.001
"""Between phases the interpreter is free: gloo's threads need it to let go of a collective's tensors, which would else
be alive in the next phase, too, now and then."""


class _Watched(weakref.ref[torch.UntypedStorage]):
    """A counted storage: its address and the bytes it was counted with."""

    __slots__ = ("key", "size")
    key: int
    size: int


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all CPU storages that operators return, until they are freed.

    The last reference to a tensor of a collective is sometimes dropped by one of gloo's threads, a moment after the
    rank went on: only the counting thread changes the counts, others leave a note. Such a storage was alive until then,
    so two runs of one trial may differ by those, as a rule a few scalars.

    Limits: memory inside an operator (workspaces) is not seen, nor are weights mapped from a file.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self.own_seconds = 0.0
        self._watched: dict[int, _Watched] = {}
        self._freed: deque[int] = deque()
        """Sizes that are yet to be taken off."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while bytes are counted: torch need not wrap each call to keep dynamo out (2 us)."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        started = time.perf_counter()
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_cpu:
                self._note(leaf.untyped_storage())
        self.own_seconds += time.perf_counter() - started
        return result

    def settle(self) -> None:
        """Take off what was freed until now."""
        while self._freed:
            self.live_bytes -= self._freed.popleft()

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        watched = self._watched.get(key)
        if watched is None:
            watched = self._watched[key] = _Watched(storage, self._forget)
            watched.key, watched.size = key, 0
        if watched.size != size:
            self.settle()
            self.live_bytes += size - watched.size
            watched.size = size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, watched: _Watched) -> None:
        """In whichever thread drops the storage: nothing here reads a value and writes it back."""
        del self._watched[watched.key]
        self._freed.append(watched.size)


class CpuMeter:
    """Live tensor bytes of a CPU rank."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self._live = LiveBytes()
        self._current: Phase | None = None
        self._peak = 0
        self._waited_seconds = 0.0
        self._counting = True
        self._live.__enter__()  # type: ignore[no-untyped-call]

    def enter(self, phase: Phase) -> None:
        if not self._counting:
            return
        started = time.perf_counter()
        time.sleep(_HANDOVER_SECONDS)
        self._close()
        self._current = phase
        self._waited_seconds += time.perf_counter() - started

    @property
    def own_seconds(self) -> float:
        """Seconds that this rank has spent on being measured, but for the way into the count: some 5 us an operator."""
        return self._waited_seconds + self._live.own_seconds

    def finish_phases(self) -> None:
        if self._counting:
            self._close()
            self._counting = False
            self._live.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _close(self) -> None:
        self._live.settle()
        self._peak = max(self._peak, self._live.peak_bytes)
        if self._current is not None:
            self.phases[self._current] = max(self.phases.get(self._current, 0), self._live.peak_bytes)
        self._live.peak_bytes = self._live.live_bytes

    @property
    def allocated_bytes(self) -> int:
        return max(self._peak, self._live.peak_bytes)


def make_meter(kind: Literal["cuda", "cpu"], local_rank: int) -> CudaMeter | CpuMeter:
    """The meter for this rank's device, counting from now."""
    return CpuMeter() if kind == "cpu" else CudaMeter(local_rank)


def measure_used_bytes(kind: Literal["cuda", "cpu"], local_rank: int) -> int | None:
    """Used memory of this rank's GPU as nvidia-smi shows it (all processes); None on a CPU rank."""
    return None if kind == "cpu" else int(torch.cuda.device_memory_used(local_rank))


def measure_pinned_bytes(kind: Literal["cuda", "cpu"]) -> int | None:
    """Peak of page-locked host memory that torch's pinned allocator holds; None on a CPU rank."""
    if kind == "cpu":
        return None
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def peak_resident_bytes() -> int:
    """Peak resident memory of this process (VmHWM); pages shared with a forked parent count in each process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
