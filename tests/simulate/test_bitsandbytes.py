"""The stand-in for bitsandbytes' 4-bit weights: its bytes by hand, and against the library where it is installed."""

from __future__ import annotations

import sys
from typing import Any

import peft.import_utils
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.simulate.conftest import question
from zplan.memory.operations import dequantised_bytes
from zplan.memory.trainable import nf4_bytes
from zplan.simulate.analysis import find_peaks
from zplan.simulate.bitsandbytes import Linear4bit, peft_with_4bit, quantize_4bit
from zplan.simulate.client import WorkerClient
from zplan.simulate.tracker import Tracker

ROWS, COLUMNS, TOKENS = 1024, 2048, 512
TABLES_BYTES = 4 * 16 + 4 + 4 * 256
"""Code of NF4, mean of the scales, code of the scales."""


def states(state: Any) -> list[torch.Tensor]:
    return [state.absmax, state.offset, state.code, state.nested_absmax, state.nested_code]


def num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def layer(dtype: torch.dtype = torch.bfloat16) -> Linear4bit:
    made = Linear4bit(
        COLUMNS, ROWS, False, dtype, compress_statistics=True, quant_type="nf4", quant_storage=dtype
    )  # fmt: skip
    made.quantize(torch.empty(ROWS, COLUMNS, dtype=dtype))
    return made


@pytest.mark.parametrize("shape", [(64, 64), (1024, 2048), (3, 5)])
def test_a_quantised_weight_holds_what_the_formula_says(shape: tuple[int, int]) -> None:
    packed, state = quantize_4bit(torch.empty(shape, dtype=torch.bfloat16), torch.bfloat16)
    held = num_bytes(packed, *states(state)) - TABLES_BYTES
    assert 0 <= nf4_bytes(shape[0] * shape[1]) - held < 2  # half an element is not stored


def test_forward_dequantises_beside_its_result_and_backward_before_it() -> None:
    with FakeTensorMode() as fake, Tracker({"cpu": "gpu"}, fake_mode=fake) as tracker:
        linear, x = layer(), torch.empty(TOKENS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
        before = tracker.current["gpu"]
        tracker.enter_phase("forward")
        out = linear(x)
        held = tracker.current["gpu"] - before
        tracker.enter_phase("backward")
        out.backward(torch.empty_like(out))
    forward, backward = dequantised_bytes(ROWS * COLUMNS, 2)
    result, gradient = 2 * TOKENS * ROWS, 2 * TOKENS * COLUMNS
    peaks = find_peaks(tracker).phases["gpu"]
    assert held == result
    assert peaks["forward"] - before == result + forward
    assert peaks["backward"] - before == 2 * result + backward + gradient


def test_the_graph_keeps_the_packed_weight_until_it_goes_itself() -> None:
    """Not among the saved tensors, which a backward frees."""
    with FakeTensorMode() as fake, Tracker({"cpu": "gpu"}, fake_mode=fake) as tracker:
        linear, x = layer(), torch.empty(TOKENS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
        packed = num_bytes(linear.weight)
        out = linear(x).sum()
        linear.weight.data = torch.empty(0, dtype=torch.bfloat16)  # as ZeRO-3 releases it
        out.backward()
        held = tracker.current["gpu"]
        del out
        assert held - tracker.current["gpu"] == packed + 512  # and the sum's block


def test_pefts_layer_is_made_beside_the_stand_in_and_forgotten() -> None:
    asked = peft.import_utils.is_bnb_4bit_available
    with peft_with_4bit():
        assert peft.import_utils.is_bnb_4bit_available()
        assert hasattr(sys.modules["peft.tuners.lora.bnb"], "dispatch_bnb_4bit")
    assert peft.import_utils.is_bnb_4bit_available is asked
    assert "bitsandbytes" not in sys.modules or hasattr(sys.modules["bitsandbytes"], "__version__")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (1024, 2048), (130, 66)])
def test_the_library_itself_makes_the_same_tensors(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, dtype=dtype)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4", quant_storage=dtype
    )
    real = [packed, state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
    ours, stand_in = quantize_4bit(weight, dtype)
    described = [(tensor.shape, tensor.dtype) for tensor in (ours, *states(stand_in))]
    assert described == [(tensor.shape, tensor.dtype) for tensor in real]
    assert functional.dequantize_4bit(packed, state).shape == weight.shape


def test_the_librarys_own_graph_keeps_the_packed_weight_too() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = bitsandbytes.nn.Linear4bit(
        COLUMNS, ROWS, False, torch.bfloat16, compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16
    )
    linear.weight.data = torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16)
    linear.to("cpu")
    x = torch.randn(TOKENS, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    out = linear(x).sum()
    (node,) = [found for found in _nodes(out.grad_fn) if type(found).__name__ == "MatMul4BitBackward"]
    storage = linear.weight.data.untyped_storage().data_ptr()
    out.backward()
    assert node.tensors[1].untyped_storage().data_ptr() == storage


def _nodes(node: Any) -> list[Any]:
    return [node, *(found for child, _ in node.next_functions if child is not None for found in _nodes(child))]


def test_a_model_that_is_quantised_while_it_is_loaded_is_never_whole_on_the_host(worker: WorkerClient) -> None:
    report = worker.ask(question(2, recipe={"method": "qlora"}))
    assert report.host_phases["load"] < 2 * 512 * 64, "less than the embedding in 16 bits"
