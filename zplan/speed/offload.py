"""Seconds of offloading: the link between GPU and host, Adam on the host, NVMe."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.recipe import Recipe
from zplan.speed.communication import LINK_SHARE
from zplan.speed.compute import STATE_BYTES_PER_ELEMENT, offloaded_share
from zplan.speed.work import Work
from zplan.values import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StateCopies:
    """Seconds of one optimizer step's copies between a GPU and its offloaded states."""

    during_backward: float
    """Gradients, of all micro-batches."""
    after_update: float
    """The new weights."""

    @property
    def total(self) -> float:
        return self.during_backward + self.after_update


NO_COPIES = StateCopies(during_backward=0.0, after_update=0.0)


def gradient_copy_bytes(choice: Choice, weight_bytes: int) -> int:
    """Bytes that one trainable element of a rank's partition costs the link before the update, w = `weight_bytes`.

        stage 3            A down and A up                each micro-batch reads the sum back and adds to it
        stage 2            A down and A - 1 up, if A > 1
        stage 1            1 down and 1 up, if A > 1      it adds up on the GPU
        and at the end     4 down                         the fp32 gradient

    Source: deepspeed 0.19.8, stage3.py:2006 (partition_grads), stage_1_and_2.py:2142 (copy_grads_in_partition), :1809
    (async_accumulate_grad_in_cpu_via_gpu), :1888 (async_inplace_copy_grad_to_fp32_buffer_from_gpu).
    """
    steps = choice.batch.gradient_accumulation_steps
    if choice.zero.stage == 3:
        copies = 2 * steps
    elif steps == 1:
        copies = 0
    else:
        copies = 2 * steps - 1 if choice.zero.stage == 2 else 2
    return copies * weight_bytes + 4


def state_copies(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> StateCopies | None:
    """Gradients down and back during the micro-batches, updated weights up once a step; one direction at a time."""
    share = offloaded_share(choice)
    if not share or cluster.gpu.kind == "cpu":
        return NO_COPIES
    speed = _host_link(cluster, pinned=choice.zero.offload_optimizer.pin_memory)
    if speed is None:
        return None
    elements = share * _partition(work.trainable_numel, choice)
    return StateCopies(
        during_backward=elements * gradient_copy_bytes(choice, recipe.weight_bytes) / speed,
        after_update=elements * recipe.weight_bytes / speed,
    )


def _host_link(cluster: Cluster, *, pinned: bool) -> float | None:
    """Bytes a second between one GPU and its host, as achieved; None if the link is not known."""
    link = cluster.host_link_bytes_per_second
    return None if link is None else link * LINK_SHARE * (1.0 if pinned else PAGEABLE_SHARE)


def parameter_link_seconds(work: Work, recipe: Recipe, choice: Choice, cluster: Cluster) -> float | None:
    """This rank's partition of every parameter up to the GPU, for forward and for backward of each micro-batch."""
    if not choice.zero.offloads_param or cluster.gpu.kind == "cpu":
        return 0.0
    speed = _host_link(cluster, pinned=choice.zero.offload_param.pin_memory)
    if speed is None:
        return None
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
    """What all ranks of a node read from and write to its one drive in an optimizer step."""
    num_bytes = nvme_bytes(work, recipe, choice) * ranks_on_a_node(choice, cluster)
    if not num_bytes:
        return 0.0
    speed = cluster.host.nvme_bytes_per_second
    return None if speed is None else num_bytes / speed


def nvme_bytes(work: Work, recipe: Recipe, choice: Choice) -> float:
    """One rank's part of it.

        optimizer     read and written once: fp32 weights, fp32 gradients and states
        parameters    read for forward and for backward of each micro-batch: frozen ones, and those trained ones beyond
                      max_in_cpu, which are written after the update, too

    Limits: partitions below 1 MiB, which are not on the drive, count; what a recomputation reads a second time under a
    small stage3_max_reuse_distance does not. A sub-group that does not fit into max_in_cpu is on the drive as a whole.

    Source: deepspeed 0.19.8, stage3.py:1463 (swap_out_gradients), :1271 (_partitioned_params_swap_out);
    bytes of a simulated step: tests/simulate/test_nvme_traffic.py.
    """
    zero, b = choice.zero, recipe.weight_bytes
    trained, num_bytes = _partition(work.trainable_numel, choice), 0.0
    if zero.stage == 3 and zero.offload_optimizer.device == "nvme":
        states = (STATE_BYTES_PER_ELEMENT[recipe.optimizer] - STATE_BYTES_PER_ELEMENT["sgd"]) / 2
        num_bytes += 2 * (4 + 4 + states) * trained
    if zero.offloads_param and zero.offload_param.device == "nvme":
        frozen = _partition(work.total_numel - work.trainable_numel, choice)
        beyond = max(trained - zero.offload_param.max_in_cpu, 0.0)
        num_bytes += b * (2 * choice.batch.gradient_accumulation_steps * (frozen + beyond) + beyond)
    return num_bytes
