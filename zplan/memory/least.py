"""What a configuration needs at least, from what is held all the time alone: a step only adds to it.

A tenth of the cost of an estimate, and a search asks about many that are far too large.
"""

from __future__ import annotations

from zplan.autotp import cut_shape
from zplan.hardware import Cluster
from zplan.memory.estimate import gpu_level, gpu_ranges, phase_bytes, standing_of
from zplan.memory.host import estimate_host
from zplan.memory.limits import not_modelled
from zplan.memory.outside import outside_allocator
from zplan.memory.resident import Resident
from zplan.memory.terms import VERDICTS
from zplan.memory.trainable import Layout, layout
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.values import dataclass
from zplan.zero_config import Choice


def cannot_fit(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> bool:
    """Whether the verdict cannot be `fits`, from what is held all the time alone; False says nothing.

    As `least_need`, but the host is asked only if the GPU has room.
    """
    least = _least_of_gpu(shape, recipe, choice, cluster)
    return least.level > 0 or _least_of_host(recipe, choice, cluster, least)[0] > 0


def least_need(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> tuple[int, int]:
    """(tier, bytes short on GPU and host) that the estimate cannot be below; bytes only where the tier is 2.

    Tiers are indices into VERDICTS.
    """
    least = _least_of_gpu(shape, recipe, choice, cluster)
    level, short = _least_of_host(recipe, choice, cluster, least)
    tier = max(least.level, level)
    return tier, least.short_bytes + short if tier == 2 else 0


@dataclass(frozen=True, slots=True)
class _Least:
    """What a GPU holds all the time."""

    laid: Layout
    """The part of the model that AutoTP leaves to one rank."""
    still: Resident
    peak: int
    """In the fullest phase."""
    level: int
    """Index into VERDICTS."""
    short_bytes: int


def _least_of_gpu(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> _Least:
    on_cpu = cluster.gpu.kind == "cpu"
    is_whole = not not_modelled(shape, recipe, choice, on_cpu=on_cpu)
    laid = layout(cut_shape(shape, choice.batch.autotp_size), recipe)
    still = standing_of(laid, recipe, choice, cluster, None)
    peak = max(phase_bytes(still.terms).values())
    used = gpu_ranges(peak, 0, outside_allocator(choice, cluster), on_cpu=on_cpu).used
    level, short = gpu_level(used, cluster.gpu.free_bytes, is_whole=is_whole)
    return _Least(laid, still, peak, level, short)


def _least_of_host(recipe: Recipe, choice: Choice, cluster: Cluster, least: _Least) -> tuple[int, int]:
    """(index into VERDICTS, bytes short)."""
    host, nvme = estimate_host(
        least.laid, recipe, choice, cluster, partition_numel=least.still.partition_numel,
        rank_bytes=least.peak if cluster.gpu.kind == "cpu" else 0,
        touched_numel=least.still.node_touched_numel,
    )  # fmt: skip
    return max(VERDICTS.index(host.verdict), VERDICTS.index(nvme.verdict)), host.short_bytes
