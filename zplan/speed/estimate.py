"""Seconds of one optimizer step: the parts, then what of them overlaps."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.speed.communication import Traffic, traffic
from zplan.speed.compute import (
    OVERLAP_SLOWDOWN,
    achieved_flops,
    backward_flops,
    flops_per_token,
    gpu_step_seconds,
    weight_traffic_seconds,
)
from zplan.speed.exchange import exchange_seconds, sum_seconds
from zplan.speed.offload import (
    StateCopies,
    cpu_adam_seconds,
    nvme_seconds,
    parameter_link_seconds,
    ranks_on_a_node,
    state_copies,
)
from zplan.speed.types import BoundBy, SpeedEstimate
from zplan.speed.work import Work, part_of, work_of
from zplan.zero_config import Choice, ZeroConfig


def estimate_speed(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> SpeedEstimate:
    """One optimizer step, all micro-batches, all ranks. A step whose parts are not all known has no seconds."""
    work = part_of(work_of(shape, recipe), choice.batch.autotp_size)
    arithmetic = _arithmetic(work, recipe, choice, cluster)
    moved = traffic(work, recipe, choice, cluster)
    exchanged = exchange_seconds(shape, recipe, choice, cluster) if moved else 0.0
    exchanged += sum_seconds(shape, recipe, choice, cluster) if moved else 0.0
    states = state_copies(work, recipe, choice, cluster)
    weights = parameter_link_seconds(work, recipe, choice, cluster)
    disk = nvme_seconds(work, recipe, choice, cluster)
    host_step = cpu_adam_seconds(work, recipe, choice, cluster)
    gpu_step = gpu_step_seconds(work, recipe, choice, cluster.gpu)
    parts: dict[BoundBy, float | None] = {
        "compute": arithmetic,
        "memory_bandwidth": gpu_step,
        "communication": moved.total + exchanged if moved else None,
        "host_link": None if states is None or weights is None else states.total + weights,
        "cpu_adam": host_step,
        "nvme": disk,
    }
    known = {name: value for name, value in parts.items() if value is not None}
    shown: dict[str, float] = {str(name): value for name, value in known.items()}
    if arithmetic is None or moved is None or states is None or weights is None or disk is None:
        return SpeedEstimate(
            step_seconds=None, tokens_per_second=None, tokens_per_second_per_gpu=None, bound_by=None, parts=shown
        )
    passes = _passes_seconds(work, recipe, choice, arithmetic, moved, states, weights)
    update = gpu_step + _host_update(choice, host_step, disk) + moved.step
    seconds = passes + exchanged + update
    tokens_per_second = choice.batch.train_batch_size * recipe.max_length / seconds
    return SpeedEstimate(
        step_seconds=seconds,
        tokens_per_second=tokens_per_second,
        tokens_per_second_per_gpu=tokens_per_second / choice.batch.world_size,
        bound_by=max(known.items(), key=lambda part: part[1])[0],
        parts=shown,
    )


def _arithmetic(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float | None:
    """Forward, backward and recomputation of all micro-batches on one rank, never faster than reading the weights."""
    speed = achieved_flops(cluster, recipe, ranks_on_a_node(choice, cluster))
    if speed is None:
        return None
    batch, recompute = choice.batch, choice.gradient_checkpointing
    tokens = batch.train_micro_batch_size_per_gpu * recipe.max_length / batch.sequence_parallel_size
    seconds = tokens * flops_per_token(work, recipe, gradient_checkpointing=recompute) / speed
    floor = weight_traffic_seconds(work, recipe, cluster.gpu, passes=4 if recompute else 3)
    return batch.gradient_accumulation_steps * max(seconds, floor)


def _passes_seconds(
    work: Work, recipe: Recipe, choice: Choice, arithmetic: float, moved: Traffic, states: StateCopies, weights: float
) -> float:
    """Forward and backward with what runs beside them. Pinned offload copies run on their own stream; pageable ones
    block. The gradients' way down can hide behind backward, the new weights' way up cannot.
    """
    zero = choice.zero
    all_flops = flops_per_token(work, recipe, gradient_checkpointing=choice.gradient_checkpointing)
    backward = arithmetic * backward_flops(work, recipe) / all_flops
    shown = _shown_seconds(zero, moved, arithmetic, backward)
    slowed = OVERLAP_SLOWDOWN * (moved.gradients + moved.parameters - shown)
    if prefetches(zero) and zero.offload_param.pin_memory:
        weights = max(weights - arithmetic, 0.0)
    copies = states.during_backward
    if zero.overlaps_comm and zero.offload_optimizer.pin_memory:
        copies = max(copies - backward, 0.0)
    return arithmetic + slowed + shown + weights + copies + states.after_update


def prefetches(zero: ZeroConfig) -> bool:
    """Stage 3 gathers what comes next while this is computed."""
    return zero.overlaps_comm and zero.stage3_prefetch_bucket_size > 0


def _shown_seconds(zero: ZeroConfig, moved: Traffic, arithmetic: float, backward: float) -> float:
    """Collectives that the arithmetic does not hide.

    With overlap_comm reductions hide behind backward but for the last bucket, and gathers, which share the links with
    them, behind what is left of forward and backward if there is a prefetch bucket.
    """
    if not zero.overlaps_comm:
        return moved.gradients + moved.parameters
    reductions = max(moved.gradients - backward, moved.last_bucket)
    if not prefetches(zero):
        return reductions + moved.parameters
    return max(reductions, moved.gradients + moved.parameters - arithmetic)


def _host_update(choice: Choice, host_step: float, disk: float) -> float:
    """Adam on the host and the drive that feeds it; pipelined only if both directions are asked for."""
    offload = choice.zero.offload_optimizer
    if offload.pipeline_read and offload.pipeline_write:
        return max(host_step, disk)
    return host_step + disk
