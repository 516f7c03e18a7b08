"""Configurations beside the draws: some on which the formula was wrong once, and knobs that no draw turns."""

from __future__ import annotations

from typing import Any

from benchmarks.formula_case import GIB, Case
from zplan.zero_config import OffloadOptimizer, OffloadParam, ZeroConfig

CPU = OffloadOptimizer(device="cpu")
PARAMETERS_ON_CPU = OffloadParam(device="cpu")
MUON = {"optimizer": "muon"}


def added_cases() -> list[Case]:
    """All of them, by theme."""
    return [
        *_of_layers(),
        *_of_expert_adapters(),
        *_of_muon(),
        *_of_limits(),
        *_of_gradient_types(),
        *_of_accumulation_in_fp32(),
        *_of_gradient_types_at_3(),
        *_of_quantised_weights(),
        *_of_quantised_exchange(),
        *_of_muon_elsewhere(),
        *_of_parallel_ranks(),
        *_of_super_offload(),
        *_of_wide_draws(),
        *_of_parameters_on_nvme(),
        *_of_small_cards(),
    ]


def _added(model: str, method: str, stage: int, **other: Any) -> Case:
    """A case of two layers; what Case has no field for is one of ZeroConfig."""
    of_case = {
        "world_size": 8, "micro_batch": 1, "accumulation": 1, "max_length": 1024, "checkpointing": True, "loss": "nll",
        "attention": "sdpa", "adapter": {}, "sequence_parallel_size": 1, "autotp_size": 1,
        "card_bytes": 141 * GIB,
    }  # fmt: skip
    of_case = {name: other.pop(name, value) for name, value in of_case.items()}
    zero = ZeroConfig(stage=stage, **other)  # type: ignore[arg-type]
    return Case(model=model, method=method, layers=2, zero=zero, **of_case)  # type: ignore[arg-type]


def _of_layers() -> list[Case]:
    """Gradients, windows, dropout, DoRA and experts."""
    return [
        _added("qwen2.5-7b", "lora", 3, world_size=64, micro_batch=2, accumulation=2, contiguous_gradients=False,
               reduce_bucket_size=200_000_000, offload_optimizer=CPU, stage3_prefetch_bucket_size=500_000_000),
        _added("mistral-7b", "full", 3, world_size=2, accumulation=2, max_length=2048, loss="full",
               contiguous_gradients=False, reduce_bucket_size=5_000_000, offload_optimizer=CPU,
               offload_param=PARAMETERS_ON_CPU, stage3_prefetch_bucket_size=500_000_000,
               stage3_max_live_parameters=30_000_000, stage3_max_reuse_distance=0),
        _added("falcon-7b", "lora", 3, max_length=2048, attention="eager", stage3_prefetch_bucket_size=0),
        _added("falcon-7b", "lora", 3, micro_batch=2, checkpointing=False, attention="eager"),
        _added("smollm2-135m", "lora", 3, attention="eager", reduce_bucket_size=5_000_000),
        _added("falcon-40b", "lora", 3, micro_batch=2, checkpointing=False),
        _added("falcon-40b", "full", 1, checkpointing=False, attention="eager"),
        _added("pythia-410m", "lora", 1, micro_batch=4, checkpointing=False, attention="eager"),
        _added("falcon-7b", "lora", 3, world_size=2, max_length=4096, offload_optimizer=CPU,
               stage3_prefetch_bucket_size=0, stage3_max_live_parameters=30_000_000, stage3_max_reuse_distance=0),
        _added("phi-3-mini", "lora", 0, micro_batch=4),
        _added("mistral-7b", "lora", 3, adapter={"lora_dropout": 0.05}),
        _added("qwen3-4b", "lora", 2, checkpointing=False, adapter={"lora_dropout": 0.05}),
        _added("smollm2-135m", "full", 3, world_size=2, sub_group_size=2_000_000,
               offload_optimizer=OffloadOptimizer(device="cpu", ratio=0.4)),
        _added("qwen2.5-7b", "lora", 2, adapter={"use_dora": True}),
        _added("smollm2-135m", "lora", 2, max_length=64, checkpointing=False, adapter={"use_dora": True},
               reduce_bucket_size=5_000_000),
        _added("mistral-7b", "lora", 3, checkpointing=False, adapter={"use_dora": True},
               stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0),
        _added("qwen2.5-0.5b", "lora", 3, max_length=4096, adapter={"use_dora": True, "lora_dropout": 0.05},
               stage3_max_live_parameters=0),
        _added("deepseek-v2-lite", "lora", 3, world_size=1, micro_batch=2, max_length=512, stage3_max_reuse_distance=0,
               reduce_bucket_size=50_000_000, stage3_param_persistence_threshold=0),
        _added("deepseek-v2-lite", "lora", 3, checkpointing=False, reduce_bucket_size=50_000_000,
               stage3_max_live_parameters=30_000_000),
    ]  # fmt: skip


def _of_expert_adapters() -> list[Case]:
    """Routed experts with adapters, without any, and a router that is adapted in fp32."""
    small: dict[str, Any] = {"world_size": 2, "reduce_bucket_size": 5_000_000}
    attention = {"lora_target": ("q_proj", "k_proj", "v_proj", "o_proj")}
    return [
        _added("mixtral-8x7b", "lora", 3, checkpointing=False, max_length=512, **small),
        _added("qwen3-30b-a3b", "lora", 3, checkpointing=False, max_length=512, stage3_max_reuse_distance=0, **small),
        _added("qwen3-30b-a3b", "lora", 3, checkpointing=False, micro_batch=2, stage3_prefetch_bucket_size=0, **small),
        _added("deepseek-v2-lite", "lora", 3, checkpointing=False, micro_batch=2, **small),
        _added("deepseek-v2-lite", "lora", 0, micro_batch=2, **small),
        _added("mixtral-8x7b", "lora", 0, checkpointing=False, micro_batch=2, adapter=attention, **small),
        _added("mixtral-8x7b", "lora", 2, checkpointing=False, micro_batch=2,
               adapter={"lora_target": ("w1", "w2", "w3")}, **small),
        _added("llama-3.2-1b", "lora", 3, checkpointing=False, micro_batch=4,
               adapter={"lora_target": ("down_proj", "up_proj")}, **small),
        _added("qwen3-30b-a3b", "full", 3, micro_batch=2, max_length=128, loss="full", stage3_max_live_parameters=0,
               stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=1_000_000),
        _added("llama-3.2-1b", "lora", 3, checkpointing=False, micro_batch=4, attention="eager",
               adapter={"lora_target": ("v_proj",)}, **small),
    ]  # fmt: skip


def _of_muon() -> list[Case]:
    """Muon on the GPU below stage 3."""
    return [
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
        _added("gemma-3-1b", "lora", 2, reduce_bucket_size=1_000_000,
               adapter={**MUON, "modules_to_save": ("lm_head",), "lora_target": ("q_proj", "down_proj")}),
    ]  # fmt: skip


def _of_limits() -> list[Case]:
    """What the limits of ZeRO-3 keep gathered, in recomputed and kept layers."""
    return [
        _added("falcon-7b", "lora", 3, world_size=64, checkpointing=False, micro_batch=2, accumulation=2,
               contiguous_gradients=False, reduce_bucket_size=5_000_000, offload_param=PARAMETERS_ON_CPU,
               stage3_param_persistence_threshold=0, stage3_max_live_parameters=30_000_000,
               stage3_max_reuse_distance=0),
        _added("qwen3-30b-a3b", "lora", 3, world_size=1, checkpointing=False, micro_batch=2, max_length=512,
               offload_param=PARAMETERS_ON_CPU, stage3_param_persistence_threshold=0,
               stage3_max_live_parameters=0, stage3_max_reuse_distance=30_000_000),
        _added("qwen3-30b-a3b", "lora", 3, checkpointing=False, loss="full", micro_batch=4, max_length=512,
               offload_param=PARAMETERS_ON_CPU, stage3_prefetch_bucket_size=0,
               stage3_param_persistence_threshold=0, stage3_max_reuse_distance=30_000_000),
        _added("mistral-7b", "lora", 3, world_size=1, checkpointing=False, offload_param=PARAMETERS_ON_CPU,
               stage3_param_persistence_threshold=5_000_000, reduce_bucket_size=5_000_000),
        _added("mistral-7b", "lora", 3, checkpointing=False, micro_batch=2, accumulation=2,
               stage3_prefetch_bucket_size=500_000_000, stage3_max_reuse_distance=30_000_000),
        _added("mixtral-8x7b", "lora", 3, stage3_use_all_reduce_for_fetch_params=True),
        _added("mixtral-8x7b", "lora", 3, accumulation=2, stage3_use_all_reduce_for_fetch_params=True,
               offload_param=PARAMETERS_ON_CPU, offload_optimizer=CPU),
        _added("mixtral-8x7b", "full", 3, stage3_use_all_reduce_for_fetch_params=True, reduce_bucket_size=5_000_000),
        _added("llama-3.2-1b", "lora", 3, accumulation=2, checkpointing=False, stage3_prefetch_bucket_size=500_000_000,
               stage3_use_all_reduce_for_fetch_params=True, stage3_param_persistence_threshold=5_000_000),
    ]  # fmt: skip


def _of_gradient_types() -> list[Case]:
    """Gradients that are accumulated or reduced in another dtype."""
    return [
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
    ]  # fmt: skip


def _of_accumulation_in_fp32() -> list[Case]:
    """In buffers of their own below stage 3, also offloaded; and gradients larger than the bucket."""
    return [
        *(
            _added("llama-3.2-1b", "full", stage, world_size=2, loss="full", max_length=64, offload_optimizer=CPU,
                   adapter={"grad_accum_dtype": "fp32"}) for stage in (1, 2)
        ),
        _added("mistral-7b", "full", 2, world_size=1, accumulation=3, loss="full", max_length=64, offload_optimizer=CPU,
               reduce_bucket_size=5_000_000, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 2, world_size=1, accumulation=2, loss="full", max_length=64,
               reduce_bucket_size=5_000_000, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 1, world_size=4, overlap_comm=True, loss="full", max_length=64,
               reduce_bucket_size=5_000_000, offload_optimizer=CPU, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "lora", 1, accumulation=2, offload_optimizer=CPU,
               adapter={"grad_accum_dtype": "fp32", "dtype": "fp16"}),
        _added("llama-3.2-1b", "full", 1, accumulation=2, loss="full", max_length=64, contiguous_gradients=False,
               reduce_bucket_size=50_000_000, adapter={"grad_accum_dtype": "fp32", "dtype": "fp16"}),
        _added("llama-3.2-1b", "full", 1, accumulation=2, overlap_comm=True, loss="full", max_length=64,
               reduce_scatter=False, reduce_bucket_size=50_000_000,
               adapter={"grad_accum_dtype": "fp32", "dtype": "fp16", "communication_data_type": "fp32"}),
        _added("mistral-7b", "full", 2, world_size=1, accumulation=2, loss="full", max_length=64,
               reduce_bucket_size=5_000_000, offload_optimizer=CPU),
    ]  # fmt: skip


def _of_gradient_types_at_3() -> list[Case]:
    """The same with partitioned parameters."""
    return [
        _added("llama-3.2-1b", "full", 3, adapter={"grad_accum_dtype": "fp32"}),
        _added("llama-3.1-8b", "full", 3, accumulation=2, reduce_bucket_size=50_000_000,
               adapter={"grad_accum_dtype": "fp32", "communication_data_type": "fp32"}),
        _added("llama-3.2-1b", "full", 3, accumulation=2, loss="full", max_length=64, contiguous_gradients=False,
               reduce_bucket_size=50_000_000, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 3, accumulation=2, offload_optimizer=CPU, adapter={"grad_accum_dtype": "fp32"}),
        _added("mistral-7b", "full", 3, reduce_scatter=False, reduce_bucket_size=200_000_000, sub_group_size=10_000_000,
               adapter={"grad_accum_dtype": "fp32", "communication_data_type": "fp16"}),
        _added("llama-3.2-1b", "full", 3, world_size=16, loss="full", max_length=64, reduce_bucket_size=50_000_000,
               zero_quantized_gradients=True, adapter={"communication_data_type": "fp16"}),
    ]  # fmt: skip


def _of_quantised_weights() -> list[Case]:
    """4-bit weights."""
    return [
        _added("llama-3.1-8b", "qlora", 0),
        _added("mistral-7b", "qlora", 2, micro_batch=2, accumulation=2),
        _added("gemma-3-1b", "qlora", 1, checkpointing=False),
        _added("llama-3.1-8b", "qlora", 3, stage3_max_reuse_distance=0, reduce_bucket_size=5_000_000),
        _added("qwen2.5-7b", "qlora", 3, world_size=4, micro_batch=2, accumulation=2),
        _added("mistral-7b", "qlora", 3, checkpointing=False, reduce_bucket_size=5_000_000,
               offload_param=PARAMETERS_ON_CPU),
        _added("llama-3.2-1b", "qlora", 3, checkpointing=False),
        _added("phi-3-mini", "qlora", 3, stage3_prefetch_bucket_size=500_000_000, adapter={"dtype": "fp16"}),
        _added("mistral-7b", "qlora", 3, loss="full", zero_hpz_partition_size=4, offload_optimizer=CPU),
        _added("mistral-7b", "qlora", 3, zero_quantized_weights=True),
        _added("falcon-7b", "qlora", 3, checkpointing=False),
        _added("qwen3-30b-a3b", "qlora", 3),
    ]  # fmt: skip


def _of_quantised_exchange() -> list[Case]:
    """ZeRO++: qwZ, qgZ, hpZ."""
    return [
        _added("llama-3.2-1b", "full", 3, zero_quantized_weights=True, stage3_prefetch_bucket_size=0,
               stage3_max_reuse_distance=0),
        _added("llama-3.2-1b", "full", 3, zero_quantized_weights=True, adapter={"dtype": "fp16"}),
        _added("mistral-7b", "full", 3, zero_quantized_weights=True, offload_param=PARAMETERS_ON_CPU,
               offload_optimizer=CPU),
        _added("mistral-7b", "lora", 3, zero_quantized_weights=True, stage3_allgather_sequential=True,
               stage3_max_reuse_distance=0),
        _added("qwen2.5-7b", "lora", 3, checkpointing=False, zero_quantized_weights=True, zero_hpz_partition_size=4),
        _added("llama-3.1-8b", "full", 3, world_size=16, zero_quantized_gradients=True, reduce_bucket_size=5_000_000),
        _added("llama-3.1-8b", "full", 3, world_size=64, accumulation=2, zero_quantized_weights=True,
               zero_quantized_gradients=True, zero_hpz_partition_size=8, reduce_bucket_size=50_000_000),
        _added("smollm2-135m", "lora", 3, zero_quantized_nontrainable_weights=True),
        _added("llama-3.2-1b", "full", 3, zero_hpz_partition_size=4, offload_param=PARAMETERS_ON_CPU),
        _added("mistral-7b", "lora", 3, accumulation=2, checkpointing=False, zero_hpz_partition_size=2,
               stage3_max_reuse_distance=0, offload_param=PARAMETERS_ON_CPU),
        _added("llama-3.2-1b", "full", 3, zero_hpz_partition_size=4, zero_quantized_weights=True,
               offload_param=PARAMETERS_ON_CPU, offload_optimizer=CPU),
    ]  # fmt: skip


def _of_muon_elsewhere() -> list[Case]:
    """Muon at stage 3, offloaded, in other dtypes."""
    return [
        _added("llama-3.2-1b", "full", 3, world_size=2, adapter=MUON),
        _added("llama-3.1-8b", "full", 3, reduce_bucket_size=50_000_000, adapter=MUON),
        _added("qwen2.5-0.5b", "full", 3, world_size=4, accumulation=2, reduce_bucket_size=50_000_000,
               sub_group_size=10_000_000, adapter=MUON),
        _added("qwen2.5-7b", "lora", 3, adapter=MUON, offload_param=PARAMETERS_ON_CPU),
        *(
            _added("qwen2.5-0.5b", "full", stage, world_size=2, adapter={**MUON, "dtype": dtype}, offload_optimizer=CPU)
            for stage in (1, 2, 3) for dtype in ("bf16", "fp16")
        ),
        _added("llama-3.2-1b", "full", 3, accumulation=2, offload_optimizer=CPU, adapter=MUON),
        _added("olmo-2-1b", "full", 3, world_size=1, adapter=MUON, offload_optimizer=CPU, sub_group_size=20_000_000),
        _added("qwen2.5-7b", "lora", 2, accumulation=2, adapter={**MUON, "dtype": "fp32"}, offload_optimizer=CPU),
        _added("llama-3.2-1b", "full", 0, world_size=2, adapter={**MUON, "dtype": "fp16"}),
        _added("qwen2.5-0.5b", "full", 3, world_size=2, adapter={**MUON, "dtype": "fp16"}),
        _added("qwen2.5-0.5b", "full", 0, world_size=2, adapter={**MUON, "dtype": "fp32"}),
    ]  # fmt: skip


def _of_parallel_ranks() -> list[Case]:
    """Ulysses and AutoTP."""
    return [
        _added("llama-3.2-1b", "full", 0, world_size=4, sequence_parallel_size=2, max_length=2048),
        _added("llama-3.2-1b", "full", 1, world_size=16, sequence_parallel_size=16, max_length=4096),
        _added("qwen2.5-7b", "full", 2, world_size=4, sequence_parallel_size=4, checkpointing=False, max_length=2048),
        _added("phi-3-mini", "full", 2, sequence_parallel_size=4, micro_batch=2, loss="full",
               reduce_bucket_size=50_000_000, contiguous_gradients=False),
        _added("qwen2.5-7b", "lora", 3, sequence_parallel_size=2, checkpointing=False, max_length=4096),
        _added("mistral-7b", "full", 3, sequence_parallel_size=8, accumulation=2, max_length=8192,
               reduce_bucket_size=5_000_000, offload_optimizer=CPU),
        _added("gemma-3-1b", "full", 3, sequence_parallel_size=4, reduce_scatter=False, max_length=2048),
        _added("llama-3.1-8b", "full", 0, world_size=2, autotp_size=2, loss="full"),
        _added("mistral-7b", "full", 1, autotp_size=2, accumulation=2, micro_batch=2, checkpointing=False,
               max_length=4096, loss="full"),
        _added("llama-3.1-8b", "full", 2, autotp_size=8, loss="full", reduce_bucket_size=5_000_000,
               offload_optimizer=CPU),
        _added("qwen2.5-7b", "full", 2, autotp_size=4, checkpointing=False, loss="full"),
        _added("qwen3-4b", "full", 2, autotp_size=2, max_length=4096),
        _added("granite-3-2b", "full", 1, world_size=4, autotp_size=4, contiguous_gradients=False,
               reduce_bucket_size=50_000_000),
    ]  # fmt: skip


def _of_super_offload() -> list[Case]:
    """SuperOffload."""
    return [
        _added("qwen2.5-0.5b", "full", 3, world_size=2, accumulation=2, sub_group_size=20_000_000,
               reduce_bucket_size=20_000_000, offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True)),
        _added("llama-3.2-1b", "full", 3, world_size=2, adapter={"max_grad_norm": 0.0},
               offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True, ratio=0.4),
               offload_param=PARAMETERS_ON_CPU, sub_group_size=20_000_000),
        _added("qwen2.5-7b", "lora", 3, adapter={"max_grad_norm": 0.0},
               offload_optimizer=OffloadOptimizer(device="cpu", super_offload=True, pin_memory=False)),
    ]  # fmt: skip


def _of_wide_draws() -> list[Case]:
    """On which the formula was wrong when more knobs were drawn."""
    return [
        _added("mistral-7b", "lora", 2, accumulation=2, reduce_bucket_size=50_000_000,
               adapter={"modules_to_save": ("embed_tokens", "lm_head")}),
        _added("llama-3.2-1b", "lora", 3, adapter={"modules_to_save": ("lm_head",)}),
        _added("qwen3-4b", "lora", 1, checkpointing=False, adapter={"modules_to_save": ("embed_tokens", "norm")}),
        _added("phi-3-mini", "lora", 3, world_size=2, checkpointing=False),
        _added("phi-4", "lora", 3, checkpointing=False, adapter={"lora_target": ("o_proj",)}),
        _added("qwen2.5-1.5b", "full", 3, world_size=6, zero_hpz_partition_size=2, adapter={"optimizer": "sgd"}),
        _added("llama-3.2-1b", "full", 3, adapter={"optimizer": "sgd"}),
        _added("mistral-7b", "full", 3, world_size=5, max_length=64, reduce_bucket_size=1000,
               stage3_max_live_parameters=0, offload_optimizer=OffloadOptimizer(device="nvme", nvme_path="/nvme")),
        _added("qwen2.5-0.5b", "lora", 3, checkpointing=False, adapter={"lora_r": 4},
               offload_optimizer=OffloadOptimizer(device="nvme", nvme_path="/nvme")),
        _added("llama-3.2-1b", "full", 1, max_length=4096, round_robin_gradients=True, reduce_scatter=False,
               reduce_bucket_size=200_000_000, overlap_comm=True),
        _added("deepseek-v2-lite", "full", 3, world_size=7, micro_batch=3, max_length=8192, adapter={"dtype": "fp32"},
               reduce_bucket_size=1_000_000, stage3_param_persistence_threshold=0),
    ]  # fmt: skip


def _of_parameters_on_nvme() -> list[Case]:
    """Trained parameters that are kept on the host or not, frozen ones, and states beside them."""
    states = OffloadOptimizer(device="nvme", nvme_path="/nvme")

    def on_nvme(room: int) -> OffloadParam:
        return OffloadParam(
            device="nvme", nvme_path="/nvme", buffer_count=60, buffer_size=700_000_000, max_in_cpu=room
        )  # fmt: skip

    return [
        _added("mistral-7b", "full", 3, offload_param=on_nvme(0), offload_optimizer=states,
               stage3_prefetch_bucket_size=0),
        _added("mistral-7b", "full", 3, world_size=2, max_length=4096, offload_param=on_nvme(100_000_000),
               offload_optimizer=CPU, sub_group_size=50_000_000, accumulation=2),
        _added("llama-3.2-1b", "full", 3, world_size=1, checkpointing=False, offload_param=on_nvme(0),
               offload_optimizer=CPU, sub_group_size=10_000_000),
        _added("llama-3.2-1b", "full", 3, world_size=2, micro_batch=4, offload_param=on_nvme(1_000_000_000)),
        _added("qwen3-8b", "lora", 3, world_size=1, max_length=2048, offload_param=on_nvme(1_000_000_000),
               offload_optimizer=states, stage3_prefetch_bucket_size=0),
        _added("llama-3.1-8b", "lora", 3, world_size=2, offload_param=on_nvme(1_000_000_000),
               stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0),
        _added("qwen2.5-0.5b", "full", 3, world_size=64, accumulation=2, offload_param=on_nvme(1_000_000)),
        _added("gpt2", "full", 3, world_size=1, max_length=512, checkpointing=False, offload_param=on_nvme(0),
               offload_optimizer=states),
        _added("pythia-410m", "lora", 3, world_size=1, checkpointing=False, offload_param=on_nvme(0),
               offload_optimizer=states, stage3_max_reuse_distance=30_000_000, sub_group_size=10_000_000),
    ]  # fmt: skip


def _of_small_cards() -> list[Case]:
    """Without room for two copies of the weights, which are then flattened on the host."""
    return [
        _added("mistral-7b", "full", 2, world_size=4, offload_optimizer=CPU, card_bytes=3 * GIB),
        _added("mistral-7b", "full", 1, offload_optimizer=CPU, accumulation=2, card_bytes=3 * GIB),
        _added("qwen2.5-7b", "full", 2, world_size=2, card_bytes=6 * GIB),
        _added("llama-3.2-1b", "full", 2, offload_optimizer=CPU, checkpointing=False, card_bytes=2 * GIB),
    ]
