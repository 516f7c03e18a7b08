"""What the tracker says of a backward against what torch allocates when nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from zplan.simulate.analysis import find_peaks
from zplan.simulate.tracker import Tracker

SIDE = 256
MATRIX_BYTES = 4 * SIDE * SIDE
Loss = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]
Run = Callable[[Callable[[], None]], None]
"""Calls its argument where watching begins."""
LOSSES: dict[str, Loss] = {
    "one input of three products": lambda y, w: y * w[0] + y * w[1] + y * w[2],
    "a residual": lambda y, w: y + (y * w[0]) * w[1] + y * w[2],
    "one gradient for two inputs": lambda y, w: (y + y) * w[0],
    "a gradient that is a view": lambda y, w: (y * w[0]).view(-1) + (y.t() * w[1]).reshape(-1) + y.view(-1),
    "a sum's expanded gradient": lambda y, w: y.sum() + (y * w[0]).sum() + y.sum(),
    "a transposed gradient": lambda y, w: (w[0] * y.t()) + (w[1] * y.t()) + y * w[2],
    "recomputed, not reentrant": lambda y, w: recomputed(lambda t: t * w[0] + t * w[1] + t * w[2], y, reentrant=False),
    "recomputed, reentrant": lambda y, w: recomputed(lambda t: t * w[0] + t * w[1] + t * w[2], y, reentrant=True),
}


def recomputed(block: Callable[[torch.Tensor], torch.Tensor], y: torch.Tensor, *, reentrant: bool) -> torch.Tensor:
    out: torch.Tensor = checkpoint(block, y, use_reentrant=reentrant)
    return out


def backward(loss: Loss, watch: Callable[[], None] = lambda: None) -> None:
    x = torch.ones(SIDE, SIDE, requires_grad=True)
    weights = [torch.ones(SIDE, SIDE) for _ in range(3)]  # frozen: the peak is where gradients are added
    value = loss(x * 2, weights).sum()
    watch()
    value.backward()  # type: ignore[no-untyped-call]


def math_softmax(watch: Callable[[], None] = lambda: None) -> None:
    scores = torch.ones(SIDE, SIDE)
    watch()
    torch._safe_softmax(scores, -1)


def unwatched_peak(run: Run) -> int:
    """Highest sum of torch's own record of allocations and frees, from where it is watched."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        run(lambda: torch.profiler.record_function("watched from here").__enter__())
    current = peak = 0
    started = False
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        started = started or event.name() == "watched from here"
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current) if started else 0
    return peak


def watched_peak(run: Run, fake_mode: FakeTensorMode | None) -> int:
    tracker = Tracker({"cpu": "gpu"}, fake_mode=fake_mode)
    with fake_mode or contextlib.nullcontext(), tracker:
        run(lambda: tracker.enter_phase("backward"))
    return find_peaks(tracker).phases["gpu"]["backward"]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_gradients_are_added_in_place_where_torch_does_it_unwatched(loss: Loss) -> None:
    run = partial(backward, loss)
    matrices = unwatched_peak(run) // MATRIX_BYTES
    assert watched_peak(run, None) // MATRIX_BYTES == matrices
    assert watched_peak(run, FakeTensorMode()) // MATRIX_BYTES == matrices


def test_the_math_kernel_s_softmax_takes_what_it_takes_unwatched() -> None:
    """Scores, softmax, a byte for each."""
    quarters = unwatched_peak(math_softmax) // SIDE**2
    assert quarters == 4 + 4 + 1
    assert watched_peak(math_softmax, FakeTensorMode()) // SIDE**2 == quarters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_experts_run_in_every_dtype(dtype: torch.dtype) -> None:
    """torch's fake kernel of a grouped product takes bf16 alone; the real ones take every dtype."""
    tokens, experts, narrow, wide = 32, 4, 16, 64

    def products() -> tuple[torch.Tensor, ...]:
        x = torch.ones(tokens, narrow, dtype=dtype, requires_grad=True)
        weight = torch.ones(experts, narrow, wide, dtype=dtype, requires_grad=True)
        offsets = torch.arange(1, experts + 1, dtype=torch.int32) * (tokens // experts)
        out = torch._grouped_mm(x, weight, offsets)
        (out * out).sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        assert weight.grad is not None
        return out, x.grad, weight.grad

    real = products()
    mode = FakeTensorMode()
    with mode, Tracker({"cpu": "gpu"}, fake_mode=mode):
        fake = products()
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
