"""Seconds of what ranks send each other inside a layer; nothing else runs meanwhile.

Source: deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (UlyssesSPAttentionHF.forward),
module_inject/layers.py (RowParallel, ColumnParallel).
"""

from __future__ import annotations

from zplan.hardware import Cluster
from zplan.model_shape import ModelShape
from zplan.recipe import Recipe
from zplan.speed.communication import COLLECTIVE_SECONDS, link_bytes_per_second, ring_bytes_per_second, ring_share
from zplan.zero_config import Choice

EXCHANGES = 4
"""q, k, v and the result, each an all-to-all."""


def exchange_seconds(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> float:
    """All exchanges of one optimizer step: forward, backward, and forward again with recomputation.

        layers * passes * (bytes of q, k, v and the result * (P - 1) / P / link + 4 starts)

    Limits: 0 where the link's speed is not known; a full mesh of equal links.
    """
    batch = choice.batch
    ranks = batch.sequence_parallel_size
    link = link_bytes_per_second(cluster, ranks)
    if ranks == 1 or link is None:
        return 0.0
    heads = 2 * shape.num_attention_heads + 2 * max(shape.num_key_value_heads, ranks)
    tokens = batch.train_micro_batch_size_per_gpu * recipe.max_length / ranks
    sent_bytes = tokens * heads * shape.head_dim * recipe.weight_bytes * ring_share(ranks)
    passes = shape.num_hidden_layers * batch.gradient_accumulation_steps * (3 if choice.gradient_checkpointing else 2)
    return passes * (sent_bytes / link + EXCHANGES * COLLECTIVE_SECONDS)


SUMS_FORWARD, SUMS_BACKWARD = 2, 5
"""All-reduces of a layer under AutoTP: behind o and down, and of the gradients before q, k, v, gate and up."""


def sum_seconds(shape: ModelShape, recipe: Recipe, choice: Choice, cluster: Cluster) -> float:
    """All of AutoTP's all-reduces of one optimizer step; with recomputation forward's run again.

        layers * (2 + 5 + 2 again) * (2 * bytes of the hidden states * (P - 1) / P / link + start)

    Limits: 0 where the link's speed is not known; the head's gathered logits are not counted.
    """
    batch = choice.batch
    link = ring_bytes_per_second(cluster, batch.autotp_size)
    if batch.autotp_size == 1 or link is None:
        return 0.0
    hidden_bytes = batch.train_micro_batch_size_per_gpu * recipe.max_length * shape.hidden_size * recipe.weight_bytes
    each = 2 * hidden_bytes * ring_share(batch.autotp_size) / link + COLLECTIVE_SECONDS
    sums = SUMS_FORWARD * (2 if choice.gradient_checkpointing else 1) + SUMS_BACKWARD
    return shape.num_hidden_layers * batch.gradient_accumulation_steps * sums * each
