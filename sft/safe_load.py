"""No pickle runs code: whatever asks torch to load a file gets tensors, plain values and four classes of DeepSpeed.

DeepSpeed reads its own checkpoints with `weights_only=False`, which would run whatever a foreign checkpoint holds. A
variable of torch overrides even that; what the engine's files hold beside tensors is then allowed by name.

`python -m sft.safe_load ARGUMENTS` is `python -m deepspeed.checkpoint.ds_to_universal ARGUMENTS` under the same rule.

Source: torch 2.13, serialization.py:1480 (load); deepspeed 0.19.8, runtime/checkpoint_engine/
torch_checkpoint_engine.py:37 (load).
"""

from __future__ import annotations

import os
import pickle
import runpy
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from zplan.errors import ConfigError


def member(kind: Any, name: str) -> Any:
    """What `getattr` may do in a checkpoint. Python 3.11.2, Debian 12's, pickles a member of an enumeration as
    `getattr(kind, name)`; 3.11.7 does not.

    Raises:
        pickle.UnpicklingError: it is anything else.
    """
    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr of {name!r}")
    return ZeroStageEnum[name]


ALLOWED = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address, (member, "builtins.getattr")]
"""What `torch.serialization.get_unsafe_globals_in_checkpoint` finds in checkpoints of stages 0 to 3."""


def load_only_tensors() -> None:
    """From now on, in this process and its children."""
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals(ALLOWED)


def refused(error: Exception) -> ConfigError | None:
    """torch's refusal in the words of a user; None for any other failure."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    found = [line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
    return ConfigError(
        f"a checkpoint holds more than tensors: {found[0].strip() if found else str(error).splitlines()[0]}",
        because="loading it could run any code, so it is not loaded",
        fix="a checkpoint that sft.train wrote, or start anew in another --output-dir",
    )


if __name__ == "__main__":
    load_only_tensors()
    runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__")
