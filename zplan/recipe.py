"""Recipe: what the user wants trained; tuning must not change any of it."""

from __future__ import annotations

import math
from typing import Literal

from zplan.errors import ConfigError
from zplan.values import dataclass

Method = Literal["full", "lora", "qlora"]
DType = Literal["bf16", "fp16", "fp32"]
Attention = Literal["sdpa", "flash_attention_2", "eager"]
Loss = Literal["nll", "chunked_nll", "liger", "full"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion", "muon"]

DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of one element of the training dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Model, method, data and mathematics of a run. Two runs with one recipe train the same thing."""

    model: str
    """Catalogue name, Hub id, folder or config.json, as the user gave it (folders absolute)."""
    dataset: str | None = None
    """File, folder or Hub id; None while only estimating."""
    method: Method = "full"
    load_in_8bit: bool = False
    """With qlora: the frozen weights in LLM.int8() instead of 4-bit NormalFloat."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()
    use_rslora: bool = False
    """PEFT: adapters are scaled by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """PEFT: a trained magnitude per output of every adapted matrix."""
    max_length: int = 1024
    """Longest sequence, in tokens; TRL's default."""
    train_batch_size: int = 8
    """Global: sequences per optimizer step over all ranks."""
    optimizer: Optimizer = "adamw"
    dtype: DType = "bf16"
    grad_accum_dtype: DType | None = None
    """DeepSpeed's data_types.grad_accum_dtype; None: as `dtype`."""
    communication_data_type: DType | None = None
    """In which gradients are reduced; None: as `dtype`."""
    attention: Attention = "sdpa"
    loss: Loss = "nll"
    packing: bool = False
    learning_rate: float = 2e-5
    neftune_noise_alpha: float | None = None
    """transformers: noise of alpha / sqrt(tokens x hidden size) on the embeddings while training."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 switches it off."""
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_alpha", "max_length", "train_batch_size"):
            value = getattr(self, name)
            if not 1 <= value <= 1 << 30:
                raise ConfigError(f"{name} is {value}, not between 1 and 2**30", fix=f"--{name.replace('_', '-')} 8")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate is {self.learning_rate}, not from 0 up", fix="--learning-rate 2e-5")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout is {self.lora_dropout}, not from 0 up to below 1", fix="--lora-dropout 0.05"
            )
        if self.neftune_noise_alpha is not None and not 0 < self.neftune_noise_alpha < math.inf:
            raise ConfigError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, not above 0", fix="--neftune-noise-alpha 5"
            )
        if self.method == "full" and (self.use_rslora or self.use_dora):
            raise ConfigError(
                "use_rslora and use_dora are for adapters, and the method is full", fix="a plan with --method lora"
            )

        if self.load_in_8bit and self.method != "qlora":
            raise ConfigError(
                f"load_in_8bit, and the method is {self.method}",
                because="quantised weights cannot train; adapters beside them can",
                fix="--method qlora --load-in-8bit",
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of one element in the training dtype."""
        return DTYPE_BYTES[self.dtype]
