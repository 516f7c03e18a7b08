"""The configurations of formula_vs_simulation: models x stages x draws of every other knob, and what was added."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zplan.catalog.find import find_model
from zplan.hardware import Cluster, Gpu, Host
from zplan.model_shape import Block, ModelShape
from zplan.recipe import Recipe
from zplan.simulate.request import SimulationRequest
from zplan.zero_config import BatchSizes, Choice, OffloadOptimizer, OffloadParam, ZeroConfig

SEED = 11
DRAWS = 4
"""Configurations of each model at each stage."""
MODELS = (
    "mistral-7b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-4b", "smollm2-135m",
    "gemma-2-2b", "gemma-3-1b", "phi-3-mini", "olmo-2-1b", "granite-3-2b", "starcoder2-3b", "gpt2", "pythia-410m",
    "opt-1.3b", "bloom-560m", "falcon-7b", "qwen3-30b-a3b", "deepseek-v2-lite",
)  # fmt: skip
GIB = 1 << 30
MUON = {"optimizer": "muon"}


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
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """Fields of Recipe that describe it, where they are not the default ones."""


def cases() -> list[Case]:
    """Models x stages x draws of every other knob, then what was added; the same list every time."""
    drawn = [
        draw(random.Random(f"{SEED} {model} {stage} {number}"), model, stage)
        for number in range(DRAWS)
        for model in MODELS
        for stage in (0, 1, 2, 3)
    ]
    return [*drawn, *added_cases()]


def added_cases() -> list[Case]:
    """Configurations of other draws on which the formula was wrong once, and knobs that no draw turns."""
    cpu = OffloadOptimizer(device="cpu")
    return [
        _added("qwen2.5-7b", "lora", 3, world_size=64, micro_batch=2, accumulation=2, contiguous_gradients=False,
               reduce_bucket_size=200_000_000, offload_optimizer=cpu, stage3_prefetch_bucket_size=500_000_000),
        _added("mistral-7b", "full", 3, world_size=2, accumulation=2, max_length=2048, loss="full",
               contiguous_gradients=False, reduce_bucket_size=5_000_000, offload_optimizer=cpu,
               offload_param=OffloadParam(device="cpu"), stage3_prefetch_bucket_size=500_000_000,
               stage3_max_live_parameters=30_000_000, stage3_max_reuse_distance=0),
        _added("falcon-7b", "lora", 3, max_length=2048, attention="eager", stage3_prefetch_bucket_size=0),
        _added("falcon-7b", "lora", 3, micro_batch=2, checkpointing=False, attention="eager"),
        _added("falcon-40b", "lora", 3, micro_batch=2, checkpointing=False),
        _added("falcon-40b", "full", 1, checkpointing=False, attention="eager"),
        _added("pythia-410m", "lora", 1, micro_batch=4, checkpointing=False, attention="eager"),
        _added("falcon-7b", "lora", 3, world_size=2, max_length=4096, offload_optimizer=cpu,
               stage3_prefetch_bucket_size=0, stage3_max_live_parameters=30_000_000, stage3_max_reuse_distance=0),
        _added("phi-3-mini", "lora", 0, micro_batch=4),
        _added("mistral-7b", "lora", 3, adapter={"lora_dropout": 0.05}),
        _added("qwen3-4b", "lora", 2, checkpointing=False, adapter={"lora_dropout": 0.05}),
        _added("smollm2-135m", "full", 3, world_size=2, sub_group_size=2_000_000,
               offload_optimizer=OffloadOptimizer(device="cpu", ratio=0.4)),
        _added("qwen2.5-7b", "lora", 2, adapter={"use_dora": True}),
        _added("mistral-7b", "lora", 3, checkpointing=False, adapter={"use_dora": True},
               stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0),
        _added("qwen2.5-0.5b", "lora", 3, max_length=4096, adapter={"use_dora": True, "lora_dropout": 0.05},
               stage3_max_live_parameters=0),
        _added("deepseek-v2-lite", "lora", 3, world_size=1, micro_batch=2, max_length=512, stage3_max_reuse_distance=0,
               reduce_bucket_size=50_000_000, stage3_param_persistence_threshold=0),
        _added("deepseek-v2-lite", "lora", 3, checkpointing=False, reduce_bucket_size=50_000_000,
               stage3_max_live_parameters=30_000_000),
        _added("llama-3.2-1b", "full", 0, world_size=2, adapter=MUON),
        _added("gpt2", "full", 0, adapter=MUON),
        _added("qwen2.5-7b", "lora", 0, accumulation=2, adapter=MUON),
        _added("llama-3.2-1b", "full", 1, world_size=2, adapter=MUON),
        _added("qwen2.5-0.5b", "full", 1, world_size=2, accumulation=2, max_length=4096, adapter=MUON),
        _added("llama-3.1-8b", "full", 2, reduce_bucket_size=50_000_000, adapter=MUON),
        _added("mistral-7b", "full", 2, world_size=4, contiguous_gradients=False, overlap_comm=True,
               reduce_bucket_size=50_000_000, adapter=MUON),
        _added("olmo-2-1b", "full", 2, world_size=1, accumulation=2, contiguous_gradients=False,
               reduce_bucket_size=50_000_000, adapter=MUON),
        _added("qwen2.5-7b", "lora", 2, accumulation=2, adapter=MUON),
        _added("falcon-7b", "lora", 3, world_size=64, checkpointing=False, micro_batch=2, accumulation=2,
               contiguous_gradients=False, reduce_bucket_size=5_000_000, offload_param=OffloadParam(device="cpu"),
               stage3_param_persistence_threshold=0, stage3_max_live_parameters=30_000_000,
               stage3_max_reuse_distance=0),
        _added("qwen3-30b-a3b", "lora", 3, world_size=1, checkpointing=False, micro_batch=2, max_length=512,
               offload_param=OffloadParam(device="cpu"), stage3_param_persistence_threshold=0,
               stage3_max_live_parameters=0, stage3_max_reuse_distance=30_000_000),
        _added("qwen3-30b-a3b", "lora", 3, checkpointing=False, loss="full", micro_batch=4, max_length=512,
               offload_param=OffloadParam(device="cpu"), stage3_prefetch_bucket_size=0,
               stage3_param_persistence_threshold=0, stage3_max_reuse_distance=30_000_000),
        _added("mistral-7b", "lora", 3, world_size=1, checkpointing=False, offload_param=OffloadParam(device="cpu"),
               stage3_param_persistence_threshold=5_000_000, reduce_bucket_size=5_000_000),
        _added("mistral-7b", "lora", 3, checkpointing=False, micro_batch=2, accumulation=2,
               stage3_prefetch_bucket_size=500_000_000, stage3_max_reuse_distance=30_000_000),
        _added("llama-3.2-1b", "full", 0, adapter={"communication_data_type": "fp32"}),
        _added("llama-3.2-1b", "full", 1, world_size=2, loss="full", max_length=64,
               adapter={"communication_data_type": "fp32"}),
        _added("llama-3.2-1b", "full", 2, accumulation=2, loss="full", max_length=64, reduce_bucket_size=50_000_000,
               adapter={"communication_data_type": "fp16"}),
        _added("llama-3.2-1b", "full", 2, world_size=2, loss="full", max_length=64,
               adapter={"grad_accum_dtype": "fp32"}),
        _added("llama-3.2-1b", "full", 2, accumulation=2, loss="full", max_length=64, reduce_bucket_size=50_000_000,
               adapter={"grad_accum_dtype": "fp32"}),
        _added("llama-3.2-1b", "full", 2, loss="full", max_length=64, reduce_bucket_size=50_000_000,
               reduce_scatter=False, overlap_comm=True, adapter={"grad_accum_dtype": "fp32"}),
        _added("smollm2-135m", "full", 2, contiguous_gradients=False, overlap_comm=True,
               adapter={"grad_accum_dtype": "fp32", "dtype": "fp16"}),
        _added("llama-3.2-1b", "full", 1, world_size=2, loss="full", max_length=64,
               adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "lora", 1, accumulation=2, adapter={"grad_accum_dtype": "fp32"}),
        _added("smollm2-135m", "full", 1, world_size=64, overlap_comm=True, adapter={"grad_accum_dtype": "fp32"}),
        _added("llama-3.2-1b", "full", 3, adapter={"grad_accum_dtype": "fp32"}),
        _added("llama-3.1-8b", "full", 3, accumulation=2, reduce_bucket_size=50_000_000,
               adapter={"grad_accum_dtype": "fp32", "communication_data_type": "fp32"}),
        _added("llama-3.2-1b", "full", 3, accumulation=2, loss="full", max_length=64, contiguous_gradients=False,
               reduce_bucket_size=50_000_000, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 3, accumulation=2, offload_optimizer=cpu, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 3, reduce_scatter=False, reduce_bucket_size=200_000_000, sub_group_size=10_000_000,
               adapter={"grad_accum_dtype": "fp32", "communication_data_type": "fp16"}),
        _added("llama-3.2-1b", "full", 3, world_size=16, loss="full", max_length=64, reduce_bucket_size=50_000_000,
               zero_quantized_gradients=True, adapter={"communication_data_type": "fp16"}),
        _added("llama-3.1-8b", "qlora", 0),
        _added("mistral-7b", "qlora", 2, micro_batch=2, accumulation=2),
        _added("gemma-3-1b", "qlora", 1, checkpointing=False),
        _added("llama-3.1-8b", "qlora", 3, stage3_max_reuse_distance=0, reduce_bucket_size=5_000_000),
        _added("qwen2.5-7b", "qlora", 3, world_size=4, micro_batch=2, accumulation=2),
        _added("mistral-7b", "qlora", 3, checkpointing=False, reduce_bucket_size=5_000_000,
               offload_param=OffloadParam(device="cpu")),
        _added("llama-3.2-1b", "qlora", 3, checkpointing=False),
        _added("phi-3-mini", "qlora", 3, stage3_prefetch_bucket_size=500_000_000, adapter={"dtype": "fp16"}),
        _added("mistral-7b", "qlora", 3, loss="full", zero_hpz_partition_size=4, offload_optimizer=cpu),
        _added("mistral-7b", "qlora", 3, zero_quantized_weights=True),
        _added("falcon-7b", "qlora", 3, checkpointing=False),
        _added("qwen3-30b-a3b", "qlora", 3),
        _added("llama-3.2-1b", "full", 3, zero_quantized_weights=True, stage3_prefetch_bucket_size=0,
               stage3_max_reuse_distance=0),
        _added("llama-3.2-1b", "full", 3, zero_quantized_weights=True, adapter={"dtype": "fp16"}),
        _added("mistral-7b", "full", 3, zero_quantized_weights=True, offload_param=OffloadParam(device="cpu"),
               offload_optimizer=cpu),
        _added("mistral-7b", "lora", 3, zero_quantized_weights=True, stage3_allgather_sequential=True,
               stage3_max_reuse_distance=0),
        _added("qwen2.5-7b", "lora", 3, checkpointing=False, zero_quantized_weights=True, zero_hpz_partition_size=4),
        _added("llama-3.1-8b", "full", 3, world_size=16, zero_quantized_gradients=True, reduce_bucket_size=5_000_000),
        _added("llama-3.1-8b", "full", 3, world_size=64, accumulation=2, zero_quantized_weights=True,
               zero_quantized_gradients=True, zero_hpz_partition_size=8, reduce_bucket_size=50_000_000),
        _added("smollm2-135m", "lora", 3, zero_quantized_nontrainable_weights=True),
        _added("llama-3.2-1b", "full", 3, world_size=2, adapter=MUON),
        _added("llama-3.1-8b", "full", 3, reduce_bucket_size=50_000_000, adapter=MUON),
        _added("qwen2.5-0.5b", "full", 3, world_size=4, accumulation=2, reduce_bucket_size=50_000_000,
               sub_group_size=10_000_000, adapter=MUON),
        _added("qwen2.5-7b", "lora", 3, adapter=MUON, offload_param=OffloadParam(device="cpu")),
        *(
            _added("qwen2.5-0.5b", "full", stage, world_size=2, adapter={**MUON, "dtype": dtype}, offload_optimizer=cpu)
            for stage in (1, 2, 3) for dtype in ("bf16", "fp16")
        ),
        _added("llama-3.2-1b", "full", 3, accumulation=2, offload_optimizer=cpu, adapter=MUON),
        _added("olmo-2-1b", "full", 3, world_size=1, adapter=MUON, offload_optimizer=cpu, sub_group_size=20_000_000),
        _added("qwen2.5-7b", "lora", 2, accumulation=2, adapter={**MUON, "dtype": "fp32"}, offload_optimizer=cpu),
        _added("llama-3.2-1b", "full", 0, world_size=2, adapter={**MUON, "dtype": "fp16"}),
        _added("qwen2.5-0.5b", "full", 3, world_size=2, adapter={**MUON, "dtype": "fp16"}),
        _added("qwen2.5-0.5b", "full", 0, world_size=2, adapter={**MUON, "dtype": "fp32"}),
        _added("llama-3.2-1b", "full", 0, world_size=4, sequence_parallel_size=2, max_length=2048),
        _added("llama-3.2-1b", "full", 1, world_size=16, sequence_parallel_size=16, max_length=4096),
        _added("qwen2.5-7b", "full", 2, world_size=4, sequence_parallel_size=4, checkpointing=False, max_length=2048),
        _added("phi-3-mini", "full", 2, sequence_parallel_size=4, micro_batch=2, loss="full",
               reduce_bucket_size=50_000_000, contiguous_gradients=False),
        _added("qwen2.5-7b", "lora", 3, sequence_parallel_size=2, checkpointing=False, max_length=4096),
        _added("mistral-7b", "full", 3, sequence_parallel_size=8, accumulation=2, max_length=8192,
               reduce_bucket_size=5_000_000, offload_optimizer=cpu),
        _added("gemma-3-1b", "full", 3, sequence_parallel_size=4, reduce_scatter=False, max_length=2048),
        _added("llama-3.1-8b", "full", 0, world_size=2, autotp_size=2, loss="full"),
        _added("mistral-7b", "full", 1, autotp_size=2, accumulation=2, micro_batch=2, checkpointing=False,
               max_length=4096, loss="full"),
        _added("llama-3.1-8b", "full", 2, autotp_size=8, loss="full", reduce_bucket_size=5_000_000,
               offload_optimizer=cpu),
        _added("qwen2.5-7b", "full", 2, autotp_size=4, checkpointing=False, loss="full"),
        _added("qwen3-4b", "full", 2, autotp_size=2, max_length=4096),
        _added("granite-3-2b", "full", 1, world_size=4, autotp_size=4, contiguous_gradients=False,
               reduce_bucket_size=50_000_000),
        _added("qwen2.5-0.5b", "full", 3, world_size=2, accumulation=2, sub_group_size=20_000_000,
               reduce_bucket_size=20_000_000, offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True)),
        _added("llama-3.2-1b", "full", 3, world_size=2, adapter={"max_grad_norm": 0.0},
               offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True, ratio=0.4),
               offload_param=OffloadParam(device="cpu"), sub_group_size=20_000_000),
        _added("qwen2.5-7b", "lora", 3, adapter={"max_grad_norm": 0.0},
               offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True, pin_memory=False)),
    ]  # fmt: skip


def _added(model: str, method: str, stage: int, **other: Any) -> Case:
    """A case of two layers; what Case has no field for is one of ZeroConfig."""
    of_case = {
        "world_size": 8, "micro_batch": 1, "accumulation": 1, "max_length": 1024, "checkpointing": True, "loss": "nll",
        "attention": "sdpa", "adapter": {}, "sequence_parallel_size": 1, "autotp_size": 1,
    }  # fmt: skip
    of_case = {name: other.pop(name, value) for name, value in of_case.items()}
    zero = ZeroConfig(stage=stage, **other)  # type: ignore[arg-type]
    return Case(model=model, method=method, layers=2, zero=zero, **of_case)  # type: ignore[arg-type]


def draw(chance: random.Random, model: str, stage: int) -> Case:
    """One configuration of the model at the stage."""
    pick = chance.choice
    long = pick((512, 1024, 1024, 2048, 4096))
    return Case(
        model=model,
        zero=_draw_zero(chance, stage),
        method=pick(("full", "full", "lora")),
        layers=pick((2, 3, 4)),
        world_size=pick((1, 2, 4, 8, 8, 64)),
        micro_batch=pick((1, 2, 4)) if long < 4096 else 1,
        accumulation=pick((1, 1, 2)),
        max_length=long,
        checkpointing=pick((True, True, False)),
        loss=pick(("nll", "nll", "nll", "full")),
        attention="eager" if model.startswith("gemma-2") or chance.random() < 0.15 else "sdpa",
    )


def _draw_zero(chance: random.Random, stage: int) -> ZeroConfig:
    pick = chance.choice
    cpu = chance.random() < 0.25
    values: dict[str, Any] = {
        "reduce_bucket_size": pick((5_000_000, 50_000_000, 200_000_000, 500_000_000)),
        "overlap_comm": pick((None, True, False)),
        "contiguous_gradients": chance.random() < 0.8,
        "reduce_scatter": chance.random() < 0.85,
        "round_robin_gradients": chance.random() < 0.15,
        "offload_optimizer": OffloadOptimizer(device="cpu" if cpu else "none"),
        "sub_group_size": pick((10_000_000, 1_000_000_000)),
        "stage3_prefetch_bucket_size": pick((0, 10_000_000, 50_000_000, 500_000_000)),
        "stage3_param_persistence_threshold": pick((0, 100_000, 5_000_000)),
        "stage3_max_live_parameters": pick((0, 30_000_000, 1_000_000_000)),
        "stage3_max_reuse_distance": pick((0, 30_000_000, 1_000_000_000)),
        "offload_param": OffloadParam(device="cpu" if chance.random() < 0.2 else "none"),
    }
    of_stage = {0: (), 1: _STAGE_1, 2: _STAGE_1, 3: tuple(values)}[stage]
    return ZeroConfig(stage=stage, **{name: values[name] for name in of_stage})  # type: ignore[arg-type]


_STAGE_1 = (
    "reduce_bucket_size", "overlap_comm", "contiguous_gradients", "reduce_scatter", "round_robin_gradients",
    "offload_optimizer",
)  # fmt: skip


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
            gpu=Gpu(name="card", total_bytes=141 * GIB, free_bytes=140 * GIB),
            host=Host(total_bytes=1024 * GIB, available_bytes=1024 * GIB),
            gpus_per_node=min(8, case.world_size),
            nodes=max(1, case.world_size // 8),
        ),
        cpu_adam=case.zero.offload_optimizer.ratio < 1,  # which takes no other
        # Muon keeps buffers of the first step and, offloaded, others of the second
        steps=3 if case.zero.offloads_optimizer and case.adapter.get("optimizer") == "muon" else 2,
    )  # fmt: skip
