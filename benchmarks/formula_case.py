"""One configuration of formula_vs_simulation, and the simulation's question about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.model_shape import Block, ModelShape
from zplan.recipe import Recipe
from zplan.simulate.request import SimulationRequest
from zplan.zero_config import BatchSizes, Choice, ZeroConfig

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration."""

    model: str
    zero: ZeroConfig
    method: str
    layers: int
    world_size: int
    micro_batch: int
    accumulation: int
    max_length: int
    checkpointing: bool
    loss: str
    attention: str
    sequence_parallel_size: int = 1
    autotp_size: int = 1
    card_bytes: int = 141 * GIB
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Recipe that describe it, where they are not the default ones."""


def cut_layers(shape: ModelShape, num_layers: int) -> ModelShape:
    """The same model with fewer layers."""
    blocks: list[Block] = []
    left = num_layers
    for block in shape.blocks:
        if block.role != "layer":
            blocks.append(block)
        elif left:
            blocks.append(replace(block, repeat=min(block.repeat, left)))
            left -= blocks[-1].repeat
    config = {**shape.config, "num_hidden_layers": num_layers, "tie_word_embeddings": shape.tie_word_embeddings}
    if config.get("layer_types"):
        config["layer_types"] = list(config["layer_types"])[:num_layers]
    return replace(
        shape, blocks=tuple(blocks), num_hidden_layers=num_layers, config=config,
        layer_types=shape.layer_types[:num_layers],
    )  # fmt: skip


def request_of(case: Case) -> SimulationRequest:
    """The simulation's question; its config is the cut model's."""
    shape = cut_layers(find_model(case.model), case.layers)  # type: ignore[arg-type]
    batch = BatchSizes(
        train_micro_batch_size_per_gpu=case.micro_batch, gradient_accumulation_steps=case.accumulation,
        world_size=case.world_size, sequence_parallel_size=case.sequence_parallel_size,
        autotp_size=case.autotp_size,
    )  # fmt: skip
    return SimulationRequest(
        config=shape.config,
        recipe=Recipe(
            model=case.model, method=case.method, max_length=case.max_length, loss=case.loss,  # type: ignore[arg-type]
            train_batch_size=batch.train_batch_size, attention=case.attention,  # type: ignore[arg-type]
            **case.adapter,
        ),
        choice=Choice(zero=case.zero, batch=batch, gradient_checkpointing=case.checkpointing),
        cluster=Cluster(
            gpu=Gpu(name="card", total_bytes=case.card_bytes, free_bytes=case.card_bytes - GIB),
            host=Host(total_bytes=1024 * GIB, available_bytes=1024 * GIB),
            gpus_per_node=min(8, case.world_size),
            nodes=max(1, case.world_size // 8),
        ),
        cpu_adam=case.zero.offload_optimizer.ratio < 1,  # which takes no other
        # Muon keeps buffers of the first step and, offloaded, others of the second
        steps=3 if case.zero.offloads_optimizer and case.adapter.get("optimizer") == "muon" else 2,
    )  # fmt: skip
