"""Libraries that only some recipes need, looked for before anything is loaded."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from zplan.errors import ConfigError, MachineError
from zplan.hardware import DeviceKind
from zplan.recipe import Recipe
from zplan.zero_config import Choice

_BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion")
"""Source: transformers 5.23, trainer_optimizer.py (every OptimizerNames entry of bitsandbytes)."""

REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "trackio": ("trackio",),
    "swanlab": ("swanlab",),
    "dvclive": ("dvclive",),
    "codecarbon": ("codecarbon",),
}
"""--report-to -> modules, one of which is needed. Source: transformers 5.23, integrations/integration_utils.py."""


READ_DEEPSPEED = "0.19.8"
"""The version whose methods were read where one of them is replaced; any other one keeps its own."""


def is_read_deepspeed() -> bool:
    """Whether it is the installed one."""
    return version("deepspeed").partition("+")[0] == READ_DEEPSPEED


def check_reporter(name: str) -> None:
    """Raises ConfigError for a name that transformers does not know, MachineError if its library is not installed."""
    if name == "none":
        return
    if name not in REPORTERS:
        raise ConfigError(f"--report-to is {name}", fix=f"--report-to none, or one of {', '.join(REPORTERS)}")
    if all(find_spec(module) is None for module in REPORTERS[name]):
        _require(REPORTERS[name][0], f"--report-to is {name}", instead="--report-to none", package=name)


def check_software(recipe: Recipe, choice: Choice, kind: DeviceKind) -> None:
    """Whether this machine can run what the recipe asks for.

    Raises:
        MachineError: bitsandbytes, Liger or flash-attn is needed and not installed.
        ConfigError: 8-bit weights under ZeRO-3; FlashAttention on CPU ranks.
    """
    if recipe.load_in_8bit and choice.zero.stage == 3:
        raise ConfigError(
            "8-bit weights under ZeRO stage 3",
            because="bitsandbytes keeps the scales on the weight itself, and ZeRO-3 takes the weight apart",
            fix="a plan with --stage 2, or 4-bit weights (--method qlora without --load-in-8bit)",
        )
    if recipe.method == "qlora":
        bits = 8 if recipe.load_in_8bit else 4
        _require(
            "bitsandbytes",
            f"qlora loads {bits}-bit weights",
            instead="a plan with --method lora",
        )
    if recipe.optimizer in _BITSANDBYTES_OPTIMIZERS:
        _require("bitsandbytes", f"{recipe.optimizer} is its optimizer", instead="a plan with --optimizer adamw")
    if recipe.loss == "liger":
        _require("liger_kernel", "the loss is liger", instead="a plan with --loss chunked_nll", package="liger-kernel")
    if recipe.attention == "flash_attention_2":
        if kind == "cpu":
            raise ConfigError(
                "flash_attention_2 on CPU ranks", because="its kernels are CUDA's", fix="a plan with --attention sdpa"
            )
        _require(
            "flash_attn",
            "the attention is flash_attention_2",
            instead="a plan with --attention sdpa",
            package="flash-attn",
        )


def _require(module: str, reason: str, *, instead: str, package: str | None = None) -> None:
    if find_spec(module) is None:
        name = package or module
        raise MachineError(f"{name} is not installed", because=reason, fix=f"pip install {name}; or {instead}")
