"""What ZeRO-3 may release after a module, by one look at the trace of a step; in trials, trainings and simulations.

DeepSpeed walks over the parameters of all modules within the reuse distance, for each module anew: the square of their
number in the first step with a trace, 2 s for 30 layers, a minute for 160.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

PREFIX = "_PartitionedParameterCoordinator__"
"""Of what the coordinator keeps to itself."""
METHOD = f"{PREFIX}params_to_release"


class Trace:
    """A complete trace of modules, asked for the next use of a parameter.

    Args:
        order: the modules as they run, forward and backward.
        listed: the parameters of a module.
    """

    def __init__(self, order: Sequence[Any], listed: Callable[[Any], Sequence[Any]]) -> None:
        self.order = order
        self._before = [0]
        self._uses: dict[int, list[int]] = {}
        for step_id, module in enumerate(order):
            parameters = listed(module)
            self._before.append(self._before[-1] + sum(parameter.ds_numel for parameter in parameters))
            for parameter in parameters:
                self._uses.setdefault(parameter.ds_id, []).append(step_id)

    def is_used_soon(self, ds_id: int, step_id: int, distance: int) -> bool:
        """Whether it is used again, from `step_id` on, before the modules in between have had `distance` elements."""
        uses = self._uses.get(ds_id, [])
        following = bisect_left(uses, step_id)
        return following < len(uses) and self._before[uses[following]] - self._before[step_id] < distance


def params_to_release(original: Callable[..., set[int]], listed: Callable[..., Any]) -> Callable[..., set[int]]:
    """DeepSpeed's `__params_to_release`, which is left with the refusal of a trace that is not complete.

    Like the original this gives the same set for the same question, because the caller adds to it.

    Args:
        listed: DeepSpeed's iter_params: the parameters of a module, or also of those below it.

    Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py:634 (__params_to_release).
    """
    traces: dict[tuple[Any, bool], Trace] = {}

    def trace_of(coordinator: Any, below: bool) -> Trace:
        order = getattr(coordinator, f"{PREFIX}submodule_order")
        known = traces.get((coordinator, below))
        if known is None or known.order is not order:
            known = traces[coordinator, below] = Trace(order, lambda module: tuple(listed(module, recurse=below)))
        return known

    @functools.cache
    def params_to_release(coordinator: Any, submodule: Any, step_id: int) -> set[int]:
        if not coordinator.is_complete_trace():
            return original(coordinator, submodule, step_id)
        is_leaf = bool(submodule.__dict__.get("_z3_leaf", False))
        waiting = [parameter for parameter in listed(submodule, recurse=is_leaf) if not parameter.ds_persist]
        if not waiting:
            return set()
        fetched_for = getattr(coordinator, f"{PREFIX}most_recent_step_id_param_fetched_for")
        distance = getattr(coordinator, f"{PREFIX}max_reuse_dist_in_numel")
        trace = trace_of(coordinator, is_leaf)
        return {
            parameter.ds_id
            for parameter in waiting
            if fetched_for[parameter] <= step_id and not trace.is_used_soon(parameter.ds_id, step_id, distance)
        }

    return params_to_release
