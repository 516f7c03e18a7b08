"""Seconds of arithmetic: forward, backward, recomputation, and the optimizer step on the GPU."""

from __future__ import annotations

from zplan.hardware import Cluster, Gpu
from zplan.recipe import Recipe
from zplan.speed.work import Work
from zplan.zero_config import Choice

ACHIEVABLE_SHARE = 0.43
"""Of a GPU's published dense FLOP/s that training reaches.
Source: The Llama 3 Herd of Models (2024), table 4: 38 - 43 % in bf16 on H100; PaLM (2022), table 3: 46 % on TPU v4."""
FP32_SHARE = 1 / 16
"""fp32 outside the tensor cores against dense bf16: 19.5 of 312 TFLOP/s on A100, 67 of 989 on H100 (data sheets)."""
CPU_CORE_FLOPS = 40e9
"""fp32 of one x86 core: AVX2 has 2 FMA units x 8 lanes x 2 = 32 FLOP a cycle, 96e9 at 3 GHz (Intel's optimization
manual), times the share that a training step reaches on a GPU."""
CPU_HALF_SHARE = 0.25
"""bf16 and fp16 against fp32 on cores without AMX or AVX512-BF16, which convert each operand: an assumption."""
BACKWARD_ATTENTION = 2.5
"""Backward against forward of fused attention: five matrix products for two (FlashAttention-2, section 3.1)."""
OVERLAP_SLOWDOWN = 0.189
"""What collectives cost the arithmetic that hides them, of their own time: they share its cores and memory.
Source: Characterizing Compute-Communication Overlap in GPU-Accelerated Distributed Deep Learning (2025, arXiv
2507.03114): 18.9 % on average over GPT and LLaMA on A100, H100 and MI2xx."""
STATE_BYTES_PER_ELEMENT = {
    "adamw": 30, "paged_adamw": 30, "adamw_8bit": 20, "paged_adamw_8bit": 20, "adafactor": 18, "sgd": 14, "lion": 22,
    "muon": 22,
}  # fmt: skip
"""Bytes an update reads and writes per element: fp32 weight twice, fp32 gradient once, 16-bit weight once, and each
state (fp32 or 8-bit) twice: adamw 8 + 4 + 2 + 16."""


def forward_flops(work: Work, recipe: Recipe) -> float:
    """Forward FLOPs of one token: 2 per weight that multiplies it, and its share of attention."""
    return 2.0 * (work.layer_numel + work.head_numel + work.adapter_numel) + _attention(work, recipe)


def _attention(work: Work, recipe: Recipe) -> float:
    return work.attention_flops_per_sequence / recipe.max_length


def backward_flops(work: Work, recipe: Recipe) -> float:
    """Backward FLOPs of one token: 2 per weight for the input's gradient, 2 more for the weight's where it trains."""
    through = 2.0 * (work.layer_numel + work.head_numel + work.adapter_numel)
    adapted = work.adapter_numel + work.folded_numel
    trained = work.layer_numel + work.head_numel if recipe.method == "full" else adapted
    return through + 2.0 * trained + BACKWARD_ATTENTION * _attention(work, recipe)


def recompute_flops(work: Work, recipe: Recipe) -> float:
    """One more forward of the layers (not of the head) under gradient checkpointing, per token."""
    return 2.0 * (work.layer_numel + work.adapter_numel) + _attention(work, recipe)


def flops_per_token(work: Work, recipe: Recipe, *, gradient_checkpointing: bool) -> float:
    """All FLOPs of one token in a training step: 6 per weight for full training, 4 under LoRA, and attention."""
    again = recompute_flops(work, recipe) if gradient_checkpointing else 0.0
    return forward_flops(work, recipe) + backward_flops(work, recipe) + again


def achieved_flops(cluster: Cluster, recipe: Recipe, ranks_per_node: int) -> float | None:
    """FLOP/s that one rank reaches; None where the card's peak is not known."""
    if cluster.gpu.kind == "cpu":
        cores = max(cluster.host.num_cpus / ranks_per_node, 1 / ranks_per_node)
        return CPU_CORE_FLOPS * cores * (1.0 if recipe.dtype == "fp32" else CPU_HALF_SHARE)
    if cluster.gpu.dense_flops is None:
        return None
    return cluster.gpu.dense_flops * ACHIEVABLE_SHARE * (FP32_SHARE if recipe.dtype == "fp32" else 1.0)


def weight_traffic_seconds(work: Work, recipe: Recipe, gpu: Gpu, *, passes: int) -> float:
    """Reading every weight from device memory once per pass: the floor of a small micro-batch. 0 if unknown."""
    if gpu.memory_bytes_per_second is None:
        return 0.0
    return passes * work.total_numel * recipe.weight_bytes / gpu.memory_bytes_per_second


def gpu_step_seconds(work: Work, recipe: Recipe, choice: Choice, gpu: Gpu) -> float:
    """The optimizer's update of this rank's share on the device. 0 if the card's bandwidth is not known.

    CPU ranks update in host memory: `offload.cpu_adam_seconds` counts them.
    """
    if gpu.memory_bytes_per_second is None or gpu.kind == "cpu":
        return 0.0
    shards = choice.batch.zero_ranks if choice.zero.stage >= 1 else 1
    here = 1.0 - offloaded_share(choice)
    return (
        work.trainable_numel / shards * here * STATE_BYTES_PER_ELEMENT[recipe.optimizer] / gpu.memory_bytes_per_second
    )


def offloaded_share(choice: Choice) -> float:
    """Share of the optimizer states that is updated on the host; `ratio` counts at stage 3 only."""
    if not choice.zero.offloads_optimizer:
        return 0.0
    return choice.zero.offload_optimizer.ratio if choice.zero.stage == 3 else 1.0
