"""The parameters of a module, as DeepSpeed lists them, without a walk over it at each question."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def listed_parameters(original: Callable[..., Any]) -> Callable[..., tuple[torch.nn.Parameter, ...]]:
    """DeepSpeed's iter_params (runtime/zero/partitioned_param_coordinator.py), asked once for each module.

    The engine registers no parameter after its start but external ones, which appear at the first use: a module is
    listed again when their number has changed.
    """
    own: dict[torch.nn.Module, tuple[int, tuple[torch.nn.Parameter, ...]]] = {}
    with_children: dict[torch.nn.Module, tuple[int, tuple[torch.nn.Parameter, ...]]] = {}

    def iter_params(module: torch.nn.Module, recurse: bool = False) -> tuple[torch.nn.Parameter, ...]:
        listed = with_children if recurse else own
        found = listed.get(module)
        external = len(module.__dict__.get("_external_params", ()))
        if found is None or found[0] != external:
            found = listed[module] = (external, tuple(original(module, recurse=recurse)))
        return found[1]

    return iter_params
