"""What a GPU holds outside its allocator: CUDA contexts, and a communicator for every process group that exchanges."""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.memory import runtime
from zplan.memory.super_offload import contexts_on_first_gpu
from zplan.memory.terms import ByteRange
from zplan.zero_config import Choice


def ranks_of_node(choice: Choice, cluster: Cluster) -> int:
    """Ranks that one node runs; fewer than its GPUs when the run uses fewer."""
    return min(cluster.gpus_per_node, choice.batch.world_size)


def outside_allocator(choice: Choice, cluster: Cluster) -> ByteRange:
    """CUDA contexts and NCCL of one rank."""
    extra = runtime.overheads(
        on_cpu=cluster.gpu.kind == "cpu",
        num_communicators=num_communicators(choice, cluster.gpus_per_node),
        num_contexts=contexts_on_first_gpu(choice, ranks_of_node(choice, cluster)),
    )
    return ByteRange(
        low=extra.context.low + extra.nccl.low,
        expected=extra.context.expected + extra.nccl.expected,
        high=extra.context.high + extra.nccl.high,
    )


def num_communicators(choice: Choice, gpus_per_node: int) -> int:
    """Groups of several ranks in which one rank exchanges tensors; NCCL makes buffers for each at its first collective.

        all ranks                         the trainer's gathers, ZeRO-3
        all ranks once more, or those     stages 0, 1, 2: ZeRO's own clone of the group (Ulysses: its sequence and data
        that hold the same part           group)
        the ranks of AutoTP, of Ulysses, of hpZ (also where that are all)
        one's node and one's peers        qgZ between nodes

    DeepSpeed makes others, of single ranks and without a collective (the clone at stage 3, qgZ's within one node).
    Groups of experts belong to its own MoE layers.

    Source: deepspeed 0.19.8, utils/groups.py:723 (_clone_world_group), :738 (_get_local_all_to_all_group), :200
    (_init_tp_mesh_device), :920 (_create_zero_param_parallel_group), runtime/sequence_parallel/parallel_state_sp.py:26;
    transformers 5.23.0, trainer.py:2249, :2342 (gathers of the loss and of token counts).
    """
    batch, zero = choice.batch, choice.zero
    if batch.world_size == 1:
        return 0
    is_stage_3 = zero.stage == 3
    between_nodes = batch.world_size > gpus_per_node
    return (
        1
        + (not is_stage_3 and batch.zero_ranks > 1)
        + (batch.autotp_size > 1)
        + (batch.sequence_parallel_size > 1)
        + (is_stage_3 and zero.zero_hpz_partition_size > 1)
        + (2 if is_stage_3 and zero.zero_quantized_gradients and between_nodes else 0)
    )
