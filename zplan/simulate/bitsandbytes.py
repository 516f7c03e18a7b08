"""bitsandbytes' 4-bit weights on fake tensors: the same tensors as its CUDA code has, no arithmetic.

A parameter of a class of its own, which Params4bit is, cannot be a fake tensor, and its kernels dereference addresses.
What stands in for them here follows bitsandbytes 0.50.2 name by name; PEFT's layer around it is PEFT's own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft.import_utils
import peft.tuners.lora.model as lora_model
import torch
import transformers.integrations.bitsandbytes as integration
from torch import Tensor
from transformers.core_model_loading import dot_natural_key
from transformers.quantizers.base import HfQuantizer

from zplan.values import dataclass

BLOCK = 64
"""Weights with one absmax (quantize_4bit, blocksize=64)."""
NESTED_BLOCK = 256
"""absmax values with one absmax of their own (compress_statistics)."""


@dataclass(slots=True)
class QuantState:
    """What lies beside the packed weights of a matrix (functional.py, QuantState)."""

    shape: torch.Size
    dtype: torch.dtype
    absmax: Tensor
    """uint8, one for each block."""
    offset: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor


def quantize_4bit(weight: Tensor, storage: torch.dtype) -> tuple[Tensor, QuantState]:
    """NF4 with double quantisation: two weights a byte, in elements of `storage`.

    Source: bitsandbytes 0.50.2, functional.py (quantize_4bit, quantize_blockwise), _ops.py (quantize_4bit).
    """
    blocks, numel = -(-weight.numel() // BLOCK), weight.numel()
    packed = torch.empty(((numel + 1) // (2 * storage.itemsize), 1), dtype=storage, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    code = absmax.new_empty(16)
    offset = absmax.mean()
    centred = absmax - offset
    state = QuantState(
        shape=weight.shape,
        dtype=weight.dtype,
        absmax=torch.empty_like(centred, dtype=torch.uint8),
        offset=offset,
        code=code,
        nested_absmax=absmax.new_empty(-(-blocks // NESTED_BLOCK)),
        nested_code=absmax.new_empty(256),
    )
    return packed, state


def gemm_4bit(x: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """The product with a weight that is dequantised first, as CUDA does it for more than some hundred rows.

    Source: bitsandbytes 0.50.2, backends/cuda/ops.py (_dequant_linear_fallback).
    Limits: for fewer rows the choice of a kernel that dequantises nothing depends on the GPU
    (_gemm_4bit_use_custom_cuda).
    """
    dequantized = torch.empty_like(state.absmax, dtype=torch.float32)
    absmax = dequantized + state.offset
    weight = torch.empty(state.shape, dtype=x.dtype, device=absmax.device)
    return torch._C._nn.linear(x, weight, bias)


def dequantize_4bit(state: QuantState) -> Tensor:
    """functional.py (dequantize_4bit)."""
    absmax = torch.empty_like(state.absmax, dtype=torch.float32)
    absmax += state.offset
    return torch.empty(state.shape, dtype=state.dtype, device=absmax.device)


class MatMul4Bit(torch.autograd.Function):
    """Keeps the packed weight on the context, not among the saved tensors, and dequantises it again for the gradient.

    Source: bitsandbytes 0.50.2, autograd/_functions.py (MatMul4Bit).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, state: QuantState) -> Tensor:
        packed = packed.view(-1, 1)
        output = gemm_4bit(x, state, bias)
        ctx.state = state
        ctx.tensors = (None, packed) if any(ctx.needs_input_grad[:2]) else (None, None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None, None]:
        needed = ctx.needs_input_grad[0]
        return torch.matmul(grad_output, dequantize_4bit(ctx.state)) if needed else None, None, None, None


class Linear4bit(torch.nn.Linear):
    """nn/modules.py (Linear4bit, Params4bit): the state hangs on the parameter, which ZeRO keeps when it takes the
    packed weight apart."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, compute_dtype: torch.dtype, *, compress_statistics: bool,
        quant_type: str, quant_storage: torch.dtype,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias)
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage
        self.compress_statistics, self.quant_type = compress_statistics, quant_type

    def quantize(self, weight: Tensor) -> None:
        """The weight as it was loaded, in 16 bits on the GPU, becomes the parameter."""
        packed, state = quantize_4bit(weight, self.quant_storage)
        parameter: Any = torch.nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state
        parameter.compress_statistics, parameter.quant_type = self.compress_statistics, self.quant_type
        self.weight = parameter

    def forward(self, x: Tensor) -> Tensor:
        entered = x.dtype
        x = x.to(self.compute_dtype)
        bias = self.bias.to(self.compute_dtype) if self.bias is not None else None
        weight: Any = self.weight
        state = weight.quant_state
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            out: Tensor = MatMul4Bit.apply(x, weight.view(-1, 1), bias, state)  # type: ignore[no-untyped-call]
        else:
            out = gemm_4bit(x, state, bias)
        return out.to(entered)


STAND_IN: Any = ModuleType("bitsandbytes")
STAND_IN.nn = SimpleNamespace(Linear4bit=Linear4bit)


@contextlib.contextmanager
def peft_with_4bit() -> Iterator[None]:
    """PEFT's 4-bit layer exists where bitsandbytes does: its file is run anew beside the stand-in, and forgotten."""
    name = "peft.tuners.lora.bnb"
    before = sys.modules.get("bitsandbytes"), sys.modules.get(name)
    asked = peft.import_utils.is_bnb_available, peft.import_utils.is_bnb_4bit_available
    spec: Any = importlib.util.spec_from_file_location(name, Path(str(lora_model.__file__)).with_name("bnb.py"))
    layers = importlib.util.module_from_spec(spec)
    try:
        sys.modules["bitsandbytes"], sys.modules[name] = STAND_IN, layers
        _answer(lambda: False, lambda: True)
        spec.loader.exec_module(layers)
        yield
    finally:
        _answer(*asked)
        for key, module in zip(("bitsandbytes", name), before, strict=True):
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


def _answer(has_8bit: Any, has_4bit: Any) -> None:
    for owner in (peft.import_utils, lora_model):
        vars(owner).update(is_bnb_available=has_8bit, is_bnb_4bit_available=has_4bit)


def quantize_model(model: Any, *, dtype: torch.dtype, device: str) -> None:
    """A model on the meta device -> as `from_pretrained` leaves it: every weight on the GPU, one after the other in the
    order of their names, the linear ones quantised there.

    Source: transformers 5.23.0, quantizers/quantizer_bnb_4bit.py, integrations/bitsandbytes.py
    (replace_with_bnb_linear, Bnb4bitQuantize), core_model_loading.py:1742 (dot_natural_key; no thread pool).
    """
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    config = SimpleNamespace(
        quantization_method=lambda: "nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=dtype,
    )  # fmt: skip
    before = vars(integration).get("bnb")
    integration.bnb = STAND_IN
    try:
        integration.replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    finally:
        integration.bnb = before
    made: dict[Tensor, torch.nn.Parameter] = {}
    for path, parameter in sorted(model.named_parameters(remove_duplicate=False), key=_by_name):
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, Linear4bit) and name == "weight":
            module.quantize(torch.empty(parameter.shape, dtype=dtype, device=device))
            continue
        if parameter not in made:
            loaded = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            made[parameter] = torch.nn.Parameter(loaded, requires_grad=parameter.requires_grad)
        module._parameters[name] = made[parameter]
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    model.is_loaded_in_4bit = True


def _by_name(named: tuple[str, Any]) -> Any:
    return dot_natural_key(named[0])
