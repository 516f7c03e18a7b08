"""Stand-ins for compiled ops: the shapes of the tensors that csrc/quantization/pt_binding.cpp allocates."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives as collectives
from torch._subclasses.fake_tensor import FakeTensorMode

from zplan.memory.quantized import scatter_bytes
from zplan.simulate.analysis import find_peaks
from zplan.simulate.ops import StandInOp
from zplan.simulate.tracker import Tracker


def shapes(tensors: list[torch.Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors]


def test_the_quantizer_returns_what_the_cuda_one_allocates() -> None:
    op = StandInOp("quantizer")
    weights = torch.empty(64, 32, dtype=torch.float16)
    assert shapes(op.quantize(weights, 8, 8, op.Symmetric)) == [((64, 32), torch.int8), ((8, 1), torch.float32)]
    packed, scales = op.swizzle_quant(weights, 64, 4, op.Symmetric, 1, 2, 4)
    assert shapes([packed, scales]) == [((64 * 32 // 2,), torch.int8), ((64, 1), torch.float32)]
    reduced, fewer = op.quantized_reduction(packed, scales, 64, 16, 4, op.Symmetric, 4)
    assert shapes([reduced, fewer]) == [((64 * 32 // 8,), torch.int8), ((16, 1), torch.float32)]
    whole = op.dequantize(reduced, fewer, fewer.numel(), 4, op.Symmetric)
    assert shapes([whole]) == [((64 * 32 // 4,), torch.float16)]


def test_deepspeeds_own_reduction_between_nodes_takes_what_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """all_to_all_quant_reduce itself, over two nodes of eight; every tensor is whole blocks of 512 bytes."""
    sizes = ((1024, 512), (2048, 1024), (4096,), (1024, 256))
    monkeypatch.setattr(collectives, "quantizer_module", StandInOp("quantizer"))
    monkeypatch.setattr(collectives, "get_accelerator", lambda: SimpleNamespace(device_count=lambda: 8))
    monkeypatch.setattr(collectives, "all_to_all_single", lambda *_, **__: None)
    group = SimpleNamespace(
        get_world_size=lambda *_: 16, get_rank=lambda *_: 0, reduce_scatter_fn=lambda *_, **__: None
    )
    monkeypatch.setattr(collectives, "dist", group)
    with FakeTensorMode() as fake, Tracker({"cpu": "gpu"}, fake_mode=fake) as tracker:
        gradients = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
        given = tracker.current["gpu"]
        partitions = collectives.all_to_all_quant_reduce(gradients, dict.fromkeys(("local_0", "global_0")))
    assert [one.numel() for one in partitions] == [prod(size) // 16 for size in sizes]
    asked = [(prod(size), max(size) if len(size) > 1 else 0) for size in sizes]
    assert find_peaks(tracker).gpu_bytes - given == scatter_bytes(
        asked, num_ranks=16, gpus_per_node=8, itemsize=2
    )  # fmt: skip
