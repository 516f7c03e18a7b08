"""What a rank holds all the time: parameters, fp32 masters, optimizer states, ZeRO-3's permanent buffers.

Legend: psi trainable elements, S one rank's partition of them, b bytes of the training dtype.
"""

from __future__ import annotations

from zplan.recipe import Optimizer
from zplan.zero_config import CPU_ADAM

FP32 = 4

STATE_BYTES_PER_ELEMENT: dict[Optimizer, float] = {
    "adamw": 8,
    "paged_adamw": 8,
    "adamw_8bit": 2 + 2 * FP32 / 256,
    "paged_adamw_8bit": 2 + 2 * FP32 / 256,
    "lion": 4,
    "sgd": 0,
    "muon": 4,
}
"""Adam: fp32 m and v. 8-bit: one byte each and an fp32 absmax per block of 256 (bitsandbytes, optim/optimizer.py).
Lion: one fp32 momentum; Muon too, of its matrices, on the host (muon.py: on a GPU). SGD without momentum: nothing.
Adafactor depends on shapes: `adafactor_bytes`."""


def first_state_bytes(optimizer: Optimizer) -> float:
    """What the first update makes for each element: AdamW's states where Muon leaves it elements, whose own momentum is
    there before."""
    if optimizer == "adafactor":
        return FP32
    return STATE_BYTES_PER_ELEMENT["adamw" if optimizer == "muon" else optimizer]


def optimizer_state_bytes(optimizer: Optimizer, numel: int, *, num_tensors: int = 1) -> int:
    """Optimizer states of `numel` flat fp32 elements on one rank.

        numel * bytes per element;   Adafactor on a flat 1-D partition cannot factor: 4 numel

    Source: torch 2.13.0, optim/adam.py (_init_group); transformers 5.23.0, optimization.py (Adafactor._get_options:
    factored only if the tensor has two dimensions, and ZeRO's partitions have one).
    """
    if optimizer == "adafactor":
        return FP32 * numel
    scalars = FP32 * num_tensors if optimizer in ("adamw", "paged_adamw") else 0
    return int(STATE_BYTES_PER_ELEMENT[optimizer] * numel) + scalars


def offloaded_state_bytes(optimizer: Optimizer, numel: int) -> int:
    """The same in host memory, where AdamW is DeepSpeedCPUAdam, with states in fp32, whatever it was on the GPU."""
    return optimizer_state_bytes("adamw" if optimizer in CPU_ADAM else optimizer, numel)


def step_temporary_bytes(optimizer: Optimizer, numel: int) -> int:
    """What the optimizer itself allocates while it updates `numel` fp32 elements.

    Fused AdamW: nothing. SGD without weight decay: it adds the gradients in place. Adafactor: the squared gradient and
    the update (8 numel). Lion: one update. Muon: nothing, its update is made before (muon.py, muon3.py).

    Source: torch 2.13.0, optim/adam.py (_fused_adam), sgd.py (_multi_tensor_sgd); transformers 5.23.0, optimization.py
    (Adafactor.step).
    """
    if optimizer in ("adamw", "paged_adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "muon"):
        return 0
    if optimizer == "adafactor":
        return 2 * FP32 * numel
    return FP32 * numel
