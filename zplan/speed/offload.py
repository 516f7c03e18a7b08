"""Seconds of offloading: the link between GPU and host, Adam on the host, NVMe."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.speed.compute import STATE_BYTES_PER_ELEMENT, offloaded_share
from zplan.speed.work import Work
from zplan.zero_config import Choice

PAGEABLE_SHARE = 0.4
"""Speed of pageable against pinned copies: 2.3 against 5.8 GB/s in NVIDIA's "How to Optimize Data Transfers in CUDA
C/C++" (2012); the driver stages them through a pinned buffer."""
CPU_ADAM_ELEMENTS_PER_SECOND = 10e9 / 2.57
"""DeepSpeedCPUAdam on one DGX-2 host (2 x 24 cores): 10 billion parameters in 2.57 s.
Source: ZeRO-Offload (2021), table 4."""
CPU_ADAM_CORES = 48
"""Cores of that host; fewer update proportionally slower."""


def ranks_on_a_node(choice: Choice, cluster: Cluster) -> int:
    return min(choice.batch.world_size, cluster.gpus_per_node)


def _partition(numel: int, choice: Choice) -> float:
    return numel / choice.batch.zero_ranks


def optimizer_link_seconds(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float | None:
    """Gradients down after each micro-batch, updated 16-bit weights up once a step; per rank, one direction at a time.

    Source: deepspeed 0.19.8, stage_1_and_2.py (async_accumulate_grad_in_cpu_via_gpu), stage3.py (partition_grads).
    """
    share = offloaded_share(choice)
    if not share or cluster.gpu.kind == "cpu":
        return 0.0
    if cluster.host_link_bytes_per_second is None:
        return None
    speed = cluster.host_link_bytes_per_second * (1.0 if choice.zero.offload_optimizer.pin_memory else PAGEABLE_SHARE)
    trips = choice.batch.gradient_accumulation_steps + 1
    return trips * share * _partition(work.trainable_numel, choice) * recipe.weight_bytes / speed


def parameter_link_seconds(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float | None:
    """This rank's partition of every parameter up to the GPU, for forward and for backward of each micro-batch."""
    if not choice.zero.offloads_param or cluster.gpu.kind == "cpu":
        return 0.0
    if cluster.host_link_bytes_per_second is None:
        return None
    speed = cluster.host_link_bytes_per_second * (1.0 if choice.zero.offload_param.pin_memory else PAGEABLE_SHARE)
    trips = 2 * choice.batch.gradient_accumulation_steps
    return trips * _partition(work.total_numel, choice) * recipe.weight_bytes / speed


def cpu_adam_seconds(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float:
    """The update of all of a node's partitions by its cores; also the whole update of CPU ranks."""
    share = 1.0 if cluster.gpu.kind == "cpu" else offloaded_share(choice)
    if not share:
        return 0.0
    shards = choice.batch.zero_ranks if choice.zero.stage >= 1 else 1
    on_node = work.trainable_numel / shards * ranks_on_a_node(choice, cluster) * share
    slower = STATE_BYTES_PER_ELEMENT[recipe.optimizer] / STATE_BYTES_PER_ELEMENT["adamw"]
    # The cores of a described machine are not described: the host of the published figure stands in.
    cores = CPU_ADAM_CORES if cluster.described else min(cluster.host.num_cpus, CPU_ADAM_CORES)
    return on_node * slower / (CPU_ADAM_ELEMENTS_PER_SECOND * cores / CPU_ADAM_CORES)


def nvme_seconds(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float | None:
    """Optimizer states (fp32 weight, momentum, variance) read and written once a step, parameters read twice a
    micro-batch beyond `max_in_cpu`; one drive for all ranks of a node."""
    zero, ranks = choice.zero, ranks_on_a_node(choice, cluster)
    states = 3 * 4 if zero.stage == 3 and zero.offload_optimizer.device == "nvme" else 0
    moved = 2.0 * states * _partition(work.trainable_numel, choice) * ranks
    if zero.offloads_param and zero.offload_param.device == "nvme":
        beyond = max(_partition(work.total_numel, choice) - zero.offload_param.max_in_cpu, 0.0)
        moved += 2 * choice.batch.gradient_accumulation_steps * beyond * recipe.weight_bytes * ranks
    if not moved:
        return 0.0
    speed = cluster.host.nvme_bytes_per_second
    return None if speed is None else moved / speed
