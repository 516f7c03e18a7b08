"""Tape: what the model's own forward and backward ask of memory in one micro-step, to be played to other runs.

Below stage 3 DeepSpeed changes nothing within the model. From the batch to the loss, and from the loss back to the
parameters, what is allocated and freed follows from the model, the batch and checkpointing; buckets, partitions,
offload and ranks come in where the gradient of a parameter is complete, in hooks of that parameter. So a tape holds
the model's own allocations and frees, and the places of the hooks; whoever plays it (playing.py) runs the hooks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from zplan.simulate.report import Category, MemoryKind
from zplan.simulate.request import SimulationRequest
from zplan.simulate.template import loading_key
from zplan.values import dataclass

Slot = int
"""A block of the tape, numbered as they are allocated."""
INCOMING: Slot = -1
"""The block of the gradient that comes in from the loss."""


class Layout(NamedTuple):
    """How a tensor lies on its storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class Allocated(NamedTuple):
    """A block is taken."""

    operation: int
    """Number of the operation, from the start of the part; those of hooks are not counted."""
    slot: Slot
    kind: MemoryKind
    num_bytes: int
    stream: int
    site: str
    category: Category | None
    seen: bool
    """Somebody outside of the tape gets a tensor on it."""


class Freed(NamedTuple):
    """The model's last reference to a block goes."""

    operation: int
    slot: Slot


class Gradient(NamedTuple):
    """The gradient of a parameter is complete, and its hooks run."""

    operation: int
    parameter: int
    slot: Slot
    layout: Layout


class Output(NamedTuple):
    """A tensor that the model returns."""

    name: str
    slot: Slot
    layout: Layout
    differentiable: bool


Step = Allocated | Freed | Gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Forward or backward."""

    steps: tuple[Step, ...]
    num_operations: int
    flops: int
    copied: tuple[tuple[tuple[str, str], int], ...]
    """Bytes between kinds of devices, as Tracker.copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """One micro-step."""

    inputs: tuple[Any, ...]
    """What the model was called with (described)."""
    forward: Part
    backward: Part
    output: type
    """A ModelOutput of transformers."""
    outputs: tuple[Output, ...]
    with_output: tuple[tuple[Slot, int], ...]
    """Blocks that go when that output goes, as the saved tensors of a loss that nobody derives."""
    with_graph: tuple[Slot, ...]
    """Blocks that go with the autograd graph, as an input that was made to require a gradient."""


def tape_key(request: SimulationRequest) -> str | None:
    """Equal for two questions whose models do the same in a micro-step; None where DeepSpeed has a part in it.

    ZeRO-3 gathers and releases within the model, and its hooks and engine are half of a run, which would remain;
    Ulysses and AutoTP communicate there. One step shows no period.
    """
    batch, model = request.choice.batch, loading_key(request)
    shared = request.choice.zero.stage == 3 or batch.sequence_parallel_size > 1 or batch.autotp_size > 1
    if model is None or shared or request.steps < 2 or not request.replay:
        return None
    return json.dumps([model, batch.train_micro_batch_size_per_gpu, request.choice.gradient_checkpointing])


def signature(model: torch.nn.Module) -> tuple[Any, ...]:
    """What a library that prepares the model may have changed since it was built: dtypes, devices, hooks, modes."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        tuple((tuple(t.shape), str(t.dtype), t.device.type, t.requires_grad) for t in tensors),
        tuple(sum(len(vars(module)[name]) for module in modules) for name in hooks),
        sum(module.training for module in modules),
    )


def described(arguments: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of a call without their values; None if there are others than tensors and plain values."""
    plain = (int, float, bool, str, type(None))
    found: list[Any] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found.append((name, tuple(value.shape), str(value.dtype), value.device.type, value.requires_grad))
        elif isinstance(value, plain):
            found.append((name, value))
        else:
            return None
    return tuple(found)


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.device)
