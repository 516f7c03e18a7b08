"""Seconds on the links between GPUs: bytes of the collectives of each ZeRO stage over a ring."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.speed.work import Work
from zplan.values import dataclass
from zplan.zero_config import Choice

COLLECTIVE_SECONDS = 20e-6
"""Start of one collective: launch and synchronisation of a small NCCL ring. An assumption: nccl-tests print 10 - 30
microseconds for small messages within a node."""
GLOO_BYTES_PER_SECOND = 1e9
"""gloo between CPU ranks of one host, over loopback TCP. An assumption."""
LINK_SHARE = 370 / 450
"""Of a link's published rate that carries data: NCCL reaches 370 of NVLink's 450 GB/s on H100, the rest is protocol.
PCIe and the ports between nodes are taken to lose as much.
Source: NCCL's maintainers, https://github.com/NVIDIA/nccl-tests/issues/212."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Seconds of one optimizer step's collectives, by when they run."""

    gradients: float
    """Reduction during backward, of all micro-batches."""
    last_bucket: float
    """The last reduction of each backward: nothing is left to hide it."""
    parameters: float
    """ZeRO-3: gathers during forward and backward, of all micro-batches."""
    step: float
    """After the update: all-gather of the new parameters (stages 1 and 2)."""

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.step


NOTHING = Traffic(gradients=0.0, last_bucket=0.0, parameters=0.0, step=0.0)


def ring_share(world_size: int) -> float:
    """(N - 1) / N: the part of a buffer that each rank sends in a reduce-scatter or an all-gather over a ring."""
    return (world_size - 1) / world_size


def link_bytes_per_second(cluster: Cluster, world_size: int) -> float | None:
    """The slowest link of one GPU to `world_size` ranks, as achieved; None if it is not known."""
    return _achieved(cluster, world_size, ports=1)


def ring_bytes_per_second(cluster: Cluster, world_size: int) -> float | None:
    """What each rank sends around a ring over `world_size` ranks, as achieved; None if it is not known.

    Between nodes every GPU has a port, and NCCL lays a ring through each of them: the ports of a node add up, as far as
    the links within it carry them.

    Source: NCCL's maintainers, https://github.com/NVIDIA/nccl/issues/412; issue 812: 192 GB/s over eight ports of 25.
    """
    return _achieved(cluster, world_size, ports=cluster.gpus_per_node)


def _achieved(cluster: Cluster, world_size: int, *, ports: int) -> float | None:
    intra = cluster.intra_node_bytes_per_second
    if cluster.gpu.kind == "cpu":
        intra = intra or GLOO_BYTES_PER_SECOND / LINK_SHARE
    inter = cluster.inter_node_bytes_per_second
    if world_size <= cluster.gpus_per_node:
        return None if intra is None else intra * LINK_SHARE
    if inter is None or (intra is None and cluster.gpus_per_node > 1):
        return None
    return min(intra or inter, ports * inter) * LINK_SHARE


def gradient_bytes(work: Work, recipe: Recipe, choice: Choice, *, num_nodes: int) -> float:
    """What each rank sends to reduce the gradients once.

    Stage 0 to 2: an all-reduce, twice the ring share (the reduce-scatter option of stages 1 and 2 is an all-reduce of
    the bucket and a copy: use_multi_rank_bucket_allreduce is on by default). Stage 3: a reduce-scatter, or 4-bit
    values under zero_quantized_gradients between nodes.

    Source: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py:1695, runtime/zero/stage3.py (__avg_scatter_grads).
    """
    bytes_once = work.trainable_numel * recipe.weight_bytes * ring_share(choice.batch.zero_ranks)
    if choice.zero.stage < 3:
        return 2 * bytes_once
    quantizes = choice.zero.zero_quantized_gradients and num_nodes > 1
    return bytes_once / (2 * recipe.weight_bytes) if quantizes else bytes_once


def reductions_per_step(choice: Choice) -> int:
    """Stages 2 and 3 reduce in every backward; stages 0 and 1 when the accumulation is complete."""
    return choice.batch.gradient_accumulation_steps if choice.zero.stage >= 2 else 1


def traffic(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> Traffic | None:
    """All collectives of one optimizer step; None where a link's speed is not known.

    Limits: a ring without hierarchy; parameters kept below the persistence threshold and layers that the live limit
    spares from a second gather are counted as gathered.
    """
    zero, world_size = choice.zero, choice.batch.zero_ranks
    if world_size == 1:
        return NOTHING
    link = ring_bytes_per_second(cluster, world_size)
    if link is None:
        return None
    once = gradient_bytes(work, recipe, choice, num_nodes=cluster.nodes)
    bucket = min(zero.reduce_bucket_size, work.trainable_numel) if zero.stage else work.trainable_numel
    num_buckets = max(work.trainable_numel / bucket, 1.0)
    reductions = reductions_per_step(choice)
    per_reduction = once / link + num_buckets * COLLECTIVE_SECONDS
    share = ring_share(world_size) * recipe.weight_bytes / link
    return Traffic(
        gradients=reductions * per_reduction,
        last_bucket=reductions * per_reduction / num_buckets,
        parameters=_gathers(work, recipe, choice, cluster, link) if zero.stage == 3 else 0.0,
        step=work.trainable_numel * share + COLLECTIVE_SECONDS if zero.stage in (1, 2) else 0.0,
    )


def _gathers(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster, link: float) -> float:
    """ZeRO-3: every parameter, frozen or not, once for forward and once for backward of each micro-batch.

    zero_quantized_weights halves the bytes (int8); zero_hpz_partition_size keeps backward's gather within the group.
    """
    zero, world_size = choice.zero, choice.batch.zero_ranks
    itemsize = 1 if zero.zero_quantized_weights else recipe.weight_bytes
    forward = work.total_numel * itemsize * ring_share(world_size) / link
    backward = forward
    group = zero.zero_hpz_partition_size
    if 1 < group <= cluster.gpus_per_node:
        inner = ring_bytes_per_second(cluster, group) or link
        backward = work.total_numel * recipe.weight_bytes * ring_share(group) / inner
    num_gathers = 2 * max(work.total_numel / max(zero.stage3_prefetch_bucket_size, 1), 1.0)
    starts = min(num_gathers, work.total_numel) * COLLECTIVE_SECONDS
    return choice.batch.gradient_accumulation_steps * (forward + backward + starts)
