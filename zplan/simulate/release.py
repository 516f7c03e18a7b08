"""Which parameters ZeRO-3 may release, as DeepSpeed's coordinator says it, without its walks over all modules."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

_PREFIX = "_PartitionedParameterCoordinator__"


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


class Trace:
    """A complete trace of modules, asked for the next use of a parameter.

    Args:
        order: the modules as they run, forward and backward.
        listed: the parameters of a module.
    """

    def __init__(self, order: Sequence[torch.nn.Module], listed: Callable[..., Any]) -> None:
        self.order = order
        numels = (sum(parameter.ds_numel for parameter in listed(module)) for module in order)
        self._before = list(accumulate(numels, initial=0))
        self._uses: dict[int, list[int]] = {}
        for step_id, module in enumerate(order):
            for parameter in listed(module):
                self._uses.setdefault(parameter.ds_id, []).append(step_id)

    def is_used_soon(self, ds_id: int, step_id: int, distance: int) -> bool:
        """Whether it is used again, from `step_id` on, before the modules in between have had `distance` elements."""
        uses = self._uses.get(ds_id, [])
        following = bisect_left(uses, step_id)
        return following < len(uses) and self._before[uses[following]] - self._before[step_id] < distance


def params_to_release(original: Callable[..., set[int]], listed: Callable[..., Any]) -> Callable[..., set[int]]:
    """DeepSpeed's `__params_to_release` (runtime/zero/partitioned_param_coordinator.py) by one look at the trace.

    The original walks all modules of the reuse distance for each question. Like the original this gives the same set
    for the same question, because the caller adds to it. Leaf modules are left to the original.
    """
    traces: dict[Any, Trace] = {}

    def trace_of(coordinator: Any) -> Trace:
        order = getattr(coordinator, _PREFIX + "submodule_order")
        if coordinator not in traces or traces[coordinator].order is not order:
            traces[coordinator] = Trace(order, listed)
        return traces[coordinator]

    @functools.cache
    def params_to_release(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
        if submodule.__dict__.get("_z3_leaf", False) or not coordinator.is_complete_trace():
            return original(coordinator, submodule, step_id)
        waiting = [parameter for parameter in listed(submodule) if not parameter.ds_persist]
        if not waiting:
            return set()
        fetched_for = getattr(coordinator, _PREFIX + "most_recent_step_id_param_fetched_for")
        distance = getattr(coordinator, _PREFIX + "max_reuse_dist_in_numel")
        trace = trace_of(coordinator)
        return {
            parameter.ds_id
            for parameter in waiting
            if fetched_for[parameter] <= step_id and not trace.is_used_soon(parameter.ds_id, step_id, distance)
        }

    return params_to_release
