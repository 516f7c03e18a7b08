"""A process group of any size with one member, and a record of every collective that DeepSpeed asks for."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "broadcast",
    "broadcast_object_list", "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced",
    "all_gather_object", "reduce_scatter_tensor", "all_to_all_single", "all_to_all", "send", "recv", "isend", "irecv",
    "gather", "scatter", "barrier", "monitored_barrier",
)  # fmt: skip
"""Methods of deepspeed.comm.torch.TorchBackend that communicate."""


class FinishedWork:
    """The handle of a collective that is already done."""

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def __enter__(self) -> FinishedWork:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class CollectiveRecorder:
    """Counts calls and bytes per collective: a gather's output, a reduction's input."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int, int]] = {}
        self.log: list[tuple[int, str, int]] = []
        """(number of the operation, name, bytes), for the trace."""
        self.clock: Callable[[], int] = lambda: 0
        self._depth = 0

    def record(self, name: str, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        num_bytes = max((t.numel() * t.element_size() for t in tensors), default=0)
        if name in ("all_gather", "reduce_scatter", "all_gather_coalesced", "all_reduce_coalesced"):
            num_bytes = sum(t.numel() * t.element_size() for t in tensors) - num_bytes * (name == "all_gather")
        self.add(name, num_bytes)

    def add(self, name: str, num_bytes: int) -> None:
        """Count one call."""
        count, total = self.totals.get(name, (0, 0))
        self.totals[name] = (count + 1, total + num_bytes)
        self.log.append((self.clock(), name, num_bytes))

    def instead_of(self, name: str) -> Callable[..., Any]:
        """A method that records and returns at once."""

        def method(backend: Any, *args: Any, **kwargs: Any) -> Any:
            self.record(name, args, kwargs)
            return FinishedWork()

        return method

    def around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method that records and communicates for real; a collective made of others counts once."""

        def method(backend: Any, *args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return original(backend, *args, **kwargs)
            self.record(name, args, kwargs)
            self._depth += 1
            try:
                if "object" in name:  # what arrives is put into the caller's list
                    return original(backend, *args, **kwargs)
                return on_copies(partial(original, backend), args, kwargs)
            finally:
                self._depth -= 1

        return method


class Agreement:
    """DeepSpeed's checks that all ranks hold the same integers (runtime/zero/utils.py): int64 lists from rank 0."""

    def __init__(self, recorder: CollectiveRecorder) -> None:
        self._recorder = recorder

    def from_rank0(self, values: list[int]) -> list[int]:
        self._recorder.add("broadcast", 8 * len(values))
        return list(values)

    def on_length(self, values: list[int]) -> None:
        self.from_rank0([len(values)])

    def on_ints(self, values: list[int]) -> None:
        self.on_length(values)
        self.from_rank0(values)


def on_copies(collective: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run a collective to its end on uncounted copies of its tensors, and write back what it changed.

    Gloo's threads let go of a tensor some time after the collective ended; with the tensors themselves, the bytes that
    are counted alive would depend on the scheduler.
    """
    with _disable_current_modes():
        leaves, spec = tree_flatten((args, kwargs))
        tensors = {n: leaf for n, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        copies = {n: tensor.detach().clone(memory_format=torch.contiguous_format) for n, tensor in tensors.items()}
        copied_args, copied_kwargs = tree_unflatten([copies.get(n, leaf) for n, leaf in enumerate(leaves)], spec)
        work = collective(*copied_args, **copied_kwargs)
        if isinstance(work, dist.Work):
            work.wait()
        # an input may be a part of the output: what changed is decided before anything is written
        changed = [n for n, tensor in tensors.items() if not torch.equal(copies[n], tensor)]
        for n in changed:
            tensors[n].detach().copy_(copies[n])
    return work


def finished(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of torch that has let go of its tensors when it returns."""
    return lambda *args, **kwargs: on_copies(collective, args, kwargs)


def counted_exchange(original: Callable[..., torch.Tensor], recorder: CollectiveRecorder) -> Callable[..., Any]:
    """Ulysses' all-to-all (sequence/layer.py), an operation of torch with a derivative of its own."""

    def exchange(input: torch.Tensor, group_name: str) -> torch.Tensor:
        recorder.record("all_to_all_single", (input,), {})
        return original(input, group_name)

    return exchange


def join_fake_group(*, world_size: int, local_size: int) -> None:
    """Become rank 0 of a group of `world_size`, without a socket."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size), LOCAL_SIZE=str(local_size),
        LOCAL_WORLD_SIZE=str(local_size), MASTER_ADDR="localhost", MASTER_PORT="1",
    )  # fmt: skip
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    # accelerate does this before the model is built; zero.Init and the batch check ask DeepSpeed for the world size
    deepspeed.init_distributed("fake", auto_mpi_discovery=False, verbose=False)
