"""Names for configurations, the same in tables, figures and progress lines."""

from __future__ import annotations

from collections.abc import Iterable

from zplan.zero_config import Choice


def choice_label(choice: Choice) -> str:
    """A configuration in one line: `ZeRO-3 + optimizer on cpu, 4 x 2 on 8, checkpointing`."""
    zero, batch = choice.zero, choice.batch
    parts = [f"ZeRO-{zero.stage}" if zero.stage else "DDP"]
    if zero.offloads_optimizer:
        parts.append(f"optimizer on {zero.offload_optimizer.device}")
    if zero.offloads_param:
        parts.append(f"parameters on {zero.offload_param.device}")
    label = " + ".join(parts)
    micro, accumulation = batch.train_micro_batch_size_per_gpu, batch.gradient_accumulation_steps
    checkpointing = ", checkpointing" if choice.gradient_checkpointing else ""
    shared = f", sequences over {batch.sequence_parallel_size}" if batch.sequence_parallel_size > 1 else ""
    cut = f", matrices over {batch.autotp_size}" if batch.autotp_size > 1 else ""
    return f"{label}, {micro} x {accumulation} on {batch.world_size}{checkpointing}{shared}{cut}"


QUANTITY_NAMES = {"gpu_bytes": "GPU bytes", "host_bytes": "host bytes", "tokens_per_second": "tokens/s"}
STRATEGY_LEGEND = "opt, par: where optimizer states and parameters are; ckpt: recomputed activations; 4/8: GPUs used"
SPLIT_LEGEND = "seq/2, tp/2: ranks that share each sequence (Ulysses), that hold one copy of the model (AutoTP)"


def strategy_legend(choices: Iterable[Choice]) -> str:
    """What the codes of these strategies mean."""
    splits = any(max(choice.batch.sequence_parallel_size, choice.batch.autotp_size) > 1 for choice in choices)
    return f"{STRATEGY_LEGEND}; {SPLIT_LEGEND}" if splits else STRATEGY_LEGEND


def strategy_code(choice: Choice, world_size: int) -> str:
    """A strategy short enough for a table: `ZeRO-3 opt:cpu par:cpu ckpt 4/8`."""
    zero = choice.zero
    parts = [f"ZeRO-{zero.stage}" if zero.stage else "DDP"]
    if zero.offloads_optimizer:
        parts.append(f"opt:{zero.offload_optimizer.device}")
    if zero.offloads_param:
        parts.append(f"par:{zero.offload_param.device}")
    if choice.gradient_checkpointing:
        parts.append("ckpt")
    if choice.batch.sequence_parallel_size > 1:
        parts.append(f"seq/{choice.batch.sequence_parallel_size}")
    if choice.batch.autotp_size > 1:
        parts.append(f"tp/{choice.batch.autotp_size}")
    if choice.batch.world_size != world_size:
        parts.append(f"{choice.batch.world_size}/{world_size}")
    return " ".join(parts)
