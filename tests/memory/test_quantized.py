"""ZeRO++'s int8 gather and 4-bit reduction: worked numbers, and the installed quantizer's own groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer

from zplan.memory.quantized import Given, QuantizedGather, gather_alone, gather_together, num_groups, scatter_bytes


def groups_of_deepspeed(numel: int) -> int:
    quantizer = object.__new__(CUDAQuantizer)
    quantizer.quantizer_cuda_module = SimpleNamespace(quantize=lambda _p, groups, *_: groups, Symmetric=0)
    found: int = quantizer.quantize(SimpleNamespace(numel=lambda: numel, to=lambda *_, **__: None))
    return found


@pytest.mark.parametrize("numel", [8, 64, 8000, 8008, 8 * 1009, 576 * 192, 4096 * 4096 // 8, 128256 * 2048 // 64])
def test_groups_are_those_of_the_installed_quantizer(numel: int) -> None:
    assert num_groups(numel) == groups_of_deepspeed(numel)


@pytest.mark.parametrize("numel", [9, 100, 8001])
def test_what_the_quantizer_refuses_has_no_groups(numel: int) -> None:
    assert num_groups(numel) is None
    with pytest.raises(AssertionError, match="multiple of 8"):
        groups_of_deepspeed(numel)


def test_one_parameter_alone() -> None:
    """16,000 elements over two ranks: one group of 8,000 on each."""
    given = [Given(16_000, 8_000, 0)]
    assert gather_alone(given, num_ranks=2, itemsize=2, is_fp16=False) == QuantizedGather(
        launching=16_000 + 2 * 8_000 + 8_000 + 4,  # int8 buffer, fp16 copy, int8 partition, its scale
        flying=16_000 + 2 * 4,
        arriving=2 * 16_000 + 2 * 16_000,  # fp16, then bf16
        unpacked=0,
    )
    assert gather_alone(given, num_ranks=2, itemsize=2, is_fp16=True).arriving == 2 * 16_000


def test_two_parameters_in_one_buffer() -> None:
    """Two of 16,000 elements over two ranks: 16,000 elements of a rank in two groups."""
    given = [Given(16_000, 8_000, 0)] * 2
    assert gather_together(given, num_ranks=2, itemsize=2, is_fp16=False) == QuantizedGather(
        launching=32_000 + 2 * 16_000 + 2 * 16_000,  # int8 buffer, the two in bf16, their fp16 copy
        flying=32_000 + 2 * 8,
        arriving=2 * 32_000 + 2 * 16_000 + 2 * 16_000 + 2 * 16_000,  # fp16 buffer, the first, the second twice
        unpacked=2 * 32_000,
    )


def test_four_bit_reduction_between_two_nodes_of_two() -> None:
    """A matrix of 64 x 16 over four ranks: 64 groups."""
    reduced = 512 // 2 + 4 * 32
    steps = 2 * (512 + 4 * 64) + 2 * reduced + 2 * 1024 // 2 + 2 * (2 * 1024 // 4)
    assert scatter_bytes([(1024, 64)], num_ranks=4, gpus_per_node=2, itemsize=2) == steps
    averaged = 2 * 1024 // 4
    assert scatter_bytes([(1024, 64)] * 2, num_ranks=4, gpus_per_node=2, itemsize=2) == averaged + steps


def test_vectors_and_what_the_ranks_do_not_divide_are_reduced_in_full() -> None:
    assert scatter_bytes([(1024, 0)], num_ranks=4, gpus_per_node=2, itemsize=2) == 0
    assert scatter_bytes([(1023, 33)], num_ranks=4, gpus_per_node=2, itemsize=2) == 2 * 1024
