"""Stand-ins for DeepSpeed's compiled ops: the same memory behaviour, no arithmetic.

Fused Adam and CPU Adam update in place and allocate nothing on the device; their states are allocated by the Python
classes around them, which run as they are. The asynchronous I/O op moves bytes between a pinned buffer and a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zplan.values import dataclass


@dataclass(slots=True)
class NvmeTraffic:
    """Bytes that asynchronous I/O would have moved, of one run."""

    read_bytes: int = 0
    written_bytes: int = 0


NVME_TRAFFIC = NvmeTraffic()


class AioHandle:
    """DeepSpeed's asynchronous I/O without a file: the tracker sees its pinned buffers, reads and writes are counted.

    Source: deepspeed 0.19.8, csrc/aio/py_lib/py_ds_aio.cpp (aio_handle); runtime/swap_tensor/utils.py.
    """

    def __init__(self, *_args: Any, **_options: Any) -> None:
        self.pending = 0

    def new_cpu_locked_tensor(self, numel: int, example: torch.Tensor) -> torch.Tensor:
        """A pinned buffer of the example's dtype."""
        return torch.empty(numel, dtype=example.dtype, pin_memory=True)

    def free_cpu_locked_tensor(self, _tensor: torch.Tensor) -> bool:
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def get_alignment(self) -> int:
        return 512

    def get_intra_op_parallelism(self) -> int:
        return 1

    def async_pread(self, tensor: torch.Tensor, _path: str, _offset: int = 0) -> int:
        self.pending += 1
        NVME_TRAFFIC.read_bytes += tensor.numel() * tensor.element_size()
        return 0

    def async_pwrite(self, tensor: torch.Tensor, _path: str, _offset: int = 0) -> int:
        self.pending += 1
        NVME_TRAFFIC.written_bytes += tensor.numel() * tensor.element_size()
        return 0

    def sync_pread(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        self.async_pread(tensor, path, offset)
        return self.wait()

    def sync_pwrite(self, tensor: torch.Tensor, path: str, offset: int = 0) -> int:
        self.async_pwrite(tensor, path, offset)
        return self.wait()

    def wait(self) -> int:
        """How many operations were under way."""
        done, self.pending = self.pending, 0
        return done


class Quantizer:
    """DeepSpeed's quantizer without arithmetic: every function returns tensors of the shapes and dtypes that the CUDA
    one allocates, and these have no scratch memory of their own. int8, two 4-bit values in one; a float32 scale for
    each group of elements (symmetric quantisation); dequantised values are float16 whatever they were made of.

    Source: deepspeed 0.19.8, ops/csrc/quantization/pt_binding.cpp.
    """

    Symmetric, Asymmetric = 0, 1

    def quantize(self, values: Tensor, groups: int, num_bits: int, _type: int) -> list[Tensor]:
        scales = torch.empty((groups, 1), dtype=torch.float32, device=values.device)
        *rows, last = values.shape
        return [torch.empty((*rows, last * num_bits // 8), dtype=torch.int8, device=values.device), scales]

    def dequantize(self, values: Tensor, _scales: Tensor, _groups: int, num_bits: int, _type: int) -> Tensor:
        *rows, last = values.shape
        return torch.empty((*rows, last * 8 // num_bits), dtype=torch.float16, device=values.device)

    def swizzle_quant(self, values: Tensor, groups: int, num_bits: int, _type: int, *_layout: int) -> list[Tensor]:
        scales = torch.empty((groups, 1), dtype=torch.float32, device=values.device)
        return [torch.empty(values.numel() * num_bits // 8, dtype=torch.int8, device=values.device), scales]

    def quantized_reduction(
        self, values: Tensor, _scales: Tensor, _in_groups: int, out_groups: int, _num_bits: int, _type: int, ranks: int
    ) -> list[Tensor]:
        scales = torch.empty((out_groups, 1), dtype=torch.float32, device=values.device)
        *rows, last = values.shape
        return [torch.empty((*rows, last // ranks), dtype=torch.int8, device=values.device), scales]


class StandInOp:
    """A compiled module whose functions do nothing, except those that rearrange memory or return some."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if self.name == "quantizer":
            return getattr(Quantizer(), attribute)
        if attribute == "flatten":
            return torch._utils._flatten_dense_tensors
        if attribute == "unflatten":
            return torch._utils._unflatten_dense_tensors
        if attribute in ("aio_handle", "gds_handle"):
            return AioHandle
        return lambda *args, **kwargs: 0


class StandInBuilder:
    """Answers for any `OpBuilder`."""

    def __init__(self, name: str = "") -> None:
        self.NAME = name

    def load(self, verbose: bool = True) -> StandInOp:
        return StandInOp(self.NAME)

    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def absolute_name(self) -> str:
        return self.NAME
