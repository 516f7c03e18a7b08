"""The configurations of formula_vs_simulation: models x stages x draws of every other knob, and what was added."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.added_cases import added_cases
from benchmarks.formula_case import Case
from zplan.zero_config import OffloadOptimizer, OffloadParam, ZeroConfig

SEED = 11
DRAWS = 4
"""Configurations of each model at each stage."""
MODELS = (
    "mistral-7b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-4b", "smollm2-135m",
    "gemma-2-2b", "gemma-3-1b", "phi-3-mini", "olmo-2-1b", "granite-3-2b", "starcoder2-3b", "gpt2", "pythia-410m",
    "opt-1.3b", "bloom-560m", "falcon-7b", "qwen3-30b-a3b", "deepseek-v2-lite",
)  # fmt: skip


def cases() -> list[Case]:
    """Models x stages x draws of every other knob, then what was added; the same list every time."""
    drawn = [
        draw(random.Random(f"{SEED} {model} {stage} {number}"), model, stage)
        for number in range(DRAWS)
        for model in MODELS
        for stage in (0, 1, 2, 3)
    ]
    return [*drawn, *added_cases()]


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
