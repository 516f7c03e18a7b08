"""Random weights of a trial under ZeRO-3 on CPU ranks, made where they stay: every rank fills its own partitions.

transformers gathers each weight twice, for its module and for the one around it, and sends rank 0's values to all;
zero.Init has sent what is not written yet before. What a trial measures does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

_FILLED = (torch.nn.Linear, torch.nn.Embedding)
_LOOK_INSIDE = (torch.nn.LSTM, torch.nn.MultiheadAttention)
"""Modules whose initialisation touches other modules' weights."""


def filling(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """transformers' `initialize_weights_zero3`, without communication where the model's weights are of the usual kinds.

    The largest weights that it would gather together are gathered once: they are the peak of the load phase.

    Source: transformers 5.23, integrations/deepspeed.py:298 (initialize_weights_zero3).
    """

    def initialize(model: Any) -> None:
        if not _can_be_filled(model):
            original(model)
            return
        rank = deepspeed.comm.get_rank()
        generator = torch.Generator().manual_seed(torch.initial_seed() + rank)
        std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
        with torch.no_grad(), guard_torch_init_functions():
            for module in model.modules():
                own = list(module.parameters(recurse=False))
                if type(module) in _FILLED:
                    for parameter in own:
                        parameter.ds_tensor.normal_(0.0, std, generator=generator)
                    module._is_hf_initialized = True
                elif own:
                    with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
                        if rank == 0:
                            model._initialize_weights(module, False)
                else:
                    model._initialize_weights(module, False)
            with deepspeed.zero.GatheredParameters(max(_groups(model), key=_numel), modifier_rank=0):
                pass

    return initialize


def without_broadcast(init: Any, parameter: torch.nn.Parameter) -> None:
    """zero.Init's `_zero_init_param` for a weight that nobody has written yet.

    Source: deepspeed 0.19.8, runtime/zero/partition_parameters.py:1200.
    """
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()  # type: ignore[attr-defined]


def is_cpu() -> bool:
    """On CUDA the order of allocations decides what is reserved: there nothing is left out."""
    return bool(get_accelerator().device_name() == "cpu")


def _can_be_filled(model: Any) -> bool:
    modules = list(model.modules())
    models = [module for module in modules if isinstance(module, PreTrainedModel)]
    usual = all(type(module)._init_weights is PreTrainedModel._init_weights for module in models)
    alone = not any(isinstance(module, _LOOK_INSIDE) for module in modules)
    return usual and alone and all(map(_is_plain, model.parameters()))


def _is_plain(parameter: Any) -> bool:
    """One partition in host memory, in the training dtype."""
    part = parameter.ds_tensor
    here = part.status == PartitionedParamStatus.AVAILABLE and part.device.type == "cpu"
    return here and part.is_floating_point() and parameter.ds_secondary_tensor is None


def _groups(model: Any) -> list[list[Any]]:
    """Weights that transformers gathers together: a module's own and those of the modules directly below it."""
    groups = []
    for module in model.modules():
        below = [child for child in module.children() if not isinstance(child, PreTrainedModel)]
        groups.append([p for owner in (module, *below) for p in owner.parameters(recurse=False)])
    return groups


def _numel(parameters: list[Any]) -> int:
    return sum(parameter.ds_numel for parameter in parameters)
