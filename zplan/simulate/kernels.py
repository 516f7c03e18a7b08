"""What a CUDA kernel does that a fake one does not: scratch memory, answers to the host, shapes that follow data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false

if TYPE_CHECKING:
    from zplan.simulate.tracker import Tracker

aten = torch.ops.aten
Handler = Callable[["Tracker", Any, Any, Any], Any]


def read_on_host(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """A device value read by Python.

    What DeepSpeed reads are overflow and mismatch counts (none) and norms; what others read asks for the common case,
    such as a mask without padding (yes).
    """
    dtype = args[0].dtype
    if dtype.is_floating_point:
        return 1.0
    answer = not _asked_by_deepspeed()
    return answer if dtype == torch.bool else int(answer)


def _asked_by_deepspeed() -> bool:
    frame: Any = sys._getframe(3)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/zplan/simulate/" not in path:
            return "/deepspeed/" in path
        frame = frame.f_back
    return False


def same_values(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> bool:
    """`torch.equal`: every rank agrees."""
    return True


def index(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """`x[mask]` with every position true: the largest result, and what a batch of the longest sequences gives."""
    source, indices = args
    masks = [i for i in indices if i is not None and i.dtype == torch.bool]
    if not masks:
        return tracker.run(func, args, kwargs)
    mask = masks[0]
    positions = torch.empty((mask.numel(), mask.dim()), dtype=torch.int64, device=mask.device)
    tracker.track(positions)
    out = source.new_empty((mask.numel(), *source.shape[mask.dim() :]))
    tracker.track(out)
    return out


def index_put(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of `x[mask]`: in place, with the positions as scratch."""
    target, indices, *_ = args
    masks = [i for i in indices if i is not None and i.dtype == torch.bool]
    if not masks:
        return tracker.run(func, args, kwargs)
    positions = torch.empty((masks[0].numel(), masks[0].dim()), dtype=torch.int64, device=masks[0].device)
    tracker.track(positions)
    if func is aten.index_put_.default or func is aten._index_put_impl_.default:
        return target
    out = torch.empty_like(target)
    tracker.track(out)
    return out


def masked_scatter_backward(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """The selected gradients, all positions true."""
    gradient, _, sizes = args
    out = gradient.new_empty(tuple(sizes))
    tracker.track(out)
    return out


def grouped_matmul(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """One product an expert; in another dtype than bf16, which only the fake kernel refuses, a matrix product a group,
    written into the result.

    Source: torch 2.13, aten/native/GroupedMMUtils.h (_grouped_mm_fallback); torch/_meta_registrations.py:8645.
    """
    left, right = args[:2]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if left.dtype == torch.bfloat16:
        return tracker.run(func, args, kwargs)
    groups = (offsets.shape[0],) if left.dim() == right.dim() == 2 else ()
    rows = left.shape[:-1] if right.dim() == 3 or left.dim() == 2 else left.shape[1:-1]
    out = left.new_empty((*groups, *rows, right.shape[-1]))
    tracker.track(out)
    return out


def flash_forward(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    out = tracker.run(func, args, kwargs)
    tracker.count_flops(_attention_flops(args[0], args[1], products=2))
    return out


def flash_backward(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """FlashAttention-2's backward takes softmax_d and a float32 dq, and dk, dv per query head under grouped queries.

    Source: torch 2.13, aten/native/transformers/cuda/flash_attn/flash_api.cpp (mha_bwd).
    """
    query, key = args[1], args[2]
    out = tracker.run(func, args, kwargs)
    batch, heads, tokens, dim = query.shape
    rows, width = _round_up(tokens, 128), _round_up(dim, 32)
    sizes = [batch * heads * rows * 4, batch * rows * heads * width * 4]
    if key.shape[1] != heads:
        sizes += [batch * key.shape[2] * heads * dim * query.element_size()] * 2
    if tracker.kinds.get(query.device.type) == "gpu" and query.device.type != "cpu":
        tracker.scratch(sizes)
    tracker.count_flops(_attention_flops(query, key, products=5))
    return out


def safe_softmax(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """The math kernel's softmax looks for rows that see no key: a byte for each score.

    Source: torch 2.13, aten/native/transformers/attention.cpp (_safe_softmax, which no device has a kernel for). Held
    to torch's own peak by a test.
    """
    out = tracker.run(func, args, kwargs)
    if tracker.kinds.get(out.device.type) == "gpu":
        tracker.scratch([out.numel()])
    return out


def _attention_flops(query: torch.Tensor, key: torch.Tensor, *, products: int) -> int:
    """Causal attention: half of each of the `products` square matrix products is skipped."""
    batch, heads, tokens, dim = query.shape
    return products * 2 * batch * heads * tokens * key.shape[2] * dim // 2


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def matmul(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    out = tracker.run(func, args, kwargs)
    left, right = (args[1], args[2]) if len(args) > 2 else (args[0], args[1])
    tracker.count_flops(2 * prod(left.shape) * right.shape[-1])
    return out


def copy_into(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if source.device.type != target.device.type:
        tracker.copy(source.device.type, target.device.type, target.numel() * target.element_size())
    return tracker.run(func, args, kwargs)


def copy_to(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """`.to(...)`; a tensor made of a Python number keeps its value on the CPU and loses it on the device.

    FakeTensorMode would copy the value as well, and the device has no memory to hold one.
    """
    source = args[0]
    constant = getattr(source, "constant", None)
    if constant is not None and kwargs.get("device", source.device).type != "cpu":
        source.constant = None
        try:
            out = tracker.run(func, args, kwargs)
        finally:
            source.constant = constant
    else:
        out = tracker.run(func, args, kwargs)
    if source.device.type != out.device.type:
        tracker.copy(source.device.type, out.device.type, out.numel() * source.element_size())
    return out


_LAST_REFERENCE = (4, 3, 2)
"""Use count of a tensor, references to its Python object and use count of its storage, seen from `accumulate`, when
autograd's buffer is the last to hold it: everything else among them is the dispatch's own."""


def accumulate(tracker: Tracker, func: Any, args: Any, kwargs: Any) -> Any:
    """Autograd adds a second gradient into the first one in place, but not under a dispatch mode: here it does.

    Source: torch 2.13, csrc/autograd/input_buffer.cpp (can_accumulate_inplace): not under grad mode, the first
    gradient is dense and nobody else holds it or its storage. Held to torch's own peak by a test.
    """
    caller = sys._getframe(1).f_back
    by_engine = caller is None or caller.f_code.co_name == "_engine_run_backward"
    if by_engine and not torch.is_grad_enabled():
        storage = args[0].untyped_storage()
        counts = (args[0]._use_count(), sys.getrefcount(args[0]), torch._C._storage_Use_Count(storage._cdata))
        if counts == _LAST_REFERENCE and (args[0].is_contiguous() or is_non_overlapping_and_dense_or_false(args[0])):
            return tracker.run(aten.add_.Tensor, args, kwargs)
    return tracker.run(func, args, kwargs)


SPECIAL: dict[Any, Handler] = {
    aten.add.Tensor: accumulate,
    aten._local_scalar_dense.default: read_on_host,
    aten.equal.default: same_values,
    aten.index.Tensor: index,
    aten.index_put.default: index_put,
    aten.index_put_.default: index_put,
    aten._index_put_impl_.default: index_put,
    aten.masked_scatter_backward.default: masked_scatter_backward,
    aten._grouped_mm.default: grouped_matmul,
    aten._safe_softmax.default: safe_softmax,
    aten._scaled_dot_product_flash_attention.default: flash_forward,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: matmul,
    aten.copy_.default: copy_into,
    aten._to_copy.default: copy_to,
}
SPECIAL_BY_ID = {id(func): handler for func, handler in SPECIAL.items()}
"""torch computes the hash of an operation in Python at each look-up; it never lets one go."""
COUNTED = frozenset(
    {
        aten.add.Tensor, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.copy_.default,
        aten._to_copy.default,
    }
)  # fmt: skip
"""Handlers that run over real tensors too: they only count, or do what torch does without a dispatch mode."""
