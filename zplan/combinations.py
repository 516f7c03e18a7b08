"""What DeepSpeed refuses of a ZeroConfig although each value alone is fine; what only a file says is in ds_zero.py."""

from __future__ import annotations

from collections.abc import Iterator

from zplan.recipe import Optimizer
from zplan.zero_config import CPU_ADAM, ZeroConfig


def offload_refused(zero: ZeroConfig, optimizer: Optimizer, *, on_cpu: bool) -> str | None:
    """Why ZeRO-3's partial offload or super_offload cannot run here, if it cannot.

    Source: deepspeed 0.19.8, stage3.py:314 (the assertion of the backup optimizer);
    runtime/superoffload/superoffload_stage3.py:18 (_validate_superoffload_accelerator), :43 (it reads the options of
    Adam), :159 (partition_grads: a swapped gradient is None).
    """
    states = zero.offload_optimizer
    if zero.stage != 3 or states.device == "none":
        return None
    if states.ratio < 1 and optimizer not in CPU_ADAM:
        return f"offload_optimizer.ratio of {optimizer}: DeepSpeed asserts DeepSpeedCPUAdam"
    if not states.super_offload:
        return None
    if on_cpu:
        return "super_offload on CPU ranks: DeepSpeed asserts NVIDIA GPUs"
    if states.device == "nvme":
        return "super_offload with offload_optimizer.device nvme: DeepSpeed's has no swapping and fails in backward"
    if optimizer not in ("adamw", "paged_adamw"):
        return f"super_offload of {optimizer}: its process runs DeepSpeedCPUAdam and nothing else"
    return None


def refused_combinations(zero: ZeroConfig, *, device_kind: str) -> Iterator[str]:
    """What DeepSpeed's checks or the engine refuse although each value alone is fine.

    Source: deepspeed 0.19.8, runtime/zero/config.py (offload_ratio_check), partition_parameters.py:1229,
    stage_1_and_2.py:389, stage3.py:300, 316, 390 and 840, op_builder (QuantizerBuilder is a CUDA kernel).
    """
    states, params = zero.offload_optimizer, zero.offload_param
    if states.ratio < 1.0 and zero.stage != 3:
        yield f"offload_optimizer.ratio is {states.ratio} at stage {zero.stage}; partial offload is for stage 3"
    if zero.stage == 3:
        for name, device, path in (
            ("offload_optimizer", states.device, states.nvme_path),
            ("offload_param", params.device, params.nvme_path),
        ):
            if device == "nvme" and not path:
                yield f'{name}.device is nvme, but {name}.nvme_path is not given; add "nvme_path": "/path/on/the/drive"'
    if zero.stage in (1, 2) and zero.allgather_bucket_size % 2:
        yield (
            f"allgather_bucket_size is {zero.allgather_bucket_size}, an odd number, which DeepSpeed refuses at stage"
            f" {zero.stage}; write {zero.allgather_bucket_size + 1}"
        )
    if zero.stage == 3 and zero.zero_quantized_gradients and not zero.reduce_scatter:
        yield "zero_quantized_gradients needs reduce_scatter, and it is false; DeepSpeed asserts it; set it to true"
    if device_kind == "cpu":
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if getattr(zero, name) and zero.stage == 3:
                yield f"{name} needs DeepSpeed's CUDA quantizer, and the ranks are CPUs; delete it"
