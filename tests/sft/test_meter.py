"""Live bytes of a CPU rank: what is alive is counted once, whoever frees it."""

from __future__ import annotations

import threading
import time
from types import FrameType
from typing import Any

import torch

from sft import meter
from sft.meter import CpuMeter, LiveBytes


def test_a_storage_counts_once_until_it_is_freed() -> None:
    with LiveBytes() as live:
        tensor = torch.empty(100)
        view = tensor.view(10, 10)
        assert live.live_bytes == live.peak_bytes == 100 * 4
        tensor.resize_(200)
        assert live.live_bytes == 200 * 4
        del tensor, view
        live.settle()
        assert (live.live_bytes, live.peak_bytes) == (0, 200 * 4)


def test_what_another_thread_frees_loses_no_byte_of_what_is_counted_meanwhile() -> None:
    """gloo's threads free tensors of collectives; each instruction of theirs gives way to the counting thread here."""

    def slowly(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename == meter.__file__:
            frame.f_trace_opcodes = True
            time.sleep(0.0005)
        return slowly

    def free(tensors: list[torch.Tensor]) -> None:
        tensors.clear()

    with LiveBytes() as live:
        others = [torch.empty(1000) for _ in range(10)]
        threading.settrace(slowly)
        try:
            thread = threading.Thread(target=free, args=(others,))
            thread.start()
        finally:
            threading.settrace(None)  # type: ignore[arg-type]
        kept = []
        while thread.is_alive():
            kept.append(torch.empty(25))
        live.settle()
    assert kept
    assert live.live_bytes == len(kept) * 25 * 4


def test_torch_calls_the_count_itself() -> None:
    """Kept from dynamo as other modes are, each operator would pass three more functions on its way."""
    assert LiveBytes.__torch_dispatch__.__code__.co_filename == meter.__file__


def test_a_meter_knows_the_seconds_that_it_takes() -> None:
    counting = CpuMeter()
    try:
        before, started = counting.own_seconds, time.perf_counter()
        for _ in range(10):
            counting.enter("forward")
        for _ in range(100):
            torch.empty(1)
        taken = counting.own_seconds - before
        assert 10 * meter._HANDOVER_SECONDS <= taken <= time.perf_counter() - started
    finally:
        counting.finish_phases()
    stopped = counting.own_seconds
    counting.enter("forward")
    torch.empty(1)
    assert counting.own_seconds == stopped
