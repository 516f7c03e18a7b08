"""What ZeRO-3 may release after a module, found without a search through the whole step for each of them."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

import torch
from deepspeed.runtime.zero import partitioned_param_coordinator as engine

_READ_VERSION = "0.19.8"
"""Of DeepSpeed, whose method this replaces; any other one keeps its own."""
_PRIVATE = "_PartitionedParameterCoordinator__"


def is_quick() -> bool:
    """Whether the search costs a step nothing that could be felt."""
    return version("deepspeed").partition("+")[0] == _READ_VERSION


def quicken_release() -> None:
    """Put `params_to_release` into DeepSpeed's engine.

    The first step with a trace asks for every module, and DeepSpeed lists the parameters of all modules that follow:
    the square of their number, 2 s of a step for 30 layers, a minute for 160. Trials and trainings do this alike.
    """
    if is_quick():
        setattr(engine.PartitionedParameterCoordinator, f"{_PRIVATE}params_to_release", params_to_release)


@functools.cache
def params_to_release(coordinator: Any, submodule: torch.nn.Module, step_id: int) -> set[int]:
    """Ids of the module's parameters that neither persist nor are used again within the reuse distance.

    The same set for the same question, as in DeepSpeed, whose caller adds to it. The search ends when nothing is left.

    Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py:634 (__params_to_release).
    """
    if not coordinator.is_complete_trace():
        raise RuntimeError("expected trace to be complete")
    is_leaf = engine.z3_leaf_module(submodule)
    fetched_for = getattr(coordinator, f"{_PRIVATE}most_recent_step_id_param_fetched_for")
    found = {
        parameter.ds_id
        for parameter in engine.iter_params(submodule, recurse=is_leaf)
        if not parameter.ds_persist and fetched_for[parameter] <= step_id
    }
    reach_numel = getattr(coordinator, f"{_PRIVATE}max_reuse_dist_in_numel")
    traversed_numel = 0
    for used, numel in _uses(coordinator, is_leaf)[step_id:] if found else ():
        if not found or traversed_numel >= reach_numel:
            break
        found -= used
        traversed_numel += numel
    return found


def _uses(coordinator: Any, with_children: bool) -> list[tuple[frozenset[int], int]]:
    """Ids and elements of the parameters that each step of the trace uses; made once for a trace."""
    order = getattr(coordinator, f"{_PRIVATE}submodule_order")
    kept = coordinator.__dict__.setdefault("_zplan_uses", {})
    if with_children not in kept or kept[with_children][0] is not order:
        listed = [tuple(engine.iter_params(module, recurse=with_children)) for module in order]
        uses = [(frozenset(p.ds_id for p in found), sum(p.ds_numel for p in found)) for found in listed]
        kept[with_children] = (order, uses)
    found: list[tuple[frozenset[int], int]] = kept[with_children][1]
    return found
